"""Influence scores against the dense formula and against leaving samples out."""

from __future__ import annotations

import numpy as np
import pytest

import invhvp as ih
from invhvp import problems


def factors(samples, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((samples, 2, 3)), rng.standard_normal((samples, 2, 4))


def dense(d, a):
    return np.sum(d[:, :, :, None] * a[:, :, None, :], axis=1).reshape(len(d), -1)


def structured(backend, d, a):
    return ih.OuterProductGradients(output_grads=backend.asarray(d), inputs=backend.asarray(a))


@pytest.mark.parametrize("method", [ih.SampleSpace(), ih.BlockCG(rtol=1e-4), ih.Direct()], ids=repr)
def test_scores_equal_the_dense_formula(backend, method):
    train, test = factors(9, 0), factors(5, 1)
    G, T = dense(*train), dense(*test)
    inverse = method.prepare(ih.RankOneMean(structured(backend, *train)), damping=0.1)
    influence = ih.Influence(inverse, structured(backend, *train))
    scores = influence.scores(structured(backend, *test))
    M = np.linalg.inv(G.T @ G / 9 + 0.1 * np.eye(12))
    tolerance = max(3e-3 if isinstance(method, ih.BlockCG) else 0, 3e3 * backend.eps)
    expected = T @ M @ G.T
    np.testing.assert_allclose(
        backend.to_numpy(scores), expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )
    backend.assert_like(scores)
    own = np.sum((G @ M) * G, axis=1)
    np.testing.assert_allclose(
        backend.to_numpy(influence.self_influence()), own, atol=tolerance * own.max(), rtol=0
    )
    X = backend.to_numpy(influence.factors(structured(backend, *test)).x)
    np.testing.assert_allclose(X, M @ T.T, atol=tolerance * np.abs(M @ T.T).max(), rtol=0)


def test_top_k(backend):
    G = np.diag(np.arange(1.0, 6.0))
    G[:, 0] = [1.0, -2.0, 3.0, -4.0, 5.0]
    gradients = ih.DenseGradients(backend.asarray(G))
    inverse = ih.Direct().prepare(ih.Identity(5, like=backend.asarray([])), damping=0.0)
    query = ih.DenseGradients(backend.asarray(np.eye(5)[:1]))
    top = ih.Influence(inverse, gradients).top_k(query, k=2)
    np.testing.assert_array_equal(backend.to_numpy(top.helpful), [[4, 2]])
    np.testing.assert_array_equal(backend.to_numpy(top.harmful), [[3, 1]])
    np.testing.assert_allclose(backend.to_numpy(top.helpful_scores), [[5.0, 3.0]])
    with pytest.raises(ValueError, match="between 1 and the 5"):
        ih.Influence(inverse, gradients).top_k(query, k=6)


def test_sample_space_forms_no_vector_of_length_p():
    """p = 10⁸ here: one dense row would be 0.8 GB, the scores need 64 numbers."""
    rng = np.random.default_rng(0)
    d, a = rng.standard_normal((8, 10_000)), rng.standard_normal((8, 10_000))
    G = ih.OuterProductGradients(output_grads=d / 100, inputs=a / 100)
    inverse = ih.SampleSpace().prepare(ih.RankOneMean(G), damping=0.1)
    scores = ih.Influence(inverse, G).scores(G)
    K = (d @ d.T) * (a @ a.T) / 1e8
    expected = (K - K @ np.linalg.solve(K + 0.8 * np.eye(8), K)) / 0.1
    np.testing.assert_allclose(scores, expected, rtol=1e-9)


def test_leave_one_out_of_least_squares_is_exact():
    """For squared loss, refitting without sample i moves the fit by H⁻¹gᵢ/(N(1 − hᵢᵢ))."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((30, 4)), rng.standard_normal(30)
    theta = np.linalg.solve(X.T @ X, X.T @ y)
    G = ih.DenseGradients(X * (X @ theta - y)[:, None])
    H = ih.RankOneMean(ih.DenseGradients(X))
    hat = np.sum(X * np.linalg.solve(X.T @ X, X.T).T, axis=1)
    query = rng.standard_normal(4)
    scores = ih.Influence(ih.Direct().prepare(H, damping=0.0), G).scores(
        ih.DenseGradients(query[None, :])
    )
    for i in range(30):
        keep = np.arange(30) != i
        refit = np.linalg.lstsq(X[keep], y[keep], rcond=None)[0]
        change = query @ (refit - theta)
        assert change == pytest.approx(scores[0, i] / 30 / (1 - hat[i]), rel=1e-9, abs=1e-12)


def test_the_door():
    G = ih.DenseGradients(np.ones((2, 3)))
    inverse = ih.SampleSpace().prepare(ih.RankOneMean(G), damping=1.0)
    with pytest.raises(TypeError, match="DenseGradients"):
        ih.Influence(inverse, np.ones((2, 3)))
    with pytest.raises(ValueError, match="4 columns"):
        ih.Influence(inverse, G).scores(ih.DenseGradients(np.ones((2, 4))))


def test_scores_of_an_indefinite_operator_are_refused():
    inverse = ih.BlockCG().prepare(ih.Diagonal(np.array([1.0, -2.0])), damping=0.1)
    G = ih.DenseGradients(np.ones((1, 2)))
    with pytest.warns(ih.ConvergenceWarning), pytest.raises(ih.IndefiniteError):
        ih.Influence(inverse, G).scores(G)


def test_regression_problem_has_its_closed_forms():
    assert problems.linear_regression() is not None
