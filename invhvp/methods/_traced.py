"""A Krylov solve of which no value can be looked at: one compiled loop, inside of `jax.jit`.

The same kernels, tolerances, restarts on the true residual and verdicts as in `_cycles`, decided
by values on the device. What needs the host is missing: history, warnings, budgets, the test
of symmetry, the vector that proves negative curvature, Gauss–Radau bounds.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import _backend, _linalg, _tracing
from ..operators.damping import plus_shifted
from ..protocols import Array
from ..solution import Solution, Status
from ._inverse import pack_solution
from ._krylov import Kernel

if TYPE_CHECKING:
    from ._driver import Run

_REFINEMENTS = 20  # cycles with a residual_operator, as where one can look
_NEED_THE_HOST = ("etol", "max_products", "max_seconds")


class _Progress(NamedTuple):
    """A block of columns between two cycles; small arrays have shape (k,) or ()."""

    X: Array  # (n, k)
    R: Array  # (n, k) true residuals
    norms: Array  # (k,) of them
    steps: Array  # () iterations so far
    cycles: Array  # ()
    judged: Array  # () passes that were spent on whether curvature is negative
    size: Array  # () lower bound on ‖A + λI‖
    indefinite: Array  # () negative curvature was met
    broken: Array  # (k,) the operator returned NaN or Inf
    improving: Array  # () the last cycle halved a residual


def solve(run: Run, B: Array, x0: Array | None) -> Solution:
    """Solve for all columns of B (n, k), with the derivatives of the exact solution."""
    _check_options(run)
    inverse = run.inverse

    def product(X: Array) -> Array:
        return plus_shifted(inverse.outer._matmat(X), X, inverse.outer_shift)

    def columns(rhs: Array) -> tuple[Array, tuple[Array, ...]]:
        return _solve_columns(run, rhs, x0)

    X, (codes, norms, b_norms, bounds, iterations, passes, products) = _tracing.linear_solve(
        product, B, columns
    )
    solution = pack_solution(
        X, codes=codes, norms=norms, b_norms=b_norms, bounds=bounds, started=0.0, products=None
    )
    return replace(solution, iterations=iterations, passes=passes, products=products, seconds=0.0)


def _check_options(run: Run) -> None:
    """Raise ValueError for what needs the host while the iteration runs."""
    given = [name for name in _NEED_THE_HOST if getattr(run.method, name) is not None]
    given += ["callback"] if run.callback is not None else []
    if given:
        msg = f"{', '.join(given)} cannot act inside of jax.jit or jax.grad; use rtol and maxiter"
        raise ValueError(msg)


def _solve_columns(run: Run, B: Array, x0: Array | None) -> tuple[Array, tuple[Array, ...]]:
    xp, k, width = _backend.namespace(B), B.shape[1], run.inverse.width(B.shape[1])
    found = []
    for first in range(0, k, width):
        cut = slice(first, min(first + width, k))
        found.append(_solve_block(run, B[:, cut], None if x0 is None else x0[:, cut]))
    X = xp.concat([X for X, _, _ in found], axis=1)
    small = zip(*(values for _, values, _ in found), strict=True)
    per_column = [xp.concat(values, axis=0) for values in small]
    spent = zip(*(numbers for _, _, numbers in found), strict=True)
    counts = [sum(numbers[1:], numbers[0]) for numbers in spent]
    return X, (*per_column, *counts)


def _solve_block(
    run: Run, B: Array, x0: Array | None
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    method, k = run.method, B.shape[1]
    b_norms = run.norms(B)
    xp = _backend.namespace(b_norms)
    zero = xp.sum(b_norms) * 0.0
    count = xp.astype(xp.zeros_like(zero), xp.int32)
    no = xp.zeros_like(b_norms) > 0
    X, R = _backend.namespace(B).zeros_like(B), B
    if x0 is not None:  # adjoint systems come here too: a start must show that it is one
        from_x0 = B - run.outer(x0)
        closer = run.norms(from_x0) < b_norms
        X, R = _choose(closer, x0, X), _choose(closer, from_x0, R)
    targets = xp.where(
        b_norms * method.rtol > method.atol, b_norms * method.rtol, method.atol + zero
    )
    start = _Progress(
        X=X,
        R=R,
        norms=run.norms(R),
        steps=count,
        cycles=count,
        judged=count,
        size=zero,
        indefinite=xp.any(no),
        broken=~xp.isfinite(b_norms),
        improving=~xp.any(no),
    )
    watched = method.check_every is not None
    cycles = _REFINEMENTS if run.outer is not run.products else 1 + method.max_restarts

    def go_on(s: _Progress) -> Array:
        if not watched:
            return s.cycles < 1
        unmet = xp.any((s.norms > targets) & ~s.broken) & ~s.indefinite & s.improving
        return unmet & (s.steps < run.maxiter) & (s.cycles < cycles)

    end = _tracing.while_loop(go_on, lambda s: _cycle(run, s, B, targets), start)
    x_norms = run.norms(end.X)
    codes, bounds = _verdict(run, end, b_norms, x_norms, targets)
    # There is no exception to raise here: what must not be used is not a number.
    useless = (codes == Status.NEGATIVE_CURVATURE.code) | (codes == Status.NONFINITE.code)
    X = _choose(useless, xp.full_like(B, math.nan), end.X)
    passes = end.steps + end.cycles + end.judged + (0 if x0 is None else 1)
    return X, (codes, end.norms, b_norms, bounds), (end.steps, passes, passes * k)


def _cycle(run: Run, s: _Progress, B: Array, targets: Array) -> _Progress:
    """Iterate on the true residuals of the open columns, and measure what that gave."""
    xp, method = _backend.namespace(targets), run.method
    watched = method.check_every is not None
    open_ = (s.norms > targets) & ~s.broken if watched else s.norms > 0
    one = xp.ones_like(s.norms)
    scale = xp.where(open_, s.norms, one)
    tolerance = xp.where(open_, 0.9 * targets / scale, math.inf * one)
    unit = _linalg.scale_columns(s.R, xp.where(open_, 1 / scale, 0.0 * one))
    kernel = run.kernel(guarded=True, traced=True)
    begun = (kernel.start(_backend.cast(unit, run.inverse.operator.like)), s.steps)

    def go_on(at: tuple[Any, Array]) -> Array:
        state, steps = at
        if not watched:
            return steps < run.maxiter
        return xp.any((kernel.residual_norms(state) > tolerance) & state.ok) & (steps < run.maxiter)

    state, steps = _tracing.while_loop(go_on, lambda at: (kernel.step(at[0]), at[1] + 1), begun)
    size = xp.max(state.size)
    size = xp.maximum(s.size, xp.where(xp.isfinite(size), size, 0.0 * size))
    failed = ~state.ok & (kernel.residual_norms(state) > tolerance)
    indefinite, passes = _indefinite(run, kernel, state, failed, size)
    step = _linalg.scale_columns(
        _backend.cast(kernel.solution(state), B), xp.where(open_, scale, 0.0 * one)
    )
    X = s.X + step
    R = B - run.outer(X)
    norms = run.norms(R)
    finite = xp.isfinite(norms)
    # CG lowers the A-norm error even where the residual grows; a restart must show for it.
    cut_short = (s.cycles == 0) & (indefinite | (steps >= run.maxiter))
    better = open_ & finite & ((norms < s.norms) | (cut_short & kernel.needs_definite))
    return _Progress(
        X=_choose(better, X, s.X),
        R=_choose(better, R, s.R),
        norms=xp.where(better, norms, s.norms),
        steps=steps,
        cycles=s.cycles + 1,
        judged=s.judged + passes,
        size=size,
        indefinite=indefinite,
        broken=s.broken | (open_ & ~finite),
        improving=xp.any(open_ & (norms <= 0.5 * s.norms)),
    )


def _indefinite(
    run: Run, kernel: Kernel, state: Any, failed: Array, size: Array
) -> tuple[Array, Array]:
    """Whether a direction has negative curvature beyond rounding, and how many passes that took.

    One, and none where no iteration has failed.
    """
    xp = _backend.namespace(failed)
    none = xp.zeros_like(failed)
    count = xp.astype(xp.any(none), xp.int32)
    if not kernel.needs_definite:
        return xp.any(none), count

    def measure(at: tuple[Array, Array]) -> tuple[Array, Array]:
        V = kernel.suspects(state)
        lengths = run.norms(V)
        V = _linalg.scale_columns(V, 1 / xp.where(lengths > 0, lengths, xp.ones_like(lengths)))
        Q = run.products(V)
        quotients = _linalg.column_dot(V, Q, reduce=run.method.reduce)
        vanished = (lengths > 0) & (run.norms(Q) == 0)
        proof = vanished | (quotients < -4 * _backend.eps(V.dtype) * size)
        return xp.any(failed & proof), at[1] + 1

    return _tracing.while_loop(
        lambda at: xp.any(failed) & (at[1] < 1), measure, (xp.any(none), count)
    )


def _verdict(
    run: Run, end: _Progress, b_norms: Array, x_norms: Array, targets: Array
) -> tuple[Array, Array]:
    """Status codes and error bounds, by the rules of `_cycles`."""
    xp, inverse = _backend.namespace(b_norms), run.inverse
    eps = _backend.eps(end.X.dtype)
    scale = xp.maximum(end.size * x_norms, b_norms)
    unmet = xp.where(end.norms <= 16 * eps * scale, Status.FLOOR.code, Status.STAGNATED.code)
    unmet = xp.where(end.steps >= run.maxiter, Status.MAXITER.code, unmet)
    codes = xp.where(end.norms <= targets, Status.CONVERGED.code, unmet)
    codes = xp.where(end.indefinite, Status.NEGATIVE_CURVATURE.code, codes)
    codes = xp.where(end.broken, Status.NONFINITE.code, codes)
    codes = xp.where(b_norms == 0, Status.ZERO.code, codes)
    zeros = xp.zeros_like(b_norms)
    bounds = zeros + math.inf
    if inverse.outer.psd and inverse.preconditioner is None:
        least = zeros + _smallest(inverse.outer_shift, b_norms)
        safe = xp.where(least > 0, least, xp.ones_like(least))
        # ‖A + λI‖ is known from below only: twice the largest that the iteration has met.
        rounding = 4 * eps * xp.maximum(2 * end.size * x_norms, b_norms)
        known = (least > 0) & ~end.broken & ~end.indefinite
        bounds = xp.where(known, (end.norms + rounding) / xp.sqrt(safe), bounds)
    return codes, xp.where(b_norms == 0, zeros, bounds)


def _smallest(shift: Any, like: Array) -> Any:
    """The smallest λ, without a look at it."""
    if isinstance(shift, float):
        return shift
    return _backend.cast(_backend.namespace(shift).min(shift), like)


def _choose(columns: Array, new: Array, old: Array) -> Array:
    """The columns of `new` where told so, else those of `old`."""
    return _backend.namespace(new).where(columns[None, :], new, old)
