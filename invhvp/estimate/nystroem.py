"""Low-rank models of an operator from one block of products, which can grow."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from .. import _arithmetic, _backend, _linalg
from .._random import generator
from ..operators import as_operator
from ..protocols import Array
from ..solution import ConvergenceError, Status
from .lanczos import Eigenpairs, eigenpairs

Kind = Literal["gaussian", "columns"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """Â = U diag(values) Uᵀ − shift·I.

    Attributes:
        vectors: orthonormal U (n, r), as many as rise above rounding.
        values: (r,) descending by size, float64 on the host.
        shift: 0, or the μ of a sketch of A + μI.
        tail: the least value sketched, kept or not; about 0 where the rank of A was reached.
    """

    vectors: Array
    values: np.ndarray
    shift: float = 0.0
    tail: float = 0.0

    def product(self, X: Array) -> Array:
        """Â X."""
        inside = _linalg.gram(self.vectors, X)
        values = _backend.lift(self.values, X)[:, None] if self.values.size else 0.0
        inside = _arithmetic.matmul(self.vectors, values * _backend.lift(inside, X))
        return inside - self.shift * X if self.shift else inside


class Sketch:
    """Y = A Ω for an orthonormal test matrix Ω (n, r), and the models of A that follow from it.

    Models cost no product; `grow` multiplies only the new columns. With r = n the sketch is the
    whole matrix.

    Args:
        A: a symmetric operator.
        rank: columns of Ω, at most n of them.
        kind: "gaussian", or "columns": Ω is made of columns of I, chosen without replacement.
        rng: seed.

    Raises ConvergenceError where A returns NaN.
    Cost: r products in one pass, 2·n·r numbers, 8·n·r² flops a model.

    Source: Tropp, Yurtsever, Udell & Cevher (2017), algorithm 3; Frangella, Tropp & Udell
    (2023), algorithm 2.1, with the shift from the spectral norm.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> from invhvp.estimate import Sketch
        >>> A = ih.Diagonal(np.where(np.arange(50) < 3, 2.0, 0.0), psd=True)
        >>> Sketch(A, 5).positive().values.round(6).tolist()
        [2.0, 2.0, 2.0]
    """

    def __init__(self, A: Any, rank: int, *, kind: Kind = "gaussian", rng: Any = 0) -> None:
        if kind not in get_args(Kind):
            msg = f"sketch must be one of {get_args(Kind)}, got {kind!r}"
            raise ValueError(msg)
        self.operator = as_operator(A)
        self.n = self.operator.shape[0]
        self.kind = kind
        self.products = self.passes = 0
        self.asymmetry = 0.0
        self._random = generator(rng, self.operator.like)
        self._eps = _backend.eps(self.operator.dtype)
        self._order = self._random.permutation(self.n) if kind == "columns" else None
        self.test: Array = None
        self.image: Array = None
        self._models: dict[Any, Model] = {}
        self._lowest: Eigenpairs | None = None
        self._norm = 0.0
        self.grow(rank)

    @property
    def rank(self) -> int:
        """Columns sketched so far."""
        return 0 if self.test is None else self.test.shape[1]

    def grow(self, columns: int) -> None:
        """Sketch more columns, orthogonal to those that are there."""
        columns = min(columns, self.n - self.rank)
        if columns < 1:
            return
        new = self._test_columns(columns)
        Y = self._product(new)
        if self.test is not None:
            xp = _backend.namespace(Y)
            new, Y = (xp.concat(pair, axis=1) for pair in ((self.test, new), (self.image, Y)))
        self.test, self.image = new, Y
        gram = _host(_linalg.gram(self.test, self.image))
        size = _host(_linalg.gram(self.image))
        if not (np.all(np.isfinite(gram)) and np.all(np.isfinite(size))):
            raise ConvergenceError(Status.NONFINITE.value)
        self.size = float(np.sqrt(max(0.0, np.linalg.eigvalsh(size)[-1])))
        gap = float(np.max(np.abs(gram - gram.T)))
        self.asymmetry = gap / self.size if self.size else 0.0
        self._gram, self._gram_vectors = np.linalg.eigh((gram + gram.T) / 2)
        self._models = {}

    def _test_columns(self, columns: int) -> Array:
        like, old = self.operator.like, self.rank
        xp = _backend.namespace(like)
        if self._order is not None or old + columns == self.n:
            order = np.arange(self.n) if self._order is None else self._order
            if self._order is None and old:  # the whole space: start again from I
                self.test = self.image = None
                old, columns = 0, self.n
            at = xp.asarray(order[old : old + columns], device=_backend.device(like))
            rows = xp.arange(self.n, dtype=at.dtype, device=_backend.device(like))
            return xp.astype(rows[:, None] == at[None, :], like.dtype)
        new, _ = _linalg.cholqr(self._random.normal((self.n, columns)))
        for _ in range(2 if old else 0):
            new = _linalg.add_combined(new, self.test, -_linalg.gram(self.test, new))
            new, _ = _linalg.cholqr(new)
        return new

    def _product(self, V: Array) -> Array:
        self.products += V.shape[1]
        self.passes += 1
        return self.operator._matmat(V)

    def release(self) -> None:
        """Forget Ω and Y (2·n·r numbers); the models made so far remain."""
        self.test = self.image = None

    @property
    def looks_positive(self) -> bool:
        """Whether ΩᵀAΩ is positive semidefinite to rounding."""
        return bool(self._gram[0] >= -10 * self._eps * self.rank * self.size)

    def lowest_direction(self) -> tuple[Array, float]:
        """The unit vector of least curvature in the span of Ω, and its Rayleigh quotient."""
        return self._span(self._gram_vectors[:, :1])[:, 0], float(self._gram[0])

    def _span(self, M: np.ndarray) -> Array:
        return _linalg.combine(self.test, self._place(M))

    def positive(self, shift: float = 0.0) -> Model:
        """The Nyström model of A + shift·I, which has to be positive semidefinite.

        Then it lies between 0 and A + shift·I, up to rounding.
        """
        if shift not in self._models:
            self._models[shift] = self._whole(shift) or self._positive(shift)
        return self._models[shift]

    def _positive(self, shift: float) -> Model:
        # It hides rounding in the core without growing with n, and is taken off again.
        nu = 2 * self._eps * (self.size + shift)
        while not self._gram[0] + shift + nu > self._eps * (self.size + shift):
            if nu > self.size + shift or nu == 0:
                break
            nu *= 10
        core = self._gram + shift + nu
        core = np.where(core > 0, 1 / np.where(core > 0, core, 1.0), 0.0)
        model = self._from_core(core, shift + nu)
        values = np.maximum(model.values - nu, 0.0)
        return self._cut(replace(model, values=values, shift=shift), 2 * nu)

    def signed(self) -> Model:
        """Y (ΩᵀAΩ)⁺ Yᵀ, the pseudo-inverse truncated at rounding: A may be indefinite."""
        if "signed" not in self._models:
            self._models["signed"] = self._whole(0.0) or self._signed()
        return self._models["signed"]

    def _signed(self) -> Model:
        real = np.abs(self._gram) > 10 * self._eps * self.size
        core = np.where(real, 1 / np.where(real, self._gram, 1.0), 0.0)
        return self._cut(self._from_core(core), 10 * self._eps * self.size)

    def clipped(self) -> Model:
        """A positive semidefinite model of any A: negative values dropped, spurious ones cut."""
        if self.operator.psd or self.rank == self.n:
            return self._cut(self.positive(), 0.0, positive=True)
        model = self.positive() if self.looks_positive else self.signed()
        model = self._cut(model, 0.0, positive=True)
        if not model.values.size:
            return model
        # A core that is nearly singular gives eigenvalues that A does not have.
        values = np.minimum(model.values, self.norm())
        return replace(model, values=values, tail=float(np.min(values)))

    def _from_core(self, core: np.ndarray, shift: float = 0.0) -> Model:
        """(Y + shift·Ω) V diag(core) Vᵀ (Y + shift·Ω)ᵀ with V the eigenvectors of ΩᵀAΩ."""
        Y = self.image + shift * self.test if shift else self.image
        W, T = _linalg.cholqr(Y)
        half = _host(T) @ self._gram_vectors
        w, P = np.linalg.eigh((half * core) @ half.T)
        order = np.argsort(-np.abs(w), kind="stable")
        vectors = _linalg.combine(W, self._place(P[:, order]))
        return Model(vectors=vectors, values=w[order], tail=math.inf)

    def _whole(self, shift: float) -> Model | None:
        """With r = n, the eigenvectors of the matrix itself."""
        if self.rank < self.n:
            return None
        values = self._gram + shift
        values = np.maximum(values, 0.0) if self.operator.psd else values
        order = np.argsort(-np.abs(values), kind="stable")
        vectors, values = self._span(self._gram_vectors[:, order]), values[order]
        return Model(vectors=vectors, values=values, shift=shift, tail=float(np.min(values)))

    def _cut(self, model: Model, floor: float, *, positive: bool = False) -> Model:
        size = model.values if positive else np.abs(model.values)
        real = np.flatnonzero(size > floor)
        model = replace(model, tail=max(0.0, float(np.min(size, initial=model.tail))))
        if real.size == model.values.size:
            return model
        vectors = model.vectors
        xp = _backend.namespace(vectors)
        vectors = xp.take(vectors, xp.asarray(real, device=_backend.device(vectors)), axis=1)
        return replace(model, vectors=vectors, values=model.values[real])

    def _place(self, M: np.ndarray) -> Array:
        return _backend.from_host(np.ascontiguousarray(M), self.operator.like)

    def norm(self, *, steps: int = 3) -> float:
        """A lower bound on ‖A‖₂ by power iteration from the top of the signed model.

        Cost: `steps` products, once.
        """
        if not self._norm:
            v = self.signed().vectors[:, :1]
            self._norm = max(self.size, self._power(self._product, v, steps))
        return self._norm

    def error(self, model: Model, *, steps: int = 6) -> float:
        """‖A − Â‖₂ by power iteration: a lower bound, usually within a few percent.

        Cost: `steps` products.
        """
        v = self._random.normal((self.n, 1))
        return self._power(lambda V: self._product(V) - model.product(V), v, steps)

    def lowest(self) -> Eigenpairs:
        """The lowest eigenpair of A to 2 %, by Lanczos. Cost: some 10-100 products, once."""
        if self._lowest is None:
            self._lowest = eigenpairs(self.operator, 1, tol=0.02, which="lowest", dimension=30)
            self.products += self._lowest.products
            self.passes += self._lowest.passes
        return self._lowest

    def _power(self, product: Any, v: Array, steps: int) -> float:
        largest = 0.0
        for _ in range(steps if v.shape[1] else 0):
            norm = float(_host(_linalg.column_norms(v))[0])
            if not norm > 0:
                break
            v = product(v / norm)
            largest = max(largest, float(_host(_linalg.column_norms(v))[0]))
        return largest


def adaptive_sketch(
    A: Any,
    *,
    target: float,
    start: int = 16,
    max_rank: int | None = None,
    kind: Kind = "gaussian",
    rng: Any = 0,
) -> tuple[Sketch, float]:
    """Double the sketch until ‖A − Â‖ ≤ `target`; the sketch and the error it ended with.

    Cost: the final rank in products, and 6 for each estimate of the error.

    Source: Frangella, Tropp & Udell (2023), algorithm E.2, without drawing anything again.
    """
    n = as_operator(A).shape[0]
    most = min(n, max(start, n // 4) if max_rank is None else max_rank)
    sketch = Sketch(A, min(start, most), kind=kind, rng=rng)
    while True:
        model = sketch.clipped() if sketch.operator.psd else sketch.signed()
        error = sketch.error(model)
        if not error > target or sketch.rank >= most:
            return sketch, error
        sketch.grow(min(sketch.rank, most - sketch.rank))


def _host(x: Array) -> np.ndarray:
    return np.asarray(_backend.to_host(x), dtype=np.float64)
