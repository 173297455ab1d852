from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import invhvp_torch as it
from invhvp.gradients import DenseGradients, OuterProductGradients
from invhvp.testing import check_gradients
from tests.adapters.invhvp_torch.models import (
    BY_NAME,
    CASES,
    assert_close,
    cross_entropy,
    reference,
)

MLP = BY_NAME["mlp"]


@pytest.mark.parametrize("batch_size", [7, 3, 1])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equal_the_jacobian_of_the_sample_losses(case, batch_size):
    if case.name == "squeezed" and batch_size < 7:
        pytest.skip("this model has no batches of one")
    model, x, y = case.build()
    _, expected = reference(model, case.loss, x, y)
    loader = DataLoader(TensorDataset(x, y), batch_size=batch_size)
    for G in (
        it.per_sample_gradients(model, case.loss, loader),
        it.per_sample_gradients(model, case.loss, x, y, batch_size=batch_size),
    ):
        assert_close(G.to_dense(), expected)
        assert G.layout.names == tuple(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
def test_float32(name):
    case = BY_NAME[name]
    model, x, y = case.build(dtype=torch.float32)
    G = it.per_sample_gradients(model, case.loss, (x, y))
    assert G.dtype == torch.float32
    _, expected = reference(model.double(), case.loss, x if case.tokens else x.double(), y)
    assert_close(G.to_dense(), expected, 1e-5)


def test_are_gradients_by_the_public_check():
    model, x, y = MLP.build()
    check_gradients(it.per_sample_gradients(model, cross_entropy, x, y))


def _kinds(G):
    return {name: type(block) for name, block in G.blocks.items()}


def test_linear_weights_stay_factored():
    model, x, y = MLP.build()
    G = it.per_sample_gradients(model, cross_entropy, DataLoader(TensorDataset(x, y), 3))
    kinds = _kinds(G)
    for name, kind in kinds.items():
        assert kind is (OuterProductGradients if "weight" in name else DenseGradients)


def test_only_recorded_uses_are_factored(caplog):
    model, x, y = BY_NAME["twice"].build()
    with caplog.at_level(logging.INFO, logger="invhvp"):
        G = it.per_sample_gradients(model, cross_entropy, x, y)
    kinds = _kinds(G)
    assert kinds["out.weight"] is OuterProductGradients
    assert kinds["shared.weight"] is DenseGradients
    assert "shared.weight (vmap)" in caplog.text
    assert "again" not in caplog.text  # called twice: two terms, or their dense sum if smaller
    assert "out." not in caplog.text


def test_what_vmap_cannot_follow_is_done_sample_by_sample(caplog):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 3)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            if float(x.abs().max()) > 1e9:
                raise AssertionError
            return torch.tanh(self.inner(x)) * self.scale

    model, (_, x, y) = Branching().double(), MLP.build(n=11)
    with caplog.at_level(logging.INFO, logger="invhvp"):
        G = it.per_sample_gradients(model, cross_entropy, x, y)
    assert "scale (sample by sample)" in caplog.text
    assert_close(G.to_dense(), reference(model, cross_entropy, x, y)[1])


def test_selection_and_frozen_parameters():
    model, x, y = MLP.build()
    _, expected = reference(model, cross_entropy, x, y)
    model[0].weight.requires_grad_(False)
    G = it.per_sample_gradients(model, cross_entropy, x, y)
    assert G.layout.names[0] == "0.bias"
    assert_close(G.to_dense(), expected[:, 30:])
    G = it.per_sample_gradients(model, cross_entropy, x, y, parameters=["4", "0.bias"])
    assert G.layout.names == ("0.bias", "4.weight", "4.bias")
    assert_close(G.to_dense(), torch.cat([expected[:, 30:36], expected[:, -15:]], 1))


def test_sample_weights_scale_the_rows():
    model, x, y = MLP.build()
    w = torch.linspace(0, 2, 7, dtype=x.dtype)
    G = it.per_sample_gradients(model, cross_entropy, (x, y, w))
    assert_close(G.to_dense(), w[:, None] * reference(model, cross_entropy, x, y)[1])


def test_batch_loss_and_reductions():
    model, x, y = BY_NAME["in-place"].build()
    _, expected = reference(model, cross_entropy, x, y)
    single = nn.CrossEntropyLoss(reduction="none")
    summed = nn.CrossEntropyLoss(reduction="sum")

    def losses(model, batch):
        assert batch["note"] == "kept"
        return single(model(batch["x"]), batch["y"])

    opaque = [{"x": x[:4], "y": y[:4], "note": "kept"}, {"x": x[4:], "y": y[4:], "note": "kept"}]
    for G in (
        it.per_sample_gradients(model, single, x, y, reduction="none"),
        it.per_sample_gradients(model, summed, x, y, reduction="sum"),
        it.per_sample_gradients(model, batch_loss=losses, data=opaque),
    ):
        assert_close(G.to_dense(), expected)
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype))
    with pytest.raises(ValueError, match="class weights"):
        it.per_sample_gradients(model, weighted, x, y)


def test_a_shuffling_loader_is_refused():
    model, x, y = MLP.build()
    loader = DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True)
    with pytest.raises(ValueError, match="shuffle=False"):
        it.per_sample_gradients(model, cross_entropy, loader)
    with pytest.raises(ValueError, match="no batches"):
        it.per_sample_gradients(model, cross_entropy, [])


def test_batch_normalisation_in_training_mode_is_refused():
    model, x, y = BY_NAME["cnn"].build()
    with pytest.raises(ValueError, match="BatchNorm2d"):
        it.per_sample_gradients(model, cross_entropy, x, y, training=True)


def test_training_mode_has_one_mask_for_all_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Dropout(0.5), nn.Linear(6, 3))
    model, (_, x, y) = model.double(), MLP.build()
    G = it.per_sample_gradients(model, cross_entropy, x, y, training=True)
    H = it.per_sample_gradients(model, cross_entropy, x, y, training=True, parameters="1.*")
    assert_close(G.to_dense()[:, 36:48], H.to_dense())
    other = it.per_sample_gradients(model, cross_entropy, x, y, training=True, rng=5)
    assert not torch.allclose(G.to_dense(), other.to_dense())
    # By hand, with the same masks.
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        losses = cross_entropy(model(x), y, reduction="none")
    rows = [torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in losses]
    expected = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    assert_close(G.to_dense(), expected)


def test_dead_units_and_uniform_predictions():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    _, x, y = MLP.build()
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
        model[2].weight.zero_()
    G = it.per_sample_gradients(model, cross_entropy, x, y)
    assert_close(G.to_dense(), reference(model, cross_entropy, x, y)[1])
    assert _kinds(G)["0.weight"] is OuterProductGradients


def test_a_sure_model_in_float32_keeps_the_fast_ways(caplog):
    model, x, _ = BY_NAME["cnn"].build(n=30, dtype=torch.float32)
    with torch.no_grad():
        model[7].weight.mul_(50.0)
        y = model.eval()(x).argmax(1)
    with caplog.at_level(logging.INFO, logger="invhvp"):
        it.per_sample_gradients(model, cross_entropy, x, y)
    assert "sample by sample" not in caplog.text
