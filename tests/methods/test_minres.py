"""Minres: indefinite, singular and preconditioned systems."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import invhvp as ih


def rotated(eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((len(eigenvalues), len(eigenvalues))))
    M = (Q * np.asarray(eigenvalues)) @ Q.T
    return (M + M.T) / 2, Q


INDEFINITE = np.concatenate([-np.geomspace(0.5, 3, 8), np.geomspace(0.3, 20, 22)])


def test_indefinite_systems_are_solved(backend):
    M, _ = rotated(INDEFINITE)
    B = np.random.default_rng(1).standard_normal((30, 3))
    placed, rhs = backend.asarray(M), backend.asarray(B)
    rtol = 1e-9 if backend.eps < 1e-10 else 1e-4
    sol = ih.solve(ih.Dense(placed), rhs, ih.Minres(rtol=rtol), damping=0.1)
    assert set(sol.status) == {ih.Status.CONVERGED}
    exact = np.linalg.solve(backend.to_numpy(placed) + 0.1 * np.eye(30), backend.to_numpy(rhs))
    error = np.linalg.norm(backend.to_numpy(sol.x) - exact, axis=0)
    assert np.all(error <= 1.1 * rtol * np.linalg.norm(B, axis=0) / 0.2)
    assert np.all(np.isinf(backend.to_numpy(sol.error_bounds)))
    backend.assert_like(sol.x)


def test_residuals_never_grow():
    M, _ = rotated(INDEFINITE)
    sol = ih.solve(ih.Dense(M), np.ones(30), ih.Minres(rtol=1e-9), damping=0.1)
    norms = [record.relative_residuals[0] for record in sol.history]
    assert np.all(np.diff(norms) <= 1e-12)


def test_a_singular_system_stagnates_at_least_squares():
    values = INDEFINITE.copy()
    values[3:6] = 0.0
    M, Q = rotated(values)
    b = np.random.default_rng(2).standard_normal(30)
    with pytest.warns(ih.ConvergenceWarning, match="STAGNATED"):
        sol = ih.solve(ih.Dense(M), b, ih.Minres(rtol=1e-9), damping=0.0)
    least = np.linalg.norm(Q[:, 3:6].T @ b)
    assert float(sol.residual_norms) == pytest.approx(least, rel=1e-6)
    consistent = ih.solve(ih.Dense(M), M @ b, ih.Minres(rtol=1e-9), damping=0.0)
    assert consistent.status is ih.Status.CONVERGED


def test_preconditioning_with_the_absolute_value_clusters_at_two_points(backend):
    M, Q = rotated(INDEFINITE)
    K = (Q * np.abs(INDEFINITE + 0.1)) @ Q.T
    surrogate = ih.Fixed(
        ih.Direct().prepare(ih.Dense(backend.asarray((K + K.T) / 2), psd=True), damping=0.0)
    )
    method = ih.Minres(rtol=1e-4, preconditioner=surrogate)
    rhs = backend.asarray(np.random.default_rng(1).standard_normal((30, 2)))
    sol = ih.solve(ih.Dense(backend.asarray(M)), rhs, method, damping=0.1)
    assert set(sol.status) == {ih.Status.CONVERGED}
    assert sol.iterations <= 4


def test_limits_and_failures_are_named():
    M, _ = rotated(INDEFINITE)
    with pytest.warns(ih.ConvergenceWarning, match="MAXITER"):
        ih.solve(ih.Dense(M), np.ones(30), ih.Minres(maxiter=3), damping=0.1)
    nan = ih.Callback(lambda X: X * np.nan, 30, like=M)
    with pytest.warns(ih.ConvergenceWarning, match="NONFINITE"):
        ih.solve(nan, np.ones(30), ih.Minres(), damping=0.1)
    skew = M + np.triu(np.ones((30, 30)))
    with pytest.warns(ih.ConvergenceWarning, match="NOT_SYMMETRIC"):
        ih.solve(
            ih.Callback(lambda X: skew @ X, 30, like=M), np.arange(30.0), ih.Minres(), damping=0.1
        )
    with pytest.raises(ValueError, match="etol"):
        ih.Minres(etol=1e-3)


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 30), k=st.integers(1, 4))
def test_converged_means_the_true_residual(seed, n, k):
    rng = np.random.default_rng(seed)
    w = rng.choice([-1.0, 1.0], n) * 10.0 ** rng.uniform(-2, 1, n)
    M, _ = rotated(w, seed)
    B = rng.standard_normal((n, k))
    sol = ih.solve(ih.Dense(M), B, ih.Minres(rtol=1e-6), damping=0.0)
    true = np.linalg.norm(B - M @ sol.x, axis=0)
    assert set(sol.status) == {ih.Status.CONVERGED}
    assert np.all(true <= 1.0001e-6 * np.linalg.norm(B, axis=0))
