"""Inverses that do not exist, are indefinite, or whose factorisation fails."""

from __future__ import annotations

import math

import numpy as np
import pytest

from invhvp import _backend, _lapack
from invhvp.gradients import DenseGradients
from invhvp.layout import Layout
from invhvp.operators import BlockDiagonal, Callback, Dense, Diagonal, LowRank, RankOneMean
from invhvp.operators.factor import SymmetricFactor
from invhvp.solution import SingularError
from tests.backends import Backend
from tests.cases import N, matrix, rows


def test_singular_matrices_are_named(backend: Backend):
    singular = [
        Dense(backend.asarray([[1.0, 1.0], [1.0, 1.0]])),
        Dense(backend.asarray(np.zeros((3, 3)))),
        Diagonal(backend.asarray([1.0, 0.0])),
        LowRank(backend.asarray(np.eye(3)[:, :1]), backend.asarray([2.0])),
        RankOneMean(DenseGradients(backend.asarray(rows(2, 3)))),
        RankOneMean(DenseGradients(backend.asarray(rows(4, 3) * [1.0, 1.0, 0.0]))),
        BlockDiagonal(
            {name: Diagonal(backend.asarray([d])) for name, d in (("a", 1.0), ("b", 0.0))}
        ),
    ]
    for A in singular:
        with pytest.raises(SingularError, match="damping"):
            A.inverse(0.0)


def test_damping_onto_an_eigenvalue(backend: Backend):
    for A in (
        Dense(backend.asarray([[0.0, 0.5], [0.5, 0.0]])),
        Diagonal(backend.asarray([1.0, -0.5])),
        LowRank(backend.asarray(np.eye(3)[:, :1]), backend.asarray([-0.5])),
    ):
        with pytest.raises(SingularError, match="damping"):
            A.inverse(0.5)


def test_indefinite_inverses_are_exact_and_say_so(backend: Backend):
    M = matrix(2.0, -1.0, 0.5).astype(backend.np_dtype).astype(float)
    A = Dense(backend.asarray(M))
    K = A.inverse(0.25)
    assert not K.definite
    assert not K.psd
    assert A.inverse(1.5).definite
    X = backend.to_numpy(K.to_dense())
    np.testing.assert_allclose(X @ (M + 0.25 * np.eye(3)), np.eye(3), atol=50 * backend.eps)
    low = LowRank(backend.asarray(np.eye(3)[:, :1]), backend.asarray([-2.0]))
    assert not low.inverse(1.0).definite
    assert low.inverse(3.0).definite
    d = Diagonal(backend.asarray([1.0, -2.0]))
    assert not d.inverse(1.0).definite
    assert d.inverse(3.0).definite
    both = BlockDiagonal({"a": A, "b": d})
    assert not both.inverse(1.5).definite
    assert both.inverse(3.0).definite


def test_indefinite_by_block(backend: Backend):
    """λ by block on an indefinite operator: exact, and never claimed to be definite."""
    layout = Layout.from_shapes({"a": (1,), "b": (2,)})
    U = np.linalg.qr(rows(3, 2))[0].astype(backend.np_dtype).astype(float)
    A = LowRank(backend.asarray(U), backend.asarray([3.0, -2.0]), layout=layout)
    K = A.inverse({"a": 0.5, "b": 1.0})
    damped = (U * [3.0, -2.0]) @ U.T + np.diag([0.5, 1.0, 1.0])
    assert np.linalg.eigvalsh(damped)[0] < 0
    assert not K.definite
    expected = np.linalg.inv(damped)
    allowed = 50 * backend.eps * np.linalg.cond(damped) * np.linalg.norm(expected)
    assert np.linalg.norm(backend.to_numpy(K.to_dense()) - expected) <= allowed


def test_blocks_without_an_inverse_are_densified(backend: Backend):
    M = matrix(1.0, 0.5, 0.25).astype(backend.np_dtype).astype(float)
    placed = backend.asarray(M)
    block = Callback(lambda X: placed @ X, 3, like=placed, psd=True)
    A = BlockDiagonal({"a": block})
    np.testing.assert_allclose(backend.to_numpy(A.diagonal()), np.diag(M), atol=8 * backend.eps)
    X = backend.to_numpy(A.inverse(0.5).to_dense())
    np.testing.assert_allclose(X, np.linalg.inv(M + np.eye(3) / 2), atol=50 * backend.eps)


def test_tall_gradients_without_damping(backend: Backend):
    G = rows(40).astype(backend.np_dtype).astype(float)
    A = RankOneMean(DenseGradients(backend.asarray(G)))
    H = G.T @ G / 40
    expected = np.linalg.inv(H)
    allowed = 50 * backend.eps * np.linalg.cond(H) * np.linalg.norm(expected)
    assert np.linalg.norm(backend.to_numpy(A.inverse(0.0).to_dense()) - expected) <= allowed


def test_sample_space_at_small_damping(backend: Backend):
    """x = b/λ - ... cancels: the error is that of the condition number, no more."""
    G = rows(5).astype(backend.np_dtype).astype(float)
    A = RankOneMean(DenseGradients(backend.asarray(G)))
    b = np.random.default_rng(0).standard_normal(N).astype(backend.np_dtype).astype(float)
    for damping in (1e-2, 1e-3):
        damped = G.T @ G / 5 + damping * np.eye(N)
        expected = np.linalg.solve(damped, b)
        got = backend.to_numpy(A.inverse(damping) @ backend.asarray(b))
        allowed = 30 * backend.eps * np.linalg.cond(damped) * np.linalg.norm(expected)
        assert np.linalg.norm(got - expected) <= allowed


def test_bilinear_forms_need_no_vector_of_length_p(backend: Backend):
    G, left, right = (rows(k, seed=k).astype(backend.np_dtype).astype(float) for k in (5, 3, 4))
    wrap = [DenseGradients(backend.asarray(a)) for a in (G, left, right)]
    got = RankOneMean(wrap[0]).inverse(0.1).bilinear(wrap[1], wrap[2])
    backend.assert_like(got)
    damped = G.T @ G / 5 + 0.1 * np.eye(N)
    expected = left @ np.linalg.solve(damped, right.T)
    allowed = 30 * backend.eps * np.linalg.cond(damped) * np.linalg.norm(expected)
    assert np.linalg.norm(backend.to_numpy(got) - expected) <= allowed


def test_bilinear_forms_of_the_operators_own_gradients(backend: Backend):
    """Whichever side is the operator's own, or larger, or the same as the other."""
    G, few, many = (rows(k, seed=k).astype(backend.np_dtype).astype(float) for k in (5, 2, 7))
    own, small, large = (DenseGradients(backend.asarray(a)) for a in (G, few, many))
    damping = 1e-3
    inverse = RankOneMean(own).inverse(damping)
    damped = G.T @ G / 5 + damping * np.eye(N)
    for left, right, a, b in (
        (small, own, few, G),
        (own, small, G, few),
        (own, own, G, G),
        (large, small, many, few),
        (small, small, few, few),
        (large, large, many, many),
    ):
        got = backend.to_numpy(inverse.bilinear(left, right))
        expected = a @ np.linalg.solve(damped, b.T)
        allowed = 30 * backend.eps * np.linalg.cond(damped) * np.linalg.norm(expected)
        assert got.shape == expected.shape
        assert np.linalg.norm(got - expected) <= allowed


def test_the_size_of_the_damped_operator_comes_from_the_gram_matrix(backend: Backend):
    for seed in range(5):
        G = rows(5, seed=seed).astype(backend.np_dtype).astype(float)
        inverse = RankOneMean(DenseGradients(backend.asarray(G)), count=3.0).inverse(0.5)
        exact = np.linalg.norm(G, 2) ** 2 / 3 + 0.5
        assert 0.9 * exact <= inverse.damped_norm() <= (1 + 50 * backend.eps) * exact
    nothing = RankOneMean(DenseGradients(backend.asarray(np.zeros((2, N))))).inverse(0.5)
    assert nothing.damped_norm() == 0.5


def test_singular_by_block(backend: Backend):
    layout = Layout.from_shapes({"a": (1,), "b": (2,)})
    A = LowRank(backend.asarray(np.eye(3)[:, :2]), backend.asarray([-0.5, 1.0]), layout=layout)
    with pytest.raises(SingularError, match="damping"):
        A.inverse({"a": 0.5, "b": 1.0})
    with pytest.raises(SingularError, match="damping"):
        A.inverse({"a": 0.5, "b": 0.0})
    assert not A.inverse({"a": 0.25, "b": 1.0}).definite
    assert A.inverse({"a": 0.75, "b": 1.0}).definite


@pytest.mark.parametrize("broken", ["cholesky", "both"])
def test_failed_factorisations(backend: Backend, broken: str, monkeypatch: pytest.MonkeyPatch):
    """A library that returns NaN: recover through the eigenvectors, or say so; no garbage."""

    def nan_cholesky(M):
        return _backend.namespace(M).full_like(M, math.nan)

    monkeypatch.setattr(_lapack, "cholesky", nan_cholesky)
    if broken == "both":
        monkeypatch.setattr(_lapack, "eigh", lambda M: (nan_cholesky(M[:, 0]), nan_cholesky(M)))
    makers = [
        lambda: Dense(backend.asarray(np.eye(3))),
        lambda: RankOneMean(DenseGradients(backend.asarray(rows(2, 3)))),
        lambda: RankOneMean(DenseGradients(backend.asarray(rows(4, 3)))),
        lambda: BlockDiagonal({"a": Dense(backend.asarray(np.eye(3)))}),
    ]
    for make in makers:
        A = make()
        if broken == "both":
            with pytest.raises(SingularError):
                A.inverse(0.5)
            continue
        M = backend.to_numpy(A.to_dense()) + np.eye(3) / 2
        X = backend.to_numpy(A.inverse(0.5).to_dense())
        np.testing.assert_allclose(X @ M, np.eye(3), atol=30 * np.linalg.cond(M) * backend.eps)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_matrices_with_nan_or_inf(backend: Backend, value: float):
    M = np.eye(3)
    M[1, 1] = value
    with pytest.raises(SingularError, match="NaN or Inf"), np.errstate(invalid="ignore"):
        Dense(backend.asarray(M)).inverse(1.0)
    for inverse in (
        lambda: Diagonal(backend.asarray([1.0, value])).inverse(1.0),
        lambda: LowRank(backend.asarray(np.eye(3)[:, :1]), backend.asarray([value])).inverse(1.0),
    ):
        with pytest.raises(SingularError):
            inverse()


def test_factor_solves_in_its_own_precision(backend: Backend):
    small = _backend.to_small(backend.asarray(matrix(1.0, 1e-3, 1e-6)))
    factor = SymmetricFactor(small)
    assert factor.definite
    M = backend.to_numpy(small)
    unit = 2.0**-52 if _backend.dtype_name(small.dtype) == "float64" else 2.0**-23
    X = backend.to_numpy(factor.solve(_backend.from_host(np.eye(3), small)))
    np.testing.assert_allclose(X @ M, np.eye(3), atol=30 * np.linalg.cond(M) * unit)
