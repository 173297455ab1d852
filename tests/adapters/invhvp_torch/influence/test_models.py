"""Every model against dense float64 algebra: factors, scores, by block and by layer."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import invhvp as ih
from invhvp_torch import influence as inf
from tests.adapters.invhvp_torch.influence import problem

RANK = 5


def exact(M, damping):
    return np.linalg.inv(M + damping * np.eye(len(M)))


def leading(M, damping):
    w, V = np.linalg.eigh(M)
    kept = np.argsort(-np.abs(w))[:RANK]
    return (V[:, kept] / (w[kept] + damping)) @ V[:, kept].T


def leading_and_rest(M, damping):
    w, V = np.linalg.eigh(M)
    kept = np.argsort(-np.abs(w))[:RANK]
    V = V[:, kept]
    return (V / (w[kept] + damping)) @ V.T + (np.eye(len(M)) - V @ V.T) / damping


def cg(model, loss, regularization, **options):
    return inf.CgInfluence(model, loss, regularization, rtol=1e-10, **options)


def block_cg(model, loss, regularization, **options):
    preconditioner = inf.preconditioner.NystroemPreconditioner(rank=6)
    return inf.CgInfluence(
        model, loss, regularization, rtol=1e-10, solve_simultaneously=True,
        preconditioner=preconditioner, **options,
    )  # fmt: skip


def lissa(model, loss, regularization, **options):
    return inf.LissaInfluence(model, loss, regularization, rtol=1e-4, **options)


def arnoldi(model, loss, regularization, **options):
    return inf.ArnoldiInfluence(model, loss, regularization, rank=RANK, tol=1e-9, **options)


def woodbury(model, loss, regularization, **options):
    return arnoldi(model, loss, regularization, use_woodbury=True, **options)


def sketch(model, loss, regularization, **options):
    return inf.NystroemSketchInfluence(model, loss, regularization, rank=80, **options)


def generic(model, loss, regularization, **options):
    return inf.InfluenceModel(model, loss, ih.Minres(rtol=1e-9), regularization, **options)


# Constructor, dense reference of a block's inverse, tolerance of the comparison.
MODELS = {
    "direct": (inf.DirectInfluence, exact, 1e-9),
    "cg": (cg, exact, 1e-7),
    "block-cg": (block_cg, exact, 1e-7),
    "lissa": (lissa, exact, 3e-3),
    "arnoldi": (arnoldi, leading, 1e-6),
    "arnoldi-woodbury": (woodbury, leading_and_rest, 1e-6),
    "nystroem": (sketch, exact, 1e-6),
    "generic": (generic, exact, 1e-6),
}
MODES = list(inf.SecondOrderMode)


def fitted(name, structure, mode):
    model, _, _ = problem.mlp()
    damping = problem.least(mode)
    if name == "lissa":
        damping = max(damping, 0.1)  # steps go like 1/λ
    build, reference, eps = MODELS[name]
    options = {"block_structure": problem.STRUCTURES[structure], "second_order_mode": mode}
    fit = build(model, problem.LOSS, damping, **options).fit(problem.loader())
    inverses = {
        k: reference(M, damping) for k, M in problem.blocks(problem.matrix(mode), structure).items()
    }
    return fit, inverses, eps


VARIANTS = ("block-cg", "arnoldi-woodbury", "generic")
CASES = [
    (name, structure, mode)
    for name in MODELS
    for structure in problem.STRUCTURES
    for mode in MODES
    if name not in VARIANTS or structure == "subset"  # what varies there is not the blocks
]


@pytest.mark.parametrize(("name", "structure", "mode"), CASES)
def test_factors_and_scores_are_those_of_the_dense_matrix(name, structure, mode):
    fit, inverses, eps = fitted(name, structure, mode)
    _, (x, y), (x_test, y_test) = problem.mlp()
    train = problem.by_block(problem.rows(), structure)
    test = problem.by_block(problem.rows(test=True), structure)
    factors = {k: test[k] @ inverse for k, inverse in inverses.items()}
    scores = {k: factors[k] @ train[k].T for k in inverses}

    found = fit.influence_factors(x_test, y_test)
    assert not found.requires_grad
    assert found.dtype == torch.float64
    problem.close(found.numpy(), np.concatenate(list(factors.values()), axis=1), eps)
    assert fit.n_parameters == found.shape[1] == sum(map(len, inverses.values()))
    assert fit.block_names == list(inverses)

    problem.close(fit.influences_from_factors(found, x, y).numpy(), sum(scores.values()), eps)
    problem.assert_blocks(fit.influences_by_block(x_test, y_test, x, y), scores, eps)


@pytest.mark.parametrize("structure", problem.STRUCTURES)
def test_harmonic_mean(structure):
    model, (x, y), (x_test, y_test) = problem.mlp()
    fit = inf.InverseHarmonicMeanInfluence(
        model, problem.LOSS, 1e-2, block_structure=problem.STRUCTURES[structure]
    ).fit(problem.loader())
    train = problem.by_block(problem.rows(), structure)
    test = problem.by_block(problem.rows(test=True), structure)
    expected = {}
    for name, G in train.items():
        p = G.shape[1]
        terms = [np.linalg.inv(np.outer(g, g) + 1e-2 * np.eye(p)) for g in G]
        expected[name] = test[name] @ np.mean(terms, axis=0) @ G.T
    problem.assert_blocks(fit.influences_by_block(x_test, y_test, x, y), expected, 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_alone_the_scores_are_symmetric(name):
    fit, _, _ = fitted(name, "layers", inf.SecondOrderMode.GAUSS_NEWTON)
    _, _, (x, y) = problem.mlp()
    found = fit.influences(x, y)
    assert torch.equal(found, found.mT)
    problem.close(found.numpy(), fit.influences(x, y, x, y).numpy(), 1e-3)
    for S in fit.influences_by_block(x, y).values():
        assert torch.equal(S, S.mT)


@pytest.mark.parametrize("structure", ["full", "subset"])
def test_layers_add_up_whatever_the_blocks(structure):
    fit, _, _ = fitted("direct", structure, inf.SecondOrderMode.HESSIAN)
    _, (x, y), (x_test, y_test) = problem.mlp()
    layers = fit.influences_by_layer(x_test, y_test, x, y)
    assert list(layers) == ["0", "2"]
    total = fit.influences(x_test, y_test, x, y).numpy()
    problem.close(sum(layers.values()).numpy(), total, 1e-12)
    factors = fit.influence_factors_by_layer(x_test, y_test)
    again = fit.influences_from_factors_by_layer(factors, x, y)
    problem.assert_blocks(again, {k: v.numpy() for k, v in layers.items()}, 1e-12)
    # A layer's columns are the weight and then the bias, as in `named_parameters()`.
    weight = dict(fit.model.named_parameters())["2.weight"].numel()
    whole = fit.influence_factors_by_block(x_test, y_test)
    out = whole["out"][:, -weight:] if structure == "subset" else whole[""][:, -weight - 3 : -3]
    assert torch.equal(factors["2"][:, :weight], out)


@pytest.mark.parametrize("structure", problem.STRUCTURES)
def test_perturbation_is_the_derivative_of_the_score(structure):
    fit, _, _ = fitted("direct", structure, inf.SecondOrderMode.GAUSS_NEWTON)
    _, (x, y), (x_test, y_test) = problem.mlp()
    x, y, h = x[:3], y[:3], 1e-5
    found = fit.influences(x_test, y_test, x, y, mode="perturbation")
    assert found.shape == (problem.N_TEST, 3, 4)
    expected = torch.empty_like(found)
    for j in range(x.shape[1]):
        step = torch.zeros_like(x)
        step[:, j] = h
        up = fit.influences(x_test, y_test, x + step, y)
        expected[:, :, j] = (up - fit.influences(x_test, y_test, x - step, y)) / (2 * h)
    problem.close(found.numpy(), expected.numpy(), 1e-6)
    mode = inf.InfluenceMode.Perturbation
    parts = fit.influences_by_block(x_test, y_test, x, y, mode=mode)
    problem.close(sum(parts.values()).numpy(), found.numpy(), 1e-12)
    factors = fit.influence_factors(x_test, y_test)
    again = fit.influences_from_factors(factors, x, y, mode=mode)
    problem.close(again.numpy(), found.numpy(), 1e-12)
    layers = fit.influences_by_layer(x_test, y_test, x, y, mode=mode)
    problem.close(sum(layers.values()).numpy(), found.numpy(), 1e-12)


def test_a_shuffling_loader_and_the_size_of_batches_change_nothing():
    model, _, (x, y) = problem.mlp()
    structure = {"block_structure": "layer_wise"}
    results = []
    for data in (problem.loader(), problem.loader(7, shuffle=True), problem.mlp()[1]):
        fit = inf.DirectInfluence(model, problem.LOSS, 0.3, **structure).fit(data)
        results.append(fit.influence_factors(x, y).numpy())
    problem.close(results[1], results[0], 1e-10)
    problem.close(results[2], results[0], 1e-10)


def test_the_model_is_left_as_it_was():
    model, _, (x, y) = problem.mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inf.DirectInfluence(model, problem.LOSS, 0.3).fit(problem.loader()).influences(x, y)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
