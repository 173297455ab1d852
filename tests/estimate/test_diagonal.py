"""Diagonal and trace estimates: unbiased, exact where they must be, guarded where rank is low."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from invhvp.estimate import diagonal, trace
from invhvp.gradients import DenseGradients
from invhvp.operators import Callback, Dense, RankOneMean
from tests.backends import Backend
from tests.cases import matrix, rows

SIZE = 40
seeds = st.integers(0, 2**16)


def callback(backend: Backend, M: np.ndarray) -> Callback:
    """An operator that knows nothing but its products."""
    placed = backend.asarray(M)
    return Callback(lambda X: placed @ X, M.shape[0], like=backend.asarray([]))


def decaying() -> np.ndarray:
    return matrix(*0.5 ** np.arange(SIZE))


def flat() -> np.ndarray:
    return matrix(*np.linspace(1.0, 3.0, SIZE))


# -------------------------------------------------------------------------------- what is exact


@given(seed=seeds)
def test_one_rademacher_sample_is_exact_on_a_diagonal_operator(backend: Backend, seed: int):
    d = np.random.default_rng(seed).standard_normal(SIZE)
    A = callback(backend, np.diag(d))
    estimate = diagonal(A, samples=1, rng=seed, kind="hutchinson")
    found = backend.to_numpy(estimate.values)
    assert np.array_equal(found, d.astype(backend.np_dtype))
    assert math.isinf(backend.to_numpy(estimate.standard_error)[0])
    # Gaussian probes would not pass: the test tells the two apart.
    w = np.random.default_rng(seed + 1).standard_normal(SIZE)
    assert not np.allclose(w * (d * w), d, rtol=1e-3)


def test_own_diagonal_costs_nothing(backend: Backend):
    G = rows(6, SIZE)
    A = RankOneMean(DenseGradients(backend.asarray(G)))
    estimate = diagonal(A)
    assert (estimate.kind, estimate.products) == ("exact", 0)
    expected = np.sum(G * G, axis=0) / 6
    assert np.allclose(backend.to_numpy(estimate.values), expected, rtol=100 * backend.eps)
    assert not np.any(backend.to_numpy(estimate.standard_error))
    total = trace(A)
    assert (total.kind, total.products, total.standard_error) == ("exact", 0, 0.0)
    assert math.isclose(total.value, expected.sum(), rel_tol=100 * backend.eps)


def test_few_parameters_are_multiplied_out(backend: Backend):
    M = matrix(3.0, 2.0, -1.0)
    estimate = diagonal(callback(backend, M), samples=3)
    assert (estimate.kind, estimate.products) == ("exact", 3)
    assert np.allclose(backend.to_numpy(estimate.values), np.diag(M), rtol=0, atol=9 * backend.eps)


@pytest.mark.backends("numpy", "strict", "torch-cpu", "jax-f32")
@pytest.mark.parametrize("rank", [0, 1, 9])
@settings(max_examples=10)
@given(seed=seeds)
def test_low_rank_is_exact(backend: Backend, rank: int, seed: int):
    values = np.concatenate([np.linspace(1.0, 2.0, rank), np.zeros(SIZE - rank)])
    M = matrix(*values, seed=seed)
    A = callback(backend, M)
    found = diagonal(A, samples=20, rng=seed, kind="xdiag")
    allowed = 1e-10 if backend.eps < 1e-10 else 1e-3
    assert np.allclose(backend.to_numpy(found.values), np.diag(M), rtol=0, atol=allowed)
    assert np.max(backend.to_numpy(found.standard_error)) <= allowed
    assert found.products <= 10 + max(rank, 1) + (backend.eps > 1e-10) * 10
    total = trace(A, samples=20, rng=seed, kind="xtrace")
    assert abs(total.value - values.sum()) <= SIZE * allowed


def psd_callback(backend: Backend, M: np.ndarray) -> Callback:
    placed = backend.asarray(M)
    return Callback(lambda X: placed @ X, len(M), like=backend.asarray([]), psd=True)


@pytest.mark.backends("numpy", "strict", "torch-cpu")
@pytest.mark.parametrize("rank", [0, 1, 9])
def test_nystroem_deflation_of_low_rank_is_exact(backend: Backend, rank: int):
    values = np.concatenate([np.linspace(1.0, 2.0, rank), np.zeros(SIZE - rank)])
    M = matrix(*values, seed=1)
    A = psd_callback(backend, M)
    found = diagonal(A, samples=20, kind="xnysdiag")
    allowed = 1e-10 if backend.eps < 1e-10 else 1e-3
    assert np.allclose(backend.to_numpy(found.values), np.diag(M), rtol=0, atol=allowed)
    assert (found.kind, found.products) == ("xnysdiag", 20)
    total = trace(A, samples=20, kind="xnystrace")
    assert abs(total.value - values.sum()) <= SIZE * allowed


@pytest.mark.backends("numpy-f64")
def test_nystroem_deflation_is_unbiased_and_chosen_where_it_is_legal(backend: Backend):
    M = decaying()
    A = psd_callback(backend, M)
    runs = [diagonal(A, samples=8, rng=s, kind="xnysdiag") for s in range(400)]
    found = np.stack([run.values for run in runs])
    sem = found.std(axis=0, ddof=1) / math.sqrt(400)
    assert np.all(np.abs(found.mean(axis=0) - np.diag(M)) <= 4 * sem + 1e-12)
    totals = np.asarray([trace(A, samples=8, rng=s, kind="xnystrace").value for s in range(400)])
    assert abs(totals.mean() - np.trace(M)) <= 4 * totals.std(ddof=1) / math.sqrt(400)
    chosen = diagonal(A, samples=20)
    assert (chosen.kind, chosen.products) == ("xnysdiag", 20)
    plain = diagonal(callback(backend, M), samples=20)
    assert plain.kind == "xdiag"
    error = np.linalg.norm(chosen.values - np.diag(M))
    assert error < np.linalg.norm(plain.values - np.diag(M))
    assert trace(A, samples=20).kind == "xnystrace"
    with pytest.raises(ValueError, match="positive semidefinite"):
        diagonal(callback(backend, M), samples=20, kind="xnysdiag")


# ---------------------------------------------------------------------------- what is unbiased


@pytest.mark.backends("numpy-f64")
@pytest.mark.parametrize("kind", ["hutchinson", "xdiag"])
@pytest.mark.parametrize("make", [decaying, flat])
def test_diagonal_is_unbiased(backend: Backend, kind: str, make):
    M = make()
    A = callback(backend, M)
    found = np.stack([diagonal(A, samples=8, rng=s, kind=kind).values for s in range(400)])
    sem = found.std(axis=0, ddof=1) / math.sqrt(400)
    assert np.all(np.abs(found.mean(axis=0) - np.diag(M)) <= 4 * sem + 1e-12)


@pytest.mark.backends("numpy-f64")
@pytest.mark.parametrize("kind", ["hutchinson", "xtrace"])
@pytest.mark.parametrize("make", [decaying, flat])
def test_trace_is_unbiased(backend: Backend, kind: str, make):
    M = make()
    A = callback(backend, M)
    found = np.asarray([trace(A, samples=8, rng=s, kind=kind).value for s in range(400)])
    assert abs(found.mean() - np.trace(M)) <= 4 * found.std(ddof=1) / math.sqrt(400)


@pytest.mark.backends("numpy-f64")
@pytest.mark.parametrize("kind", ["hutchinson", "xdiag"])
def test_standard_error_is_the_size_of_the_error(backend: Backend, kind: str):
    M = flat()
    A = callback(backend, M)
    errors, claimed = [], []
    for seed in range(100):
        estimate = diagonal(A, samples=16, rng=seed, kind=kind)
        errors.append((estimate.values - np.diag(M)) ** 2)
        claimed.append(estimate.standard_error**2)
    # The samples of XDiag share a sketch: up to √2.
    assert 0.8 < math.sqrt(np.mean(errors) / np.mean(claimed)) < 1.5


def test_deflation_wins_where_the_spectrum_decays(backend: Backend):
    M = decaying()
    A = callback(backend, M)

    def error(kind: str) -> float:
        found = backend.to_numpy(diagonal(A, samples=24, kind=kind).values)
        return float(np.linalg.norm(found - np.diag(M)))

    assert error("xdiag") < 1e-2 * error("hutchinson")
    assert diagonal(A, samples=24).kind == "xdiag"
    assert diagonal(callback(backend, flat()), samples=24).kind == "hutchinson"
    assert trace(A, samples=24).kind == "xtrace"


# ------------------------------------------------------------------------------------ the rest


@pytest.mark.parametrize("samples", [1, 2, 4, 33])
@given(seed=seeds)
def test_positive_estimates(backend: Backend, samples: int, seed: int):
    M = matrix(*np.linspace(-2.0, 2.0, SIZE), seed=seed)
    estimate = diagonal(callback(backend, M), samples=samples, rng=seed)
    assert estimate.products == samples
    safe = backend.to_numpy(estimate.positive())
    assert np.all(safe > 0)
    assert np.all(safe >= backend.to_numpy(estimate.values) * (1 - 8 * backend.eps))
    backend.assert_like(estimate.values)
    backend.assert_like(estimate.standard_error)


def test_same_seed_same_bits(backend: Backend):
    A = callback(backend, flat())
    for kind in ("hutchinson", "xdiag"):
        first, second = (diagonal(A, samples=8, rng=5, kind=kind).values for _ in range(2))
        assert np.array_equal(backend.to_numpy(first), backend.to_numpy(second))
        other = diagonal(A, samples=8, rng=6, kind=kind).values
        assert not np.array_equal(backend.to_numpy(first), backend.to_numpy(other))


@pytest.mark.backends("numpy")
@pytest.mark.parametrize("kind", ["auto", "hutchinson", "xdiag"])
def test_nan_stays_nan(backend: Backend, kind: str):
    M = flat()
    M[2, 3] = M[3, 2] = np.nan
    assert np.any(np.isnan(diagonal(callback(backend, M), samples=8, kind=kind).values))


@pytest.mark.backends("numpy-f64")
def test_door(backend: Backend):
    A = callback(backend, flat())
    for samples in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="samples"):
            diagonal(A, samples=samples)
    with pytest.raises(ValueError, match="xdiag"):
        diagonal(A, kind="gauss")
    with pytest.raises(ValueError, match="at least 4"):
        trace(A, kind="xtrace", samples=3)
    assert diagonal(Dense(backend.asarray(flat())), samples=1).kind == "exact"
