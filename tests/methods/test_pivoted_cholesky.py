"""Randomly pivoted Cholesky: rows that stand for all, and the preconditioner made of them."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import invhvp as ih
from invhvp.estimate import pivots

seeds = st.integers(0, 2**16)


def decaying(seed, n=40, p=30):
    """Gradients of random decay, at times of low rank, with rows of all lengths, some equal."""
    rng = np.random.default_rng(seed)
    w = np.arange(1, p + 1) ** -rng.uniform(0.5, 3)
    w[rng.integers(1, p) :] *= rng.choice([1.0, 1e-4, 0.0])
    G = rng.standard_normal((n, p)) * w * 10.0 ** rng.uniform(-2, 0, (n, 1))
    G[rng.integers(0, n, 3)] = G[0]
    return G


@given(seed=seeds, rank=st.integers(1, 50), fraction=st.sampled_from([0.0, 1e-3, 0.3, 2.0]))
def test_a_factorisation_of_the_gram_matrix(seed, rank, fraction):
    G = decaying(seed)
    trace = np.sum(G * G)
    found = pivots(ih.DenseGradients(G), rank=rank, goal=fraction * trace, rng=seed)
    m = found.rows.size
    assert m == np.unique(found.rows).size <= rank
    L, inner = np.asarray(found.factor), np.asarray(found.inner)
    S = G[found.rows]
    np.testing.assert_allclose(L @ L.T, S @ S.T, atol=1e-12 * trace)
    assert np.all(np.triu(L, 1) == 0)
    assert found.trace == pytest.approx(trace)
    # Q spans the chosen rows, and QGᵀGQᵀ is the Rayleigh-Ritz matrix; what Q leaves is the rest.
    Q = np.linalg.qr(S.T)[0].T if m else np.zeros((0, 30))
    left = np.sum(G * G) - np.sum((G @ Q.T) ** 2)
    assert found.rest >= left - 1e-9 * trace
    if fraction == 0.0:  # nothing was skipped
        assert found.rest <= left + 1e-9 * trace
        np.testing.assert_allclose(
            np.sort(np.linalg.eigvalsh(inner)),
            np.sort(np.linalg.eigvalsh(Q @ G.T @ G @ Q.T)),
            atol=1e-8 * trace,
        )
    if m < min(rank, 30) and fraction:
        assert found.rest <= max(fraction, 1e-9) * trace


@given(seed=seeds, rank=st.integers(1, 40), log_damping=st.floats(-5, 0))
def test_the_condition_number_is_bounded_by_what_the_rows_leave(seed, rank, log_damping):
    damping, G = 10.0**log_damping, decaying(seed)
    A = ih.RankOneMean(ih.DenseGradients(G))
    H = G.T @ G / len(G) + damping * np.eye(30)
    M = ih.PivotedCholesky(rank=rank, rng=seed).prepare(A, damping=damping).to_dense()
    np.testing.assert_allclose(M, M.T, atol=1e-9 / damping)
    root = np.linalg.cholesky((M + M.T) / 2)
    w = np.linalg.eigvalsh(root.T @ H @ root)
    delta = pivots(ih.DenseGradients(G), rank=rank, goal=damping * len(G), rng=seed).rest / len(G)
    assert w[0] > 0
    assert w[-1] / w[0] <= 4 * (1 + delta / damping) ** 3 * (1 + 1e-6)


def test_all_rows_give_the_exact_inverse(backend):
    G = decaying(3, n=12)
    A = ih.RankOneMean(ih.DenseGradients(backend.asarray(G)), count=5.0)
    exact = np.linalg.inv(G.T @ G / 5 + 1e-2 * np.eye(30))
    M = ih.PivotedCholesky(rank=12, tol=0.0).prepare(A, damping=1e-2)
    # Rounding of A, of size 10 ε, is magnified by ‖(A + λ)⁻¹‖² = 1 / λ².
    tolerance = 1e3 * backend.eps
    np.testing.assert_allclose(backend.to_numpy(M.to_dense()), exact, atol=tolerance / 1e-2**2)
    other = M.with_damping(0.3)
    exact = np.linalg.inv(G.T @ G / 5 + 0.3 * np.eye(30))
    np.testing.assert_allclose(backend.to_numpy(other.to_dense()), exact, atol=tolerance / 0.3**2)


def test_a_surrogate_halves_the_passes():
    rng = np.random.default_rng(1)
    G = rng.standard_normal((400, 300)) / np.arange(1, 301) ** 1.5
    K = ih.RankOneMean(ih.DenseGradients(G))
    H = K + 1e-5 * ih.Dense(np.diag(np.linspace(0, 1, 300)))
    b = rng.standard_normal((300, 2))
    plain = ih.solve(H, b, ih.BlockCG(rtol=1e-8), damping=1e-6)
    method = ih.BlockCG(rtol=1e-8, preconditioner=ih.Surrogate(K, ih.PivotedCholesky()))
    helped = ih.solve(H, b, method, damping=1e-6)
    assert helped.converged.all()
    assert helped.passes <= plain.passes / 2
    np.testing.assert_allclose(helped.x, plain.x, atol=1e-5 * np.abs(plain.x).max())


def test_gradients_that_vanish_leave_the_damping():
    A = ih.RankOneMean(ih.DenseGradients(np.zeros((4, 3))))
    M = ih.PivotedCholesky().prepare(A, damping=0.5)
    np.testing.assert_array_equal(M @ np.ones(3), np.full(3, 2.0))


@pytest.mark.parametrize(
    ("noise", "damping", "dtype", "passes"),
    [
        (1e-6, 1e-10, np.float64, 20), (1e-4, 1e-8, np.float64, 20),
        (1e-4, 1e-6, np.float64, 20), (1e-2, 1e-4, np.float32, 50),
        (1e-1, 1e-4, np.float32, 50),
    ],
)  # fmt: skip
def test_nearly_equal_samples_do_no_harm(noise, damping, dtype, passes):
    rng = np.random.default_rng(0)
    G = np.repeat(rng.standard_normal((12, 200)), 50, axis=0)
    G = (G + noise * rng.standard_normal(G.shape)).astype(dtype)
    A, b = ih.RankOneMean(ih.DenseGradients(G)), rng.standard_normal(200).astype(dtype)
    H = G.T.astype(float) @ G / len(G) + damping * np.eye(200)
    wanted = np.linalg.solve(H, b.astype(float))
    size = np.linalg.norm(H, 2) * np.linalg.norm(wanted) / np.linalg.norm(b)
    rtol = max(1e-5, 0.5 * float(np.finfo(dtype).eps) * size)  # what the precision can reach
    method = ih.BlockCG(rtol=rtol, preconditioner=ih.PivotedCholesky(), maxiter=100)
    inverse = method.prepare(A, damping=damping)
    M = inverse.preconditioner.to_dense().astype(float)
    assert np.linalg.eigvalsh((M + M.T) / 2)[0] > 0
    solution = inverse.solve(b)
    assert solution.status == ih.Status.CONVERGED
    assert solution.iterations <= passes
    limit = 1e-2 if dtype == np.float32 else 1e-4
    assert np.linalg.norm(solution.x - wanted) <= limit * np.linalg.norm(wanted)


def test_gradients_and_transforms_go_through():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
    A = ih.RankOneMean(ih.DenseGradients(torch.from_numpy(decaying(5))))
    P = ih.PivotedCholesky(rank=8).prepare(A, damping=1e-2)
    x = torch.linspace(-1, 1, 30, dtype=torch.float64)
    M = P.to_dense()
    w = x.clone().requires_grad_()
    (P @ w).sum().backward()
    torch.testing.assert_close(w.grad, M.sum(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.vmap(lambda v: P @ v)(x[None])[0], M @ x)


def test_bad_input_is_named():
    A = ih.RankOneMean(ih.DenseGradients(np.ones((4, 3))))
    with pytest.raises(TypeError, match=r"needs an operator with gradients.*Surrogate"):
        ih.PivotedCholesky().prepare(np.eye(3), damping=1.0)
    with pytest.raises(ih.SingularError, match="damping > 0"):
        ih.PivotedCholesky().prepare(A, damping=0.0)
    with pytest.raises(ih.SingularError, match="damping > 0"):
        ih.PivotedCholesky().prepare(A, damping=1.0).with_damping(0.0)
    bad = ih.RankOneMean(ih.DenseGradients(np.array([[np.nan, 1.0]])))
    with pytest.raises(ValueError, match="NaN or Inf"):
        ih.PivotedCholesky().prepare(bad, damping=1.0)
    for options in (
        {"rank": 0},
        {"rank": "many"},
        {"max_rank": 0},
        {"max_rank": 2.5},
        {"tol": -1.0},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            ih.PivotedCholesky(**options)


def test_the_same_seed_gives_the_same_bits():
    A = ih.RankOneMean(ih.DenseGradients(decaying(7)))
    b = np.arange(30.0)
    first, again, other = (
        ih.PivotedCholesky(rank=5, rng=seed).prepare(A, damping=1e-3) @ b for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
