"""Rows that stand for a whole gradient matrix: randomly pivoted Cholesky of its Gram matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from .. import _backend, _lapack, _linalg
from .._random import generator
from ..gradients import GradientMatrix
from ..protocols import Array

_LEAST_BLOCK, _MOST_BLOCK = 16, 128
_NEGLIGIBLE = 0.5  # of the goal: what rows may be left out for being short


@dataclass(frozen=True)
class Pivots:
    """A partial Cholesky factorisation K ≈ F Fᵀ of the Gram matrix K = G Gᵀ.

    Attributes:
        rows: the pivots S (m,), rows of G.
        factor: L (m, m), lower triangular with K[S, S] = L Lᵀ: L⁻¹G[S] has orthonormal rows Q.
        inner: FᵀF (m, m), which is Q GᵀG Qᵀ.
        trace: tr K.
        rest: tr(K − F Fᵀ), at least the squared norm of what Q leaves of G.
    """

    rows: np.ndarray
    factor: Array
    inner: Array
    trace: float
    rest: float


def pivots(G: GradientMatrix, *, rank: int, goal: float, rng: Any = 0) -> Pivots:
    """Choose rows of G until tr(K − F Fᵀ) ≤ goal, at most `rank`.

    Rows are drawn with probabilities in proportion to what is left of their squared norms, in
    blocks; within a block the largest goes first, and what depends on the others is left out.
    Rows so short that all of them together are half of the goal are never looked at again.

    Raises ValueError where a row is not finite.
    Cost: N m inner products of gradients, N m² flops, N m numbers in float64; a transfer of N
    numbers a block.

    Source: Chen, Epperly, Tropp & Webber (2024), Randomly pivoted Cholesky, algorithm 2.2.
    """
    squares = np.asarray(_backend.to_host(_backend.to_small(G.row_norms()))) ** 2
    trace = float(np.sum(squares))
    if not math.isfinite(trace):
        raise ValueError("the gradients contain NaN or Inf")
    kept = _worth_looking_at(squares, _NEGLIGIBLE * goal)
    skipped = trace - float(np.sum(squares[kept]))
    short = G if kept.size in (0, squares.size) else G[kept]
    left = squares[kept]
    unit = _backend.eps(G.dtype)
    random, rank = generator(rng, G.like), min(rank, *G.shape)
    block = min(_MOST_BLOCK, max(_LEAST_BLOCK, rank // 4))
    chosen = np.zeros(0, dtype=int)
    parts: list[Array] = []
    while kept.size and chosen.size < rank and float(np.sum(left)) + skipped > goal:
        drawn = random.weighted(left, min(block, rank - chosen.size))
        columns = _backend.to_small(short.gram(short[drawn]))
        xp = _backend.namespace(columns)
        for F in parts:
            columns = columns - F @ xp.matrix_transpose(_rows(F, drawn))
        core = _backend.to_host(_rows(columns, drawn))
        order, L = _pivoted(core, 100 * unit * float(np.max(squares)))
        if order.size == 0:  # what is left is rounding
            break
        columns = xp.take(columns, xp.asarray(order, device=_backend.device(columns)), axis=1)
        inverse = _lapack.inv_lower(_backend.from_host(L, columns))
        parts.append(columns @ xp.matrix_transpose(inverse))
        chosen = np.concatenate([chosen, drawn[order]])
        explained = _backend.to_host(xp.sum(parts[-1] * parts[-1], axis=1))
        left = np.maximum(left - explained, 0.0)
        left[chosen] = 0.0
    F = _joined(parts, short)
    return Pivots(
        rows=kept[chosen],
        factor=_backend.namespace(F).tril(_rows(F, chosen)),  # zeros above but for rounding
        inner=_linalg.gram(F),
        trace=trace,
        rest=float(np.sum(left)) + skipped,
    )


def _worth_looking_at(squares: np.ndarray, allowed: float) -> np.ndarray:
    """All rows but the shortest, whose squares add up to at most `allowed`; in their order."""
    ascending = np.argsort(squares, kind="stable")
    n_short = int(np.searchsorted(np.cumsum(squares[ascending]), allowed, side="right"))
    return np.sort(ascending[n_short:])


def _pivoted(core: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Pivots of a symmetric matrix down to `tolerance`, in order, and their Cholesky factor."""
    (pstrf,) = scipy.linalg.get_lapack_funcs(("pstrf",), (core,))
    c, order, rank, _ = pstrf((core + core.T) / 2, tol=tolerance, lower=1)
    return order[:rank] - 1, np.tril(c[:rank, :rank])


def _rows(M: Array, indices: np.ndarray) -> Array:
    xp = _backend.namespace(M)
    return xp.take(M, xp.asarray(indices, device=_backend.device(M)), axis=0)


def _joined(parts: list[Array], G: GradientMatrix) -> Array:
    if parts:
        return _backend.namespace(parts[0]).concat(parts, axis=1)
    xp = _backend.namespace(G.like)
    return _backend.to_small(xp.zeros((G.shape[0], 0), dtype=G.dtype, device=G.device))
