"""recycle=: one sketch made at the first solve makes every batch of right-hand sides cheaper."""

from __future__ import annotations

import numpy as np
import pytest

import invhvp as ih
from invhvp import problems

N = 60


class Counted:
    def __init__(self, M):
        self.M, self.columns, self.passes = M, 0, 0

    def __call__(self, X):
        self.columns += X.shape[1]
        self.passes += 1
        return self.M @ X


def decaying(n=N):
    Q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))
    M = (Q * (10.0 * np.arange(1, n + 1) ** -2.0)) @ Q.T
    return (M + M.T) / 2


@pytest.mark.parametrize("method", [ih.BlockCG, ih.CG])
@pytest.mark.parametrize("kind", ["float64", "float32"])
@pytest.mark.filterwarnings("ignore::invhvp.ConvergenceWarning")  # float32 ends at its floor
def test_four_batches_on_the_network_spectrum_need_fewer_products(method, kind):
    n, rank = 400, 64
    like = np.zeros(0, dtype=kind)
    problem = problems.nn_spectrum(n, like=like)
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((n, 16)).astype(kind) for _ in range(4)]
    spent, worst = {}, {}
    for recycle in (None, rank):
        options = method(rtol=1e-5, recycle=recycle, maxiter=1000)
        inverse = options.prepare(problem.operator, damping=problem.damping)
        solutions = [inverse.solve(B) for B in batches]
        spent[recycle] = sum(solution.products for solution in solutions)
        worst[recycle] = max(float(np.max(s.relative_residuals)) for s in solutions)
    assert spent[rank] < 0.75 * spent[None]
    assert worst[rank] <= max(1e-5, 1.5 * worst[None])


@pytest.mark.parametrize("method", [ih.BlockCG, ih.CG])
def test_solutions_and_counts(backend, method):
    rtol = 1e-8 if backend.eps < 1e-10 else 1e-3
    placed = backend.asarray(decaying())
    product = Counted(placed)
    A = ih.Callback(product, N, like=backend.asarray([]), psd=True)
    inverse = method(rtol=rtol, recycle=12).prepare(A, damping=1e-2)
    assert (product.columns, inverse.products) == (0, 0)
    M = backend.to_numpy(placed) + 1e-2 * np.eye(N)
    for seed in range(2):
        before = product.columns, product.passes
        B = backend.asarray(np.random.default_rng(seed).standard_normal((N, 3)))
        solution = inverse.solve(B)
        spent = product.columns - before[0], product.passes - before[1]
        assert (solution.products, solution.passes) == spent
        assert set(solution.status) == {ih.Status.CONVERGED}
        error = backend.to_numpy(solution.x) - np.linalg.solve(M, backend.to_numpy(B))
        energy = np.sqrt(np.maximum(np.sum(error * (M @ error), axis=0), 0))
        assert np.all(energy <= backend.to_numpy(solution.error_bounds))
        backend.assert_like(solution.x)


def test_the_sketch_belongs_to_one_inverse_and_is_made_once():
    product = Counted(decaying())
    A = ih.Callback(product, N, like=np.ones(1), psd=True)
    method = ih.BlockCG(recycle=10)
    first, second = (method.prepare(A, damping=1e-2) for _ in range(2))
    b = np.random.default_rng(1).standard_normal(N)
    once, again, other = first.solve(b), first.solve(b), second.solve(b)
    assert once.products == again.products + 10
    assert once.passes == again.passes + 1
    assert other.products == once.products
    np.testing.assert_array_equal(once.x, again.x)
    np.testing.assert_array_equal(once.x, other.x)
    assert first.with_damping(1.0).solve(b).converged


def test_an_indefinite_operator_is_still_counted_and_named():
    M = decaying()
    _, V = np.linalg.eigh(M)
    M = M - 3.0 * np.outer(V[:, 0], V[:, 0])
    product = Counted((M + M.T) / 2)
    A = ih.Callback(product, N, like=np.ones(1))
    inverse = ih.BlockCG(recycle=8).prepare(A, damping=1e-2)
    with pytest.warns(ih.ConvergenceWarning, match="NEGATIVE_CURVATURE"):
        solution = inverse.solve(np.random.default_rng(1).standard_normal((N, 4)))
    assert (solution.products, solution.passes) == (product.columns, product.passes)


def test_a_sketch_of_everything_and_the_door():
    A = ih.Dense(decaying(5), psd=True)
    solution = ih.solve(A, np.ones(5), ih.BlockCG(recycle=64), damping=1e-2)
    assert solution.status is ih.Status.CONVERGED
    with pytest.raises(ValueError, match="recycle must be at least 1"):
        ih.CG(recycle=0)
    with pytest.raises(ValueError, match="one of the two"):
        ih.BlockCG(recycle=4, preconditioner=ih.Jacobi())
