"""Signatures, errors, blocks, λ = 0 and what may be set after `fit`."""

from __future__ import annotations

import inspect
import pickle
import warnings

import numpy as np
import pytest
import torch

import invhvp as ih
import invhvp_torch as it
from invhvp_torch import influence as inf
from tests.adapters.invhvp_torch.influence import problem

LOSS = problem.LOSS
SIGNATURES = {
    "CgInfluence": "model, loss, regularization=None, rtol=1e-06, atol=0.0, maxiter=None, "
    "progress=False, precompute_grad=False, preconditioner=None, solve_simultaneously=False, "
    "warn_on_max_iteration=True, block_structure=full, second_order_mode=hessian",
    "LissaInfluence": "model, loss, regularization=None, maxiter=1000, dampen=0.0, scale=auto, "
    "rtol=0.0001, progress=False, warn_on_max_iteration=True, block_structure=full, "
    "second_order_mode=hessian, force=False",
    "ArnoldiInfluence": "model, loss, regularization=None, rank=10, krylov_dimension=None, "
    "tol=1e-06, max_iter=None, eigen_computation_on_gpu=False, block_structure=full, "
    "second_order_mode=hessian, use_woodbury=False",
    "NystroemSketchInfluence": "model, loss, regularization, rank, block_structure=full, "
    "second_order_mode=hessian",
    "InverseHarmonicMeanInfluence": "model, loss, regularization, block_structure=full",
    "DirectInfluence": "model, loss, regularization=None, block_structure=full, "
    "second_order_mode=hessian",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(inf, name)).parameters.values()
    shown = [
        p.name if p.default is p.empty else f"{p.name}={p.default}"  # modes are strings
        for p in parameters
    ]
    assert ", ".join(shown) == SIGNATURES[name]


def direct(regularization=0.3, **options):
    return inf.DirectInfluence(problem.mlp()[0], LOSS, regularization, **options)


def dense_factors(damping, mode=inf.SecondOrderMode.HESSIAN):
    M = problem.matrix(mode)
    return np.linalg.solve(M + damping * np.eye(len(M)), problem.rows(test=True).T).T


# ------------------------------------------------------------------------------------------ errors


def test_what_needs_fit_says_so():
    _, (x, y), _ = problem.mlp()
    model = direct()
    assert not model.is_fitted
    for call in (
        lambda: model.influences(x, y),
        lambda: model.influence_factors(x, y),
        lambda: model.influences_from_factors(torch.zeros(1, 27, dtype=x.dtype), x, y),
        lambda: model.influence_factors_by_block(x, y),
        lambda: model.influences_by_layer(x, y),
        lambda: model.explore_hessian_regularization(x, y, [1.0]),
        lambda: model.operator_,
        lambda: model.inverse_,
        lambda: model.solution_,
    ):
        with pytest.raises(inf.NotFittedError, match="call fit first"):
            call()
    assert issubclass(inf.NotFittedError, ValueError)
    with pytest.raises(inf.NotFittedError, match="no solve yet"):
        _ = model.fit((x, y)).solution_
    assert model.is_fitted


def test_unknown_modes_and_attributes_raise():
    _, (x, y), _ = problem.mlp()
    model = direct().fit((x, y))
    with pytest.raises(inf.UnsupportedModeError, match="'down' is no InfluenceMode"):
        model.influences(x, y, mode="down")
    with pytest.raises(inf.UnsupportedModeError, match="layer_wise"):
        direct(block_structure="layers")
    with pytest.raises(inf.UnsupportedModeError, match="gauss_newton"):
        direct(second_order_mode="newton")
    assert issubclass(inf.UnsupportedModeError, ValueError)
    assert inf.InfluenceMode("up") is inf.InfluenceMode.Up == "up"
    with pytest.raises(AttributeError, match="regularisation"):
        model.regularisation = 0.1
    with pytest.raises(AttributeError, match="hessian_damping"):
        _ = model.hessian_damping


def test_x_and_y_go_together():
    _, (x, y), _ = problem.mlp()
    model = direct().fit((x, y))
    for given in ({"x": x}, {"y": y}):
        for call in (model.influences, model.influences_by_block, model.influences_by_layer):
            with pytest.raises(ValueError, match="pass both"):
                call(x, y, **given)


def test_factors_of_another_shape_are_refused():
    _, (x, y), _ = problem.mlp()
    model = direct(block_structure="layer_wise").fit((x, y))
    with pytest.raises(ValueError, match=r"must have shape \(N, 27\), got \(2, 3\)"):
        model.influences_from_factors(torch.zeros(2, 3), x, y)
    with pytest.raises(TypeError, match="tensor of rows"):
        model.influences_from_factors([[1.0]], x, y)
    with pytest.raises(ValueError, match="no block 'head'"):
        model.influences_from_factors_by_block({"head": torch.zeros(2, 3)}, x, y)
    with pytest.raises(ValueError, match=r"factors of '0' must have shape \(N, 15\)"):
        model.influences_from_factors_by_layer({"0": torch.zeros(2, 3)}, x, y)


# ------------------------------------------------------------------------------------------ blocks


def test_block_mappings_are_checked():
    with pytest.raises(ValueError, match=r"'3.weight', which is no parameter"):
        direct(block_structure={"a": ["3.weight"]})
    with pytest.raises(ValueError, match="in the blocks 'a' and 'b'"):
        direct(block_structure={"a": ["0.weight"], "b": ["0.bias", "0.weight"]})
    with pytest.raises(ValueError, match="in the blocks 'a' and 'a'"):
        direct(block_structure={"a": ["0.weight", "0.weight"]})
    with pytest.raises(TypeError, match="must list parameter names"):
        direct(block_structure={"a": "0.weight"})
    with pytest.raises(ValueError, match="no trainable parameters"):
        direct(block_structure={})


class WithTop(torch.nn.Module):
    """A parameter of its own, a layer twice removed, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.body = torch.nn.ModuleDict({"inner": torch.nn.Linear(4, 3)})
        self.frozen = torch.nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.body["inner"](x)) * self.scale


def test_layers_include_top_level_parameters_and_frozen_ones_are_left_out():
    _, (x, y), _ = problem.mlp()
    model = WithTop().double()
    layers = inf.DirectInfluence(model, LOSS, 1.0, block_structure="layer_wise")
    assert layers.block_names == ["", "body.inner"]
    assert layers.n_parameters == 3 + 15
    structure = {"a": ["frozen.bias", "scale"]}
    with pytest.warns(ih.InvhvpWarning, match="frozen parameters are left out.*frozen.bias"):
        some = inf.DirectInfluence(model, LOSS, 1.0, block_structure=structure)
    assert some.n_parameters == 3
    by_layer = layers.fit((x, y)).influence_factors_by_block(x, y)
    assert {k: tuple(v.shape) for k, v in by_layer.items()} == {"": (15, 3), "body.inner": (15, 15)}
    H = it.hessian(model, LOSS, (x, y), parameters=["scale"]).to_dense().numpy()
    G = it.per_sample_gradients(model, LOSS, x, y, parameters=["scale"]).to_dense().numpy()
    problem.close(by_layer[""].numpy(), np.linalg.solve(H + np.eye(3), G.T).T, 1e-10)


def test_a_shared_parameter_is_known_by_all_its_names():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match="in the blocks 'a' and 'b'"):
        inf.DirectInfluence(model, LOSS, block_structure={"a": ["0.weight"], "b": ["2.weight"]})
    fit = inf.DirectInfluence(model, LOSS, block_structure={"a": ["2.weight", "0.bias"]})
    assert fit.n_parameters == 12


# ------------------------------------------------------------------------------------------ λ


def test_regularization_by_block_and_by_parent():
    _, (x, y), (x_test, y_test) = problem.mlp()
    options = {"block_structure": "parameter_wise"}
    fit = direct({"": 5, "0": 0.5, "0.bias": 2.0}, **options).fit((x, y))
    expected = {}
    test = problem.by_block(problem.rows(test=True), "parameters")
    for name, M in problem.blocks(problem.matrix("hessian"), "parameters").items():
        damping = {"0.weight": 0.5, "0.bias": 2.0}.get(name, 5.0)
        expected[name] = np.linalg.solve(M + damping * np.eye(len(M)), test[name].T).T
    problem.assert_blocks(fit.influence_factors_by_block(x_test, y_test), expected, 1e-9)
    with pytest.raises(ValueError, match="regularization names '1'"):
        direct({"1": 0.5}, **options)
    for bad, error in ((-1.0, ValueError), (float("nan"), ValueError), (True, TypeError)):
        for value in (bad, {"0": bad}):
            with pytest.raises(error, match="regularization must be"):
                direct(value, block_structure="layer_wise")


def test_a_mapping_may_leave_blocks_out():
    fit = inf.CgInfluence(
        problem.mlp()[0], LOSS, {"2": 0.5, "0": None}, block_structure="layer_wise"
    )
    fit_with_one_warning(fit, "regularization is 0 in 0; the smallest usable value is")
    assert fit.inverse_.damping == {"0": 0.0, "2": 0.5}


@pytest.mark.parametrize("method", [ih.Direct(), ih.BlockCG(rtol=1e-11), ih.Arnoldi(rank=30)])
def test_lambda_can_be_set_after_fit(method):
    model, (x, y), (x_test, y_test) = problem.mlp()
    fit = inf.InfluenceModel(model, LOSS, method, 9.0).fit((x, y))
    for how in ("assign", "alias", "call"):
        damping = {"assign": 0.2, "alias": 0.4, "call": 0.8}[how]
        if how == "assign":
            fit.regularization = damping
        elif how == "alias":
            fit.hessian_regularization = damping
        else:
            assert fit.with_regularization(damping) is fit
        assert fit.regularization == fit.hessian_regularization == damping
        found = fit.influence_factors(x_test, y_test).numpy()
        problem.close(found, dense_factors(damping), 1e-7)


def products(operator):
    """Count the columns that an operator multiplies from now on."""
    seen, original = [], operator._matmat

    def counting(X):
        seen.append(X.shape[1])
        return original(X)

    operator._matmat = counting
    return seen


@pytest.mark.parametrize(
    ("build", "spent"),
    [
        (lambda m: inf.DirectInfluence(m, LOSS, 0.3), 0),
        (lambda m: inf.ArnoldiInfluence(m, LOSS, 0.3, rank=27, use_woodbury=True), 0),
        (lambda m: inf.NystroemSketchInfluence(m, LOSS, 0.3, rank=27), 0),
        (lambda m: inf.CgInfluence(m, LOSS, 0.3, rtol=1e-11, solve_simultaneously=True), 40),
    ],
)
def test_exploring_lambda_solves_once_or_not_at_all(build, spent):
    model, (x, y), (x_test, y_test) = problem.mlp()
    fit = build(model).fit((x, y))
    seen = products(fit.operator_)
    values = [0.2, 0.5, 2]
    found = fit.explore_hessian_regularization(x_test, y_test, values)
    assert sum(seen) <= spent * len(y_test)
    assert list(found) == values
    for value in values:
        expected = dense_factors(value) @ problem.rows(test=True).T
        assert list(found[value]) == [""]
        problem.close(found[value][""].numpy(), expected, 1e-7)
    assert fit.regularization == 0.3
    with pytest.raises(ValueError, match="finite and not negative"):
        fit.explore_hessian_regularization(x_test, y_test, [-1.0])


def test_a_lambda_that_is_refused_changes_nothing():
    model, (x, y), _ = problem.mlp()
    for influence, refused in (
        (inf.NystroemSketchInfluence(model, LOSS, 2.0, 26), 1e-6),  # the Hessian is indefinite
        (inf.LissaInfluence(model, LOSS, 2.0, scale=5.0), 50.0),  # the iteration would diverge
    ):
        before = influence.fit((x, y)).influences(x[:2], y[:2])
        with pytest.raises(ValueError, match="must"):
            influence.regularization = refused
        assert influence.regularization == 2.0
        assert influence.solution_.x.shape[1] == 2
        torch.testing.assert_close(influence.influences(x[:2], y[:2]), before, rtol=0, atol=0)


def test_explored_lambdas_are_found_under_floats():
    _, (x, y), _ = problem.mlp()
    explored = direct().fit((x, y)).explore_hessian_regularization(x, y, torch.tensor([0.5, 1.0]))
    assert explored[0.5][""].shape == explored[1.0][""].shape == (len(x), len(x))


def test_single_samples_are_refused_in_words():
    _, (x, y), _ = problem.mlp()
    with pytest.raises(ValueError, match="pass batches"):
        direct().fit((x, y)).influences(x[0], y[0])


def test_exploring_by_layer():
    _, train, (x, y) = problem.mlp()
    fit = direct(block_structure="layer_wise").fit(train)
    found = fit.explore_hessian_regularization(x, y, [0.5])[0.5]
    test = problem.by_block(problem.rows(test=True), "layers")
    for name, M in problem.blocks(problem.matrix("hessian"), "layers").items():
        expected = test[name] @ np.linalg.solve(M + 0.5 * np.eye(len(M)), test[name].T)
        problem.close(found[name].numpy(), expected, 1e-9)


# ------------------------------------------------------------------------------------------ λ = 0


def fit_with_one_warning(model, match, data=None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(problem.mlp()[1] if data is None else data)
    assert [w.category for w in caught] == [ih.InvhvpWarning]
    assert str(caught[0].message).startswith(type(model).__name__)
    assert caught[0].filename == __file__
    assert match in str(caught[0].message)
    return str(caught[0].message)


def pseudo_inverse(M, rank=None):
    w, V = np.linalg.eigh(M)
    kept = np.argsort(-np.abs(w))[:rank]
    kept = kept[np.abs(w[kept]) > 1e-10 * np.abs(w).max()]
    return (V[:, kept] / w[kept]) @ V[:, kept].T, len(kept)


def test_direct_at_zero_is_the_pseudo_inverse():
    _, _, (x, y) = problem.mlp()
    fit = direct(0, second_order_mode="gauss_newton")
    fit_with_one_warning(fit, "the smallest usable value is")
    expected, rank = pseudo_inverse(problem.matrix(inf.SecondOrderMode.GAUSS_NEWTON))
    assert rank == problem.N_TRAIN
    test = problem.rows(test=True)
    problem.close(fit.influence_factors(x, y).numpy(), test @ expected, 1e-6)
    assert f"pseudo-inverse of rank {rank} of 27, cut at" in repr(fit)
    assert set(fit.solution_.status) == {ih.Status.APPROXIMATE}


def test_arnoldi_at_zero_is_the_pseudo_inverse_with_signs():
    model, _, (x, y) = problem.mlp()
    M = problem.matrix(inf.SecondOrderMode.HESSIAN)
    assert np.sort(-np.abs(np.linalg.eigvalsh(M)))[5] != 0
    for options in ({}, {"use_woodbury": True}):
        fit = inf.ArnoldiInfluence(model, LOSS, rank=6, tol=1e-9, **options)
        text = fit_with_one_warning(fit, "regularization is 0")
        smallest = float(text.rsplit(" ", 1)[1])
        np.testing.assert_allclose(smallest, -np.linalg.eigvalsh(M)[0], rtol=2e-2)
        expected, _ = pseudo_inverse(M, 6)
        problem.close(fit.influence_factors(x, y).numpy(), problem.rows(test=True) @ expected, 1e-5)
    assert "pseudo-inverse of rank 6 of 27" in repr(fit)


def test_nystroem_at_zero_is_the_pseudo_inverse_of_what_is_positive():
    model, _, (x, y) = problem.mlp()
    mode = inf.SecondOrderMode.GAUSS_NEWTON
    fit = inf.NystroemSketchInfluence(model, LOSS, 0.0, rank=20, second_order_mode=mode)
    fit_with_one_warning(fit, "pseudo-inverse of rank 15 of 27")
    expected, _ = pseudo_inverse(problem.matrix(mode))
    problem.close(fit.influence_factors(x, y).numpy(), problem.rows(test=True) @ expected, 1e-6)
    hessian = inf.NystroemSketchInfluence(model, LOSS, 0.0, rank=10)
    fit_with_one_warning(hessian, "the smallest usable value is 0.1")
    assert np.linalg.eigvalsh(hessian.inverse_.map.inner.to_dense().numpy())[0] > -1e-10


def test_iterations_at_zero_run_and_tell_their_status():
    model, _, (x, y) = problem.mlp()
    fit = inf.CgInfluence(model, LOSS, 0.0, solve_simultaneously=True)
    fit_with_one_warning(fit, "the smallest usable value is 0.1")
    with pytest.warns(ih.ConvergenceWarning, match="NEGATIVE_CURVATURE"):
        factors = fit.influence_factors(x, y)
    assert factors.shape == (problem.N_TEST, 27)
    assert ih.Status.NEGATIVE_CURVATURE in fit.solution_.status


def test_a_regular_matrix_needs_no_warning():
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x.sum(1, keepdim=True)
    model = torch.nn.Linear(3, 1).double()
    loss = torch.nn.functional.mse_loss
    for fit in (inf.DirectInfluence(model, loss), inf.CgInfluence(model, loss)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = fit.fit((x, y)).influences(x[:2], y[:2])
        H = it.hessian(model, loss, (x, y)).to_dense()
        G = it.per_sample_gradients(model, loss, x[:2], y[:2]).to_dense()
        problem.close(found.numpy(), (G @ torch.linalg.solve(H, G.mT)).numpy(), 1e-5)


@pytest.mark.parametrize("value", [0, 0.0, None, {"0": 1.0}, {"0": 1.0, "2": 0.0}])
def test_harmonic_mean_refuses_zero(value):
    model = problem.mlp()[0]
    with pytest.raises(ValueError, match="needs regularization > 0"):
        inf.InverseHarmonicMeanInfluence(model, LOSS, value, block_structure="layer_wise")
    good = inf.InverseHarmonicMeanInfluence(model, LOSS, 1.0, block_structure="layer_wise")
    with pytest.raises(ValueError, match="needs regularization > 0"):
        good.regularization = value


# ------------------------------------------------------------------------------------------ options


def test_lissa_refuses_a_scale_that_must_diverge():
    model, train, (x, y) = problem.mlp()
    top = np.linalg.eigvalsh(problem.matrix(inf.SecondOrderMode.HESSIAN))[-1]
    options = {"regularization": 0.2, "scale": 0.1 * top}
    with pytest.raises(ValueError, match=r"must diverge.*smallest stable scale is") as error:
        inf.LissaInfluence(model, LOSS, **options).fit(train)
    smallest = float(str(error.value).split("smallest stable scale is ")[1].split(";")[0])
    np.testing.assert_allclose(smallest, (top + 0.2) / 2, rtol=0.05)
    forced = inf.LissaInfluence(model, LOSS, **options, force=True).fit(train)
    with pytest.warns(ih.ConvergenceWarning, match="DIVERGED"):
        forced.influence_factors(x, y)
    assert set(forced.solution_.status) == {ih.Status.DIVERGED}


def test_arguments_without_meaning_warn_once():
    model = problem.mlp()[0]
    for build in (
        lambda: inf.CgInfluence(model, LOSS, precompute_grad=True),
        lambda: inf.ArnoldiInfluence(model, LOSS, eigen_computation_on_gpu=True),
    ):
        with pytest.warns(DeprecationWarning, match="has no meaning here") as caught:
            build()
        assert len(caught) == 1
        assert caught[0].filename == __file__


def test_the_limit_on_iterations_can_be_quiet():
    model, train, (x, y) = problem.mlp()
    loud = inf.CgInfluence(model, LOSS, 0.2, maxiter=2).fit(train)
    with pytest.warns(ih.ConvergenceWarning, match="MAXITER"):
        loud.influence_factors(x, y)
    quiet = inf.CgInfluence(model, LOSS, 0.2, maxiter=2, warn_on_max_iteration=False).fit(train)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet.influence_factors(x, y)
    assert set(quiet.solution_.status) == {ih.Status.MAXITER}
    with pytest.warns(ih.InvhvpWarning, match="regularization is 0"):
        quiet.regularization = 0.0
    quiet.method = ih.CG()
    with pytest.warns(ih.InvhvpWarning, match="regularization is 0"):
        quiet.fit(train)
    with pytest.warns(ih.ConvergenceWarning, match="NEGATIVE_CURVATURE"):
        quiet.influence_factors(x, y)


def test_a_preconditioner_is_a_value():
    model, train, (x, y) = problem.mlp()
    shared = inf.preconditioner.NystroemPreconditioner(rank=5)
    before = repr(shared)
    small = torch.nn.Linear(4, 3).double()
    for m, p in ((model, 27), (small, 15)):
        fit = inf.CgInfluence(m, LOSS, 0.2, rtol=1e-9, preconditioner=shared).fit(train)
        assert fit.influence_factors(x, y).shape == (3, p)
        assert fit.solution_.converged.all()
    assert repr(shared) == before
    jacobi = inf.preconditioner.JacobiPreconditioner(num_samples_estimator=3)
    assert jacobi == ih.Jacobi(samples=3)
    plain = inf.CgInfluence(model, LOSS, 0.2, rtol=1e-9, preconditioner=jacobi).fit(train)
    problem.close(plain.influence_factors(x, y).numpy(), dense_factors(0.2), 1e-7)
    K = ih.Surrogate(it.gauss_newton(model, LOSS, train), ih.SampleSpace())
    ours = inf.CgInfluence(model, LOSS, 0.2, rtol=1e-9, preconditioner=K).fit(train)
    problem.close(ours.influence_factors(x, y).numpy(), dense_factors(0.2), 1e-7)
    with pytest.raises(TypeError, match="preconditioner takes a Method"):
        inf.CgInfluence(model, LOSS, preconditioner=object())


def test_what_is_behind_a_model_can_be_reached():
    _, train, (x, y) = problem.mlp()
    fit = direct(block_structure="layer_wise")
    assert "not fitted" in repr(fit)
    assert fit.fit(train) is fit
    assert isinstance(fit.operator_, ih.BlockDiagonal)
    assert list(fit.inverse_.blocks) == ["0", "2"]
    factors = fit.influence_factors(x, y)
    assert torch.equal(fit.solution_.x, factors.mT)
    assert set(fit.solution_.status) == {ih.Status.CONVERGED}
    G = it.per_sample_gradients(fit.model, LOSS, *train)
    test = it.per_sample_gradients(fit.model, LOSS, x, y)
    engine = ih.Influence(fit.inverse_, G).scores(test)
    problem.close(fit.influences(x, y, *train).numpy(), engine.numpy(), 1e-10)
    assert fit.to("cpu") is fit
    assert (fit.device.type, fit.dtype) == ("cpu", torch.float64)
    again = pickle.loads(pickle.dumps(fit))
    assert torch.equal(again.influence_factors(x, y), factors)


def test_arnoldi_says_what_it_drops():
    model = problem.mlp()[0]
    assert "all but 10 eigenvectors a block dropped" in repr(inf.ArnoldiInfluence(model, LOSS, 1.0))
    assert "dropped" not in repr(inf.ArnoldiInfluence(model, LOSS, 1.0, use_woodbury=True))


def test_a_model_that_was_trained_meanwhile_is_refused():
    _, train, (x, y) = problem.mlp()
    model = torch.nn.Linear(4, 3).double()
    fit = inf.DirectInfluence(model, LOSS, 0.3).fit(train)
    with torch.no_grad():
        model.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="have changed"):
        fit.influence_factors(x, y)
