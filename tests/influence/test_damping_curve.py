"""The damping curve: every λ as if solved alone, and rank correlations as SciPy has them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

import invhvp as ih
from invhvp.influence.curve import _shares_a_space

N, P = 9, 12
DAMPINGS = [1.0, 1e-2, 0.1]


def setting(backend):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((N, P)) * np.arange(1, P + 1) ** -1.0
    G, T = backend.asarray(rows), backend.asarray(rng.standard_normal((4, P)))
    held, query = backend.to_numpy(G), backend.to_numpy(T)
    H = held.T @ held / N
    truth = [query @ np.linalg.solve(H + d * np.eye(P), held.T) for d in DAMPINGS]
    return ih.RankOneMean(ih.DenseGradients(G)), ih.DenseGradients(T), np.stack(truth)


METHODS = {
    "sample-space": (ih.SampleSpace, 1e3),
    "direct": (ih.Direct, 1e3),
    "arnoldi": (lambda: ih.Arnoldi(rank=P), 1e4),
    "nystroem": (lambda: ih.NystroemSketch(rank=P), 1e4),
    "block-cg": (ih.BlockCG, 0),
    "cg": (ih.CG, 0),
    "block-cg-preconditioned": (lambda: ih.BlockCG(preconditioner=ih.Jacobi()), 0),
    "minres": (ih.Minres, 0),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_damping_is_solved_and_ranked(backend, name):
    make, units = METHODS[name]
    A, test, truth = setting(backend)
    curve = ih.Influence(make().prepare(A, damping=5.0), A.gradients).damping_curve(test, DAMPINGS)
    assert curve.dampings == tuple(DAMPINGS)
    assert tuple(curve.scores.shape) == truth.shape
    backend.assert_like(curve.scores)
    backend.assert_like(curve.rank_correlations)
    scores = backend.to_numpy(curve.scores)
    # rtol = 1e-5 leaves errors of 1e-5·‖b‖‖g‖/λ; what is factorised, rounding alone.
    tolerance = units * backend.eps if units else 1e-5
    scale = np.linalg.norm(backend.to_numpy(test.to_dense()), axis=1).max() * np.abs(truth).max()
    for damping, found, expected in zip(DAMPINGS, scores, truth, strict=True):
        limit = tolerance * scale / min(damping, 1.0) + 1e3 * backend.eps * scale
        np.testing.assert_allclose(found, expected, rtol=0, atol=limit)
    correlations = backend.to_numpy(curve.rank_correlations)
    assert correlations.shape == (2, 4)
    for line, left, right in zip(correlations, scores, scores[1:], strict=False):
        expected = [spearmanr(a, b)[0] for a, b in zip(left, right, strict=True)]
        np.testing.assert_allclose(line, expected, atol=50 * backend.eps)


def test_ties_share_their_rank_and_constants_agree_only_with_constants():
    rows = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [1.0, 0.0]])
    G = ih.DenseGradients(rows)
    inverse = ih.Direct().prepare(ih.Diagonal(np.array([1.0, 4.0])), damping=1.0)
    test = ih.DenseGradients(np.array([[2.0, 1.0], [1.0, 0.0], [0.0, 0.0]]))
    curve = ih.Influence(inverse, G).damping_curve(test, [0.5, 50.0])
    left, right = curve.scores[0, :, :], curve.scores[1, :, :]
    expected = [spearmanr(left[j], right[j])[0] for j in (0, 1)] + [1.0]
    np.testing.assert_allclose(curve.rank_correlations[0], expected, rtol=1e-14)
    assert expected[0] < 1


def test_krylov_inverses_share_one_space():
    columns = []
    d = np.geomspace(1e-4, 1.0, 60)
    A = ih.Callback(lambda X: columns.append(X.shape[1]) or d[:, None] * X, 60, like=d, psd=True)
    rng = np.random.default_rng(0)
    G, T = (ih.DenseGradients(rng.standard_normal((m, 60))) for m in (5, 3))
    dampings = list(np.geomspace(1e-3, 1.0, 6))
    method = ih.BlockCG(rtol=1e-6)
    ih.Influence(method.prepare(A, damping=1.0), G).damping_curve(T, dampings)
    together = sum(columns)
    columns.clear()
    method.prepare(A, damping=min(dampings)).solve(T)
    alone = sum(columns)
    assert together <= alone + 6 * 3 + 3  # one verification of every λ, one iteration's slack


@pytest.mark.parametrize(
    ("method", "shares"),
    [
        (ih.BlockCG(rtol=1e-3, block_width=4, check_every=2), True),
        (ih.CG(maxiter=7), True),
        (ih.CG(preconditioner=ih.Jacobi()), False),
        (ih.BlockCG(max_products=100), False),
        (ih.BlockCG(etol=1e-3), False),
        (ih.Minres(), False),
    ],
    ids=repr,
)
def test_options_that_a_path_does_not_have_are_honoured(method, shares):
    inverse = method.prepare(ih.Diagonal(np.arange(1.0, 5.0)), damping=1.0)
    assert _shares_a_space(inverse) is shares


def test_one_damping_and_the_door():
    G = ih.DenseGradients(np.eye(3))
    influence = ih.Influence(ih.SampleSpace().prepare(ih.RankOneMean(G), damping=1.0), G)
    curve = influence.damping_curve(G, [1.0])
    assert curve.scores.shape == (1, 3, 3)
    assert curve.rank_correlations.shape == (0, 3)
    np.testing.assert_array_equal(curve.scores[0], influence.scores(G))
    with pytest.raises(ValueError, match="at least one"):
        influence.damping_curve(G, [])
    with pytest.raises(TypeError, match="damping"):
        influence.damping_curve(G, ["1"])
    with pytest.raises(ValueError, match="not negative"):
        influence.damping_curve(G, [-1.0])


def test_an_indefinite_damping_is_refused():
    G = ih.DenseGradients(np.ones((2, 2)))
    inverse = ih.BlockCG().prepare(ih.Diagonal(np.array([1.0, -2.0])), damping=3.0)
    with pytest.warns(ih.ConvergenceWarning), pytest.raises(ih.IndefiniteError):
        ih.Influence(inverse, G).damping_curve(G, [3.0, 1.0])
