"""Block Lanczos: eigenpairs with multiplicity, honest residuals, exact counts."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import invhvp as ih
from invhvp import problems
from invhvp.estimate import eigenpairs
from tests.cases import matrix

seeds = st.integers(0, 2**16)


def counted(M, backend):
    placed, seen = backend.asarray(M), []

    def product(X):
        seen.append(X.shape[1])
        return placed @ X

    return ih.Callback(product, len(M), like=placed), seen


def check(backend, M, pairs, *, which="magnitude"):
    """Orthonormal, residuals true, values those of the matrix."""
    M = backend.to_numpy(backend.asarray(M))
    U, size = backend.to_numpy(pairs.vectors), np.linalg.norm(M, 2)
    r = U.shape[1]
    assert np.max(np.abs(U.T @ U - np.eye(r))) <= 100 * backend.eps
    true = np.linalg.norm(M @ U - U * pairs.values, axis=0)
    assert np.max(np.abs(true - pairs.residuals)) <= 1e3 * backend.eps * size
    w = np.linalg.eigvalsh(M)
    w = w[np.argsort({"magnitude": -np.abs(w), "lowest": w, "highest": -w}[which])][:r]
    return U, w, size


@pytest.mark.parametrize("which", ["magnitude", "lowest", "highest"])
@pytest.mark.parametrize("block", [1, 3])
def test_finds_the_wanted_end_of_the_spectrum(backend, which, block):
    M = matrix(*np.concatenate([[-3.0, -1.0, 2.0, 4.0], np.linspace(-0.1, 0.1, 76)]))
    A, seen = counted(M, backend)
    pairs = eigenpairs(A, 2, which=which, dimension=12, block=block, tol=1e-12)
    _, w, size = check(backend, M, pairs, which=which)
    assert pairs.converged.all()
    assert np.max(np.abs(pairs.values - w)) <= 100 * backend.eps * size
    assert pairs.products == sum(seen)
    assert pairs.passes == len(seen)
    backend.assert_like(pairs.vectors)
    assert not pairs.complete


@given(seed=seeds, rank=st.integers(1, 6), block=st.integers(1, 4), dimension=st.integers(8, 20))
def test_ritz_values_interlace(seed, rank, block, dimension):
    spectrum = np.random.default_rng(seed).standard_normal(60) ** 3
    M = matrix(*spectrum, seed=seed)
    pairs = eigenpairs(
        ih.Dense(M), rank, block=block, dimension=dimension, rng=seed, which="highest"
    )
    w, size = np.sort(spectrum)[::-1], np.max(np.abs(spectrum))
    assert np.all(pairs.values <= w[:rank] + 1e-13 * size)
    assert pairs.lowest >= w[-1] - 1e-13 * size
    true = np.linalg.norm(M @ pairs.vectors - pairs.vectors * pairs.values, axis=0)
    assert np.max(np.abs(true - pairs.residuals)) <= 1e3 * 2.0**-53 * size
    # Each Ritz value has an eigenvalue within its residual.
    gaps = np.min(np.abs(pairs.values[:, None] - w), axis=1)
    assert np.all(gaps <= true + 1e-13 * size)


def test_restarts_do_not_change_what_is_found():
    problem = problems.nn_spectrum(300)
    long = eigenpairs(problem.operator, 10, dimension=120, block=4)
    short = eigenpairs(problem.operator, 10, dimension=18, block=4)
    assert long.converged.all()
    assert short.converged.all()
    np.testing.assert_allclose(short.values, long.values, rtol=1e-10)
    overlap = np.linalg.svd(short.vectors.T @ long.vectors, compute_uv=False)
    np.testing.assert_allclose(overlap, 1, rtol=1e-10)


def test_a_network_spectrum_needs_few_products():
    problem = problems.nn_spectrum()
    few, many = eigenpairs(problem.operator, 10, block=1), eigenpairs(problem.operator, 10)
    top = np.sort(problem.spectrum)[::-1][:10]
    for pairs in (few, many):
        np.testing.assert_allclose(pairs.values, top, rtol=1e-8)
    assert few.products <= 16
    assert many.passes <= 5


def test_wilkinsons_pair_comes_out_as_two():
    problem = problems.wilkinson()
    pairs = eigenpairs(problem.operator, 2, dimension=12, block=2, tol=1e-10)
    largest, gap = problem.constants["largest"], problem.constants["gap"]
    assert not pairs.complete
    assert pairs.converged.all()
    np.testing.assert_allclose(pairs.values, largest, rtol=0, atol=1e-12)
    assert abs(pairs.values[0] - pairs.values[1]) <= gap + 1e-13
    assert abs(pairs.vectors[:, 0] @ pairs.vectors[:, 1]) <= 1e-13


@given(seed=seeds, multiplicity=st.integers(1, 4))
def test_multiple_eigenvalues_come_out_with_their_multiplicity(seed, multiplicity):
    spectrum = np.concatenate([np.full(multiplicity, 2.0), np.geomspace(1.0, 1e-3, 56)])
    A = ih.Dense(matrix(*spectrum, seed=seed))
    pairs = eigenpairs(A, multiplicity + 1, block=4, dimension=20, rng=seed)
    np.testing.assert_allclose(pairs.values[:multiplicity], 2.0, rtol=1e-12)
    assert abs(pairs.values[-1] - 1.0) <= 1e-10


@pytest.mark.parametrize("q", [0, 1, 5])
@pytest.mark.parametrize("block", [1, 4])
def test_an_exhausted_krylov_space_goes_on(backend, q, block):
    """A of rank q < rank: the rest of the pairs are null vectors, and nothing is divided by 0."""
    M = matrix(*np.concatenate([np.arange(1.0, q + 1), np.zeros(70 - q)]))
    A, _ = counted(M, backend)
    pairs = eigenpairs(A, 8, block=block)
    _, w, size = check(backend, M, pairs)
    assert pairs.converged.all()
    assert np.max(np.abs(pairs.values - w)) <= 100 * backend.eps * size


def test_the_identity_has_every_vector():
    pairs = eigenpairs(ih.Identity(50, like=np.zeros(0)), 3)
    np.testing.assert_allclose(pairs.values, 1, rtol=1e-14)
    np.testing.assert_allclose(pairs.vectors.T @ pairs.vectors, np.eye(3), atol=1e-13)


def test_small_operators_are_factored(backend):
    for n, rank in ((1, 1), (1, 5), (7, 3), (12, 12), (12, 40)):
        M = matrix(*np.linspace(-1.0, 2.0, n)) if n > 1 else np.array([[-2.0]])
        A, seen = counted(M, backend)
        pairs = eigenpairs(A, rank)
        _, w, size = check(backend, M, pairs)
        assert np.max(np.abs(pairs.values - w)) <= 100 * backend.eps * size
        assert pairs.products == sum(seen) == n
        assert pairs.complete == (rank >= n)
        assert pairs.lowest_vector.shape == (n, 1)


def test_same_seed_same_bits():
    A = problems.nn_spectrum(200).operator
    first, again, other = (eigenpairs(A, 4, rng=seed, block=2) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.vectors, again.vectors)
    assert not np.array_equal(first.vectors, other.vectors)


def test_what_has_not_converged_says_so():
    A = problems.poisson_2d(16).operator
    pairs = eigenpairs(A, 5, dimension=8, block=1, maxiter=1)
    assert not pairs.converged.all()
    assert np.all(pairs.residuals[~pairs.converged] > 1e-6 * pairs.size)


def test_the_proof_of_negative_curvature_survives_restarts():
    M = matrix(*np.concatenate([np.geomspace(10, 1, 10), np.geomspace(0.5, 1e-3, 69), [-0.2]]))
    pairs = eigenpairs(ih.Dense(M), 3, dimension=9, block=1)
    p = pairs.lowest_vector[:, 0]
    assert pairs.lowest < 0
    assert abs(p @ M @ p - pairs.lowest) <= 1e-12


def test_refuses_nonsense():
    A = ih.Identity(200, like=np.zeros(0))
    for options in (
        {"rank": 0},
        {"rank": 3, "block": 0},
        {"rank": 3, "maxiter": 0},
        {"rank": 10, "dimension": 11},
    ):
        with pytest.raises(ValueError):
            eigenpairs(A, **options)
    broken = ih.Callback(lambda X: X * np.nan, 200, like=np.zeros(0))
    with pytest.raises(ih.ConvergenceError, match="NaN"):
        eigenpairs(broken, 3)
    with pytest.raises(ih.ConvergenceError, match="NaN"):
        eigenpairs(ih.Callback(lambda X: X * np.nan, 5, like=np.zeros(0)), 3)


def test_measures_asymmetry():
    M = problems.nn_spectrum(200).operator.to_dense()
    skew = np.random.default_rng(0).standard_normal(M.shape)
    fair = eigenpairs(ih.Dense(M), 3)
    odd = eigenpairs(ih.Callback(lambda X: (M + skew) @ X, 200, like=M), 3, maxiter=1)
    assert fair.asymmetry <= 100 * 2.0**-52
    assert odd.asymmetry > 1e-3
