"""Named blocks of the parameter vector."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _backend
from .protocols import Array


@dataclass(frozen=True, eq=False)
class Block:
    """One block: its shape and its positions in the parameter vector.

    `indices` is a slice where the block is contiguous, else a one-dimensional integer array in
    the order in which the block is flattened (row-major).
    """

    shape: tuple[int, ...]
    indices: slice | np.ndarray

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)


class Layout(Mapping[str, Block]):
    """A partition of range(n) into named blocks, in the order in which they are given.

    Raises ValueError where the blocks overlap or leave a parameter out, TypeError for indices
    that are not integers.

    Example:
        >>> layout = Layout.from_shapes({"weight": (2, 3), "bias": (2,)})
        >>> layout.n, layout["bias"].indices
        (8, slice(6, 8, None))
    """

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        self._blocks = {name: _contiguous(block) for name, block in blocks.items()}
        self._gather = None
        if _consecutive(self._blocks.values()):
            return  # the usual case, and no index array of length n
        order = [_positions(block) for block in self._blocks.values()]
        position = np.concatenate(order) if order else np.arange(0)
        if position.shape != (self.n,) or not np.array_equal(np.sort(position), np.arange(self.n)):
            msg = f"the blocks {self.names} must cover each of the {self.n} parameters exactly once"
            raise ValueError(msg)
        self._gather = np.argsort(position)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        """Consecutive blocks of the given shapes."""
        blocks, start = {}, 0
        for name, shape in shapes.items():
            stop = start + math.prod(shape)
            blocks[name] = Block(tuple(shape), slice(start, stop))
            start = stop
        return cls(blocks)

    @property
    def n(self) -> int:
        """Length of the parameter vector."""
        return sum(block.size for block in self._blocks.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Block names in order."""
        return tuple(self._blocks)

    @property
    def permuted(self) -> bool:
        """Whether the blocks are not simply one after the other in their order."""
        return self._gather is not None

    def __getitem__(self, name: str) -> Block:
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def take(self, X: Array, name: str) -> Array:
        """Rows of `X` (n,) or (n, k) that belong to one block; a view where it is contiguous."""
        indices = self._blocks[name].indices
        if isinstance(indices, slice):
            return X[indices] if X.ndim == 1 else X[indices, :]
        return _take_rows(X, indices)

    def assemble(self, blocks: Mapping[str, Array]) -> Array:
        """Put blocks of rows together into one array (n,) or (n, k)."""
        missing = [name for name in self.names if name not in blocks]
        if missing:
            msg = f"assemble needs every block of the layout; missing: {missing}"
            raise ValueError(msg)
        parts = [blocks[name] for name in self.names]
        for (name, block), part in zip(self.items(), parts, strict=True):
            if part.shape[0] != block.size:
                msg = f"block {name!r} has {block.size} parameters, got {part.shape[0]} rows"
                raise ValueError(msg)
        X = _backend.namespace(*parts).concat(parts, axis=0)
        return X if self._gather is None else _take_rows(X, self._gather)

    def shifts(self, damping: Any) -> np.ndarray:
        """The λ of every parameter (n,) for a mapping from block names to λ."""
        unknown = [name for name in damping if name not in self._blocks]
        missing = [name for name in self.names if name not in damping]
        if unknown or missing:
            msg = (
                f"damping by block needs exactly the blocks {list(self.names)}; "
                f"unknown: {unknown}, missing: {missing}"
            )
            raise ValueError(msg)
        out = np.empty(self.n)
        for name, block in self._blocks.items():
            value = damping[name]
            value = _backend.to_host(value) if _backend.is_array(value) else value
            out[block.indices] = float(value)
        return out

    def __repr__(self) -> str:
        shapes = {name: "x".join(map(str, b.shape)) or "scalar" for name, b in self.items()}
        return f"Layout({', '.join(f'{name} {shape}' for name, shape in shapes.items())})"


def _consecutive(blocks: Iterable[Block]) -> bool:
    """Whether the blocks are slices that follow one another from zero."""
    start = 0
    for block in blocks:
        if not isinstance(block.indices, slice) or block.indices.start != start:
            return False
        start = block.indices.stop
    return True


def _contiguous(block: Block) -> Block:
    """Replace an index array that is a range by its slice: views instead of copies."""
    if isinstance(block.indices, slice):
        start, stop, step = block.indices.start, block.indices.stop, block.indices.step
        if step not in (None, 1) or start is None or stop is None or stop - start != block.size:
            msg = f"a slice must be start:stop with {block.size} elements, got {block.indices}"
            raise ValueError(msg)
        return block
    indices = np.asarray(block.indices).reshape(-1)
    if indices.dtype.kind not in "iu" and indices.size:
        msg = f"indices of a block must be integers, got {indices.dtype}"
        raise TypeError(msg)
    if indices.shape != (block.size,):
        msg = f"a block of shape {block.shape} needs {block.size} indices, got {indices.size}"
        raise ValueError(msg)
    if indices.size and np.array_equal(indices, np.arange(indices[0], indices[0] + indices.size)):
        return Block(block.shape, slice(int(indices[0]), int(indices[0]) + indices.size))
    return Block(block.shape, indices)


def _positions(block: Block) -> np.ndarray:
    if isinstance(block.indices, slice):
        return np.arange(block.indices.start, block.indices.stop)
    return block.indices


def _take_rows(X: Array, indices: np.ndarray) -> Array:
    xp = _backend.namespace(X)
    return xp.take(X, xp.asarray(indices, device=_backend.device(X)), axis=0)
