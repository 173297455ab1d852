"""Block conjugate gradients as published, for comparison: O'Leary; Ji & Li.

Both are given what `invhvp.BlockCG` has, so that only the recurrences differ: columns of unit
norm, float64 algebra for everything k x k, the same stopping rule with a floor for rounding (and
‖A‖ for nothing), true residuals, up to two restarts on them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg

Product = Callable[[np.ndarray], np.ndarray]
Steps = Iterator[tuple[np.ndarray, np.ndarray]]
Recurrence = Callable[[Product, np.ndarray], Steps]

RESTARTS, PATIENCE = 2, 150


class Breakdown(ArithmeticError):
    """A k x k matrix that has to be inverted is singular."""


def oleary(product: Product, R: np.ndarray) -> Steps:
    """Block CG of O'Leary (1980), §2, without preconditioner; yields X and R after each pass."""
    X, P, rho = np.zeros_like(R), R, _gram(R, R)
    while True:
        Q = product(P)
        alpha = _solve(_gram(P, Q), rho)
        X = X + _times(P, alpha)
        R = R - _times(Q, alpha)
        yield X, R
        before, rho = rho, _gram(R, R)
        P = R + _times(P, _solve(before, rho))


def breakdown_free(product: Product, R: np.ndarray, *, basis: Basis) -> Steps:
    """Breakdown-free block CG of Ji & Li (2017), algorithm 2; yields X and R after each pass.

    The search block is an orthonormal basis of what the recurrence gives, without the directions
    that `basis` takes for dependent: it may shrink from pass to pass.
    """
    X, P = np.zeros_like(R), basis(R)
    while P.shape[1]:
        Q = product(P)
        G = _gram(P, Q)
        alpha = _solve(G, _gram(P, R))
        X = X + _times(P, alpha)
        R = R - _times(Q, alpha)
        yield X, R
        P = basis(R - _times(P, _solve(G, _gram(Q, R))))


@dataclass(frozen=True)
class Basis:
    """Orthonormal basis of the columns, of the numerical rank at a relative tolerance.

    Args:
        kind: "qr", Householder QR with column pivoting, or "svd".
        tolerance: directions below this share of the largest are dropped.
    """

    kind: str
    tolerance: float

    def __str__(self) -> str:
        return f"{self.kind} {self.tolerance:.0e}"

    def __call__(self, Y: np.ndarray) -> np.ndarray:
        if not np.all(np.isfinite(Y)):
            raise Breakdown
        if self.kind == "qr":
            W, T, _ = scipy.linalg.qr(Y, mode="economic", pivoting=True, check_finite=False)
            sizes = np.abs(np.diagonal(T))
        else:
            W, T = scipy.linalg.qr(Y, mode="economic", check_finite=False)
            U, sizes, _ = np.linalg.svd(T)
            W = W @ U
        largest = float(np.max(sizes, initial=0.0))
        return W[:, (sizes > self.tolerance * largest) & (sizes > 0)]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Where a recurrence ended: its last X, what it says of itself, what it spent."""

    X: np.ndarray
    status: str
    passes: int
    products: int
    seconds: float


class _Counted:
    def __init__(self, A: np.ndarray, damping: float) -> None:
        self.A, self.damping = A, A.dtype.type(damping)
        self.passes = self.columns = 0

    def __call__(self, V: np.ndarray) -> np.ndarray:
        self.passes += 1
        self.columns += V.shape[1]
        return self.A @ V + self.damping * V


def drive(
    recurrence: Recurrence,
    A: np.ndarray,
    B: np.ndarray,
    damping: float,
    *,
    rtol: float,
    size: float,
    max_passes: int,
    max_seconds: float,
) -> Outcome:
    """Run a recurrence on (A + λI)X = B until its residual is small, then look at the true one.

    Args:
        recurrence: yields X and R for a block R0.
        A: dense matrix (n, n); its dtype is that of the iteration.
        B: right-hand sides (n, k) of the same dtype.
        damping: λ.
        rtol: of each column.
        size: ‖A + λI‖₂.
        max_passes: limit on the passes.
        max_seconds: limit on the time.
    """
    started = time.perf_counter()
    product, X = _Counted(A, damping), np.zeros_like(B)
    b_norms = _norms(B)
    live = np.flatnonzero(b_norms > 0)
    targets = rtol * b_norms[live]
    floor = np.finfo(B.dtype).eps * size
    R, norms, status = B[:, live], b_norms[live], "MAXITER"

    def spent() -> bool:
        return product.passes >= max_passes or time.perf_counter() - started > max_seconds

    for _ in range(1 + RESTARTS):
        scale, old = norms, X[:, live]
        step, ended = _cycle(recurrence, product, R, scale, old, 0.9 * targets, 0.1 * floor, spent)
        new = old + step
        true = B[:, live] - product(new)
        new_norms = _norms(true)
        if not np.all(np.isfinite(new_norms)):
            status = "NONFINITE"
            break
        X, R, norms = X.copy(), true, new_norms
        X[:, live] = new
        low = norms <= 16 * np.maximum(floor * _norms(new), np.finfo(B.dtype).eps * b_norms[live])
        if np.all(norms <= targets):
            status = "CONVERGED"
            break
        if np.all((norms <= targets) | low):
            status = "FLOOR"
            break
        status = ended or "STAGNATED"
        if spent() or not np.any(norms <= 0.5 * scale):
            break
    seconds = time.perf_counter() - started
    return Outcome(
        X=X, status=status, passes=product.passes, products=product.columns, seconds=seconds
    )


def _cycle(
    recurrence: Recurrence,
    product: _Counted,
    R: np.ndarray,
    scale: np.ndarray,
    start: np.ndarray,
    targets: np.ndarray,
    floor: float,
    spent: Callable[[], bool],
) -> tuple[np.ndarray, str | None]:
    """Iterate on columns of unit norm; the step in X, and why it ended if not by its own rule."""
    factor = scale.astype(R.dtype)
    step, best, since = np.zeros_like(R), np.inf, 0
    try:
        for X, recurred in recurrence(product, R / factor):
            norms = _norms(recurred) * scale
            if not np.all(np.isfinite(norms)) or not np.all(np.isfinite(X)):
                return step, "NONFINITE"
            step = X * factor
            if np.all((norms <= targets) | (norms <= floor * _norms(start + step))):
                return step, None
            worst = float(np.max(norms / targets))
            best, since = (worst, 0) if worst < best else (best, since + 1)
            if since >= PATIENCE or worst > 1e8 * best:
                return step, "STAGNATED"
            if spent():
                return step, "MAXITER"
    except (Breakdown, np.linalg.LinAlgError):
        return step, "BREAKDOWN"
    return step, None


def _norms(X: np.ndarray) -> np.ndarray:
    return np.linalg.norm(X.astype(np.float64), axis=0)


def _gram(X: np.ndarray, Y: np.ndarray) -> np.ndarray:
    return X.T.astype(np.float64) @ Y.astype(np.float64)


def _times(X: np.ndarray, M: np.ndarray) -> np.ndarray:
    return X @ M.astype(X.dtype)


def _solve(G: np.ndarray, M: np.ndarray) -> np.ndarray:
    if not np.all(np.isfinite(G)):
        raise Breakdown
    return np.linalg.solve(G, M)
