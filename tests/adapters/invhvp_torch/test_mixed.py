from __future__ import annotations

import pytest
import torch
from torch import nn

import invhvp_torch as it
from tests.adapters.invhvp_torch.models import BY_NAME, assert_close, cross_entropy

MLP = BY_NAME["mlp"]


def _vectors(n, k):
    return torch.randn((n, k), dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def _by_hand(model, loss, x, y, V):
    """Sample by sample, column by column, with plain autograd."""
    model.eval()
    parameters = list(model.parameters())
    columns = []
    for v in V.T:
        rows = []
        for i in range(len(x)):
            one = x[i : i + 1].clone().requires_grad_()
            slopes = torch.autograd.grad(
                loss(model(one), y[i : i + 1]), parameters, create_graph=True
            )
            inner = torch.cat([s.reshape(-1) for s in slopes]) @ v
            rows.append(torch.autograd.grad(inner, one)[0][0])
        columns.append(torch.stack(rows))
    return torch.stack(columns)


@pytest.mark.parametrize("name", ["mlp", "regression", "cnn", "recurrent", "twice", "tokens"])
def test_equal_the_derivative_by_hand(name):
    case = BY_NAME[name]
    model, x, y = case.build()
    n = it.to_array(model).shape[0]
    V = _vectors(n, 3)
    if name == "twice":
        model.idle.requires_grad_(False)
        V = V[: n - 6]
        found = [
            it.mixed_gradients(model, case.loss, x, y, V, batch_size=size) for size in (7, 3, 1)
        ]
        del model.idle
    else:
        found = [
            it.mixed_gradients(model, case.loss, x, y, V, batch_size=size) for size in (7, 3, 1)
        ]
    expected = _by_hand(model, case.loss, x, y, V)
    assert expected.shape == (3, *x.shape)
    for M in found:
        assert_close(M, expected)
    one = it.mixed_gradients(model, case.loss, x, y, V[:, 1])
    assert_close(one, expected[1])


def test_selection_and_linear_models():
    model, x, y = MLP.build()
    V = _vectors(it.to_array(model).shape[0], 2)
    some = V.clone()
    some[:-15, :] = 0.0
    whole = it.mixed_gradients(model, cross_entropy, x, y, some)
    part = it.mixed_gradients(model, cross_entropy, x, y, V[-15:], parameters="4")
    assert_close(part, whole)
    constant = nn.Linear(5, 3).double()
    M = it.mixed_gradients(constant, lambda o, t: o.sum(1).mean(), x, y, _vectors(18, 2))
    assert_close(M, M[:, :1].expand_as(M))  # the gradient is x itself, whatever x is


def test_leaves_model_and_inputs_alone():
    model, x, y = MLP.build()
    model.train()
    before = x.clone()
    it.mixed_gradients(model, cross_entropy, x, y, _vectors(79, 1))
    assert not x.requires_grad
    assert torch.equal(x, before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_wrong_arguments_are_named():
    case = BY_NAME["attention"]
    model, tokens, y = case.build()
    with pytest.raises(TypeError, match=r"model\.embedding\(tokens\)"):
        it.mixed_gradients(model, cross_entropy, tokens, y, _vectors(10, 1))
    model, x, y = MLP.build()
    for wrong, error in (
        (_vectors(78, 1), ValueError),
        (_vectors(79, 1).float(), TypeError),
        (_vectors(79, 1).numpy(), TypeError),
        (_vectors(79, 1)[:, :, None], ValueError),
    ):
        with pytest.raises(error, match="V must"):
            it.mixed_gradients(model, cross_entropy, x, y, wrong)
    with pytest.raises(TypeError, match="one tensor"):
        it.mixed_gradients(model, cross_entropy, [x], y, _vectors(79, 1))
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype))
    with pytest.raises(ValueError, match="class weights"):
        it.mixed_gradients(model, weighted, x, y, _vectors(79, 1))
