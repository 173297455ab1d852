"""Eigenpairs of an operator: block Lanczos, fully reorthogonalised and thickly restarted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .. import _backend, _linalg
from .._random import Random, generator
from ..operators import Dense, LinearOperator, as_operator
from ..protocols import Array
from ..solution import ConvergenceError, Status

Which = Literal["magnitude", "lowest", "highest"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Eigenpairs:
    """Approximate eigenpairs, the most wanted first.

    Attributes:
        vectors: orthonormal columns (n, r).
        values: Ritz values (r,), float64 on the host.
        residuals: ‖A v − θ v‖ of each pair (r,), from the recurrence.
        converged: which pairs meet the tolerance (r,).
        products, passes: what they cost.
        size: the largest |θ| seen, a lower bound on ‖A‖₂.
        lowest: the smallest Rayleigh quotient seen, an upper bound on λ_min.
        lowest_vector: its unit vector (n, 1), None where `lowest` is not negative.
        asymmetry: largest relative asymmetry of the projected operator.
        complete: whether all n pairs are there, from a dense factorisation.
    """

    vectors: Array
    values: np.ndarray
    residuals: np.ndarray
    converged: np.ndarray
    products: int
    passes: int
    size: float
    lowest: float
    lowest_vector: Array | None
    asymmetry: float
    complete: bool = False


def eigenpairs(
    A: Any,
    rank: int,
    *,
    tol: float = 1e-6,
    which: Which = "magnitude",
    dimension: int | None = None,
    block: int | None = None,
    maxiter: int | None = None,
    rng: Any = 0,
) -> Eigenpairs:
    """The `rank` eigenpairs of A that are largest in magnitude (or lowest, or highest).

    Multiple and close eigenvalues come out with their multiplicity up to the block width. Where
    the Krylov space is exhausted, as for an A of low rank, random directions continue it.

    Args:
        A: a symmetric operator.
        rank: number of pairs, at most n of which are returned.
        tol: a pair has converged when ‖A v − θ v‖ ≤ tol·|θ|, or rounding allows no better.
        which: what is wanted: "magnitude", "lowest" or "highest".
        dimension: columns of the Krylov basis before a restart; by default
            max(2·rank + 4·block, 20).
        block: columns multiplied at once; by default min(8, rank).
        maxiter: restarts; 30 by default.
        rng: seed of the start block.

    Raises ValueError for options out of range; ConvergenceError where A returns NaN.
    Cost: `block` products and 8·n·m·block flops a step at basis size m; `dimension` + 2·`rank`
    vectors of memory. Where n ≤ max(4·rank, dimension + block): n products, and a dense
    factorisation.

    Source: Golub & Underwood (1977) for the block form; Wu & Simon (2000), thick restart.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> from invhvp.estimate import eigenpairs
        >>> eigenpairs(ih.Diagonal(np.arange(100.0)), 2).values.round(6).tolist()
        [99.0, 98.0]
    """
    A = as_operator(A)
    n = A.shape[0]
    for name, value in (("rank", rank), ("block", block), ("maxiter", maxiter)):
        if value is not None and value < 1:
            msg = f"{name} must be at least 1, got {value}"
            raise ValueError(msg)
    if dimension is not None and dimension < rank + 2 and rank < n:
        msg = f"the Krylov dimension must be at least rank + 2 = {rank + 2}, got {dimension}"
        raise ValueError(msg)
    rank = min(rank, n)
    width = min(8, rank) if block is None else min(block, n)
    size = max(2 * rank + 4 * width, 20) if dimension is None else dimension
    width = max(1, min(width, (size - rank) // 2))
    if n <= max(4 * rank, size + width):
        return _dense(A, rank, which)
    run = _Lanczos(A, width, generator(rng, A.like))
    return run.solve(rank, tol, which, size, 30 if maxiter is None else maxiter)


def _order(values: np.ndarray, which: Which) -> np.ndarray:
    key = {"magnitude": -np.abs(values), "lowest": values, "highest": -values}[which]
    return np.argsort(key, kind="stable")


def _dense(A: LinearOperator, rank: int, which: Which) -> Eigenpairs:
    matrix = A.to_dense()
    Dense(matrix)  # raises where it is grossly asymmetric; NaN passes
    host = np.asarray(_backend.to_host(matrix), dtype=np.float64)
    if not np.all(np.isfinite(host)):
        raise ConvergenceError(Status.NONFINITE.value)
    w, V = np.linalg.eigh((host + host.T) / 2)
    order = _order(w, which)[:rank]
    n = A.shape[0]
    return Eigenpairs(
        vectors=_backend.from_host(V[:, order], matrix),
        values=w[order],
        residuals=np.zeros(order.size),
        converged=np.ones(order.size, dtype=bool),
        products=n,
        passes=1,
        size=float(np.max(np.abs(w))),
        lowest=float(w[0]),
        lowest_vector=_backend.from_host(V[:, :1], matrix) if w[0] < 0 else None,
        asymmetry=0.0,
        complete=order.size == n,
    )


class _Lanczos:
    """A V = V T + W C with V orthonormal, kept as the blocks it grew by, and W the next block."""

    def __init__(self, A: LinearOperator, width: int, random: Random) -> None:
        self.A = A
        self.random = random
        self.eps = _backend.eps(A.dtype)
        self.blocks: list[Array] = []
        self.T = np.zeros((0, 0))
        self.W, _ = _linalg.cholqr(random.normal((A.shape[0], width)))
        self.C = np.zeros((width, 0))
        self.products = self.passes = 0
        self.size = self.asymmetry = 0.0
        self.lowest, self.lowest_vector = math.inf, None

    def solve(self, rank: int, tol: float, which: Which, size: int, maxiter: int) -> Eigenpairs:
        restarts = 0
        while True:
            self._extend()
            m = self.T.shape[0]
            theta, S = np.linalg.eigh((self.T + self.T.T) / 2)
            self.size = max(self.size, float(np.max(np.abs(theta))))
            order = _order(theta, which)
            chosen = order[:rank]
            residuals = np.linalg.norm(self.C @ S[:, chosen], axis=0)
            limit = np.maximum(tol * np.abs(theta[chosen]), self.eps * self.size)
            converged = residuals <= limit
            done = chosen.size == rank and bool(np.all(converged))
            full = m + self.W.shape[1] > size
            if done or (full and restarts >= maxiter):
                break
            if full:
                restarts += 1
                self._restart(theta, S, order, rank)
        self._note_lowest(theta, S)
        return Eigenpairs(
            vectors=self._combine(S[:, chosen]),
            values=theta[chosen],
            residuals=residuals,
            converged=converged,
            products=self.products,
            passes=self.passes,
            size=self.size,
            lowest=self.lowest,
            lowest_vector=self.lowest_vector,
            asymmetry=self.asymmetry,
        )

    def _extend(self) -> None:
        """Multiply the next block and orthogonalise the result against all before it."""
        V, old = self.W, self.T.shape[0]
        b = V.shape[1]
        self.blocks.append(V)
        Y = self.A._matmat(V)
        self.products += b
        self.passes += 1
        first, Y = self._project_out(Y)
        second, Y = self._project_out(Y)
        W, R = _linalg.cholqr(Y)
        xp = _backend.namespace(R)
        look = np.asarray(_backend.to_host(xp.concat([first + second, R], axis=0)))
        if not np.all(np.isfinite(look)):
            raise ConvergenceError(Status.NONFINITE.value)
        T = np.zeros((old + b, old + b))
        T[:old, :old], T[old:, :old], T[:, old:] = self.T, self.C, look[:-b, :]
        self.T = T
        scale = max(self.size, float(np.linalg.norm(look[:-b, :], 2)))
        gap = float(np.max(np.abs(T - T.T)))
        self.asymmetry = max(self.asymmetry, gap / scale if scale else 0.0)
        self.W, R = self._next_block(W, look[-b:, :], scale)
        self.C = np.concatenate([np.zeros((b, old)), R], axis=1)

    def _next_block(self, W: Array, R: np.ndarray, scale: float) -> tuple[Array, np.ndarray]:
        """W R with W orthonormal to the basis; vanished directions become random ones."""
        P, s, Qt = np.linalg.svd(R)
        lost = int(np.sum(~(s > 30 * self.eps * scale)))
        if not lost and s[-1] > 0.1 * s[0]:
            return W, R
        # What cancellation left of a weak direction is mostly rounding, inside the basis too.
        kept = s.size - lost
        W = _linalg.combine(W, _place(P[:, :kept], W))
        R = s[:, None] * Qt
        R[kept:, :] = 0.0
        if lost:
            fresh = self.random.normal((W.shape[0], lost))
            W = _backend.namespace(W).concat([W, fresh], axis=1)
        for _ in range(2):
            _, W = self._project_out(W)
            W, T = _linalg.cholqr(W)
            R = np.asarray(_backend.to_host(T)) @ R
        return W, R

    def _project_out(self, Y: Array) -> tuple[Array, Array]:
        """VᵀY (small) and Y − V VᵀY."""
        parts = [_linalg.gram(V, Y) for V in self.blocks]
        for V, part in zip(self.blocks, parts, strict=True):
            Y = _linalg.add_combined(Y, V, -part)
        return _backend.namespace(*parts).concat(parts, axis=0), Y

    def _combine(self, S: np.ndarray) -> Array:
        """V S for coefficients on the host."""
        total, row = None, 0
        for V in self.blocks:
            part = _linalg.combine(V, _place(S[row : row + V.shape[1], :], V))
            total = part if total is None else total + part
            row += V.shape[1]
        return total

    def _restart(self, theta: np.ndarray, S: np.ndarray, order: np.ndarray, rank: int) -> None:
        """Keep the most wanted Ritz vectors, and with them a part of the Krylov space."""
        self._note_lowest(theta, S)
        m = theta.size
        kept = order[: min(max(rank + 1, (rank + m) // 2), m - self.W.shape[1])]
        self.blocks = [self._combine(S[:, kept])]
        self.T = np.diag(theta[kept])
        self.C = self.C @ S[:, kept]

    def _note_lowest(self, theta: np.ndarray, S: np.ndarray) -> None:
        j = int(np.argmin(theta))
        if theta[j] < self.lowest:
            self.lowest = float(theta[j])
            self.lowest_vector = self._combine(S[:, j : j + 1]) if theta[j] < 0 else None


def _place(M: np.ndarray, like: Array) -> Array:
    return _backend.from_host(np.ascontiguousarray(M), like)
