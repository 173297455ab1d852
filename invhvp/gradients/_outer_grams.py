"""Gram matrices of outer products: from the factors, or from rows formed a piece at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .. import _backend
from ..protocols import Array
from . import _memory, _sums

if TYPE_CHECKING:
    from .outer_product import OuterProductGradients


def gram(G: OuterProductGradients, other: OuterProductGradients) -> Array:
    """G otherᵀ for weights of one shape."""
    most = _most(G)
    if dense_pays(G, other):
        return _by_blocks(G, other, max(most // (2 * G._i), 1), _formed)
    # Square blocks of pairs, so that both factors are products of large matrices.
    side = math.isqrt(most // (3 * G._length * other._length))
    return _by_blocks(G, other, max(side, 1), _factored)


def forms_triangle(G: OuterProductGradients) -> bool:
    """Whether G Gᵀ is cheaper with its rows, and they fit for one output at a time."""
    return 2 * len(G) * G._i <= _most(G) and dense_pays(G, G)


def formed_triangle(G: OuterProductGradients, cuts: Sequence[slice]) -> _sums.Lines:
    """The blocks of G Gᵀ on and below the diagonal; every number of the rows is formed once."""
    xp, total = _backend.namespace(G.like), None
    for c in _memory.spans(G._o, 2 * len(G) * G._i, G.like):
        x = G._with(G._d[:, :, c], G._a).to_dense()
        lines = [
            [
                _sums.wide(_sums.product(x[rows, :], xp.matrix_transpose(x[others, :])))
                for others in cuts[: i + 1]
            ]
            for i, rows in enumerate(cuts)
        ]
        total = lines if total is None else _sums.added(total, lines)
    assert total is not None
    return [[_sums.narrow(block, G.like) for block in line] for line in total]


def _most(G: OuterProductGradients) -> int:
    return _memory.budget(G.like) // _memory.itemsize(G.like)


def dense_pays(G: OuterProductGradients, other: OuterProductGradients) -> bool:
    N, M, p = len(G), len(other), G.shape[1]
    terms, pairs = G._n_terms + other._n_terms, G._n_terms * other._n_terms
    factored = _memory.cost(2 * pairs * (G._o + G._i), 3 * pairs)
    return _memory.cost(2 * p * (terms + N * M), 2 * (N + M) * p + N * M) < factored


def _by_blocks(
    G: OuterProductGradients,
    other: OuterProductGradients,
    side: int,
    block: Callable[..., Array],
) -> Array:
    xp = _backend.namespace(G.like)
    lines = []
    for left in _pieces(G, side):
        line = [block(left, right) for right in _pieces(other, side)]
        lines.append(xp.concat(line, axis=1) if len(line) > 1 else line[0])
    return xp.concat(lines, axis=0) if len(lines) > 1 else lines[0]


def _pieces(G: OuterProductGradients, size: int) -> list[OuterProductGradients]:
    if size >= len(G):
        return [G]
    return [G._take(slice(n, min(n + size, len(G)))) for n in range(0, len(G), size)]


def _factored(left: OuterProductGradients, right: OuterProductGradients) -> Array:
    """Inner products of d and of a for all pairs of terms, multiplied and summed over T."""
    xp = _backend.namespace(left.like)

    def pairs(x: Array, y: Array) -> Array:
        x, y = (xp.reshape(z, (z.shape[0] * z.shape[1], z.shape[2])) for z in (x, y))
        return _sums.product(x, xp.matrix_transpose(y))

    both = pairs(left._d, right._d) * pairs(left._a, right._a)
    if left._length == right._length == 1:
        return both
    shape = (len(left), left._length, len(right), right._length)
    return xp.sum(xp.reshape(both, shape), axis=(1, 3), dtype=both.dtype)


def _formed(left: OuterProductGradients, right: OuterProductGradients) -> Array:
    """Dense rows of both for a few outputs at a time: every number is formed once."""
    xp, total = _backend.namespace(left.like), None
    for c in _memory.spans(left._o, (len(left) + len(right)) * left._i, left.like):
        x = left._with(left._d[:, :, c], left._a).to_dense()
        y = x if right is left else right._with(right._d[:, :, c], right._a).to_dense()
        part = _sums.wide(_sums.product(x, xp.matrix_transpose(y)))
        total = part if total is None else total + part
    return _sums.narrow(total, left.like)
