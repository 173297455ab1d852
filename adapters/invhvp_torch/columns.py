"""A tensor for each of several vectors, in one; and memory that products use again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Columns(NamedTuple):
    """A tensor for each of k vectors: one tensor, with the vectors along `axis`.

    Where that axis lies is free. Between rows and columns it merges with either, so that k
    products with a constant matrix are one product of larger matrices.
    """

    tensor: torch.Tensor
    axis: int

    @property
    def shape(self) -> torch.Size:
        """The shape for one vector."""
        shape = self.tensor.shape
        return shape[: self.axis] + shape[self.axis + 1 :]

    @property
    def k(self) -> int:
        """Number of vectors."""
        return self.tensor.shape[self.axis]

    def at(self, axis: int) -> torch.Tensor:
        """The tensor with the vectors along another axis: a view."""
        return self.tensor if axis == self.axis else self.tensor.movedim(self.axis, axis)

    def position(self, dim: int) -> int:
        """Where in the tensor a dimension of one vector's lies."""
        dim = dim % (self.tensor.ndim - 1)
        return dim + (dim >= self.axis)


_MOST_BYTES = 128_000_000  # that lie idle: what is larger is worth the system's pages


class Scratch:
    """Buffers that go from one intermediate result to the next.

    Fresh memory costs more than the arithmetic on it: the system clears every page of it. On a
    CPU a result of megabytes that is allocated, used once and freed pays that again each time.
    Other devices have allocators of their own.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}
        self._idle = 0  # bytes of what is free
        self._taken: list[torch.Tensor] = []
        self._dying: list[torch.Tensor] = []

    def empty(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor, valid until its buffer is given back."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        size = math.prod(shape)
        there = self._free.get((size, like.dtype))
        if there:
            buffer = there.pop()
            self._idle -= buffer.nbytes
        else:
            buffer = like.new_empty(size)
        self._taken.append(buffer)
        return buffer.view(shape)

    def offer(self, buffers: list[torch.Tensor]) -> None:
        """Buffers whose values nobody reads after the next operation: it may write over them."""
        self._dying = buffers

    def over(self, x: torch.Tensor) -> torch.Tensor | None:
        """Give x itself back, where it is the whole of a buffer that was offered; else None."""
        for i, buffer in enumerate(self._dying):
            if buffer.data_ptr() == x.data_ptr() and buffer.numel() == x.numel():
                if 0 in x.stride():  # expanded: some numbers stand for several
                    return None
                self._taken.append(self._dying.pop(i))
                return x
        return None

    def taken(self) -> list[torch.Tensor]:
        """The buffers since the last call; what was offered and not taken is free again."""
        found, self._taken = self._taken, []
        self.give_back(self._dying)
        self._dying = []
        return found

    def give_back(self, buffers: Sequence[torch.Tensor]) -> None:
        """Let others use the buffers."""
        for buffer in buffers:
            if buffer.nbytes > _MOST_BYTES:
                continue
            while self._idle + buffer.nbytes > _MOST_BYTES:  # what nobody has asked for in long
                oldest = next(iter(self._free))
                self._idle -= sum(b.nbytes for b in self._free.pop(oldest))
            self._idle += buffer.nbytes
            key = (buffer.numel(), buffer.dtype)
            self._free[key] = [*self._free.pop(key, ()), buffer]
