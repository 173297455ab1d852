"""Powers and log-determinants of A + λI, where a factorisation gives them."""

from __future__ import annotations

import numpy as np
import pytest

import invhvp as ih
from invhvp.estimate import logdet
from tests.cases import LAYOUT, OPERATORS, N

DEFINITE = [
    "dense",
    "identity",
    "block-diagonal",
    "block-diagonal-permuted",
    "low-rank",
    "low-rank-oblique",
    "rank-one-mean-wide",
    "rank-one-mean-tall",
    "rank-one-mean-counted",
    "kronecker",
    "eigen-kronecker",
    "kronecker-blocks",
    "callback",
]
DAMPING = 1e-3


@pytest.mark.parametrize("exponent", [-0.5, 0.5, -1.0, 1.0, -2.0])
@pytest.mark.parametrize("name", DEFINITE)
def test_powers_equal_those_of_the_dense_matrix(backend, name, exponent):
    A, M = OPERATORS[name](backend)
    if name.endswith("tall"):
        A = ih.RankOneMean(A.gradients)
    power = ih.Direct().prepare(A, damping=DAMPING).power(exponent)
    w, V = np.linalg.eigh(M)
    values = np.maximum(w, 0.0) + DAMPING
    expected = (V * values**exponent) @ V.T
    X = backend.asarray(np.eye(N))
    found = power @ X
    backend.assert_like(found)
    # A relative error of κ·ε in the smallest eigenvalue moves its power by as much.
    unit = 100 * backend.eps * max(1.0, values.max() / values.min()) ** min(abs(exponent), 1.0)
    size = np.abs(expected).max()
    np.testing.assert_allclose(backend.to_numpy(found), expected, rtol=0, atol=unit * size)
    assert power.psd


def test_minus_one_is_the_inverse_and_halves_multiply(backend):
    A, _ = OPERATORS["rank-one-mean-wide"](backend)
    inverse = ih.SampleSpace().prepare(A, damping=DAMPING)
    B = backend.asarray(np.random.default_rng(0).standard_normal((N, 3)))
    half = inverse.power(-0.5)
    X, Y = backend.to_numpy(inverse @ B), backend.to_numpy(half @ (half @ B))
    np.testing.assert_allclose(
        Y, X, rtol=0, atol=1e3 * backend.eps * np.abs(X).max() / DAMPING**0.5
    )
    Z = backend.to_numpy(inverse.power(-1.0) @ B)
    np.testing.assert_allclose(Z, X, rtol=0, atol=1e3 * backend.eps * np.abs(X).max())


def test_a_damping_far_above_the_gram_matrix_loses_nothing():
    """(s + λ)⁻½ − λ⁻½ would cancel to nothing for s = 1e-12 λ."""
    G = ih.DenseGradients(1e-6 * np.eye(4)[:2])
    half = ih.SampleSpace().prepare(ih.RankOneMean(G), damping=1.0).power(-0.5)
    tail = half._C[0, 0] * 1e-12
    assert tail == pytest.approx(-0.5 * 0.5e-12, rel=1e-10)


def test_damping_by_block(backend):
    A, M = OPERATORS["block-diagonal"](backend)
    shift = {"weight": 0.5, "bias": 0.125}
    power = ih.Direct().prepare(A, damping=shift).power(-0.5)
    w, V = np.linalg.eigh(M + np.diag(LAYOUT.shifts(shift)))
    found = backend.to_numpy(power @ backend.asarray(np.eye(N)))
    np.testing.assert_allclose(found, (V / np.sqrt(w)) @ V.T, atol=100 * backend.eps)


@pytest.mark.parametrize(
    ("A", "damping", "what"),
    [
        (ih.Dense(np.diag([1.0, -2.0])), 0.5, "more damping"),
        (ih.Diagonal(np.array([1.0, -2.0])), 0.5, "more damping"),
        (ih.LowRank(np.eye(3)[:, :1], np.array([-2.0])), 0.5, "more damping"),
    ],
)
def test_an_indefinite_matrix_has_no_powers(A, damping, what):
    with pytest.raises(ValueError, match=what):
        ih.Direct().prepare(A, damping).power(-0.5)
    with pytest.raises(ValueError, match=what):
        logdet(A, damping)


def test_inverses_without_eigenvalues_say_so():
    A = ih.LowRank(np.eye(N)[:, :2], np.ones(2), layout=LAYOUT)
    inverse = ih.Direct().prepare(A, damping={"weight": 0.5, "bias": 0.25})
    with pytest.raises(ValueError, match="no powers"):
        inverse.power(-0.5)
    inverse = ih.InverseHarmonicMean().prepare(
        ih.RankOneMean(ih.DenseGradients(np.eye(3))), damping=1.0
    )
    with pytest.raises(ValueError, match="no powers"):
        inverse.power(-0.5)


@pytest.mark.parametrize("name", [name for name in DEFINITE if name != "callback"])
def test_logdet_is_exact_where_there_is_a_factorisation(backend, name):
    A, M = OPERATORS[name](backend)
    found = logdet(A, DAMPING)
    w = np.maximum(np.linalg.eigvalsh(M), 0.0) + DAMPING
    assert found.stderr == 0
    limit = 100 * backend.eps * (N + np.sum(w.max() / w.min()))
    assert found.value == pytest.approx(np.sum(np.log(w)), abs=limit)


def test_logdet_of_a_callback_is_estimated(backend):
    d = np.arange(1, 201) ** -2.0
    placed = backend.asarray(d)
    A = ih.Callback(lambda X: placed[:, None] * X, 200, like=backend.asarray([]), psd=True)
    found = logdet(A, 1e-2, steps=30, probes=8)
    assert 0 <= found.stderr < 5
    exact = float(np.sum(np.log(d + 1e-2)))
    assert abs(found.value - exact) <= 4 * found.stderr + 1e-3 * abs(exact)
    with pytest.raises(ValueError, match="positive"):
        logdet(A, 0.0)
