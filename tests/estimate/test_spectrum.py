"""Lanczos quadrature: traces of functions, with their errors."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import invhvp as ih
from invhvp import problems
from invhvp.estimate import spectrum
from tests.cases import matrix


def test_integrals_are_within_their_errors(backend):
    w = np.arange(1, 81) ** -1.0
    M = backend.asarray(matrix(*w))
    seen = []

    def product(X):
        seen.append(X.shape[1])
        return M @ X

    density = spectrum(ih.Callback(product, 80, like=M), steps=16, probes=8)
    assert density.products == sum(seen) == 128
    assert density.passes == len(seen) == 16
    assert abs(density.largest - 1) <= 100 * backend.eps
    assert density.smallest >= w[-1] - 100 * backend.eps
    np.testing.assert_allclose(np.sum(density.weights, axis=1), 1, rtol=1e-5)
    for damping in (1e-2, 1.0):
        for estimate, exact in (
            (density.trace, np.sum(w)),
            (density.effective_dimension(damping), np.sum(w / (w + damping))),
            (density.logdet(damping), np.sum(np.log(w + damping))),
        ):
            assert abs(estimate.value - exact) <= 4 * estimate.stderr + 1e-4 * abs(exact)
            assert estimate.stderr <= 0.2 * abs(exact)


@given(seed=st.integers(0, 2**16), n=st.integers(1, 12))
def test_all_steps_and_many_probes_are_a_quadrature_of_each_probe(seed, n):
    """For all n steps the rule is exact: vᵀ f(A) v for every probe, whatever f."""
    w = np.random.default_rng(seed).standard_normal(n)
    M = matrix(*w, seed=seed) if n > 1 else np.array([[w[0]]])
    density = spectrum(ih.Dense(M), steps=50, probes=3, rng=seed)
    third = n * np.sum(density.weights * density.nodes**3, axis=1)
    assert density.nodes.shape == (3, n)
    V = np.linalg.matrix_power(M, 3)
    signs = np.array(np.meshgrid(*[[-1, 1]] * n)).reshape(n, -1)
    possible = np.sum(signs * (V @ signs), axis=0)
    scale = 1e-10 * (1 + np.max(np.abs(possible)))
    assert all(np.min(np.abs(possible - value)) <= scale for value in third)


def test_an_exhausted_space_keeps_its_weights():
    density = spectrum(ih.Identity(40, like=np.zeros(0)), steps=5)
    np.testing.assert_allclose(density.trace.value, 40)
    assert density.trace.stderr <= 1e-12
    np.testing.assert_allclose(density.density(np.array([1.0]), width=0.1), 3.989423, rtol=1e-6)
    assert spectrum(ih.Identity(40, like=np.zeros(0)), probes=1).trace.stderr == np.inf


def test_the_effective_dimension_of_a_network():
    problem = problems.nn_spectrum()
    exact = problem.constants["effective_dimension"]
    estimate = spectrum(problem.operator, steps=40, probes=8).effective_dimension(1e-3)
    assert abs(estimate.value - exact) <= 4 * estimate.stderr
    assert estimate.stderr <= 0.1 * exact


def test_no_determinant_of_an_indefinite_operator():
    density = spectrum(ih.Dense(matrix(*np.linspace(-1, 2, 30))), steps=20)
    with pytest.raises(ih.IndefiniteError) as caught:
        density.logdet(0.5)
    assert abs(caught.value.minimum_damping - 1) <= 1e-3
    assert np.isfinite(density.logdet(1.5).value)
    for options in ({"steps": 0}, {"probes": 0}):
        with pytest.raises(ValueError):
            spectrum(ih.Identity(4, like=np.zeros(0)), **options)
    with pytest.raises(ValueError):
        density.logdet(0.0)
    with pytest.raises(ih.ConvergenceError):
        spectrum(ih.Callback(lambda X: X * np.nan, 9, like=np.zeros(0)))
