"""Products and norms whose summed axis may be the number of parameters."""

from __future__ import annotations

from typing import TypeAlias

from .. import _arithmetic, _backend
from ..protocols import Array

Lines: TypeAlias = list[list[Array]]
"""Blocks of a matrix line by line; of a symmetric one those on and below the diagonal."""

_CHUNK = 1 << 16  # terms per partial sum: beyond it single precision loses digits
_MAX_CHUNKS = 64  # beyond it the chunks grow instead: launches cost more than they save


def _chunks(n: int) -> list[slice]:
    size = max(_CHUNK, -(-n // _MAX_CHUNKS))
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def wide(x: Array) -> Array:
    """The widest form of `x` on its device: float64, or single where there is nothing wider."""
    xp = _backend.namespace(x)
    if _backend.has_float64(x):
        return x if _backend.dtype_name(x.dtype) == "float64" else xp.astype(x, xp.float64)
    return single(x)


def single(x: Array) -> Array:
    """Half precision is multiplied and summed in single."""
    xp = _backend.namespace(x)
    return xp.astype(x, xp.float32) if _backend.eps(x.dtype) > 2.0**-23 else x


def narrow(x: Array, like: Array) -> Array:
    """`x` in the dtype of `like`."""
    return x if x.dtype == like.dtype else _backend.namespace(x).astype(x, like.dtype)


def product(a: Array, b: Array) -> Array:
    """The product a b in the dtype of `a`; the partial sums of long rows are added in float64.

    Leading axes are a batch, as in `matmul`.
    """
    n = a.shape[-1]
    chunks = _chunks(n)
    if len(chunks) == 1 or _backend.dtype_name(a.dtype) == "float64":
        return narrow(_arithmetic.matmul(single(a), single(b)), a)
    total = None
    for terms in chunks:
        part = wide(_arithmetic.matmul(single(a[..., terms]), single(b[..., terms, :])))
        total = part if total is None else total + part
    return narrow(total, a)


def symmetric(M: Array) -> Array:
    """The symmetric part of a square matrix."""
    return (M + _backend.namespace(M).matrix_transpose(M)) / 2


def added(left: Lines, right: Lines) -> Lines:
    """The sum of two matrices of blocks."""
    return [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(left, right, strict=True)]


def mirrored(lines: Lines) -> Array:
    """A symmetric matrix of its blocks on and below the diagonal, line by line."""
    xp = _backend.namespace(lines[0][0])
    diagonal = [symmetric(line[-1]) for line in lines]
    if len(lines) == 1:
        return diagonal[0]
    whole = []
    for i, line in enumerate(lines):
        above = [xp.matrix_transpose(lower[i]) for lower in lines[i + 1 :]]
        whole.append(xp.concat([*line[:-1], diagonal[i], *above], axis=1))
    return xp.concat(whole, axis=0)


def norms(X: Array, *, axis: int) -> Array:
    """Euclidean norms along one axis of a two-dimensional array, in the widest dtype.

    The temporaries are one chunk long. Where there is no float64 the entries are scaled by the
    largest, so that 1e-30 keeps its norm although its square underflows.
    """
    xp = _backend.namespace(X)
    pieces = [X[:, c] if axis == 1 else X[c, :] for c in _chunks(X.shape[axis])]
    scale = None
    if not _backend.has_float64(X):
        largest = [xp.max(xp.abs(single(piece)), axis=axis) for piece in pieces]
        scale = xp.max(xp.stack(largest, axis=0), axis=0)
        scale = xp.where(scale > 0, scale, xp.ones_like(scale))
    square = None
    for piece in pieces:
        terms = wide(piece)
        if scale is not None:
            terms = terms / (scale[:, None] if axis == 1 else scale[None, :])
        part = xp.sum(terms * terms, axis=axis)
        square = part if square is None else square + part
    root = xp.sqrt(square)
    return root if scale is None else root * scale


def unit_columns(X: Array) -> tuple[Array, Array]:
    """Columns with largest entry 1 and their scales: squares that neither under- nor overflow."""
    xp = _backend.namespace(X)
    scale = xp.max(xp.abs(X), axis=0)
    scale = xp.where(scale > 0, scale, xp.ones_like(scale))
    return X / scale[None, :], scale
