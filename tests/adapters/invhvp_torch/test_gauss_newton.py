from __future__ import annotations

import functools
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import invhvp as ih
import invhvp_torch as it
from invhvp.testing import check_gradients, check_operator
from tests.adapters.invhvp_torch.models import (
    BY_NAME,
    CASES,
    assert_close,
    cross_entropy,
    reference,
)
from tests.adapters.invhvp_torch.references import gauss_newton_reference, weighted_mean

MLP = BY_NAME["mlp"]
HUGE, SOME = 1e12, 6_000  # bytes: all rows, those of a batch


@pytest.mark.parametrize("memory", [HUGE, 0], ids=["cached", "through"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gauss_newton_equals_the_dense_one(case, memory):
    model, x, y = case.build()
    K = it.gauss_newton(model, case.loss, (x, y), memory=memory, batch_size=case.whole or 3)
    expected = gauss_newton_reference(model, case.loss, x, y)
    assert_close(K.to_dense(), expected, 1e-10)
    assert K.layout.names == it.hessian(model, case.loss, (x, y)).layout.names


@pytest.mark.parametrize("memory", [HUGE, SOME, 0], ids=["cached", "streamed", "through"])
def test_the_choice_is_visible_and_changes_nothing(memory, request):
    model, x, y = MLP.build()
    said = request.node.callspec.id
    for build in (it.gauss_newton, it.empirical_fisher, it.fisher):
        budget = 1_000 if memory == SOME and build is it.empirical_fisher else memory
        K = build(model, cross_entropy, (x, y), memory=budget, batch_size=2)
        assert said in repr(K)
        same = build(model, cross_entropy, (x, y), memory=HUGE)
        assert_close(K.to_dense(), same.to_dense())
        v = torch.linspace(-1, 1, K.shape[0], dtype=K.dtype)
        assert_close(K @ v, same @ v)
        assert_close(K @ torch.stack([v, v], 1)[:, :1], (same @ v)[:, None])
        check_operator(K)
    if memory:
        check_gradients(K.gradients)
        assert K.gradients.shape[0] == 21


def test_by_default_half_of_free_memory_decides(monkeypatch):
    model, x, y = MLP.build()
    assert "cached" in repr(it.gauss_newton(model, cross_entropy, (x, y)))
    from invhvp import _backend

    monkeypatch.setattr(_backend, "free_memory", lambda _: 2 * SOME)
    K = it.gauss_newton(model, cross_entropy, (x, y), batch_size=2)
    assert "streamed" in repr(K)
    with pytest.raises(ValueError, match="number of bytes"):
        it.gauss_newton(model, cross_entropy, (x, y), memory=-1)


@pytest.mark.parametrize("memory", [HUGE, SOME, 0])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 6, 7])
def test_batches_and_order_change_nothing(batch_size, memory):
    model, x, y = MLP.build()
    expected = gauss_newton_reference(model, cross_entropy, x, y)
    for data in (
        DataLoader(TensorDataset(x, y), batch_size=batch_size),
        DataLoader(TensorDataset(x.flip(0), y.flip(0)), batch_size=batch_size),
    ):
        for cache in (True, False):
            K = it.gauss_newton(model, cross_entropy, data, memory=memory, cache=cache)
            assert_close(K.to_dense(), expected)


@pytest.mark.parametrize("loss", ["cross-entropy", "mse", "bce", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gauss_newton_of_a_linear_model_is_its_hessian(loss, reduction):
    _, x, y = MLP.build()
    model = nn.Linear(5, 3).double()
    real = torch.rand((7, 3), dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    loss, target = {
        "cross-entropy": (nn.CrossEntropyLoss(reduction=reduction), y),
        "mse": (nn.MSELoss(reduction=reduction), real),
        "bce": (nn.BCEWithLogitsLoss(reduction=reduction), real),
        "probabilities": (nn.CrossEntropyLoss(reduction=reduction), real),
    }[loss]
    H = it.hessian(model, loss, (x, target), reduction=reduction).to_dense()
    for memory in (HUGE, 0):
        for build in (it.gauss_newton, it.fisher):
            K = build(model, loss, (x, target), reduction=reduction, memory=memory)
            assert_close(K.to_dense(), H)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(label_smoothing=0.2),
        functools.partial(cross_entropy, label_smoothing=0.2),
        lambda output, target: cross_entropy(output, target),
        nn.CrossEntropyLoss(ignore_index=9),
        lambda output, target: nn.functional.softplus(output - target[:, None]).mean(),
    ],
    ids=["smooth", "partial", "lambda", "ignore", "softplus"],
)
def test_other_losses_of_classes(loss):
    model, x, y = MLP.build()
    for memory in (HUGE, 0):
        K = it.gauss_newton(model, loss, (x, y), memory=memory)
        assert_close(K.to_dense(), gauss_newton_reference(model, loss, x, y), 1e-10)


def test_class_weights_and_ignored_samples():
    model, x, y = MLP.build()
    y[2] = -100
    w = torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)
    for loss in (
        nn.CrossEntropyLoss(weight=w, reduction="sum"),
        nn.CrossEntropyLoss(reduction="sum"),
    ):
        K = it.gauss_newton(model, loss, (x, y), reduction="sum", count=6)
        assert_close(K.to_dense(), 7 / 6 * gauss_newton_reference(model, loss, x, y), 1e-10)


def test_tokens_have_a_closed_form_by_place():
    model, x, y = BY_NAME["tokens"].build()

    class Channels(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x).transpose(1, 2)  # as torch's cross-entropy wants it

    model = Channels()
    y[1, 2] = -100  # every sample has its own mean
    for loss in (nn.CrossEntropyLoss(), lambda o, t: cross_entropy(o, t)):
        for memory in (HUGE, 0):
            K = it.gauss_newton(model, one_sample_mean(loss), (x, y), memory=memory, **NONE)
            assert_close(K.to_dense(), gauss_newton_reference(model, loss, x, y), 1e-10)
    y[1, 2] = 0
    for memory in (HUGE, 0):
        K = it.fisher(model, nn.CrossEntropyLoss(), (x, y), memory=memory)
        assert_close(K.to_dense(), gauss_newton_reference(model, nn.CrossEntropyLoss(), x, y))


NONE = {"reduction": "none"}


def one_sample_mean(loss):
    return lambda output, target: torch.stack(
        [loss(o[None], t[None]) for o, t in zip(output, target, strict=True)]
    )


def test_a_loss_that_is_not_convex_has_a_product_but_no_rows(caplog):
    model, x, y = BY_NAME["regression"].build()

    def welsch(output, target):
        return (1 - torch.exp(-4 * (output - target).square())).mean()

    K = it.gauss_newton(model, welsch, (x, y), memory=HUGE)
    assert "through the model" in repr(K)
    assert not K.psd
    assert_close(K.to_dense(), gauss_newton_reference(model, welsch, x, y))


def test_what_has_no_gauss_newton_or_fisher_matrix_is_named():
    model, x, y = BY_NAME["regression"].build()
    with pytest.raises(ValueError, match="linear in the model's outputs"):
        it.gauss_newton(model, lambda o, t: (o * t).mean(), (x, y))
    with pytest.raises(NotImplementedError, match="multi_margin_loss"):
        it.gauss_newton(model, nn.MultiMarginLoss(), (x, y[:, 0].long()))
    with pytest.raises(ValueError, match="likelihood"):
        it.fisher(model, nn.HuberLoss(), (x, y))
    with pytest.raises(ValueError, match="likelihood"):
        it.fisher(model, nn.HuberLoss(), (x, y), kind="mc")
    with pytest.raises(ValueError, match="empirical_fisher"):
        it.fisher(model, nn.MSELoss(), (x, y), kind="empirical")
    with pytest.raises(ValueError, match="samples"):
        it.fisher(model, nn.MSELoss(), (x, y), kind="mc", samples=0)
    with pytest.raises(ValueError, match="negative"):
        it.empirical_fisher(model, nn.MSELoss(), (x, y, -torch.ones(7, dtype=x.dtype)))
    with pytest.raises(ValueError, match="class weights"):
        it.gauss_newton(model, lambda o, t: 2 * ((o - t) ** 2).sum(), (x, y))


@pytest.mark.parametrize("memory", [HUGE, SOME, 0])
@pytest.mark.parametrize("name", ["mlp", "attention", "cnn", "recurrent"])
def test_empirical_fisher_is_the_mean_of_outer_products(name, memory):
    case = BY_NAME[name]
    model, x, y = case.build()
    _, G = reference(model, case.loss, x, y)
    F = it.empirical_fisher(model, case.loss, (x, y), batch_size=2, memory=memory)
    assert_close(F.to_dense(), G.T @ G / 7)
    w = torch.linspace(0, 2, 7, dtype=x.dtype)
    F = it.empirical_fisher(model, case.loss, (x, y, w), batch_size=3, memory=memory)
    assert_close(F.to_dense(), G.T @ (w[:, None] * G) / w.sum())


@pytest.mark.parametrize("memory", [HUGE, 0])
def test_sample_weights(memory):
    model, x, y = MLP.build()
    w = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0, 3.0, 0.25], dtype=x.dtype)
    expected = weighted_mean(model, cross_entropy, x, y, w)
    for loss in (cross_entropy, lambda o, t: cross_entropy(o, t)):
        K = it.gauss_newton(model, loss, (x, y, w), batch_size=3, memory=memory)
        assert_close(K.to_dense(), expected, 1e-10)


@pytest.mark.parametrize("memory", [HUGE, 0])
def test_batch_loss_sees_the_outputs_of_the_only_call(memory):
    model, x, y = MLP.build()

    def losses(model, batch):
        return cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    batches = [{"x": x[:4], "y": y[:4]}, {"x": x[4:], "y": y[4:]}]
    K = it.gauss_newton(model, batch_loss=losses, data=batches, memory=memory)
    assert_close(K.to_dense(), gauss_newton_reference(model, cross_entropy, x, y), 1e-10)
    F = it.empirical_fisher(model, batch_loss=losses, data=batches, memory=memory)
    _, G = reference(model, cross_entropy, x, y)
    assert_close(F.to_dense(), G.T @ G / 7)
    with pytest.raises(ValueError, match="exactly once"):
        it.gauss_newton(model, batch_loss=lambda m, b: losses(m, b) + losses(m, b), data=batches)


@pytest.mark.parametrize("name", ["mlp", "regression", "squeezed"])
def test_sampled_fisher_is_unbiased_and_reproducible(name):
    case = BY_NAME[name]
    model, x, y = case.build()
    expected = gauss_newton_reference(model, case.loss, x, y)
    F = it.fisher(model, case.loss, (x, y), kind="mc", samples=400, rng=3)
    error = float((F.to_dense() - expected).norm() / expected.norm())
    assert error < 0.15  # 1.5/√400 of a trace that few directions carry; at 1 sample it is 2
    few = {"kind": "mc", "samples": 2, "batch_size": case.whole or 3}
    F = it.fisher(model, case.loss, (x, y), **few, rng=5).to_dense()
    for memory in (HUGE, SOME, 0):
        again = it.fisher(model, case.loss, (x, y), **few, rng=5, memory=memory)
        assert_close(again.to_dense(), F)
        assert_close(again.to_dense(), F)
    assert not torch.allclose(it.fisher(model, case.loss, (x, y), **few, rng=6).to_dense(), F)


def test_uniform_predictions_and_dead_units():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    _, x, y = MLP.build()
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
        model[2].weight.zero_()
        model[2].bias.zero_()
    for memory in (HUGE, 0):
        K = it.gauss_newton(model, cross_entropy, (x, y), memory=memory).to_dense()
        assert_close(K, gauss_newton_reference(model, cross_entropy, x, y))
        assert float(K[:36, :].abs().max()) == 0.0
    inverse = ih.SampleSpace().prepare(it.gauss_newton(model, cross_entropy, (x, y)), damping=1e-3)
    b = torch.ones(K.shape[0], dtype=x.dtype)
    assert_close(K @ (inverse @ b) + 1e-3 * (inverse @ b), b, 1e-9)


def test_a_sure_model_in_float32_keeps_its_curvature():
    model, x, _ = MLP.build(dtype=torch.float32)
    with torch.no_grad():
        model[4].weight.mul_(30.0)
        y = model(x).argmax(1)
    K = it.gauss_newton(model, cross_entropy, (x, y))
    exact = gauss_newton_reference(model.double(), cross_entropy, x.double(), y)
    assert K.dtype == torch.float32
    assert_close(K.to_dense(), exact, 1e-4)


def test_training_mode_fixes_the_masks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double()
    _, x, y = MLP.build()
    options = {"training": True, "batch_size": 3, "rng": 4}
    K = it.gauss_newton(model, cross_entropy, (x, y), memory=HUGE, **options).to_dense()
    for memory in (SOME, 0):
        assert_close(
            it.gauss_newton(model, cross_entropy, (x, y), memory=memory, **options).to_dense(), K
        )
    assert not torch.allclose(it.gauss_newton(model, cross_entropy, (x, y)).to_dense(), K)


def test_the_model_is_left_as_found_and_changes_are_noticed():
    model, x, y = BY_NAME["cnn"].build()
    model.train()
    state = torch.get_rng_state()
    K = it.gauss_newton(model, cross_entropy, (x, y), memory=0)
    S = it.gauss_newton(model, cross_entropy, (x, y), memory=5_000, batch_size=2)
    assert "streamed" in repr(S)
    v = torch.ones(K.shape[0], dtype=K.dtype)
    assert_close(K @ v, S @ v, 1e-10)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    with torch.no_grad():
        model[0].weight.add_(1.0)
    for operator in (K, S):
        with pytest.raises(RuntimeError, match="changed"):
            operator @ v


def test_selection_is_a_diagonal_block():
    model, x, y = MLP.build()
    expected = gauss_newton_reference(model, cross_entropy, x, y)
    for memory in (HUGE, SOME, 0):
        K = it.gauss_newton(
            model, cross_entropy, (x, y), parameters=["0.bias", "4"], memory=memory, batch_size=2
        )
        rows = np.r_[30:36, 64:79]
        assert_close(K.to_dense(), expected[rows][:, rows])


def test_surrogate_of_the_hessian_saves_passes():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images[:304] / 16), torch.tensor(labels[:304])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(300):
        optimiser.zero_grad()
        cross_entropy(model(x[:300]), y[:300]).backward()
        optimiser.step()
    optimiser.zero_grad()
    train = (x[:300], y[:300])
    H = it.hessian(model, cross_entropy, train)
    K = it.gauss_newton(model, cross_entropy, train)
    assert K.layout.names == H.layout.names
    B = it.per_sample_gradients(model, cross_entropy, x[300:], y[300:])
    plain = ih.solve(H, B, ih.BlockCG(rtol=1e-6), damping=1e-3)
    preconditioner = ih.Surrogate(K, ih.SampleSpace())
    fast = ih.solve(H, B, ih.BlockCG(rtol=1e-6, preconditioner=preconditioner), damping=1e-3)
    assert plain.converged.all()
    assert fast.converged.all()
    assert fast.passes < 0.7 * plain.passes
    assert_close(fast.x, plain.x, 1e-4)


def test_streamed_fisher_has_an_exact_inverse_too(caplog):
    model, x, y = MLP.build()
    with caplog.at_level(logging.INFO, logger="invhvp"):
        F = it.empirical_fisher(model, cross_entropy, (x, y), memory=1_000, batch_size=2)
    assert "streamed" in repr(F)
    _, G = reference(model, cross_entropy, x, y)
    inverse = ih.SampleSpace().prepare(F, damping=0.1)
    expected = torch.linalg.inv(G.T @ G / 7 + 0.1 * torch.eye(F.shape[0], dtype=G.dtype))
    assert_close(inverse.to_dense(), expected, 1e-10)
