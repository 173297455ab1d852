"""Evaluation against problems whose retraining has a closed form."""

from __future__ import annotations

import numpy as np
import pytest

import invhvp as ih
from invhvp.influence import evaluate


@pytest.fixture(scope="module")
def ridge():
    """Scores of a ridge regression, and its exact losses after training on some samples."""
    rng = np.random.default_rng(0)
    X, noise = rng.standard_normal((40, 3)), rng.standard_normal(40)
    y = X @ np.asarray([1.0, -2.0, 0.5]) + noise
    X_test = rng.standard_normal((6, 3))
    y_test = X_test @ np.asarray([1.0, -2.0, 0.5])

    def fit(kept):
        return np.linalg.solve(X[kept].T @ X[kept] + 0.4 * np.eye(3), X[kept].T @ y[kept])

    def retrain(kept):
        return 0.5 * (X_test @ fit(kept) - y_test) ** 2

    theta = fit(np.arange(40))
    G = ih.DenseGradients(X * (X @ theta - y)[:, None])
    T = ih.DenseGradients(X_test * (X_test @ theta - y_test)[:, None])
    H = ih.RankOneMean(ih.DenseGradients(X))
    scores = ih.Influence(ih.Direct().prepare(H, damping=0.01), G).scores(T)
    return scores, retrain


def test_leave_one_out_compares_each_retraining(ridge):
    scores, retrain = ridge
    before = retrain(np.arange(40))
    result = evaluate.leave_one_out(scores, retrain, [4, 0, 39])
    np.testing.assert_array_equal(result.index, [4, 0, 39])
    np.testing.assert_allclose(result.predicted, scores[:, [4, 0, 39]].T / 40)
    without = [retrain(np.delete(np.arange(40), i)) - before for i in (4, 0, 39)]
    np.testing.assert_allclose(result.actual, without, rtol=1e-12)
    everywhere = evaluate.leave_one_out(scores, retrain, range(40), baseline=before)
    a, b = everywhere.predicted.ravel(), everywhere.actual.ravel()
    assert everywhere.pearson == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
    line = np.linalg.lstsq(np.stack([a, np.ones_like(a)], axis=1), b, rcond=None)[0]
    assert everywhere.slope == pytest.approx(line[0], rel=1e-9)


def test_one_loss_for_one_row_of_scores(backend):
    values = np.asarray([1.0, 2.0, -3.0, 0.5])
    scores = backend.asarray(4 * values)
    result = evaluate.leave_one_out(
        scores, lambda kept: backend.asarray(-values[kept].sum()), [1, 2]
    )
    np.testing.assert_allclose(result.actual, [2.0, -3.0], rtol=1e-6)
    np.testing.assert_allclose(result.predicted, [2.0, -3.0], rtol=1e-6)
    assert result.slope == pytest.approx(1.0)


def test_lds_of_an_additive_model_is_one_and_of_its_opposite_minus_one():
    values = np.random.default_rng(0).standard_normal((3, 20))

    def retrain(kept):
        return -values[:, kept].sum(axis=1)

    right = evaluate.lds(20 * values, retrain, subsets=12)
    np.testing.assert_allclose(right.correlations, np.ones(3))
    np.testing.assert_allclose(right.predicted, right.actual)
    assert right.score == pytest.approx(1.0)
    wrong = evaluate.lds(-values, retrain, subsets=12, fraction=0.3)
    np.testing.assert_allclose(wrong.correlations, -np.ones(3))
    assert evaluate.lds(0 * values, retrain, subsets=5).score == 0.0


def test_lds_draws_the_subsets_it_says(ridge):
    scores, retrain = ridge
    drawn = []
    result = evaluate.lds(
        scores, lambda kept: drawn.append(kept) or retrain(kept), subsets=30, fraction=0.8, rng=1
    )
    assert [len(set(kept.tolist())) for kept in drawn] == [32] * 30
    assert len({tuple(kept) for kept in drawn}) == 30
    assert result.actual.shape == (30, 6)
    # Spearman's coefficient from its definition, one test sample at a time.
    for j, found in enumerate(result.correlations):
        a, b = (np.argsort(np.argsort(x[:, j])) for x in (result.predicted, result.actual))
        assert found == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
    low, high = result.interval
    # The jackknife in its textbook form, of the mean coefficient over 30 subsets.
    left_out = []
    for i in range(30):
        a, b = (np.delete(x, i, axis=0) for x in (result.predicted, result.actual))
        found = [np.corrcoef(np.argsort(np.argsort(a[:, j])), np.argsort(np.argsort(b[:, j])))[0, 1]
                 for j in range(6)]  # fmt: skip
        left_out.append(np.mean(found))
    error = np.sqrt(29 / 30 * np.sum((np.asarray(left_out) - np.mean(left_out)) ** 2))
    assert low == pytest.approx(result.score - 1.96 * error, abs=1e-12)
    assert high == pytest.approx(min(result.score + 1.96 * error, 1.0), abs=1e-12)
    again = evaluate.lds(scores, retrain, subsets=30, fraction=0.8, rng=1)
    np.testing.assert_array_equal(again.correlations, result.correlations)


def test_equal_values_share_their_rank():
    x = np.asarray([[1.0], [2.0], [2.0], [5.0]])
    np.testing.assert_allclose(evaluate._ranks(x)[:, 0], [0.0, 1.5, 1.5, 3.0])


def test_mislabelled_counts(backend):
    wrong = np.asarray([True, False, True, False])
    perfect = evaluate.mislabelled(backend.asarray([3.0, 1.0, 2.0, 0.0]), wrong)
    assert (perfect.auc, perfect.precision, perfect.k) == (1.0, 1.0, 2)
    np.testing.assert_array_equal(perfect.order, [0, 2, 1, 3])
    np.testing.assert_array_equal(perfect.found, [0, 1, 2, 2, 2])
    assert evaluate.mislabelled(np.zeros(4), wrong).auc == 0.5
    other = evaluate.mislabelled(np.asarray([3.0, 2.0, 1.0, 0.0]), wrong, k=3)
    assert other.precision == pytest.approx(2 / 3)
    assert other.auc == 0.75
    with pytest.raises(ValueError, match="1 of the 4 suspicion scores are not finite"):
        evaluate.mislabelled(np.asarray([3.0, np.nan, 1.0, 0.0]), wrong)


def test_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    s, wrong = rng.integers(0, 9, 60).astype(float), rng.random(60) < 0.3
    bad, good = s[wrong][:, None], s[~wrong][None, :]
    pairs = np.mean(bad > good) + 0.5 * np.mean(bad == good)
    assert evaluate.mislabelled(s, wrong).auc == pytest.approx(pairs, abs=1e-14)


def test_the_doors():
    scores, losses = np.ones((2, 5)), lambda _: np.zeros(2)
    with pytest.raises(ValueError, match="between 0 and 4, got 5"):
        evaluate.leave_one_out(scores, losses, [5])
    with pytest.raises(ValueError, match="at least one index"):
        evaluate.leave_one_out(scores, losses, [])
    with pytest.raises(ValueError, match=r"losses of shape \(2,\)"):
        evaluate.leave_one_out(scores, lambda _: np.zeros(3), [1])
    with pytest.raises(ValueError, match="n_train"):
        evaluate.lds(np.ones((2, 2, 2)), losses)
    with pytest.raises(ValueError, match="at least 3 subsets"):
        evaluate.lds(scores, losses, fraction=1.0)
    with pytest.raises(ValueError, match="right and wrong"):
        evaluate.mislabelled(np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="between 1 and the 3"):
        evaluate.mislabelled(np.ones(3), np.asarray([1, 0, 0]), k=4)
    with pytest.raises(ValueError, match="both be"):
        evaluate.mislabelled(np.ones(3), np.ones(4))
    assert np.isnan(evaluate.correlation(np.zeros(3), np.arange(3.0)))
    assert np.isnan(evaluate.slope(np.zeros(3), np.arange(3.0)))
