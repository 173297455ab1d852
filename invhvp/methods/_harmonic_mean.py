"""Means of Sherman–Morrison inverses as operators, one pass over the gradients a product."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .. import _backend
from ..gradients import DenseGradients, GradientMatrix, StackedGradients, concatenate
from ..layout import Layout
from ..operators import LinearOperator
from ..operators.rank_one_mean import Congruence
from ..protocols import Array

_NATURAL = 1 << 62  # parts of this size are the batches of a stream as they come, or all rows


class HarmonicMean(LinearOperator):
    """(1/λ)(I − Σ g_i g_iᵀ / (cλ + N‖g_i‖²)) for A = (1/c) Σ g_i g_iᵀ, with c = N as a rule."""

    definite = True

    def __init__(
        self, G: GradientMatrix, shift: Any, count: float, norms: Array | None = None
    ) -> None:
        super().__init__(G.shape[1], like=G.like, psd=True, layout=G.layout)
        self._G, self._shift, self._count = G, shift, count
        self._norms = G.row_norms() if norms is None else norms
        self._weights = _weights(self._norms, shift, count)

    def with_shift(self, shift: Any) -> HarmonicMean:
        """The operator at another λ; the row norms are kept."""
        return HarmonicMean(self._G, _checked(shift), self._count, self._norms)

    def _matmat(self, X: Array, /) -> Array:
        return self._reduced(X, lambda part: part @ X)

    def of_gradients(self, rows: GradientMatrix, columns: Array) -> Array:
        """This mean times rowsᵀ, which `columns` (p, k) are: one product with Gᵀ."""
        return self._reduced(columns, lambda part: part.gram(rows))

    def _reduced(self, X: Array, against: Callable[[GradientMatrix], Array]) -> Array:
        total = None
        for part, rows in _parts(self._G):
            term = part.T @ (self._weights[rows, None] * against(part))
            total = term if total is None else total + term
        return (X - total) / self._shift

    def bilinear(self, left: GradientMatrix, right: GradientMatrix) -> Array:
        """All left R rightᵀ, shape (n_left, n_right), from Gram matrices alone."""
        return _bilinear(self._G, left, right, self._weights, self._shift)

    def damped_norm(self) -> float:
        """An upper bound on ‖A + λI‖₂: the trace of A, and λ; one transfer."""
        return _trace(self._norms) / self._count + float(self._shift)


class LayerHarmonicMean(LinearOperator):
    """A `HarmonicMean` for each named block of the parameters."""

    definite = True

    def __init__(
        self,
        G: GradientMatrix,
        layout: Layout,
        shifts: Mapping[str, Any],
        count: float,
        norms: Mapping[str, Array] | None = None,
    ) -> None:
        super().__init__(G.shape[1], like=G.like, psd=True, layout=G.layout)
        self._G, self._index_sets, self._count = G, layout, count
        self._shifts = shifts
        self._norms = _norms_by_block(G, layout) if norms is None else norms
        self._weights = {name: _weights(self._norms[name], shifts[name], count) for name in layout}

    def with_shift(self, shift: Any) -> LayerHarmonicMean:
        """The operator at one other λ; the row norms are kept."""
        shifts = dict.fromkeys(self._index_sets, _checked(shift))
        return LayerHarmonicMean(self._G, self._index_sets, shifts, self._count, self._norms)

    def bilinear(self, left: GradientMatrix, right: GradientMatrix) -> Array:
        """All left R rightᵀ, shape (n_left, n_right), from Gram matrices of the blocks alone."""
        total = None
        for name, (G, x, y) in _matched((self._G, left, right), self._index_sets):
            term = _bilinear(G, x, y, self._weights[name], self._shifts[name])
            total = term if total is None else total + term
        return total

    def damped_norm(self) -> float:
        """An upper bound on ‖A + λI‖₂: the trace of A, and the largest λ; a few transfers."""
        trace = sum(_trace(norms) for norms in self._norms.values())
        return trace / self._count + max(float(shift) for shift in self._shifts.values())

    def _matmat(self, X: Array, /) -> Array:
        blocks = {name: self._index_sets.take(X, name) for name in self._index_sets}
        totals: dict[str, Array] = {}
        for part, rows in _parts(self._G):
            for name, G in _blocks_of(part, self._index_sets):
                term = G.T @ (self._weights[name][rows, None] * (G @ blocks[name]))
                totals[name] = totals[name] + term if name in totals else term
        return self._index_sets.assemble(
            {name: (X_b - totals[name]) / self._shifts[name] for name, X_b in blocks.items()}
        )


def by_block(G: GradientMatrix, damping: Any, count: float) -> LinearOperator:
    """The layer-wise mean, at one λ or at one per block; ValueError for blocks without names."""
    if G.layout is None:
        msg = (
            'block="layer" needs gradients with named blocks; use StackedGradients, pass layout= '
            'where they are built, or block="full"'
        )
        raise ValueError(msg)
    shifts = damping if isinstance(damping, Mapping) else dict.fromkeys(G.layout, damping)
    return LayerHarmonicMean(G, G.layout, shifts, count)


def scaled_harmonic_mean(
    G: GradientMatrix, damping: Mapping[str, float], shift: Array, count: float
) -> LinearOperator:
    """λ by block in one system over all parameters: g → Λ^(-1/2) g leaves a problem with λ = 1."""
    roots = {name: 1.0 / math.sqrt(float(value)) for name, value in damping.items()}
    inner = HarmonicMean(G.rescaled(roots), 1.0, count)
    return Congruence(inner, 1.0 / _backend.namespace(shift).sqrt(shift))


def _bilinear(
    G: GradientMatrix, left: GradientMatrix, right: GradientMatrix, weights: Array, shift: Any
) -> Array:
    """(left rightᵀ − left Gᵀ diag(w) G rightᵀ)/λ; the difference is taken in float64."""
    small, xp = _backend.to_small, _backend.namespace(weights)
    if left.shape[0] > right.shape[0]:
        return xp.matrix_transpose(_bilinear(G, right, left, weights, shift))
    mine = G._small_gram(left)
    theirs = mine if left is right else small(G.gram(right))
    mine = _backend.namespace(mine).matrix_transpose(small(weights)[:, None] * mine)
    return _backend.lift((left._small_gram(right) - mine @ theirs) / shift, G.like)


def _trace(norms: Array) -> float:
    """Σ‖g_i‖², in float64 on the host."""
    return float((_backend.to_host(_backend.to_small(norms)) ** 2).sum())


def _weights(norms: Array, shift: Any, count: float) -> Array:
    return 1.0 / (count * shift + norms.shape[0] * (norms * norms))


def _checked(shift: Any) -> Any:
    if isinstance(shift, float) and not shift > 0:
        msg = f"InverseHarmonicMean needs damping > 0, got {shift:g}"
        raise ValueError(msg)
    return shift


def _parts(G: GradientMatrix) -> Iterator[tuple[GradientMatrix, slice]]:
    """The rows in order with their positions, in one pass over the data."""
    start = 0
    for part in G.parts(_NATURAL):
        yield part, slice(start, start + len(part))
        start += len(part)


def _blocks_of(part: GradientMatrix, layout: Layout) -> Iterator[tuple[str, GradientMatrix]]:
    """The named blocks of some rows, in their structure where there is one."""
    if isinstance(part, StackedGradients):
        yield from part.blocks.items()
        return
    columns = part.T.to_dense()
    xp = _backend.namespace(columns)
    for name in layout:
        yield name, DenseGradients(xp.matrix_transpose(layout.take(columns, name)))


def _matched(
    matrices: Sequence[GradientMatrix], layout: Layout
) -> Iterator[tuple[str, Sequence[GradientMatrix]]]:
    """The named blocks of several matrices; those of a stream are joined, or its rows formed."""
    held = [concatenate(list(G.parts(_NATURAL))) for G in matrices]
    for blocks in zip(*(_blocks_of(G, layout) for G in held), strict=True):
        yield blocks[0][0], [block for _, block in blocks]


def _norms_by_block(G: GradientMatrix, layout: Layout) -> dict[str, Array]:
    found: dict[str, list[Array]] = {name: [] for name in layout}
    for part, _ in _parts(G):
        for name, block in _blocks_of(part, layout):
            found[name].append(block.row_norms())
    xp = _backend.namespace(G.like)
    return {name: xp.concat(norms, axis=0) for name, norms in found.items()}
