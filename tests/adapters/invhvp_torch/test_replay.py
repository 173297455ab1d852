"""Recorded operations for several vectors together, against the function of one vector."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")

import torch.nn.functional as F  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from invhvp_torch import columns  # noqa: E402
from invhvp_torch.columns import Columns, Scratch  # noqa: E402
from invhvp_torch.tape import Tape  # noqa: E402


def _rand(*shape):
    generator = torch.Generator().manual_seed(sum(shape) + 7 * len(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


X, W, IMAGES, KERNEL = _rand(6, 4), _rand(3, 4), _rand(2, 3, 7, 7), _rand(5, 3, 3, 3)
STACK, G = _rand(2, 6, 4), _rand(2, 5, 5, 5)


def _backward(which, g, x, w, *, stride=1, padding=0):
    """The gradient of a convolution in its input (0) or weight (1), from that of its output."""
    settings = ((stride, stride), (padding, padding), (1, 1), False, (0, 0), 1)
    mask = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward.default(g, x, w, None, *settings, mask)[which]


def _pooled_back(g, side, kernel, stride=None, padding=0):
    """The transpose of pooling images of that side, of g."""
    side = side if isinstance(side, tuple) else (side, side)
    x = _rand(*g.shape[:2], *side)
    stride = kernel if stride is None else stride
    return torch.ops.aten.avg_pool2d_backward(
        g, x, [kernel] * 2, [stride] * 2, [padding] * 2, False, True, None
    )


FUNCTIONS = {
    "constant @ v": ((4, 5), lambda v: X @ v),
    "constant @ v.T": ((5, 4), lambda v: X @ v.t()),
    "v @ constant": ((5, 6), lambda v: v @ X),
    "v.T @ constant": ((6, 5), lambda v: v.t() @ X),
    "a layer and its gradient": ((3, 4), lambda v: ((X @ v.t()) * X[:, :3]).t() @ X),
    "two layers": ((3, 4), lambda v: (torch.tanh(X) @ W.t() @ v + X @ v.t() @ W).t() @ X),
    "a row": ((1, 4), lambda v: X @ v.t()),
    "a bias": ((3,), lambda v: (v + X @ W.t() * v).sum(0)),
    "sums": ((6, 4), lambda v: v.sum() * X + v.sum(1, keepdim=True) - v.sum(0)),
    "scalars": ((6, 4), lambda v: 2.0 * v / 3.0 - v.neg()),
    "constants on the left": ((4,), lambda v: X - X + X * v),
    "more dimensions": ((4,), lambda v: v * STACK),
    "stacks, from the right": ((2, 4, 5), lambda v: torch.bmm(STACK, v)),
    "stacks, from the left": ((2, 5, 6), lambda v: torch.bmm(v, STACK)),
    "stacks, transposed": ((2, 5, 4), lambda v: torch.bmm(STACK, v.transpose(1, 2))),
    "heads": (
        (6, 4),
        lambda v: (v @ X.t()).reshape(2, 3, 6).transpose(1, 2).contiguous().view(12, 3) @ W,
    ),
    "views": ((6, 4), lambda v: (X @ v.t()).view(3, 2, 6).unsqueeze(1).squeeze(1).view(-1, 6)),
    "no rule": ((6, 4), lambda v: torch.cat([v.cumsum(0), X * v.flip(1)])),
    "a convolution of v": ((2, 3, 7, 7), lambda v: F.conv2d(v, KERNEL, stride=2, padding=1)),
    "a convolution with v": ((5, 3, 3, 3), lambda v: F.conv2d(IMAGES, v, padding=1)),
    "groups": ((2, 3, 7, 7), lambda v: F.conv2d(v, _rand(6, 1, 3, 3), groups=3)),
    "a transposed convolution": ((3, 5, 3, 3), lambda v: F.conv_transpose2d(IMAGES, v)),
    "to the weight": ((2, 5, 7, 7), lambda v: _backward(1, v, IMAGES, KERNEL, padding=1)),
    "to the input": ((2, 5, 3, 3), lambda v: _backward(0, v, IMAGES, KERNEL, stride=2)),
    "through v, to the input": ((5, 3, 3, 3), lambda v: _backward(0, G, IMAGES, v)),
    "through v, to the weight": ((2, 3, 7, 7), lambda v: _backward(1, G, v, KERNEL)),
    "pooling": ((2, 3, 6, 6), lambda v: F.avg_pool2d(v, 2)),
    "pooling, with borders": ((2, 3, 5, 7), lambda v: F.avg_pool2d(v, 3, 2, 1, ceil_mode=True)),
    "pooling of large images": ((2, 1, 20, 20), lambda v: F.avg_pool2d(v, 2)),
    "pooling of one image": ((3, 6, 6), lambda v: F.avg_pool2d(v, 2)),
    "pooling of channels last": (
        (2, 6, 6, 3),
        lambda v: F.avg_pool2d(v.permute(0, 3, 1, 2), 2, count_include_pad=False),
    ),
    "back through pooling": ((2, 3, 3, 3), lambda v: _pooled_back(v, 6, 2)),
    "back through pooling with borders": ((2, 3, 3, 4), lambda v: _pooled_back(v, (5, 7), 3, 2, 1)),
    "back through pooling of large images": ((2, 1, 10, 10), lambda v: _pooled_back(v, 20, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_several_vectors_are_as_one(name):
    shape, function = FUNCTIONS[name]
    tape = Tape(lambda v: [function(v)], [_rand(*shape)])
    scratch = Scratch()
    for k in (3, 1, 3):  # the third call meets the buffers of the first
        V = _rand(k, *shape)
        wanted = torch.stack([function(v) for v in V])
        found = torch.full_like(wanted, 2.0)
        tape.add([V], [found], scratch)
        torch.testing.assert_close(found - 2.0, wanted, rtol=1e-12, atol=1e-12)


def test_buffers_are_used_again_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(columns, "_MOST_BYTES", 100)
    scratch, like = Scratch(), torch.empty(0, dtype=torch.float64)
    small, large = scratch.empty((3, 2), like), scratch.empty((13,), like)
    scratch.give_back(scratch.taken())
    assert scratch.empty((6,), like).data_ptr() == small.data_ptr()
    assert [b.numel() for b in scratch.taken()] == [6]
    assert large.data_ptr() not in {b.data_ptr() for bs in scratch._free.values() for b in bs}
    # An offered buffer is written over where it is whole, and else free again.
    x = scratch.empty((4,), like)
    (buffer,) = scratch.taken()
    scratch.offer([buffer])
    assert scratch.over(x[:2]) is None
    assert scratch.over(x.expand(2, 4)) is None
    assert scratch.over(x) is x
    assert scratch.taken() == [buffer]
    scratch.offer([buffer])
    assert scratch.taken() == []
    assert scratch.empty((2, 2), like).data_ptr() == x.data_ptr()


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    k=st.integers(1, 3),
    axis=st.integers(0, 4),
)
@settings(deadline=None)
def test_an_axis_of_columns_is_only_a_place(shape, k, axis):
    t = _rand(k, *shape)
    axis = min(axis, len(shape))
    x = Columns(t.movedim(0, axis), axis)
    assert tuple(x.shape) == tuple(shape)
    assert x.k == k
    for dim in range(-len(shape), len(shape)):
        assert x.tensor.shape[x.position(dim)] == shape[dim]
    for other in range(len(shape) + 1):
        assert torch.equal(x.at(other).movedim(other, 0), t)
