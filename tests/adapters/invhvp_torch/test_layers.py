"""Every layer's rule against torch's dense per-sample gradients, in float64."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import invhvp_torch as it
from invhvp.gradients import DenseGradients, OuterProductGradients, StackedGradients
from invhvp.testing import check_gradients
from tests.adapters.invhvp_torch.models import assert_close, cross_entropy, reference
from tests.adapters.invhvp_torch.references import gauss_newton_reference


class Head(nn.Module):
    """Any body, its outputs in a row, three classes; the head is not what is tested."""

    def __init__(self, *body: nn.Module, inputs: tuple[int, ...], tokens: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        x = torch.zeros((2, *inputs), dtype=torch.int64 if tokens else torch.float32)
        with torch.no_grad():
            size = self.body(x).flatten(1).shape[1]
        self.head = nn.Linear(size, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)).flatten(1))


class Conv1D(nn.Module):
    """As in transformers: a linear layer whose weight is (in, out)."""

    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.nf = n_out
        self.weight = nn.Parameter(torch.randn(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view((*x.size()[:-1], self.nf))


class LoRA(nn.Module):
    """A frozen linear layer and the product of two thin ones beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(5, 6).requires_grad_(False)
        self.down = nn.Linear(5, 2, bias=False)
        self.up = nn.Linear(2, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


class SelfAttention(nn.Module):
    def __init__(self, *, need_weights: bool = False, **options) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, **options)
        self.need_weights = need_weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x if self.inner.batch_first else x.transpose(0, 1)
        h = self.inner(h, h, h, need_weights=self.need_weights)[0]
        return h if self.inner.batch_first else h.transpose(0, 1)


def _warm(norm: nn.Module) -> nn.Module:
    """Running statistics and a scale that are not one and zero."""
    with torch.no_grad():
        for tensor in [*norm.parameters(), *norm.buffers()]:
            if tensor.dtype.is_floating_point:
                tensor.add_(torch.rand(tensor.shape))
    return norm


FAST = {  # name: (body, shape of a sample)
    "linear-2d": ([nn.Linear(5, 4)], (5,)),
    "linear-3d": ([nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)], (6, 5)),
    "linear-4d": ([nn.Linear(3, 2)], (2, 4, 3)),
    "conv1d": ([nn.Conv1d(3, 4, 3, padding=1, stride=2)], (3, 9)),
    "conv1d-same": ([nn.Conv1d(3, 4, 4, padding="same", dilation=2)], (3, 9)),
    "conv2d": ([nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0))], (2, 7, 6)),
    "conv2d-dilated": ([nn.Conv2d(2, 3, 3, dilation=2, bias=False)], (2, 7, 6)),
    "conv2d-circular": ([nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular")], (2, 5, 5)),
    "conv2d-reflect": ([nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")], (2, 5, 5)),
    "conv2d-groups": ([nn.Conv2d(4, 6, 3, groups=2)], (4, 5, 5)),
    "conv2d-depthwise": ([nn.Conv2d(4, 8, 3, groups=4, stride=2)], (4, 6, 6)),
    "conv2d-few-places": ([nn.Conv2d(8, 9, 3)], (8, 3, 3)),
    "conv2d-few-places-groups": ([nn.Conv2d(16, 18, 3, groups=2)], (16, 3, 4)),
    "conv3d": ([nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=(0, 1, 1), dilation=(1, 1, 2))],
               (2, 3, 4, 5)),
    "layer-norm": ([_warm(nn.LayerNorm(5))], (3, 5)),
    "layer-norm-2d": ([_warm(nn.LayerNorm((3, 5)))], (2, 3, 5)),
    "layer-norm-no-bias": ([nn.LayerNorm(5, bias=False)], (5,)),
    "rms-norm": ([_warm(nn.RMSNorm(5))], (3, 5)),
    "rms-norm-eps": ([_warm(nn.RMSNorm((3, 5), eps=0.1))], (3, 5)),
    "group-norm": ([_warm(nn.GroupNorm(2, 4))], (4, 3, 3)),
    "batch-norm-1d": ([_warm(nn.BatchNorm1d(5))], (5,)),
    "batch-norm-2d": ([_warm(nn.BatchNorm2d(3))], (3, 4, 4)),
    "hf-conv1d": ([Conv1D(4, 5)], (3, 5)),
    "lora": ([LoRA()], (5,)),
    "attention": ([SelfAttention(batch_first=True)], (3, 4)),
    "attention-weights": ([SelfAttention(batch_first=True, need_weights=True)], (3, 4)),
    "attention-length-first": ([SelfAttention()], (3, 4)),
    "attention-no-bias": ([SelfAttention(bias=False)], (3, 4)),
}  # fmt: skip
TOKENS = {
    "embedding": [nn.Embedding(7, 4)],
    "embedding-padding": [nn.Embedding(7, 4, padding_idx=2)],
    "embedding-large": [nn.Embedding(7, 64)],
}
DENSE = {  # no rule: exact dense rows, with a note
    "transposed": ([nn.ConvTranspose2d(2, 3, 2)], (2, 3, 3)),
    "prelu": ([nn.PReLU()], (5,)),
    "lstm": ([nn.Unflatten(1, (2, 3)), nn.LSTM(3, 2, batch_first=True)], (6,)),
    "instance-norm": ([_warm(nn.InstanceNorm1d(3, affine=True))], (3, 6)),
}


def _data(inputs, n=5):
    rng = torch.Generator().manual_seed(2)
    x = torch.randn((n, *inputs), generator=rng, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=rng)


def _check(model, x, y):
    trainable = [p.requires_grad for p in model.parameters()]
    _, expected = reference(model, cross_entropy, x, y)
    rows = torch.cat(
        [
            torch.full((p.numel(),), used)
            for p, used in zip(model.parameters(), trainable, strict=True)
        ]
    )
    G = None
    for batch_size in (5, 3, 1):
        G = it.per_sample_gradients(model, cross_entropy, x, y, batch_size=batch_size)
        assert_close(G.to_dense(), expected[:, rows])
    if all(trainable):
        K = it.gauss_newton(model, cross_entropy, (x, y), batch_size=3)
        assert_close(K.to_dense(), gauss_newton_reference(model, cross_entropy, x, y))
    check_gradients(G)
    return it.per_sample_gradients(model, cross_entropy, x, y)


@pytest.mark.parametrize("name", FAST)
def test_known_layers_need_one_backward_pass(name, caplog):
    body, inputs = FAST[name]
    torch.manual_seed(0)
    model = Head(*body, inputs=inputs).double().eval()
    with caplog.at_level(logging.INFO, logger="invhvp"):
        G = _check(model, *_data(inputs))
    assert "dense per-sample gradients" not in caplog.text
    if name == "conv2d-few-places":
        assert type(G.blocks["body.0.weight"]) is OuterProductGradients
    elif name == "conv2d-few-places-groups":
        assert type(G.blocks["body.0.weight"]) is StackedGradients
        assert len(G.blocks["body.0.weight"].blocks) == 2
    elif "conv2d" in name:
        assert type(G.blocks["body.0.weight"]) is DenseGradients


@pytest.mark.parametrize("name", TOKENS)
def test_embeddings(name, caplog):
    torch.manual_seed(0)
    model = Head(*TOKENS[name], inputs=(3,), tokens=True).double()
    rng = torch.Generator().manual_seed(3)
    x = torch.randint(0, 7, (5, 3), generator=rng)
    with caplog.at_level(logging.INFO, logger="invhvp"):
        _check(model, x, torch.randint(0, 3, (5,), generator=rng))
    assert "dense per-sample gradients" not in caplog.text


@pytest.mark.parametrize("name", DENSE)
def test_anything_else_falls_back_to_exact_rows(name, caplog):
    body, inputs = DENSE[name]
    torch.manual_seed(0)

    class Last(nn.Module):
        def forward(self, h):
            return h[0] if isinstance(h, tuple) else h

    model = Head(*body, Last(), inputs=inputs).double().eval()
    with caplog.at_level(logging.INFO, logger="invhvp"):
        _check(model, *_data(inputs))
    assert "dense per-sample gradients for body" in caplog.text
    assert "head" not in caplog.text


class Shared(nn.Module):
    """A layer called three times, a weight tied to an embedding, one weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.other = nn.Linear(4, 4, bias=False)
        self.other.weight = self.mix.weight
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(torch.tanh(self.mix(self.embedding(x))))
        h = self.norm(torch.tanh(self.mix(h[:, :2]))) + self.other(h[:, :2])
        h = torch.tanh(self.conv(torch.tanh(self.conv(h.mT)))).mT
        return self.head(h.mean(1))


def test_shared_weights_are_summed_before_any_square(caplog):
    torch.manual_seed(0)
    model = Shared().double()
    rng = torch.Generator().manual_seed(3)
    x = torch.randint(0, 6, (5, 4), generator=rng)
    with caplog.at_level(logging.INFO, logger="invhvp"):
        _check(model, x, torch.randint(0, 3, (5,), generator=rng))
    assert "dense per-sample gradients" not in caplog.text


def test_a_weight_used_by_hand_too_is_exact(caplog):
    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 3, 3)

        def forward(self, x):
            return self.conv(x).sum(2) + F.conv1d(x.flip(2), self.conv.weight).square().sum(2)

    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, logger="invhvp"):
        _check(ByHand().double(), *_data((2, 6)))
    assert "conv.weight (vmap)" in caplog.text
    assert "conv.bias" not in caplog.text
