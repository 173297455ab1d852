"""What `prepare` returns: the base of all inverses, and the checks at their door."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np

from .. import _backend, _linalg, _tracing
from ..gradients import GradientMatrix
from ..operators import LinearOperator, as_operator
from ..operators.damping import as_shift, plus_shifted, smallest
from ..protocols import Array, Damping
from ..solution import ConvergenceWarning, Curvature, Record, Solution, Status
from ._implicit import records_gradients, with_gradients


class PreparedInverse(LinearOperator):
    """(A + λI)⁻¹ as an operator. Subclasses implement `_solve` for a block of columns.

    Attributes:
        method: the options this inverse was prepared with.
        operator: A.
        damping: λ as it was given.
        products: operator-vector products that the preparation cost.
        fixed_spd: whether `@` is one fixed symmetric positive-definite map.
    """

    fixed_spd = False

    def __init__(
        self,
        method: Any,
        A: Any,
        damping: Damping,
        *,
        products: int = 0,
        like: Array | None = None,
    ) -> None:
        A = as_operator(A)
        super().__init__(A.shape[0], like=A.like if like is None else like, layout=A.layout)
        self.method = method
        self.operator = A
        self.damping = damping
        self.shift = as_shift(damping, A)
        self.products = products

    def _solve(
        self, B: Array, *, x0: Array | None = None, callback: Any = None, progress: bool = False
    ) -> Solution:
        raise NotImplementedError

    def _answer(self, B: Array, **options: Any) -> Solution:
        """`_solve`; where PyTorch records gradients, with those of the exact solution."""
        if not records_gradients(self, B):
            return self._solve(B, **options)
        with _tracing.without_record(B):
            solution = self._solve(B, **options)
        return with_gradients(self, B, solution)

    def solve(
        self,
        B: Array | GradientMatrix,
        /,
        *,
        x0: Array | None = None,
        callback: Any = None,
        progress: bool = False,
    ) -> Solution:
        """Solve (A + λI)X = B and say how well.

        Args:
            B: right-hand sides (n,), (n, k), or a gradient matrix whose k rows they are.
            x0: start, shape of B; zero by default.
            callback: called with a `Record` at every look at a running iteration.
            progress: show a tqdm bar.

        Raises TypeError or ValueError for an unusable B. What goes wrong later is in the
        `Solution`, with one `ConvergenceWarning`.
        """
        columns = self._columns(B)
        start = None
        if x0 is not None:
            self.check_operand(x0, "x0")
            start = x0[:, None] if x0.ndim == 1 else x0
            if start.shape != columns.shape:
                msg = f"x0 must have the shape of B, {tuple(columns.shape)}, got {tuple(x0.shape)}"
                raise ValueError(msg)
        options = {"x0": start, "callback": callback, "progress": progress}
        with _backend.quiet():
            solution = self._answer(columns, **options, **self._structure(B))
        if not _backend.is_tracing(solution.x):
            message = solution.describe()
            if message is not None:
                warnings.warn(message, ConvergenceWarning, stacklevel=2)
        return solution.first_column() if getattr(B, "ndim", 2) == 1 else solution

    def _structure(self, B: Any) -> dict[str, Any]:
        """What `_solve` is told of right-hand sides beyond their columns."""
        del B
        return {}

    def _columns(self, B: Any) -> Array:
        """B as columns (n, k), checked at the door."""
        if isinstance(B, GradientMatrix):
            if B.shape[1] != self.shape[0]:
                msg = (
                    f"the gradient matrix has {B.shape[1]} columns, the operator "
                    f"{self.shape[0]} parameters"
                )
                raise ValueError(msg)
            B = _backend.namespace(B.like).matrix_transpose(B.to_dense())
        self.check_operand(B, "the right-hand side")
        return B[:, None] if B.ndim == 1 else B

    def _matmat(self, X: Array, /) -> Array:
        with _backend.quiet():
            solution = self._answer(X)
        if not _backend.is_tracing(solution.x):
            solution.raise_if_meaningless()
            message = solution.describe()
            if message is not None:
                warnings.warn(message, ConvergenceWarning, stacklevel=4)
        return solution.x

    def with_damping(self, damping: Damping, /) -> PreparedInverse:
        """The inverse at another λ, re-using whatever does not depend on it."""
        return self.method.prepare(self.operator, damping=damping)

    def __repr__(self) -> str:
        return f"{self.method!r} of {self.operator!r} at damping {self.damping!r}"


def prepare_preconditioner(method: Any, A: LinearOperator, damping: Damping) -> Any:
    """The prepared `method.preconditioner`, or None; refused unless it is one fixed SPD map."""
    if method.preconditioner is None:
        return None
    return accepted(method.preconditioner.prepare(A, damping=damping))


def accepted(inner: Any) -> Any:
    """A prepared inverse, if it may precondition: ValueError unless it is one fixed SPD map."""
    if not inner.fixed_spd:
        msg = (
            f"{type(inner.method).__name__} cannot precondition: it is not one fixed symmetric "
            "positive-definite map; use Direct, Surrogate or a preconditioner"
        )
        raise ValueError(msg)
    return inner


def check_finite_columns(norms: np.ndarray, what: str = "the right-hand side") -> None:
    """Raise ValueError naming the columns that contain NaN or Inf."""
    bad = np.flatnonzero(~np.isfinite(norms))
    if bad.size:
        msg = f"{what} contains NaN or Inf in columns {bad[:10].tolist()}"
        raise ValueError(msg)


class Products:
    """(A + λI)V with a count; a product that runs out of memory is halved once and for all."""

    def __init__(self, A: LinearOperator, shift: float | Array) -> None:
        self.operator = A
        self.shift = shift
        self.columns = 0
        self.passes = 0
        self._halve = False

    def __call__(self, V: Array) -> Array:
        return plus_shifted(self._product(V), V, self.shift)

    def _call(self, V: Array) -> Array:
        """One call of the operator, counted whether or not it succeeds."""
        self.columns += V.shape[1]
        self.passes += 1
        return _tracing.unrecorded(self.operator._matmat(V), V)  # of a closure, in a subclass

    def _product(self, V: Array) -> Array:
        if self._halve and V.shape[1] > 1:
            return self._halves(V)
        try:
            return self._call(V)
        except Exception as error:
            if self._halve or V.shape[1] < 2 or not _backend.is_out_of_memory(error):
                raise
            self._halve = True
            _log().warning(
                "a product with %d columns ran out of memory; continuing in halves", V.shape[1]
            )
        return self._halves(V)

    def _halves(self, V: Array) -> Array:
        middle = V.shape[1] // 2
        xp = _backend.namespace(V)
        return xp.concat([self._call(V[:, :middle]), self._call(V[:, middle:])], axis=1)


def _log() -> Any:
    import logging

    return logging.getLogger("invhvp")


def residual_error_bounds(
    A: LinearOperator, shift: float | Array, norms: np.ndarray, floors: np.ndarray
) -> np.ndarray:
    """‖e‖_A ≤ (‖r‖ + rounding of r)/√λ for a PSD operator; inf where nothing is known."""
    least = smallest(shift)
    if not A.psd or not least > 0:
        return np.full(norms.shape, np.inf)
    with np.errstate(invalid="ignore"):
        bounds = (norms + floors) / np.sqrt(least)
    return np.where(np.isfinite(bounds), bounds, np.inf)


def pack_solution(
    X: Array,
    *,
    codes: Any,
    norms: Any,
    b_norms: Any,
    bounds: Any,
    started: float,
    products: Products | None,
    iterations: int = 0,
    history: tuple[Record, ...] = (),
    curvature: Curvature | None = None,
) -> Solution:
    """Bring host (or traced) per-column values back beside X."""
    xp = _backend.namespace(norms)
    relative = norms / xp.where(b_norms > 0, b_norms, xp.ones_like(b_norms))
    codes = _backend.namespace(codes).astype(codes, _backend.namespace(codes).int8)
    if _backend.is_numpy(codes) and not _backend.is_numpy(X):
        codes = _backend.from_host(codes, X, dtype=_backend.namespace(X).int8)
    return Solution(
        x=X,
        status_codes=codes,
        residual_norms=_backend.lift(norms, X),
        relative_residuals=_backend.lift(relative, X),
        error_bounds=_backend.lift(bounds, X),
        error_norm="A",
        iterations=iterations,
        products=0 if products is None else products.columns,
        passes=0 if products is None else products.passes,
        seconds=time.perf_counter() - started,
        history=history,
        curvature=curvature,
    )


def column_look(*arrays: Array) -> list[np.ndarray]:
    """Small per-column arrays on the host, in one transfer: copies, for JAX's are read-only."""
    xp = _backend.namespace(*arrays)
    stacked = _backend.to_host(xp.stack(list(arrays)))
    return [np.array(row, dtype=np.float64) for row in stacked]


def true_residual(products: Products, B: Array, X: Array) -> tuple[Array, Array]:
    """R = B − (A + λI)X and its column norms (small)."""
    R = B - products(X)
    return R, _linalg.column_norms(R)


def codes_for(statuses: np.ndarray | list[Status]) -> np.ndarray:
    """Status objects as an int8 array."""
    return np.asarray([status.code for status in statuses], dtype=np.int8)
