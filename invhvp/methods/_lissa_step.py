"""How long a step may be: the size of the operator and the spread of its mini-batches.

A step u ← u − ηP⁻¹((A_B + λ)u − b) contracts in mean square where

    2 vᵀ(A + λ)v > η vᵀ[(A + λ)P⁻¹(A + λ) + s F]v   for all v,   s = (N − |B|) / (|B|(N − 1)),

F = E[(gᵀP⁻¹g) g gᵀ] for terms g gᵀ. With c the largest vᵀFv / vᵀ(A + λ)v that is
η < 2 / (λmax(P⁻¹(A + λ)) + s c), and c = C·tr(A) with the kurtosis constant C of the gradients.
c is never above max gᵀP⁻¹g, and it is measured: C was 10 to 127 on small networks, not 1 to 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _backend, _linalg
from .._random import Random
from ..gradients import GradientMatrix
from ..operators import LinearOperator
from ..protocols import Array, HasGradients, HasTerms
from ._inverse import Products

_POWERS = 4  # Krylov steps of the second-moment matrix; outliers are in the start already
_OUTLIERS = 4  # rows of the largest norm that join the start
_ROWS = 256  # rows whose norms are measured in the metric of a preconditioner
_BATCHES = 8  # mini-batches that stand for all, where there are no gradients

Apply = Callable[[Array], Array]


@dataclass(frozen=True)
class Spread:
    """The second moment of the terms, on a small basis V.

    Attributes:
        second: VᵀFV, or Vᵀ E[A_B P⁻¹A_B] V for whole batches.
        first: VᵀAV.
        gram: VᵀV.
        ceiling: what c cannot exceed; inf where that is unknown.
        per_batch: whether `second` belongs to batches of one size (no gradients) and not to terms.
        trace: tr(P⁻¹A) where the gradients give it.
    """

    second: np.ndarray
    first: np.ndarray
    gram: np.ndarray
    ceiling: float
    per_batch: bool
    trace: float | None

    def constant(self, least: float) -> float:
        """C at a damping of at least `least`: the largest generalised Ritz value."""
        w, V = np.linalg.eigh(_symmetric(self.first + least * self.gram))
        keep = w > 1e-8 * max(float(w[-1]), 0.0)
        if not np.any(keep) or not np.all(np.isfinite(self.second)):
            return self.ceiling if np.isfinite(self.ceiling) else 0.0
        half = V[:, keep] / np.sqrt(w[keep])
        largest = float(np.linalg.eigvalsh(_symmetric(half.T @ self.second @ half))[-1])
        return min(max(largest, 0.0), self.ceiling)

    def noise(self, batch: int, n_terms: int, least: float) -> float:
        """s·c for mini-batches of one size drawn without replacement."""
        if batch >= n_terms:
            return 0.0
        share = 1.0 if self.per_batch else (n_terms - batch) / (batch * (n_terms - 1))
        return share * self.constant(least)


def measured_size(products: Products, precondition: Apply | None, random: Random, n: int) -> float:
    """λmax(A), or λmax(P⁻¹A): a lower bound from power iteration, usually within a few percent.

    Cost: 12 products of 2 columns. NaN where the operator gives it.
    """
    V = random.normal((n, 2))
    largest = 0.0
    for _ in range(12):
        V = _linalg.scale_columns(V, 1 / _linalg.column_norms(V))
        W = products(V)
        if precondition is None:
            look, V = _linalg.column_norms(W), W
            value = _host(look)
        else:  # the Rayleigh quotient of P⁻¹A in the inner product of A
            Z = precondition(W)
            xp = _backend.namespace(look := _linalg.column_dot(W, Z))
            both = _host(xp.stack([look, _linalg.column_dot(V, W)]))
            value, V = both[0] / np.where(both[1] > 0, both[1], np.inf), Z
        if not np.all(np.isfinite(value)):
            return float("nan")
        largest = max(largest, float(np.max(value)))
        if not np.all(value > 0):
            break
    return largest


def measured_spread(
    A: LinearOperator, products: Products, precondition: Apply | None, random: Random, batch: int
) -> Spread:
    """Measure the second moment: with gradients exactly, else on a few batches of size `batch`.

    Cost: about 50 products with gradients; without, 256 columns on a fraction |B|/N of the data.
    """
    if isinstance(A, HasGradients) and A.gradients.shape[0] == A.n_terms:  # pyright: ignore
        return _of_gradients(A, products, precondition, random)
    chosen = [random.indices(A.n_terms, batch) for _ in range(_BATCHES)]  # pyright: ignore

    def second(V: Array) -> Array:
        total = None
        for indices in chosen:
            part = A.subset(indices)  # pyright: ignore
            W = part @ V
            term = part @ (W if precondition is None else precondition(W))
            total = term if total is None else total + term
        assert total is not None
        return total / _BATCHES

    start = random.normal((A.shape[0], 4))
    V = _krylov(second, precondition, start)
    return _projected(V, second(V), products(V), float("inf"), per_batch=True, trace=None)


def _of_gradients(A: Any, products: Products, precondition: Apply | None, random: Random) -> Spread:
    G, N = A.gradients, A.n_terms
    weight = N / float(getattr(A, "count", N))  # A is the mean over terms of weight · g gᵀ
    if precondition is not None and N > _ROWS:
        G = G[np.sort(random.indices(N, _ROWS))]
    squares = _square_norms(G, precondition)
    host = _host(squares)
    top = np.argsort(host)[-_OUTLIERS:]
    rows = G[np.sort(top)].to_dense()
    outliers = _backend.namespace(rows).matrix_transpose(rows)
    xp = _backend.namespace(outliers)
    factor = weight * weight / len(G)
    scale = _backend.lift(squares * factor, G.like)

    def second(V: Array) -> Array:
        return G.T @ (scale[:, None] * (G @ V))

    start = xp.concat([outliers, random.normal((A.shape[0], 2))], axis=1)
    V = _krylov(second, precondition, start)
    return _projected(
        V,
        second(V),
        products(V),
        weight * float(np.max(host)),
        per_batch=False,
        trace=weight * float(np.mean(host)),
    )


def _square_norms(G: GradientMatrix, precondition: Apply | None) -> Array:
    """gᵀP⁻¹g of every row, small."""
    if precondition is None:
        norms = _backend.to_small(G.row_norms())
        return norms * norms
    found = []
    for start in range(0, len(G), 32):
        rows = G[start : start + 32].to_dense()
        columns = _backend.namespace(rows).matrix_transpose(rows)
        found.append(_linalg.column_dot(columns, precondition(columns)))
    return _backend.namespace(*found).concat(found, axis=0)


def _krylov(second: Apply, precondition: Apply | None, start: Array) -> Array:
    """Orthonormal columns that hold the dominant directions of P⁻¹F."""
    blocks = [_unit(start)]
    for _ in range(_POWERS - 1):
        V = second(blocks[-1])
        blocks.append(_unit(V if precondition is None else precondition(V)))
    V = _backend.namespace(start).concat(blocks, axis=1)
    return _linalg.cholqr(V[:, : V.shape[0]])[0]


def _unit(V: Array) -> Array:
    norms = _linalg.column_norms(V)
    xp = _backend.namespace(norms)
    return _linalg.scale_columns(V, 1 / xp.where(norms > 0, norms, xp.ones_like(norms)))


def _projected(
    V: Array, FV: Array, AV: Array, ceiling: float, *, per_batch: bool, trace: float | None
) -> Spread:
    second, first, gram = (_host(_linalg.gram(V, X)) for X in (FV, AV, V))
    return Spread(_symmetric(second), _symmetric(first), gram, ceiling, per_batch, trace)


def _symmetric(M: np.ndarray) -> np.ndarray:
    return (M + M.T) / 2


def _host(x: Array) -> np.ndarray:
    return np.asarray(_backend.to_host(x), dtype=np.float64)


def has_terms(A: Any) -> bool:
    """Whether mini-batches of A exist."""
    return isinstance(A, HasTerms) and A.n_terms > 1
