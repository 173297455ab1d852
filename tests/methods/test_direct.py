"""Exact methods: Direct, SampleSpace, and the borrowed inverses."""

from __future__ import annotations

import numpy as np
import pytest

import invhvp as ih
from invhvp import _lapack


def symmetric(*eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((len(eigenvalues), len(eigenvalues))))
    M = (Q * np.asarray(eigenvalues)) @ Q.T
    return (M + M.T) / 2


def exact(M, damping, B):
    return np.linalg.solve(M + damping * np.eye(len(M)), B)


def test_direct_is_exact_and_says_how_exact(backend):
    M = symmetric(*np.geomspace(1e-2, 10, 12))
    B = np.random.default_rng(1).standard_normal((12, 3))
    placed, rhs = backend.asarray(M), backend.asarray(B)
    for A in (ih.Dense(placed, psd=True), ih.Callback(lambda X: placed @ X, 12, like=placed)):
        sol = ih.solve(A, rhs, ih.Direct(), damping=1e-2)
        assert set(sol.status) == {ih.Status.CONVERGED}
        X = exact(backend.to_numpy(placed), 1e-2, backend.to_numpy(rhs))
        allowed = 1e3 * backend.eps * np.abs(X).max() * 10
        np.testing.assert_allclose(backend.to_numpy(sol.x), X, rtol=0, atol=allowed)
        backend.assert_like(sol.x)
        if A.psd:  # nothing to refine; six for ‖A‖, which the bound needs, once
            assert sol.passes == 7
        else:
            assert 1 <= sol.passes <= 3
    assert np.all(np.isinf(backend.to_numpy(sol.error_bounds)))  # not known to be PSD


def test_direct_solves_indefinite_systems_and_names_singular_ones(backend):
    M = symmetric(-2.0, -0.5, 1.0, 3.0)
    A = ih.Dense(backend.asarray(M))
    inverse = ih.Direct().prepare(A, damping=0.1)
    assert not inverse.fixed_spd
    b = backend.asarray(np.arange(1.0, 5.0))
    X = exact(M, 0.1, np.arange(1.0, 5.0))
    np.testing.assert_allclose(backend.to_numpy(inverse @ b), X, atol=1e3 * backend.eps)
    with pytest.raises(ih.SingularError, match="raise the damping"):
        ih.Direct().prepare(ih.Diagonal(backend.asarray(np.array([0.0, 1.0]))), damping=0.0)
    ones = ih.Dense(backend.asarray(np.ones((3, 3))))
    with pytest.raises(ih.SingularError, match="singular"):
        ih.Direct().prepare(ones, damping=0.0)


def test_direct_refuses_what_does_not_fit():
    A = ih.Callback(lambda X: X, 30, like=np.ones(1))
    with pytest.raises(ValueError, match="max_size=20"):
        ih.Direct(max_size=20).prepare(A, damping=1.0)
    skew = ih.Callback(lambda X: np.triu(np.ones((3, 3))) @ X, 3, like=np.ones(1))
    with pytest.raises(ValueError, match="not symmetric"):
        ih.Direct().prepare(skew, damping=1.0)


@pytest.mark.parametrize("samples", [1, 7, 12, 30])
@pytest.mark.parametrize("damping", [1e-3, 10.0])
def test_sample_space_is_exact_for_any_number_of_samples(backend, samples, damping):
    rows = np.random.default_rng(0).standard_normal((samples, 12))
    B = np.random.default_rng(1).standard_normal((12, 4))
    A = ih.RankOneMean(ih.DenseGradients(backend.asarray(rows)))
    rhs = backend.asarray(B)
    held = backend.to_numpy(backend.asarray(rows))
    M = held.T @ held / samples
    X = exact(M, damping, backend.to_numpy(rhs))
    # In float32 the residual of the best possible x is ε‖A‖‖x‖, above the default tolerance.
    inverse = ih.SampleSpace(rtol=1e-3).prepare(A, damping=damping)
    sol = inverse.solve(rhs)
    assert set(sol.status) == {ih.Status.CONVERGED}
    condition = (np.linalg.norm(M, 2) + damping) / damping
    allowed = 30 * backend.eps * condition * np.abs(X).max()
    np.testing.assert_allclose(backend.to_numpy(sol.x), X, rtol=0, atol=allowed)
    E = backend.to_numpy(sol.x) - X
    energy = np.sqrt(np.maximum(np.sum(E * ((M + damping * np.eye(12)) @ E), axis=0), 0))
    assert np.all(energy <= backend.to_numpy(sol.error_bounds))
    other = inverse.with_damping(2 * damping).solve(rhs)
    X2 = exact(M, 2 * damping, backend.to_numpy(rhs))
    np.testing.assert_allclose(backend.to_numpy(other.x), X2, rtol=0, atol=allowed)


@pytest.mark.parametrize("damping", [1e-6, 1e-9, 1e-12, 0.0])
def test_as_many_samples_as_parameters_need_no_damping(damping):
    G = np.random.default_rng(0).standard_normal((10, 10))
    A = ih.RankOneMean(ih.DenseGradients(G))
    sol = ih.solve(A, np.ones(10), ih.SampleSpace(rtol=1e-10), damping=damping)
    assert sol.status is ih.Status.CONVERGED


def test_counts_equal_an_instrumented_operator():
    calls = []
    M = symmetric(*np.geomspace(1e-2, 10, 12))
    A = ih.Callback(lambda X: calls.append(X.shape[1]) or M @ X, 12, like=M, psd=True)
    inverse = ih.Direct().prepare(A, damping=0.1)
    assert inverse.products == sum(calls)
    for _ in range(2):
        calls.clear()
        sol = inverse.solve(np.ones((12, 3)))
        assert (sol.products, sol.passes) == (sum(calls), len(calls))


def test_sample_space_with_damping_by_block(backend):
    rng = np.random.default_rng(0)
    W, b = rng.standard_normal((5, 8)), rng.standard_normal((5, 4))
    G = ih.StackedGradients(
        {
            "weight": ih.DenseGradients(backend.asarray(W)),
            "bias": ih.DenseGradients(backend.asarray(b)),
        }
    )
    rows = np.concatenate([W, b], axis=1)
    damping = {"weight": 0.1, "bias": 2.0}
    M = rows.T @ rows / 5 + np.diag([0.1] * 8 + [2.0] * 4)
    rhs = rng.standard_normal(12)
    sol = ih.solve(ih.RankOneMean(G), backend.asarray(rhs), ih.SampleSpace(), damping=damping)
    X = np.linalg.solve(M, rhs)
    np.testing.assert_allclose(backend.to_numpy(sol.x), X, atol=3e3 * backend.eps)


def test_sample_space_needs_gradients_and_damping():
    with pytest.raises(TypeError, match="needs an operator with gradients"):
        ih.SampleSpace().prepare(ih.Diagonal(np.ones(3)), damping=1.0)
    A = ih.RankOneMean(ih.DenseGradients(np.ones((2, 3))))
    with pytest.raises(ih.SingularError, match="damping > 0"):
        ih.SampleSpace().prepare(A, damping=0.0)


def test_structured_right_hand_sides(backend):
    rng = np.random.default_rng(0)
    d, a = rng.standard_normal((4, 3)), rng.standard_normal((4, 5))
    G = ih.OuterProductGradients(output_grads=backend.asarray(d), inputs=backend.asarray(a))
    A = ih.RankOneMean(G)
    sol = ih.solve(A, G, ih.SampleSpace(), damping=0.5)
    rows = (d[:, :, None] * a[:, None, :]).reshape(4, 15)
    X = exact(rows.T @ rows / 4, 0.5, rows.T)
    np.testing.assert_allclose(backend.to_numpy(sol.x), X, atol=1e3 * backend.eps)


def steep_gradients(backend):
    """Outer products and a bias with a wide spectrum, and their rows in float64."""
    rng = np.random.default_rng(0)
    scales = np.geomspace(1.0, 1e-2, 9)[:, None]
    d, a = scales * rng.standard_normal((9, 3)), rng.standard_normal((9, 5))
    d, a = (backend.to_numpy(backend.asarray(x)) for x in (d, a))
    blocks = {
        "weight": ih.OuterProductGradients(
            output_grads=backend.asarray(d), inputs=backend.asarray(a)
        ),
        "bias": ih.DenseGradients(backend.asarray(d)),
    }
    rows = np.concatenate([(d[:, :, None] * a[:, None, :]).reshape(9, 15), d], axis=1)
    return ih.StackedGradients(blocks), rows


@pytest.mark.parametrize("streamed", [False, True])
def test_gradients_as_right_hand_sides_equal_their_columns(backend, streamed):
    G, _ = steep_gradients(backend)
    A = ih.RankOneMean(ih.StreamedGradients([G[:4], G[4:]]) if streamed else G)
    for method in (ih.SampleSpace(), ih.InverseHarmonicMean()):
        for damping in (0.1, {"weight": 0.1, "bias": 0.3}):
            inverse = method.prepare(A, damping=damping)
            sol, columns = inverse.solve(G[2:6]), inverse.solve(G[2:6].T.to_dense())
            found, expected = backend.to_numpy(sol.x), backend.to_numpy(columns.x)
            size = np.linalg.norm(expected)
            assert np.linalg.norm(found - expected) <= 300 * backend.eps * size
            assert sol.status == columns.status


def test_gradients_as_right_hand_sides_meet_the_data_in_their_structure(backend, monkeypatch):
    """One product with G and one with its transpose certify; one with the transpose solves."""
    G, _ = steep_gradients(backend)
    seen = []
    for name in ("_matmat", "_rmatmat"):
        whole = getattr(ih.StackedGradients, name)
        monkeypatch.setattr(
            ih.StackedGradients,
            name,
            lambda self, X, name=name, whole=whole: seen.append(name) or whole(self, X),
        )
    inverse = ih.SampleSpace(rtol=1e-3).prepare(ih.RankOneMean(G), damping=0.5)
    inverse.solve(G[:2])
    assert seen == ["_rmatmat", "_matmat", "_rmatmat"]
    seen.clear()
    ih.Influence(inverse, G).scores(G[:2])
    assert seen == []


@pytest.mark.backends("numpy", "torch")
def test_refined_only_where_rounding_allows_better(backend):
    """b − Gᵀw cancels where b lies along large eigenvalues; elsewhere nothing is to be gained."""
    G, rows = steep_gradients(backend)
    damping = 1e-4
    M = rows.T @ rows / 9 + damping * np.eye(18)
    inverse = ih.SampleSpace(rtol=0.5).prepare(ih.RankOneMean(G), damping=damping)
    random = np.random.default_rng(1).standard_normal((18, 2))
    for B, passes in ((rows[:2].T, 2), (random, 1)):
        sol = inverse.solve(backend.asarray(B))
        assert sol.passes == passes
        X = backend.to_numpy(sol.x)
        residuals = np.linalg.norm(B - M @ X, axis=0)
        size = np.linalg.norm(M, 2) * np.linalg.norm(X, axis=0)
        assert np.all(residuals <= 8 * backend.eps * np.maximum(size, np.linalg.norm(B, axis=0)))


def test_surrogate_and_fixed_are_approximate_and_measured(backend):
    M = symmetric(1.0, 2.0, 3.0)
    A, K = ih.Dense(backend.asarray(M), psd=True), ih.Diagonal(backend.asarray(np.ones(3)))
    b = backend.asarray(np.ones(3))
    sol = ih.solve(A, b, ih.Surrogate(K), damping=0.5)
    assert sol.status is ih.Status.APPROXIMATE
    residual = np.linalg.norm(np.ones(3) - (M + 0.5 * np.eye(3)) @ (np.ones(3) / 1.5))
    assert float(backend.to_numpy(sol.residual_norms)) == pytest.approx(residual, rel=1e-5)
    fixed = ih.Fixed(ih.Direct().prepare(A, damping=0.4)).prepare(A, damping=0.5)
    np.testing.assert_allclose(
        backend.to_numpy(fixed @ b), exact(M, 0.4, np.ones(3)), atol=1e3 * backend.eps
    )
    with pytest.raises(ValueError, match="shape"):
        ih.Surrogate(ih.Identity(4, like=b)).prepare(A, damping=1.0)


def test_nan_factorisations_are_noticed(monkeypatch):
    monkeypatch.setattr(_lapack, "cholesky", lambda M: np.full_like(M, np.nan))
    inverse = ih.Direct().prepare(ih.Dense(np.diag([1.0, 2.0])), damping=0.0)
    np.testing.assert_allclose(inverse @ np.ones(2), [1.0, 0.5])  # by eigenvectors
    monkeypatch.setattr(
        _lapack, "eigh", lambda M: (np.full(len(M), np.nan), np.full_like(M, np.nan))
    )
    with pytest.raises(ih.SingularError, match="NaN"):
        ih.Direct().prepare(ih.Dense(np.diag([1.0, 2.0])), damping=0.0)
