"""K-FAC and EKFAC against factors written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import invhvp as ih
import invhvp_torch as it
from invhvp_torch import influence as inf
from tests.adapters.invhvp_torch.influence import problem


def softmax_regression():
    """One linear layer, its inputs with a one, the roots of the Fisher matrix in the outputs."""
    _, (x, y), (x_test, y_test) = problem.mlp()
    model = torch.nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.arange(12.0).reshape(3, 4).sin())
        model.bias.copy_(torch.arange(3.0).cos())
        p = torch.softmax(model(x), 1).numpy()
    a = np.concatenate([x.numpy(), np.ones((len(x), 1))], axis=1)
    d = np.sqrt(p)[:, :, None] * (np.eye(3)[None] - p[:, None, :])  # (N, columns, outputs)
    return model, (x, y), (x_test, y_test), a, d


def by_hand(a, d, *, corrected):
    """The (15, 15) matrix in the order of the parameters: the weight, then the bias."""
    S = np.einsum("nco,ncq->oq", d, d) / len(a)
    A = a.T @ a / len(a)
    K = np.kron(S, A)
    if corrected:
        U, V = np.linalg.eigh(S)[1], np.linalg.eigh(A)[1]
        Lambda = np.einsum("nco,ni->oi", (d @ U) ** 2, (a @ V) ** 2) / len(a)
        Q = np.kron(U, V)
        K = (Q * Lambda.reshape(-1)) @ Q.T
    order = np.concatenate([np.arange(15).reshape(3, 5)[:, :4].reshape(-1), [4, 9, 14]])
    return K[np.ix_(order, order)]


@pytest.mark.parametrize("corrected", [False, True])
def test_one_layer(corrected):
    model, train, (x, y), a, d = softmax_regression()
    K = by_hand(a, d, corrected=corrected)
    test = it.per_sample_gradients(model, problem.LOSS, x, y).to_dense().numpy()
    fit = inf.EkfacInfluence(model, corrected, hessian_regularization=1e-3).fit([train])
    expected = np.linalg.solve(K + 1e-3 * np.eye(15), test.T).T
    problem.close(fit.influence_factors(x, y).numpy(), expected, 1e-9)
    found = fit.explore_hessian_regularization(x, y, [1e-2, 1.0])
    for value, layers in found.items():
        assert list(layers) == [""]
        S = test @ np.linalg.solve(K + value * np.eye(15), test.T)
        problem.close(layers[""].numpy(), S, 1e-9)
    # The outputs of softmax move together: S has a null vector, and λ = 0 leaves it out.
    with pytest.warns(ih.InvhvpWarning, match="pseudo-inverse of rank 10 of 15"):
        fit.hessian_regularization = 0.0
    pseudo = np.linalg.pinv(K, rcond=1e-12, hermitian=True)
    problem.close(fit.influence_factors(x, y).numpy(), test @ pseudo, 1e-7)
    assert "pseudo-inverse of rank 10 of 15" in repr(fit)


@pytest.mark.parametrize("corrected", [False, True])
def test_layers_have_their_own_blocks_and_lambda(corrected):
    model, train, (x, y) = problem.mlp()
    damping = {"0": 0.1, "2": 0.02}
    fit = inf.EkfacInfluence(model, corrected, damping).fit(problem.loader())
    K = (it.ekfac if corrected else it.kfac)(model, problem.LOSS, train).to_dense().numpy()
    test = problem.by_block(problem.rows(test=True), "layers")
    own = problem.by_block(problem.rows(), "layers")
    factors = {
        k: np.linalg.solve(M + damping[k] * np.eye(len(M)), test[k].T).T
        for k, M in problem.blocks(K, "layers").items()
    }
    assert np.abs(K[:15, 15:]).max() == 0
    problem.assert_blocks(fit.influence_factors_by_layer(x, y), factors, 1e-9)
    scores = {k: F @ own[k].T for k, F in factors.items()}
    problem.assert_blocks(fit.influences_by_layer(x, y, *train), scores, 1e-9)
    problem.close(fit.influences(x, y, *train).numpy(), sum(scores.values()), 1e-9)
    perturbed = fit.influences(x, y, *train, mode="perturbation")
    assert perturbed.shape == (3, 15, 4)
    layers = fit.influences_by_layer(x, y, *train, mode="perturbation")
    problem.close(sum(layers.values()).numpy(), perturbed.numpy(), 1e-12)


def test_layers_without_bias_convolutions_and_norms():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, groups=2, bias=False),
        torch.nn.Flatten(),
        torch.nn.LayerNorm(16),
        torch.nn.Linear(16, 3, bias=False),
    ).double()
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(9, 2, 4, 4, generator=rng, dtype=torch.float64)
    y = torch.randint(0, 3, (9,), generator=rng)
    fit = inf.EkfacInfluence(model, update_diagonal=True, hessian_regularization=0.1).fit((x, y))
    assert fit.block_names == ["0", "2", "3"]
    K = it.ekfac(model, problem.LOSS, (x, y)).to_dense()
    G = it.per_sample_gradients(model, problem.LOSS, x, y).to_dense()
    expected = torch.linalg.solve(K + 0.1 * torch.eye(len(K), dtype=K.dtype), G.mT).mT
    problem.close(fit.influence_factors(x, y).numpy(), expected.numpy(), 1e-9)


def test_another_loss_and_fisher():
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x.sum(1, keepdim=True).sin()
    model, loss = torch.nn.Linear(3, 1).double(), torch.nn.functional.mse_loss
    fit = inf.EkfacInfluence(model, True, 0.1, loss=loss, fisher="empirical").fit((x, y))
    K = it.ekfac(model, loss, (x, y), fisher="empirical").to_dense()
    problem.close(fit.operator_.to_dense().numpy(), K.numpy(), 1e-12)
    assert "EKFAC, empirical Fisher" in repr(fit)
    plain = inf.EkfacInfluence(problem.mlp()[0], hessian_regularization=1.0)
    assert "K-FAC, exact Fisher" in repr(plain.fit(problem.loader()))
