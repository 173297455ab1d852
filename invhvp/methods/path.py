"""The whole damping curve from one Krylov space."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np

from .. import _backend, _linalg
from ..operators import LinearOperator, as_operator
from ..operators.damping import as_shift, scalar
from ..operators.data_parallel import agreed
from ..protocols import Array
from ..solution import ConvergenceWarning, Curvature, Solution, Status
from ._columns import take_columns
from ._inverse import (
    PreparedInverse,
    Products,
    check_finite_columns,
    codes_for,
    column_look,
    pack_solution,
    residual_error_bounds,
)
from ._shifted import ShiftedBlock
from .block_cg import BlockCG


@dataclass(frozen=True)
class Path(Sequence[Solution]):
    """Solutions in the order of `dampings`; products and passes were spent on all together.

    Attributes:
        dampings: λ in the order they were given.
        solutions: one per λ; their `products` and `passes` are those of the whole path.
    """

    dampings: tuple[float, ...]
    solutions: tuple[Solution, ...] = field(repr=False)

    @property
    def products(self) -> int:
        """Operator-vector products of the whole path."""
        return self.solutions[0].products

    @property
    def passes(self) -> int:
        """Sweeps over the data of the whole path."""
        return self.solutions[0].passes

    @overload
    def __getitem__(self, index: int) -> Solution: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Solution, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        return self.solutions[index]

    def __len__(self) -> int:
        return len(self.solutions)

    def __iter__(self) -> Iterator[Solution]:
        return iter(self.solutions)


def solve_path(
    A: Any,
    B: Array,
    /,
    *,
    dampings: Sequence[float],
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
) -> Path:
    """Solve (A + λI)X = B for many λ with the products of the smallest one alone.

    Krylov spaces do not change under a shift, so one block iteration serves all λ; a λ whose
    columns have converged is frozen. True residuals of all λ are verified in one last pass of
    L·k columns, and any λ that rounding left above its tolerance is finished by `BlockCG`.
    There is no preconditioner: it would tie the space to one λ.

    Args:
        A: what `as_operator` takes.
        B: right-hand sides (n,), (n, k), or a gradient matrix whose rows they are.
        dampings: the λ, in any order; where A + λI is not positive definite for the smallest
            ones, those end as NEGATIVE_CURVATURE and the others are solved.
        rtol: stopping rule for every λ and column, ‖r‖ ≤ max(rtol·‖b‖, atol).
        atol: see rtol.
        maxiter: block iterations; None is 10·n.

    Raises TypeError or ValueError at the door. Cost: the products of the smallest λ and L·k for
    the residuals; 4·n·k² flops and 2 blocks of memory (n × k) for every λ beside the smallest.

    Source: Frommer (2003), block shifted CG, in Dubrulle's R-form.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.Diagonal(np.arange(1.0, 6.0))
        >>> path = ih.solve_path(A, np.ones(5), dampings=[1.0, 0.1])
        >>> [float(s.x[0].round(3)) for s in path], path.passes
        ([0.5, 0.909], 6)
    """
    A = as_operator(A)
    method = BlockCG(rtol=rtol, atol=atol, maxiter=maxiter)
    if not dampings:
        msg = "dampings must name at least one value"
        raise ValueError(msg)
    shifts = [scalar(as_shift(value, A), "solve_path") for value in dampings]
    columns = PreparedInverse(method, A, float(min(shifts)))._columns(B)
    ascending = [float(s) for s in sorted(set(shifts))]
    solutions = _solve_ascending(method, A, columns, ascending, time.perf_counter())
    chosen = [solutions[float(value)] for value in shifts]
    for value, solution in zip(shifts, chosen, strict=True):
        message = solution.describe()
        if message is not None:
            warnings.warn(f"damping {value:g}: {message}", ConvergenceWarning, stacklevel=2)
    if getattr(B, "ndim", 2) == 1:
        chosen = [solution.first_column() for solution in chosen]
    return Path(tuple(float(s) for s in shifts), tuple(chosen))


def _solve_ascending(
    method: BlockCG, A: LinearOperator, B: Array, dampings: list[float], started: float
) -> dict[float, Solution]:
    """Solve for ascending λ; drop the smallest for as long as they meet negative curvature."""
    products = Products(A, 0.0)
    (b_norms,) = column_look(_linalg.column_norms(B))
    check_finite_columns(b_norms)
    targets = np.maximum(method.rtol * b_norms, method.atol)
    done: dict[float, Solution] = {}
    blocks_held = 7 + 2 * len(dampings)
    room = int(0.6 * _backend.free_memory(A.like))
    fits = room // (blocks_held * A.shape[0] * _backend.itemsize(A.dtype))
    width = max(1, min(B.shape[1], A.shape[0], 128, max(4, fits)))
    width = int(agreed(A, width))
    live = list(dampings)
    failed: dict[float, Curvature] = {}
    blocks: list[ShiftedBlock] = []
    first = 0
    while first < B.shape[1]:
        cut = np.arange(first, min(first + width, B.shape[1]))
        block = ShiftedBlock(
            method, products, take_columns(B, cut), b_norms[cut], targets[cut], live
        )
        proof = block.run()
        if proof is not None and live:
            # A larger shift may be definite: every λ up to the one that this vector rules out.
            lost = [s for s in live if s <= -proof.value] or live[:1]
            failed.update(dict.fromkeys(lost, proof))
            live = [s for s in live if s not in lost]
            blocks, first = [], 0
            if live:
                continue
            break
        blocks.append(block)
        first += width
    X = [_join([block.X[position] for block in blocks], B) for position in range(len(live))]
    # One sweep over the data verifies all of them.
    AX = products(_backend.namespace(B).concat(X, axis=1)) if live else B
    k = B.shape[1]
    for position, value in enumerate(live):
        R = B - AX[:, position * k : (position + 1) * k] - value * X[position]
        done[value] = _finish(
            method, A, B, X[position], R, value, b_norms, targets, products, started, blocks
        )
    for value, proof in failed.items():
        codes = codes_for([Status.NEGATIVE_CURVATURE] * B.shape[1])
        zero = _backend.namespace(B).zeros_like(B)
        bounds = np.full(B.shape[1], np.inf)
        done[value] = pack_solution(
            zero,
            codes=codes,
            norms=b_norms,
            b_norms=b_norms,
            bounds=bounds,
            started=started,
            products=products,
            curvature=proof,
        )
    total = {"products": products.columns, "passes": products.passes}
    return {value: replace(solution, **total) for value, solution in done.items()}


def _join(parts: list[Array], B: Array) -> Array:
    xp = _backend.namespace(B)
    return xp.concat(parts, axis=1) if parts else xp.zeros_like(B)


def _finish(
    method: BlockCG,
    A: LinearOperator,
    B: Array,
    X: Array,
    R: Array,
    damping: float,
    b_norms: np.ndarray,
    targets: np.ndarray,
    products: Products,
    started: float,
    blocks: list[ShiftedBlock],
) -> Solution:
    """The verdict on one λ by its true residual R, and BlockCG from there where it is not met."""
    norms, x_norms = column_look(_linalg.column_norms(R), _linalg.column_norms(X))
    size = max((block.size for block in blocks), default=0.0) + damping
    floors = 4 * _backend.eps(B.dtype) * np.maximum(size * x_norms, b_norms)
    met = norms <= targets
    if not np.all(met | (norms <= floors)):
        inverse = method.prepare(A, damping=damping)
        inverse.known_size = size
        rest = inverse._solve(B, x0=X)
        products.columns += rest.products
        products.passes += rest.passes
        return rest
    statuses = [
        Status.ZERO if b == 0 else Status.CONVERGED if good else Status.FLOOR
        for b, good in zip(b_norms, met, strict=True)
    ]
    bounds = residual_error_bounds(A, damping, norms, floors)
    return pack_solution(
        X,
        codes=codes_for(statuses),
        norms=norms,
        b_norms=b_norms,
        bounds=bounds,
        started=started,
        products=products,
        iterations=max((block.iterations for block in blocks), default=0),
    )
