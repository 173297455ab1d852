"""Per-sample gradients by parameter block, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from .. import _backend
from ..layout import Block, Layout
from ..protocols import Array
from . import _sums
from ._check import check_kind
from .base import GradientMatrix, concatenate


class StackedGradients(GradientMatrix):
    """Named blocks of columns, each with its own structure.

    Args:
        blocks: gradient matrices of the same samples, by the name of their parameters.
        layout: where the blocks lie in the parameter vector; by default one after the other.

    Raises TypeError for mixed kinds, ValueError where N or the layout does not fit.
    Cost: the sum over the blocks.

    Example:
        >>> import numpy as np
        >>> from invhvp.gradients import DenseGradients, OuterProductGradients, StackedGradients
        >>> d, a = np.ones((4, 2)), np.ones((4, 3))
        >>> weight = OuterProductGradients(output_grads=d, inputs=a)
        >>> G = StackedGradients({"weight": weight, "bias": DenseGradients(d)})
        >>> G.layout, G.row_norms()
        (Layout(weight 2x3, bias 2), array([2.828..., 2.828..., 2.828..., 2.828...]))
    """

    def __init__(
        self, blocks: Mapping[str, GradientMatrix], *, layout: Layout | None = None
    ) -> None:
        self._blocks = dict(blocks)
        if not self._blocks:
            msg = "StackedGradients needs at least one block"
            raise ValueError(msg)
        for name, block in self._blocks.items():
            self._check_block(name, block)
        if layout is None:
            layout = Layout.from_shapes({name: G.block_shape for name, G in self._blocks.items()})
        if set(layout.names) != set(self._blocks):
            msg = (
                f"the layout names the blocks {list(layout.names)}, "
                f"the gradients {list(self._blocks)}"
            )
            raise ValueError(msg)
        for name, block in self._blocks.items():
            if layout[name].size != block.shape[1]:
                msg = (
                    f"block {name!r} has {block.shape[1]} parameters, "
                    f"the layout {layout[name].size}"
                )
                raise ValueError(msg)
        first = next(iter(self._blocks.values()))
        super().__init__(len(first), layout.n, like=first.like, layout=layout)
        self._positions = layout

    def _check_block(self, name: str, block: GradientMatrix) -> None:
        first = next(iter(self._blocks.values()))
        if not isinstance(block, GradientMatrix):
            msg = (
                f"block {name!r} must be a gradient matrix, got {type(block).__name__}; "
                "wrap an array (N, p) in DenseGradients"
            )
            raise TypeError(msg)
        check_kind(block.like, first.like, f"StackedGradients, block {name!r},")
        if len(block) != len(first):
            msg = (
                f"blocks are gradients of the same samples, got {len(first)} samples in "
                f"{next(iter(self._blocks))!r} and {len(block)} in {name!r}"
            )
            raise ValueError(msg)

    @property
    def blocks(self) -> Mapping[str, GradientMatrix]:
        """The blocks by name, read-only."""
        return MappingProxyType(self._blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.nbytes for block in self._blocks.values())

    def _map(self, change: Callable[[str, GradientMatrix], GradientMatrix]) -> StackedGradients:
        changed = {name: change(name, block) for name, block in self._blocks.items()}
        return StackedGradients(changed, layout=self._positions)

    def _assemble(self, part: Callable[[GradientMatrix], Array]) -> Array:
        return self._positions.assemble({name: part(G) for name, G in self._blocks.items()})

    def _dense(self) -> Array:
        columns = self._assemble(lambda G: G.T.to_dense())
        return _backend.namespace(columns).matrix_transpose(columns)

    def _take(self, rows: slice) -> StackedGradients:
        return self._map(lambda _, block: block._take(rows))

    @classmethod
    def _join(cls, matrices: Sequence[Any]) -> StackedGradients:
        first = matrices[0]
        if not all(first._same_blocks(other) for other in matrices[1:]):
            msg = "stacked gradients are joined where their blocks and layouts are the same"
            raise ValueError(msg)
        return first._map(lambda name, _: concatenate(G._blocks[name] for G in matrices))

    def _scaled(self, factor: float) -> StackedGradients:
        return self._map(lambda _, block: block._scaled(factor))

    def _rescaled(self, factors: Mapping[str, float]) -> StackedGradients:
        return self._map(lambda name, block: block._scaled(float(factors[name])))

    def _matmat(self, V: Array) -> Array:
        total = None
        for name, block in self._blocks.items():
            part = block._matmat(self._positions.take(V, name))
            total = part if total is None else total + part
        return total

    def _rmatmat(self, U: Array) -> Array:
        if self._positions.permuted:
            return self._assemble(lambda G: G._rmatmat(U))
        xp, blocks = _backend.namespace(U), (self._blocks[name] for name in self._positions)
        # Side by side as rows: that is how outer products leave them, and how sums over p read.
        lines = [xp.matrix_transpose(block._rmatmat(U)) for block in blocks]
        return xp.matrix_transpose(xp.concat(lines, axis=1))

    def _gram(self, other: GradientMatrix) -> Array | None:
        if not (isinstance(other, StackedGradients) and self._same_blocks(other)):
            return None
        return _total(block.gram(other._blocks[name]) for name, block in self._blocks.items())

    def _small_gram(self, other: GradientMatrix) -> Array:
        if not (isinstance(other, StackedGradients) and self._same_blocks(other)):
            return super()._small_gram(other)
        blocks = self._blocks.items()
        return _total(block._small_gram(other._blocks[name]) for name, block in blocks)

    def _triangle(self, cuts: Sequence[slice]) -> _sums.Lines | None:
        total = None
        for block in self._blocks.values():
            lines = block._triangle(cuts)
            if lines is None:
                return None
            total = lines if total is None else _sums.added(total, lines)
        return total

    def _same_blocks(self, other: StackedGradients) -> bool:
        mine, theirs = self._positions, other._positions
        return set(mine) == set(theirs) and all(
            _same_positions(mine[name], theirs[name]) for name in mine
        )

    def row_norms(self) -> Array:
        """Euclidean norms of the rows, (N,)."""
        found = [block.row_norms() for block in self._blocks.values()]
        together = _backend.namespace(*found).stack(found, axis=1)
        return _sums.narrow(_sums.norms(together, axis=1), self._like)

    def column_norms(self) -> Array:
        """Euclidean norms of the columns, (p,)."""
        return self._assemble(lambda G: G.column_norms())

    def _describe(self) -> str:
        return f"{super()._describe()}, {len(self._blocks)} blocks"


def _total(parts: Iterable[Array]) -> Array:
    total = None
    for part in parts:
        total = part if total is None else total + part
    return total


def _same_positions(mine: Block, theirs: Block) -> bool:
    a, b = mine.indices, theirs.indices
    if isinstance(a, slice) or isinstance(b, slice):
        return isinstance(a, slice) and isinstance(b, slice) and a == b
    return a.shape == b.shape and bool((a == b).all())
