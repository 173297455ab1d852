"""How an operation on one vector's tensors is done for several vectors together.

A rule takes a `Scratch`, then the arguments of the operation, where `Columns` stand for tensors
that depend on the vectors and plain tensors for constants.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from invhvp._blas import multiply

from .column_convolutions import convolution, convolution_backward, pooling
from .columns import Columns, Scratch
from .evaluation import quiet_vmap

aten = torch.ops.aten

Rule = Callable[..., Any]


def one_by_one(function: Any) -> Rule:
    """An operation without a rule of its own, by `torch.vmap`."""
    if function is operator.getitem:
        return lambda _, parts, index: parts[index]

    def rule(_: Scratch, *args: Any, **kwargs: Any) -> Any:
        given, shape = tree_flatten((args, kwargs), is_leaf=lambda a: isinstance(a, Columns))
        places = [i for i, a in enumerate(given) if isinstance(a, Columns)]
        missing: list[bool] = []  # of several results, those that are None: vmap wants tensors

        def call(*tensors: torch.Tensor) -> Any:
            filled = list(given)
            for i, t in zip(places, tensors, strict=True):
                filled[i] = t
            args, kwargs = tree_unflatten(filled, shape)
            found = function(*args, **kwargs)
            if isinstance(found, torch.Tensor):
                return found
            missing[:] = [t is None for t in found]
            return tuple(t for t in found if t is not None)

        axes = tuple(given[i].axis for i in places)
        with quiet_vmap():
            found = torch.vmap(call, in_dims=axes)(*(given[i].tensor for i in places))
        if isinstance(found, torch.Tensor):
            return Columns(found, 0)
        there = iter(found)
        return tuple(None if gone else Columns(next(there), 0) for gone in missing)

    return rule


# ------------------------------------------------------------------------- element by element


def _elementwise(function: Callable[..., torch.Tensor]) -> Rule:
    def rule(scratch: Scratch, a: Any, b: Any, **kwargs: Any) -> Columns:
        x, y, axis = _aligned(a, b)
        if not isinstance(y, torch.Tensor):
            y = torch.scalar_tensor(y, dtype=x.dtype, device=x.device)
        return Columns(function(x, y, **kwargs, out=_result(scratch, x, y)), axis)

    return rule


def _result(scratch: Scratch, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Where x and y go: over one of them, where it is read for the last time."""
    shape = x.shape if y.ndim == 0 or y.shape == x.shape else _broadcast(x.shape, y.shape)
    elsewhere = x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()
    for operand in (x, y):
        if elsewhere and operand.shape == shape:
            out = scratch.over(operand)
            if out is not None:
                return out
    return scratch.empty(shape, x)


def _broadcast(a: torch.Size, b: torch.Size) -> torch.Size:
    """As `torch.broadcast_shapes`, which takes longer than many a sum."""
    a, b = (a, b) if len(a) >= len(b) else (b, a)
    behind = len(a) - len(b)
    return a[:behind] + torch.Size(n if m == 1 else m for m, n in zip(a[behind:], b, strict=True))


def _aligned(a: Any, b: Any) -> tuple[torch.Tensor, Any, int]:
    """Both operands as tensors that broadcast, and where the vectors lie in the result."""
    if isinstance(a, Columns) and isinstance(b, Columns):
        a, b = _of_rank(a, b.tensor.ndim), _of_rank(b, a.tensor.ndim)
        # What the larger one has contiguous stays so.
        larger = a if a.tensor.numel() > b.tensor.numel() or a.tensor.is_contiguous() else b
        return a.at(larger.axis), b.at(larger.axis), larger.axis
    if isinstance(a, Columns):
        if not isinstance(b, torch.Tensor):
            return a.tensor, b, a.axis
        a = _of_rank(a, b.ndim + 1)
        return a.tensor, _beside(a, b), a.axis
    b = _of_rank(b, a.ndim + 1)
    return _beside(b, a), b.tensor, b.axis


def _of_rank(x: Columns, ndim: int) -> Columns:
    """With dimensions of one in front, up to a rank."""
    while x.tensor.ndim < ndim:
        x = Columns(x.at(0).unsqueeze(1), 0)
    return x


def _beside(x: Columns, constant: torch.Tensor) -> torch.Tensor:
    """A constant with a dimension of one where x has the vectors."""
    behind = x.tensor.ndim - 1 - x.axis
    return constant.unsqueeze(constant.ndim - behind) if constant.ndim > behind else constant


def _negated(scratch: Scratch, x: Columns) -> Columns:
    out = scratch.empty(x.tensor.shape, x.tensor)
    return Columns(torch.neg(x.tensor, out=out), x.axis)


def _copied(scratch: Scratch, x: Columns, **_: Any) -> Columns:
    out = scratch.empty(x.tensor.shape, x.tensor)
    return Columns(out.copy_(x.tensor), x.axis)


def _sum(_: Scratch, x: Columns, dims: Sequence[int], keepdim: bool = False, **__: Any) -> Columns:
    if not x.shape:
        return x
    places = [x.position(d) for d in dims] or [i for i in range(x.tensor.ndim) if i != x.axis]
    before = 0 if keepdim else sum(p < x.axis for p in places)
    return Columns(x.tensor.sum(places, keepdim), x.axis - before)


# ------------------------------------------------------------------------------------- views


def _transposed(_: Scratch, x: Columns, i: int = 0, j: int = 1) -> Columns:
    return Columns(x.tensor.transpose(x.position(i), x.position(j)), x.axis)


def _reshaped(_: Scratch, x: Columns, shape: Sequence[int]) -> Columns:
    """Dimensions that merge or split on one side of the vectors leave them where they are."""
    t, axis, shape = x.tensor, x.axis, list(shape)
    if -1 in shape:
        known = -math.prod(shape)
        shape[shape.index(-1)] = math.prod(x.shape) // known if known else 0
    before, split, product = math.prod(t.shape[:axis]), 0, 1
    while split < len(shape) and product < before:
        product *= shape[split]
        split += 1
    if product == before:
        return Columns(t.reshape(*shape[:split], t.shape[axis], *shape[split:]), split)
    return Columns(x.at(0).reshape(t.shape[axis], *shape), 0)


def _expanded(_: Scratch, x: Columns, shape: Sequence[int], **__: Any) -> Columns:
    x = Columns(_of_rank(x, len(shape) + 1).at(0), 0)
    return Columns(x.tensor.expand(x.k, *shape), 0)


def _squeezed(_: Scratch, x: Columns, dim: int) -> Columns:
    if x.shape[dim] != 1:
        return x
    place = x.position(dim)
    return Columns(x.tensor.squeeze(place), x.axis - (place < x.axis))


def _unsqueezed(_: Scratch, x: Columns, dim: int) -> Columns:
    return Columns(x.at(0).unsqueeze(1 + dim % x.tensor.ndim), 0)


# ---------------------------------------------------------------------------------- products


def _bilinear(both: Rule, right: Rule, left: Rule) -> Rule:
    """A rule for a product, by which of its factors depend on the vectors."""

    def rule(scratch: Scratch, a: Any, b: Any) -> Columns:
        if not isinstance(b, Columns):
            return left(scratch, a, b)
        return (both if isinstance(a, Columns) else right)(scratch, a, b)

    return rule


def _mm_both(scratch: Scratch, a: Columns, b: Columns) -> Columns:
    x, y = a.at(0), b.at(0)
    out = scratch.empty((x.shape[0], x.shape[1], y.shape[2]), x)
    return Columns(torch.bmm(x, y, out=out), 0)


def _mm_right(scratch: Scratch, a: torch.Tensor, b: Columns) -> Columns:
    """(r, s) @ (s, k, c): the vectors merge with the columns."""
    matrix, axis = _side_by_side(b)
    out = multiply(a, matrix, scratch.empty((a.shape[0], matrix.shape[1]), a))
    return Columns(out.unflatten(1, (b.k, -1) if axis == 1 else (-1, b.k)), axis)


def _mm_left(scratch: Scratch, a: Columns, b: torch.Tensor) -> Columns:
    """(k, r, s) @ (s, c), or (r, k, s): the vectors merge with the rows."""
    matrix, axis = _side_by_side(_transposed(scratch, a))
    out = multiply(matrix.mT, b, scratch.empty((matrix.shape[1], b.shape[1]), b))
    return Columns(out.unflatten(0, (a.k, -1) if axis == 1 else (-1, a.k)), axis - 1)


def _side_by_side(x: Columns) -> tuple[torch.Tensor, int]:
    """(s, c) of each vector as one matrix, and whether it is (s, k c), 1, or (s, c k), 2.

    A view where memory allows it, and else a copy with the contiguous dimension kept.
    """
    t = x.at(1)
    s, k, c = t.shape
    _, along_k, along_c = t.stride()
    if along_k == c * along_c or k == 1 or c == 1:
        return t.flatten(1), 1
    if along_c == k * along_k:
        return x.at(2).flatten(1), 2
    if t.stride(0) == 1:
        return t.permute(1, 2, 0).reshape(k * c, s).mT, 1
    return t.reshape(s, k * c), 1


def _bmm_both(scratch: Scratch, a: Columns, b: Columns) -> Columns:
    """Stacks of matrices: the vectors merge with the stack, below with what is not summed over."""
    x, y = a.at(1).flatten(0, 1), b.at(1).flatten(0, 1)
    found = torch.bmm(x, y, out=scratch.empty((len(x), x.shape[1], y.shape[2]), x))
    return Columns(found.unflatten(0, (-1, a.k)), 1)


def _bmm_right(scratch: Scratch, a: torch.Tensor, b: Columns) -> Columns:
    y = b.at(2).flatten(2)
    found = torch.bmm(a, y, out=scratch.empty((len(a), a.shape[1], y.shape[2]), a))
    return Columns(found.unflatten(2, (b.k, -1)), 2)


def _bmm_left(scratch: Scratch, a: Columns, b: torch.Tensor) -> Columns:
    x = a.at(1).flatten(1, 2)
    found = torch.bmm(x, b, out=scratch.empty((len(b), x.shape[1], b.shape[2]), b))
    return Columns(found.unflatten(1, (a.k, -1)), 1)


RULES: dict[Any, Rule] = {
    aten.add.Tensor: _elementwise(torch.add),
    aten.sub.Tensor: _elementwise(torch.sub),
    aten.mul.Tensor: _elementwise(torch.mul),
    aten.mul.Scalar: _elementwise(torch.mul),
    aten.div.Tensor: _elementwise(torch.div),
    aten.div.Scalar: _elementwise(torch.div),
    aten.neg.default: _negated,
    aten.clone.default: _copied,
    aten.sum.dim_IntList: _sum,
    aten.t.default: _transposed,
    aten.transpose.int: _transposed,
    aten.view.default: _reshaped,
    aten._unsafe_view.default: _reshaped,
    aten.expand.default: _expanded,
    aten.squeeze.dim: _squeezed,
    aten.unsqueeze.default: _unsqueezed,
    aten.mm.default: _bilinear(_mm_both, _mm_right, _mm_left),
    aten.bmm.default: _bilinear(_bmm_both, _bmm_right, _bmm_left),
    aten.convolution.default: convolution,
    aten.convolution_backward.default: convolution_backward,
    aten.avg_pool2d.default: pooling(aten.avg_pool2d.default),
    aten.avg_pool2d_backward.default: pooling(aten.avg_pool2d_backward.default),
}
VIEWS = frozenset(
    {
        aten.t.default,
        aten.transpose.int,
        aten.view.default,
        aten._unsafe_view.default,
        aten.expand.default,
        aten.squeeze.dim,
        aten.unsqueeze.default,
    }
)
