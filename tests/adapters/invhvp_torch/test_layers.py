"""Every layer's rule against torch's dense per-sample gradients, in float64."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import invhvp as ih
import invhvp_torch as it
from invhvp.gradients import (
    DenseGradients,
    EmbeddingGradients,
    OuterProductGradients,
    StackedGradients,
)
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


class CrossAttention(nn.Module):
    """Half of the sequence asks the other half, which is two sequences where `kv` says so."""

    def __init__(self, *, kv: bool, mask: bool = False, **options) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, **options)
        self.kv, self.mask = kv, mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k = x[:, 2:, : self.inner.kdim]
        v = k if self.kv else torch.sin(x[:, 2:, -self.inner.vdim :])
        h = [x[:, :2], k, v]
        if not self.inner.batch_first:
            h = [t.transpose(0, 1) for t in h]
        mask = torch.zeros(2, x.shape[1] - 2, dtype=torch.bool)
        mask[0, 0] = self.mask
        h = self.inner(*h, need_weights=False, attn_mask=mask)[0]
        return h if self.inner.batch_first else h.transpose(0, 1)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x[:, :2], x[:, 2:])


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
    "cross-attention": ([CrossAttention(kv=True, batch_first=True)], (5, 4)),
    "cross-attention-length-first": ([CrossAttention(kv=True)], (5, 4)),
    "cross-attention-values": ([CrossAttention(kv=False, batch_first=True)], (5, 4)),
    "cross-attention-masked": ([CrossAttention(kv=False, mask=True)], (5, 4)),
    "cross-attention-no-bias": ([CrossAttention(kv=True, bias=False)], (5, 4)),
    "cross-attention-sizes": ([CrossAttention(kv=False, batch_first=True, kdim=3, vdim=2)], (5, 4)),
    "cross-attention-one-key": ([CrossAttention(kv=False, batch_first=True)], (3, 4)),
    "decoder": ([Decoder()], (5, 4)),
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
    elif name == "cross-attention-one-key":
        assert list(G.blocks["body.0.inner.in_proj_weight"].blocks) == [
            "rows 0:4",
            "rows 4:8",
            "rows 8:12",
        ]
    elif "conv2d" in name:
        assert type(G.blocks["body.0.weight"]) is DenseGradients


@pytest.mark.parametrize("name", TOKENS)
def test_embeddings(name, caplog):
    torch.manual_seed(0)
    model = Head(*TOKENS[name], inputs=(3,), tokens=True).double()
    rng = torch.Generator().manual_seed(3)
    x = torch.randint(0, 7, (5, 3), generator=rng)
    x[0] = 2  # one word three times, which is the padding
    with caplog.at_level(logging.INFO, logger="invhvp"):
        G = _check(model, x, torch.randint(0, 3, (5,), generator=rng))
    assert "dense per-sample gradients" not in caplog.text
    assert type(G.blocks["body.0.weight"]) is EmbeddingGradients


def test_an_embedding_of_one_index_a_sample(caplog):
    torch.manual_seed(0)
    model = Head(nn.Embedding(7, 4), inputs=(), tokens=True).double()
    x, y = torch.tensor([0, 3, 3, 6, 1]), torch.tensor([0, 1, 2, 0, 1])
    with caplog.at_level(logging.INFO, logger="invhvp"):
        G = _check(model, x, y)
    assert "dense per-sample gradients" not in caplog.text
    assert type(G.blocks["body.0.weight"]) is EmbeddingGradients


def test_an_embedding_of_more_words_than_its_table_is_dense():
    torch.manual_seed(0)
    model = Head(nn.Embedding(3, 4), inputs=(9,), tokens=True).double()
    rng = torch.Generator().manual_seed(3)
    x = torch.randint(0, 3, (5, 9), generator=rng)
    G = _check(model, x, torch.randint(0, 3, (5,), generator=rng))
    assert type(G.blocks["body.0.weight"]) is DenseGradients


@pytest.mark.parametrize("options", [{"sparse": True}, {"max_norm": 0.5}], ids=str)
def test_options_of_embeddings(options, caplog):
    torch.manual_seed(0)
    model = Head(nn.Embedding(7, 4, **options), inputs=(3,), tokens=True).double()
    x, y = torch.tensor([[0, 3, 3], [6, 1, 0], [2, 2, 2]]), torch.tensor([0, 1, 2])
    with caplog.at_level(logging.INFO, logger="invhvp"):
        G = it.per_sample_gradients(model, cross_entropy, x, y)
    assert "dense per-sample gradients" not in caplog.text
    parameters = list(model.parameters())
    rows = []
    for i in range(3):  # by hand, each sample alone
        found = torch.autograd.grad(cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters)
        rows.append(torch.cat([g.to_dense().reshape(-1) for g in found]))
    assert_close(G.to_dense(), torch.stack(rows))


def test_gradients_that_depend_on_the_batch_are_refused():
    model = Head(nn.Embedding(7, 4, scale_grad_by_freq=True), inputs=(3,), tokens=True)
    x, y = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1])
    for compute in (it.per_sample_gradients, it.gauss_newton, it.hessian):
        with pytest.raises(ValueError, match=r"Embedding 'body.0'.*set scale_grad_by_freq=False"):
            compute(model, cross_entropy, (x, y))
    model.body[0].requires_grad_(False)
    it.per_sample_gradients(model, cross_entropy, (x, y))


@pytest.mark.parametrize("words", [9, 40])
def test_a_tied_embedding_is_the_sum_of_both_uses(words, caplog):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(words, 16, padding_idx=1)
            self.head = nn.Linear(16, words, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(torch.tanh(self.embedding(x)).mean(1))

    torch.manual_seed(0)
    x, y = (
        torch.tensor([[0, 3, 3, 5, 5, 5], [6, 1, 1, 7, 0, 4], [2, 2, 2, 2, 2, 2]]),
        torch.tensor([0, 1, 2]),
    )
    with caplog.at_level(logging.INFO, logger="invhvp"):
        G = _check(Tied().double(), x, y)
    assert "dense per-sample gradients" not in caplog.text
    kind = type(G.blocks["embedding.weight"])
    assert kind is (OuterProductGradients if words == 40 else DenseGradients)


def test_parts_of_scores_of_a_model_in_numpy_arrays():
    """Scores by block and by token from torch's factors, handed over without copies."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(30, 16)
            self.mix = nn.Linear(16, 16)
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.mix(self.embedding(x))).mean(1))

    torch.manual_seed(0)
    model, rng = Model().double(), torch.Generator().manual_seed(3)
    x, y = torch.randint(0, 30, (6, 4), generator=rng), torch.randint(0, 3, (6,), generator=rng)
    G = it.per_sample_gradients(model, cross_entropy, x, y, array_namespace=np)
    inverse = ih.SampleSpace().prepare(ih.RankOneMean(G), damping=0.1)
    influence = ih.Influence(inverse, G)
    rows = reference(model, cross_entropy, x, y)[1].numpy()
    X = np.linalg.solve(rows.T @ rows / 6 + 0.1 * np.eye(rows.shape[1]), rows[:2].T)
    by_block = influence.scores_by_block(G[:2])
    by_token = influence.scores_by_position(G[:2])
    close = {"rtol": 0, "atol": 1e-12 * np.abs(rows).max() * np.abs(X).sum()}
    for name, block in G.layout.items():
        expected = (rows[:, block.indices] @ X[block.indices]).T
        np.testing.assert_allclose(by_block[name], expected, **close)
    positions = {name: parts.shape[2] for name, parts in by_token.items()}
    assert positions == {"embedding.weight": 4, "mix.weight": 4, "head.weight": 1}
    for name, parts in by_token.items():
        np.testing.assert_allclose(parts.sum(axis=2), by_block[name], **close)
    # By hand: what the gradient in each token's vector says.
    h = model.embedding(x).detach().requires_grad_()
    losses = cross_entropy(model.head(torch.tanh(model.mix(h)).mean(1)), y, reduction="sum")
    (d,) = torch.autograd.grad(losses, h)
    table = torch.from_numpy(X[G.layout["embedding.weight"].indices]).reshape(30, 16, 2)
    expected = torch.einsum("ntd,ntdk->knt", d, table[x])
    np.testing.assert_allclose(by_token["embedding.weight"], expected.numpy(), **close)


def test_batches_of_either_form_are_joined():
    """Sequences of three lengths: weights in three slices, in two, and dense where smaller."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(3, 4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            h = self.embedding(x)
            k = h[:, 1:]
            v = k if x.shape[1] == 3 else k.sin()
            return self.head(self.attention(h[:, :1], k, v)[0].mean(1))

    model, rng = Model().double(), torch.Generator().manual_seed(3)
    batches = []
    for length in (2, 3, 9):
        x = torch.randint(0, 3, (2, length), generator=rng)
        batches.append((x, torch.randint(0, 3, (2,), generator=rng)))
    G = it.per_sample_gradients(model, cross_entropy, batches)
    expected = [reference(model, cross_entropy, *batch)[1] for batch in batches]
    assert_close(G.to_dense(), torch.cat(expected))


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


class Bottleneck(nn.Module):
    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(n_in, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
        )
        skip = nn.Conv2d(n_in, 4 * width, 1, stride, bias=False)
        self.skip = skip if n_in != 4 * width else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.skip(x))


@pytest.mark.slow
def test_gradients_of_a_residual_network_fit_in_300_megabytes():
    """64 samples of 32 x 32 pixels, 23.5 million parameters: dense rows are 6 GB."""
    torch.manual_seed(0)
    body, n_in = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.MaxPool2d(3, 2)], 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for b in range(blocks):
            body.append(Bottleneck(n_in, width, stride if b == 0 else 1))
            n_in = 4 * width
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, 10)).eval()
    x, y = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    G = it.per_sample_gradients(model, cross_entropy, x, y, batch_size=16)
    assert G.shape[1] > 23.5e6
    assert G.nbytes < 300e6
    row = torch.autograd.grad(cross_entropy(model(x[:1]), y[:1]), list(model.parameters()))
    assert_close(G[:1].to_dense()[0], torch.cat([g.reshape(-1) for g in row]), 1e-4)


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
