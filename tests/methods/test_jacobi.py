"""Jacobi: exact where it can be, positive always, and it preconditions what it is made for."""

from __future__ import annotations

import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from invhvp.gradients import DenseGradients
from invhvp.methods import BlockCG, Jacobi
from invhvp.operators import Callback, RankOneMean
from tests.backends import Backend
from tests.cases import LAYOUT, N, matrix, rows

seeds = st.integers(0, 2**16)


def callback(backend: Backend, M: np.ndarray, **options) -> Callback:
    placed = backend.asarray(M)
    return Callback(lambda X: placed @ X, M.shape[0], like=backend.asarray([]), **options)


def ones(backend: Backend, n: int):
    return backend.asarray(np.ones(n))


def test_exact_diagonal_from_gradients(backend: Backend):
    G = rows(7)
    A = RankOneMean(DenseGradients(backend.asarray(G), layout=LAYOUT))
    inverse = Jacobi().prepare(A, damping=0.5)
    assert inverse.products == 0
    assert inverse.fixed_spd
    expected = 1 / (np.sum(G * G, axis=0) / 7 + 0.5)
    found = backend.to_numpy(inverse @ ones(backend, N))
    assert np.allclose(found, expected, rtol=100 * backend.eps)
    shift = {"weight": 0.25, "bias": 2.0}
    by_block = Jacobi().prepare(A, damping=shift) @ ones(backend, N)
    expected = 1 / (np.sum(G * G, axis=0) / 7 + LAYOUT.shifts(shift))
    assert np.allclose(backend.to_numpy(by_block), expected, rtol=100 * backend.eps)


@pytest.mark.parametrize("samples", [1, 3, 4, 16])
@given(seed=seeds, log_damping=st.floats(-8, 2))
def test_positive_whatever_the_operator(
    backend: Backend, samples: int, seed: int, log_damping: float
):
    A = callback(backend, matrix(*np.linspace(-1.0, 1.0, 24), seed=seed))
    inverse = Jacobi(samples=samples, rng=seed).prepare(A, damping=10.0**log_damping)
    assert inverse.products == samples
    entries = backend.to_numpy(inverse @ ones(backend, 24))
    assert np.all(entries > 0)
    assert np.all(np.isfinite(entries))


def test_empty_rows_do_not_blow_up(backend: Backend):
    M = np.zeros((N, N))
    M[:4, :4] = matrix(1.0, 2.0, 3.0, 4.0)
    inverse = Jacobi().prepare(callback(backend, M), damping=0.0)
    assert np.max(backend.to_numpy(inverse @ ones(backend, N))) < 2
    zero = Jacobi().prepare(callback(backend, 0 * M), damping=0.0)
    assert np.array_equal(backend.to_numpy(zero @ ones(backend, N)), np.ones(N))


def test_standard_error_is_there(backend: Backend):
    A = callback(backend, matrix(*np.linspace(1.0, 3.0, 24)))
    inverse = Jacobi(samples=8).prepare(A, damping=0.1)
    backend.assert_like(inverse.standard_error)
    assert np.all(backend.to_numpy(inverse.standard_error) > 0)
    again = inverse.with_damping(0.2)
    assert again.products == 0
    assert again.estimate is inverse.estimate
    assert again.damping == 0.2


def test_preconditions_a_badly_scaled_system(backend: Backend):
    n = 60
    scales = np.geomspace(1.0, 30.0, n)
    M = scales[:, None] * matrix(*np.linspace(1.0, 3.0, n)) * scales
    A = callback(backend, M, psd=True)
    b = backend.asarray(rows(1, n)[0])
    plain = BlockCG(rtol=1e-3).prepare(A, damping=1e-3).solve(b)
    for samples in (8, 16):
        method = BlockCG(rtol=1e-3, preconditioner=Jacobi(samples=samples))
        solution = method.prepare(A, damping=1e-3).solve(b)
        assert bool(backend.to_numpy(solution.converged))
        assert solution.passes < plain.passes


def test_one_sample_is_a_method(backend: Backend):
    A = callback(backend, matrix(*np.linspace(1.0, 3.0, 24)), psd=True)
    inverse = Jacobi(samples=1).prepare(A, damping=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a one-shot approximation needs no warning
        solution = inverse.solve(ones(backend, 24))
    assert solution.status.name == "APPROXIMATE"
    assert np.isfinite(backend.to_numpy(solution.error_bounds))


@pytest.mark.backends("numpy-f64")
def test_door(backend: Backend):
    for samples in (0, 1.5, True):
        with pytest.raises(ValueError, match="samples"):
            Jacobi(samples=samples)
    spent = []
    A = Callback(lambda X: spent.append(X) or X, 40, like=backend.asarray([]))
    with pytest.raises(ValueError, match="negative"):
        Jacobi().prepare(A, damping=-1.0)
    assert not spent
