"""Arnoldi: leading eigenpairs, the complement, and what is done with negative ones."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import invhvp as ih
from invhvp import problems
from tests.cases import counted, matrix, placed, rows

seeds = st.integers(0, 2**16)
DECAY = np.concatenate([np.geomspace(10.0, 1.0, 6), 1e-4 * np.arange(1, 75) ** -1.0])


def woodbury(M, rank, damping, B):
    w, V = np.linalg.eigh(M)
    order = np.argsort(-np.abs(w))[:rank]
    w, V = w[order], V[:, order]
    return B / damping - V @ ((w / (damping * (w + damping)))[:, None] * (V.T @ B))


@pytest.mark.parametrize("damping", [1e-3, 0.3])
def test_is_woodburys_formula(backend, damping):
    A, M = placed(backend, matrix(*DECAY), psd=True)
    B = backend.asarray(rows(3, 80).T)
    inverse = ih.Arnoldi(rank=6, block=2, krylov_dimension=18, tol=1e-13).prepare(
        A, damping=damping
    )
    expected = woodbury(M, 6, damping, backend.to_numpy(B))
    allowed = 300 * backend.eps * 10 / damping * np.linalg.norm(expected)
    assert np.linalg.norm(backend.to_numpy(inverse @ B) - expected) <= allowed
    sol = inverse.solve(B)
    assert set(sol.status) == {ih.Status.APPROXIMATE}
    error = backend.to_numpy(sol.x) - np.linalg.solve(M + damping * np.eye(80), backend.to_numpy(B))
    energy = np.sqrt(np.sum(error * (M @ error + damping * error), axis=0))
    assert np.all(energy <= backend.to_numpy(sol.error_bounds))
    assert inverse.low_rank.vectors.shape == (80, 6)
    backend.assert_like(inverse.low_rank.values)
    assert inverse.fixed_spd


@given(seed=seeds, rank=st.integers(1, 9), log_damping=st.floats(-6, 1))
def test_low_rank_operators_are_inverted_to_rounding(seed, rank, log_damping):
    damping = 10.0**log_damping
    values = np.random.default_rng(seed).uniform(0.5, 3.0, rank)
    M = matrix(*np.concatenate([values, np.zeros(70 - rank)]), seed=seed)
    B = np.random.default_rng(seed + 1).standard_normal((70, 2))
    X = ih.Arnoldi(rank=9).prepare(ih.Dense(M), damping=damping) @ B
    back = M @ X + damping * X
    assert np.linalg.norm(back - B) <= 200 * 2.0**-53 * (3 + damping) / damping * np.linalg.norm(B)


def test_dropping_the_complement_is_the_projected_inverse(backend):
    A, M = placed(backend, matrix(*DECAY), psd=True)
    b = backend.asarray(rows(1, 80)[0])
    inverse = ih.Arnoldi(rank=6, complement="drop", tol=1e-13).prepare(A, damping=0.0)
    w, V = np.linalg.eigh(M)
    expected = V[:, -6:] @ ((V[:, -6:].T @ backend.to_numpy(b)) / w[-6:])
    gap = np.linalg.norm(backend.to_numpy(inverse @ b) - expected)
    assert gap <= 1e3 * backend.eps * np.linalg.norm(expected)
    assert not inverse.fixed_spd
    with pytest.raises(ValueError, match="cannot precondition"):
        ih.solve(A, b, ih.CG(preconditioner=inverse.method), damping=0.0)


def test_another_damping_costs_no_product(backend):
    M = matrix(*DECAY)
    A, seen = counted(placed(backend, M, psd=True)[0])
    method = ih.Arnoldi(rank=5)
    inverse = method.prepare(A, damping=1.0)
    assert inverse.products == sum(seen)
    spent = sum(seen)
    moved = inverse.with_damping(0.01)
    assert sum(seen) == spent
    assert moved.products == 0
    b = backend.asarray(rows(1, 80)[0])
    np.testing.assert_array_equal(
        backend.to_numpy(moved @ b), backend.to_numpy(method.prepare(A, damping=0.01) @ b)
    )
    spent = sum(seen)
    assert moved.solve(b).products == sum(seen) - spent == 1


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.5])
def test_powers(backend, exponent):
    A, M = placed(backend, matrix(*np.concatenate([[4.0, 2.0, 1.0], np.zeros(60)])), psd=True)
    inverse = ih.Arnoldi(rank=3).prepare(A, damping=0.25)
    w, V = np.linalg.eigh(M)
    expected = (V * (np.maximum(w, 0) + 0.25) ** exponent) @ V.T
    power = inverse.power(exponent)
    assert isinstance(power, ih.LinearOperator)
    gap = np.max(np.abs(backend.to_numpy(power.to_dense()) - expected))
    assert gap <= 100 * backend.eps * 17
    b = backend.asarray(rows(1, 63)[0])
    half = inverse.power(-0.5)
    assert np.max(np.abs(backend.to_numpy(half @ (half @ b) - inverse @ b))) <= 500 * backend.eps


@pytest.mark.parametrize("n", [1, 2, 15])
def test_all_pairs_are_an_exact_inverse(backend, n):
    M = matrix(*np.geomspace(1e-2, 1.0, n)) if n > 1 else np.array([[0.5]])
    A, M = placed(backend, M)
    B = backend.asarray(rows(2, n).T)
    inverse = ih.Arnoldi(rank=20).prepare(A, damping=1e-3)
    sol = inverse.solve(B)
    assert set(sol.status) == {ih.Status.CONVERGED}
    X = np.linalg.solve(M + 1e-3 * np.eye(n), backend.to_numpy(B))
    assert np.linalg.norm(backend.to_numpy(sol.x) - X) <= 1e4 * backend.eps * np.linalg.norm(X)
    assert inverse.products == n


NEGATIVE = np.concatenate([[5.0, 3.0, -2.0], 1e-3 * np.arange(1, 70) ** -2.0])


def test_a_negative_eigenvalue_raises_with_its_vector(backend):
    A, M = placed(backend, matrix(*NEGATIVE))
    with pytest.raises(ih.IndefiniteError, match="must exceed 2") as caught:
        ih.Arnoldi(rank=3).prepare(A, damping=0.5)
    p = backend.to_numpy(caught.value.vector)
    assert p.shape == (72,)
    assert abs(p @ M @ p + 2) <= 1e-4
    assert abs(caught.value.minimum_damping - 2) <= 1e-4
    ih.Arnoldi(rank=3).prepare(A, damping=2.5)


def test_a_direction_outside_the_kept_pairs_raises_too():
    spectrum = np.concatenate([np.geomspace(10, 1, 8), 1e-3 * np.ones(71), [-0.3]])
    A = ih.Dense(matrix(*spectrum))
    with pytest.raises(ih.IndefiniteError) as caught:
        ih.Arnoldi(rank=3).prepare(A, damping=0.01)
    p = caught.value.vector
    assert p @ (A @ p) + 0.01 <= 0
    assert ih.Arnoldi(rank=3, nonpositive="drop").prepare(A, damping=0.01).fixed_spd


@pytest.mark.parametrize(("policy", "value"), [("drop", 0.0), ("abs", 2.0), ("clip", 0.0)])
def test_policies_for_negative_eigenvalues(backend, policy, value):
    A, M = placed(backend, matrix(*NEGATIVE))
    w, V = np.linalg.eigh(M)
    model = np.where(np.abs(w) > 1, w, 0.0)
    model = np.where(model < 0, value, model)
    b = rows(1, 72)[0]
    expected = V @ ((V.T @ b) / (model + 0.5))
    inverse = ih.Arnoldi(rank=3, nonpositive=policy, tol=1e-13).prepare(A, damping=0.5)
    gap = np.linalg.norm(backend.to_numpy(inverse @ backend.asarray(b)) - expected)
    assert gap <= 2e3 * backend.eps * np.linalg.norm(expected)
    assert inverse.fixed_spd
    np.testing.assert_allclose(
        np.sort(backend.to_numpy(inverse.low_rank.values)), [-2, 3, 5], rtol=1e-5
    )
    # Above the threshold nothing is replaced.
    plain = ih.Arnoldi(rank=3, tol=1e-13).prepare(A, damping=2.5) @ backend.asarray(b)
    same = inverse.with_damping(2.5) @ backend.asarray(b)
    np.testing.assert_array_equal(backend.to_numpy(plain), backend.to_numpy(same))


def test_all_pairs_of_an_indefinite_matrix_and_a_policy_are_approximate():
    A = ih.Dense(matrix(-1.0, 0.5, 2.0))
    sol = ih.solve(A, np.ones(3), ih.Arnoldi(rank=3, nonpositive="abs"), damping=0.1)
    assert sol.status is ih.Status.APPROXIMATE
    assert float(sol.relative_residuals) > 1e-3


LAYOUT = ih.Layout.from_shapes({"a": (30,), "b": (50,)})


def test_damping_by_block(backend):
    A, M = placed(backend, matrix(*DECAY), psd=True, layout=LAYOUT)
    damping = {"a": 0.1, "b": 2.0}
    D = np.diag(np.repeat([0.1, 2.0], [30, 50]))
    b = rows(1, 80)[0]
    inverse = ih.Arnoldi(rank=6, tol=1e-13).prepare(A, damping=damping)
    w, V = np.linalg.eigh(M)
    expected = np.linalg.solve((V[:, -6:] * w[-6:]) @ V[:, -6:].T + D, b)
    gap = np.linalg.norm(backend.to_numpy(inverse @ backend.asarray(b)) - expected)
    assert gap <= 1e4 * backend.eps * np.linalg.norm(expected)
    assert inverse.fixed_spd
    with pytest.raises(ValueError, match="per block"):
        inverse.power(-0.5)
    with pytest.raises(ValueError, match="per block"):
        ih.Arnoldi(rank=6, complement="drop").prepare(A, damping=damping)


def test_damping_by_block_of_an_indefinite_operator(backend):
    """A negative direction inside a block of large damping is no obstacle; in the other it is."""
    d = np.concatenate([[-1.0], np.zeros(29), [3.0], np.zeros(49)])
    A = ih.Dense(backend.asarray(np.diag(d)), layout=LAYOUT)
    b = backend.asarray(np.ones(80))
    x = backend.to_numpy(ih.Arnoldi(rank=2).prepare(A, damping={"a": 2.0, "b": 0.5}) @ b)
    expected = 1 / (d + np.repeat([2.0, 0.5], [30, 50]))
    assert np.max(np.abs(x - expected)) <= 1e3 * backend.eps
    with pytest.raises(ih.IndefiniteError) as caught:
        ih.Arnoldi(rank=2).prepare(A, damping={"a": 0.5, "b": 2.0})
    p = backend.to_numpy(caught.value.vector)
    assert p @ (d * p) + p @ (np.repeat([0.5, 2.0], [30, 50]) * p) <= 0


def test_only_converged_pairs_are_used():
    A = problems.poisson_2d(16).operator
    with pytest.warns(ih.ConvergenceWarning, match=r"only \d+ of 6 eigenpairs"):
        inverse = ih.Arnoldi(rank=6, krylov_dimension=9, block=1, maxiter=2).prepare(A, damping=0.1)
    assert inverse.low_rank.rank < 6
    exact = np.sort(4 * np.sin(np.arange(1, 17) * np.pi / 34) ** 2)
    exact = np.sort((exact[:, None] + exact).ravel())[::-1]
    for value in inverse.low_rank.values:
        assert np.min(np.abs(exact - value)) <= 1e-6 * value


def test_singular_systems_are_refused(backend):
    A, _ = placed(backend, matrix(*DECAY), psd=True)
    with pytest.raises(ih.SingularError):
        ih.Arnoldi(rank=3).prepare(A, damping=0.0)
    singular, _ = placed(backend, np.diag([1.0, 1.0, 0.0]), psd=True)
    with pytest.raises(ih.SingularError):
        ih.Arnoldi(rank=3).prepare(singular, damping=0.0)


def test_refuses_asymmetric_operators_and_wrong_options():
    M = problems.nn_spectrum(200).operator.to_dense()
    skew = np.random.default_rng(0).standard_normal(M.shape)
    A = ih.Callback(lambda X: (M + skew) @ X, 200, like=M)
    with pytest.raises(ih.ConvergenceError, match="not symmetric"):
        ih.Arnoldi(rank=3, maxiter=1).prepare(A, damping=1.0)
    for options in ({"rank": 0}, {"tol": -1.0}, {"complement": "zero"}, {"nonpositive": "flip"}):
        with pytest.raises(ValueError):
            ih.Arnoldi(**options)


def test_preconditions_cg():
    problem = problems.nn_spectrum(200, n_rhs=1)
    plain = ih.solve(problem.operator, problem.rhs, ih.CG(rtol=1e-6), damping=1e-3)
    cg = ih.CG(rtol=1e-6, preconditioner=ih.Arnoldi(rank=20))
    better = ih.solve(problem.operator, problem.rhs, cg, damping=1e-3)
    assert set(better.status) == {ih.Status.CONVERGED}
    assert better.iterations < plain.iterations / 3
