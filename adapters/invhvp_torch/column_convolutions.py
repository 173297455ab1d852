"""Convolutions and pooling for several vectors: more images, or more channels, of one of them.

Each of the three maps of a convolution (forward, to the input, to the weight) is bilinear. The
vectors merge with the samples where the weight is a constant, and with the channels of the
operand that varies where the samples are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from invhvp._blas import multiply

from .columns import Columns, Scratch

aten = torch.ops.aten

_SMALL_PLANE = 64  # numbers of the smaller plane, up to which the product was the faster one


def pooling(function: Any) -> Callable[..., Columns]:
    """A rule for the mean over windows, or for its transpose, of every plane.

    Small planes are multiplied by the matrix of that map: more arithmetic, and several times as
    fast as a kernel that walks from number to number.
    """
    on_all = on_images(function)

    def rule(scratch: Scratch, x: Columns, *args: Any) -> Columns:
        t, other = x.tensor, None
        if isinstance(args[0], torch.Tensor | Columns):  # what was pooled, in the transpose
            other = tuple(args[0].shape[-2:])
        small = min(math.prod(x.shape[-2:]), math.prod(other or (_SMALL_PLANE,))) <= _SMALL_PLANE
        if t.ndim != 5 or x.axis > 2 or t.device.type != "cpu" or not small:
            return on_all(scratch, x, *args)
        settings = tuple(tuple(a) if isinstance(a, list) else a for a in args[other is not None :])
        matrix, shape = _matrix(function, tuple(x.shape[-2:]), other, settings, t.dtype)
        rows = t.reshape(-1, len(matrix))
        out = scratch.empty((len(rows), matrix.shape[1]), t)
        return Columns(multiply(rows, matrix, out).reshape(*t.shape[:3], *shape), x.axis)

    return rule


@lru_cache(maxsize=32)
def _matrix(
    function: Any,
    plane: tuple[int, int],
    other: tuple[int, int] | None,
    settings: tuple[Any, ...],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Size]:
    """What becomes of each plane that is one at a place and else zero, and its shape."""
    n = math.prod(plane)
    ones = torch.eye(n, dtype=dtype).reshape(n, 1, *plane)
    pooled = () if other is None else (ones.new_zeros(n, 1, *other),)
    found = function(ones, *pooled, *settings)
    return found.reshape(n, -1), found.shape[-2:]


def on_images(function: Any) -> Callable[..., Columns]:
    """A rule for what is done to each image: the vectors are so many times more images."""

    def rule(_: Scratch, x: Columns, *args: Any) -> Columns:
        t = x.at(1)
        n, k = t.shape[:2]
        found = function(t.flatten(0, 1), *(_images(a, n, k) for a in args))
        return Columns(found.unflatten(0, (n, k)), 1)

    return rule


def _images(a: Any, n: int, k: int) -> Any:
    if isinstance(a, Columns):
        return a.at(1).flatten(0, 1)
    if isinstance(a, torch.Tensor):  # of each image, whatever the vector
        return a.unsqueeze(1).expand(n, k, *a.shape[1:]).flatten(0, 1)
    return a


def convolution(_: Scratch, x: Any, w: Any, bias: Any, *rest: Any) -> Columns:
    """aten.convolution, linear in the vectors: one of `x` and `w` is a constant."""
    transposed, groups = rest[3], rest[5]
    if bias is not None:
        raise NotImplementedError("a recorded convolution with a bias")
    if isinstance(x, Columns):
        t = x.at(1)
        found = aten.convolution.default(t.flatten(0, 1), w, None, *rest)
        return Columns(found.unflatten(0, t.shape[:2]), 1)
    if groups != 1:
        raise NotImplementedError("groups of a convolution whose weight varies")
    t = w.at(1 if transposed else 0)  # output channels, k times as many
    weight = t.flatten(1, 2) if transposed else t.flatten(0, 1)
    found = aten.convolution.default(x, weight, None, *rest)
    return Columns(found.unflatten(1, (w.k, -1)), 1)


def convolution_backward(
    _: Scratch, g: Any, x: Any, w: Any, __: Any, *rest: Any
) -> tuple[Columns | None, ...]:
    """aten.convolution_backward where one of `g` and the other operand is a constant."""
    *settings, mask = rest
    if settings[3] or settings[5] != 1:
        raise NotImplementedError("a transposed or grouped convolution")
    found: list[Columns | None] = [None, None, None]
    if mask[0]:
        found[0] = _to_input(g, x, w, settings)
    if mask[1]:
        found[1] = _to_weight(g, x, w, settings)
    if mask[2]:
        places = [g.position(d) for d in range(len(g.shape)) if d != 1]
        found[2] = Columns(g.tensor.sum(places), 1 if g.axis > g.position(1) else 0)
    return tuple(found)


def _to_input(g: Any, x: Any, w: Any, settings: Sequence[Any]) -> Columns:
    shape = x.shape
    if isinstance(g, Columns) and isinstance(w, Columns):
        raise NotImplementedError("a product of two tensors that vary")
    if isinstance(g, Columns):
        t = g.at(1)
        like = _nothing(w, (g.k * shape[0], *shape[1:]))
        found = _backward(t.flatten(0, 1), like, w, settings, 0)
        return Columns(found.unflatten(0, t.shape[:2]), 1)
    t = w.at(1)  # input channels, k times as many
    like = _nothing(g, (shape[0], w.k * shape[1], *shape[2:]))
    found = _backward(g, like, t.flatten(1, 2), settings, 0)
    return Columns(found.unflatten(1, (w.k, -1)), 1)


def _to_weight(g: Any, x: Any, w: Any, settings: Sequence[Any]) -> Columns:
    shape = w.shape
    if isinstance(g, Columns) and isinstance(x, Columns):
        raise NotImplementedError("a product of two tensors that vary")
    if isinstance(g, Columns):  # output channels, k times as many
        like = _nothing(x, (g.k * shape[0], *shape[1:]))
        found = _backward(g.at(1).flatten(1, 2), x, like, settings, 1)
        return Columns(found.unflatten(0, (g.k, -1)), 0)
    like = _nothing(g, (shape[0], x.k * shape[1], *shape[2:]))
    found = _backward(g, x.at(1).flatten(1, 2), like, settings, 1)
    return Columns(found.unflatten(1, (x.k, -1)), 1)


def _backward(g: Any, x: Any, w: Any, settings: Sequence[Any], which: int) -> torch.Tensor:
    mask = [which == 0, which == 1, False]
    return aten.convolution_backward.default(g, x, w, None, *settings, mask)[which]


def _nothing(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of which only the shape is read: it has no memory of its own."""
    return like.new_zeros(1).expand(tuple(shape))
