"""solve_path: every damping from one Krylov space."""

from __future__ import annotations

import numpy as np
import pytest

import invhvp as ih
from invhvp import problems

N = 40
DAMPINGS = [1.0, 1e-2, 0.1]


def spd(seed=0, n=N, low=1e-2):
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    M = (Q * np.geomspace(low, 10.0, n)) @ Q.T
    return (M + M.T) / 2, Q


def test_every_damping_meets_the_rule_in_the_order_given(backend):
    M, _ = spd()
    B = np.random.default_rng(1).standard_normal((N, 4))
    placed, rhs = backend.asarray(M), backend.asarray(B)
    rtol = 1e-8 if backend.eps < 1e-10 else 1e-3
    path = ih.solve_path(ih.Dense(placed, psd=True), rhs, dampings=DAMPINGS, rtol=rtol)
    assert path.dampings == tuple(DAMPINGS)
    for damping, sol in zip(DAMPINGS, path, strict=True):
        assert set(sol.status) == {ih.Status.CONVERGED}
        A = backend.to_numpy(placed) + damping * np.eye(N)
        exact = np.linalg.solve(A, backend.to_numpy(rhs))
        error = backend.to_numpy(sol.x) - exact
        energy = np.sqrt(np.maximum(np.sum(error * (A @ error), axis=0), 0))
        assert np.all(energy <= backend.to_numpy(sol.error_bounds))
        assert np.all(
            np.linalg.norm(error, axis=0) <= 1.2 * rtol * np.linalg.norm(B, axis=0) / damping
        )
        backend.assert_like(sol.x)


def test_the_path_costs_what_its_smallest_damping_costs():
    problem = problems.nn_spectrum(n=400)
    B = np.random.default_rng(0).standard_normal((400, 8))
    dampings = list(np.geomspace(1e-3, 10, 10))
    calls = []
    M = np.asarray(problem.operator.to_dense())
    M = M - np.eye(400) * 0.0
    A = ih.Callback(lambda X: calls.append(X.shape[1]) or M @ X, 400, like=M, psd=True)
    path = ih.solve_path(A, B, dampings=dampings, rtol=1e-8)
    alone = ih.solve(A, B, ih.BlockCG(rtol=1e-8), damping=1e-3)
    assert {s for sol in path for s in sol.status} == {ih.Status.CONVERGED}
    # The residuals of ten dampings are verified in one sweep of 80 columns.
    assert path.products <= alone.products + 80 + 2 * 8
    assert path.passes <= alone.passes + 3
    assert sum(calls) == path.products + alone.products


def test_indefinite_dampings_are_named_and_the_others_solved(backend):
    M, Q = spd(low=0.5)
    M = M - 1.2 * np.outer(Q[:, 7], Q[:, 7]) * 1.0
    A = ih.Dense(backend.asarray((M + M.T) / 2))
    least = -np.linalg.eigvalsh(M)[0]
    assert least > 0.1
    B = backend.asarray(np.random.default_rng(1).standard_normal((N, 3)))
    with pytest.warns(ih.ConvergenceWarning, match="NEGATIVE_CURVATURE"):
        path = ih.solve_path(A, B, dampings=[1e-3, least + 1.0], rtol=1e-3)
    assert set(path[0].status) == {ih.Status.NEGATIVE_CURVATURE}
    assert set(path[1].status) == {ih.Status.CONVERGED}
    v = backend.to_numpy(path[0].curvature.vector)
    assert v @ M @ v + 1e-3 < 0


def test_vectors_zero_columns_and_one_damping(backend):
    M, _ = spd(n=10, low=0.5)
    A = ih.Dense(backend.asarray(M), psd=True)
    path = ih.solve_path(A, backend.asarray(np.ones(10)), dampings=[0.5], rtol=1e-4)
    assert path[0].x.shape == (10,)
    assert path[0].status is ih.Status.CONVERGED
    B = np.stack([np.ones(10), np.zeros(10)], axis=1)
    path = ih.solve_path(A, backend.asarray(B), dampings=[0.5, 0.5, 2.0], rtol=1e-4)
    assert path[1].status == (ih.Status.CONVERGED, ih.Status.ZERO)
    np.testing.assert_array_equal(backend.to_numpy(path[2].x)[:, 1], 0.0)


def test_the_door():
    A = ih.Dense(np.eye(3), psd=True)
    with pytest.raises(ValueError, match="at least one"):
        ih.solve_path(A, np.ones(3), dampings=[])
    with pytest.raises(ValueError, match="not negative"):
        ih.solve_path(A, np.ones(3), dampings=[1.0, -1.0])
    with pytest.raises(ValueError, match="NaN"):
        ih.solve_path(A, np.full(3, np.nan), dampings=[1.0])
