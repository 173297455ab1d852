"""How much of a large array is formed at a time."""

from __future__ import annotations

from .. import _backend
from ..protocols import Array

_CAP = 64 << 20  # bytes: large enough for full speed, small beside any problem worth chunking
_SMALL = 1 << 20  # bytes below which nobody asks the device how much is free
# Flops that a device does while it moves one number: 5 to 15 a byte, on CPUs and GPUs alike.
_FLOPS_PER_NUMBER = 40


def itemsize(like: Array) -> int:
    """Bytes per number."""
    return _backend.namespace(like).finfo(like.dtype).bits // 8


def budget(like: Array) -> int:
    """Bytes that a temporary may take: an eighth of what is free, at most 64 MiB."""
    return max(min(_CAP, _backend.free_memory(like) // 8), 1)


def spans(n: int, numbers: int, like: Array, max_bytes: int | None = None) -> list[slice]:
    """Consecutive slices of range(n) such that `numbers` per element fit in the budget."""
    each = numbers * itemsize(like)
    if max_bytes is None and n * each <= _SMALL:
        return [slice(0, n)]
    size = max((budget(like) if max_bytes is None else max_bytes) // each, 1)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def cost(flops: int, numbers: int) -> int:
    """What is to be compared, of flops and of numbers moved through memory."""
    return flops + _FLOPS_PER_NUMBER * numbers


_SIDE = 256  # rows below which a product is no longer as fast as a large one
_MOST_CUTS = 8  # blocks of a triangle, 9/16 of the square: more of them save little


def triangle_cuts(n: int) -> list[slice]:
    """Consecutive slices of range(n), of one size, between which a triangle of blocks is formed."""
    size = -(-n // max(1, min(n // _SIDE, _MOST_CUTS)))
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]
