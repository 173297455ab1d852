"""Scores block by block: nothing solved twice, nothing left out, and top-k without the matrix."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import invhvp as ih
from invhvp.influence import blocks as passes
from invhvp.influence import top_k

N, M, P = 23, 11, 6


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(passes, "TEST_BLOCK", 4)
    monkeypatch.setattr(passes, "TRAIN_BLOCK", 5)


def rows(n, seed):
    return np.random.default_rng(seed).standard_normal((n, P))


def dense(train, test, damping=0.1):
    return test @ np.linalg.solve(train.T @ train / len(train) + damping * np.eye(P), train.T)


def gathered(blocks, shape):
    found, seen = np.full(shape, np.nan), np.zeros(shape, dtype=int)
    for r, c, block in blocks:
        found[r, c] = block
        seen[r, c] += 1
    assert np.all(seen == 1)
    return found


def streamed(array, sizes):
    ends = np.cumsum([0, *sizes])
    return ih.StreamedGradients([array[a:b] for a, b in itertools.pairwise(ends)])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("method", [ih.Direct(), ih.BlockCG(rtol=1e-6)], ids=repr)
def test_blocks_are_the_dense_formula(backend, method):
    train, test = rows(N, 0), rows(M, 1)
    G, T = (ih.DenseGradients(backend.asarray(a)) for a in (train, test))
    influence = ih.Influence(method.prepare(ih.RankOneMean(G), damping=0.1), G)
    found = []
    for r, c, block in influence.blocks(T):
        assert block.shape == (r.stop - r.start, c.stop - c.start)
        backend.assert_like(block)
        found.append((r, c, backend.to_numpy(block)))
    assert len(found) == 3 * 5
    expected = dense(train, test)
    tolerance = max(1e-4, 1e3 * backend.eps) * np.abs(expected).max()
    np.testing.assert_allclose(gathered(found, (M, N)), expected, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("small_blocks")
def test_an_exact_sample_space_inverse_needs_no_vector_of_length_p():
    rng = np.random.default_rng(0)
    d, a = rng.standard_normal((9, 30_000)) / 200, rng.standard_normal((9, 30_000)) / 200
    G = ih.OuterProductGradients(output_grads=d, inputs=a)  # p = 9·10⁸
    inverse = ih.SampleSpace().prepare(ih.RankOneMean(G), damping=0.1)
    influence = ih.Influence(inverse, G)
    K = (d @ d.T) * (a @ a.T)
    expected = (K - K @ np.linalg.solve(K + 0.9 * np.eye(9), K)) / 0.1
    found = gathered(influence.blocks(G[:6]), (6, 9))
    np.testing.assert_allclose(found, expected[:6], rtol=1e-9)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("sizes", [(23,), (7, 7, 7, 2), (1, 4, 5, 12, 1)], ids=str)
def test_batches_of_any_size_are_read_once(sizes):
    train, test = rows(N, 0), rows(M, 1)
    G = streamed(train, sizes)
    inverse = ih.Direct().prepare(ih.RankOneMean(ih.DenseGradients(train)), damping=0.1)
    passed = []
    original = type(G)._batches
    G._batches = lambda: passed.append(1) or original(G)
    found = gathered(ih.Influence(inverse, G).blocks(ih.DenseGradients(test)), (M, N))
    np.testing.assert_allclose(found, dense(train, test), rtol=1e-10)
    assert len(passed) == 1


@pytest.mark.usefixtures("small_blocks")
def test_each_test_sample_is_solved_once_whatever_the_memory(monkeypatch):
    train, test = rows(N, 0), rows(M, 1)
    G = ih.DenseGradients(train)
    inverse = ih.Direct().prepare(ih.RankOneMean(G), damping=0.1)
    columns = []
    original = type(inverse).solve
    monkeypatch.setattr(
        type(inverse), "solve", lambda self, B: columns.append(B.shape[0]) or original(self, B)
    )
    for free in (1 << 40, 100_000, 1):
        columns.clear()
        monkeypatch.setattr("invhvp._backend.free_memory", lambda _, free=free: free)
        found = gathered(ih.Influence(inverse, G).blocks(ih.DenseGradients(test)), (M, N))
        np.testing.assert_allclose(found, dense(train, test), rtol=1e-10)
        assert sum(columns) == M
        assert max(columns) <= (4 if free > 1 else 1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("k", [1, 3, 5, 8, N])
def test_top_k_of_blocks_is_that_of_the_matrix(backend, k):
    train = np.random.default_rng(2).integers(-2, 3, (N, P))  # with many equal scores
    G = ih.DenseGradients(backend.asarray(train))
    T = ih.DenseGradients(backend.asarray(np.eye(P)))
    inverse = ih.Direct().prepare(ih.Identity(P, like=backend.asarray([])), damping=0.0)
    top = ih.Influence(inverse, G).top_k(T, k=k)
    order = np.argsort(train.T, axis=1, kind="stable")
    helpful, harmful = order[:, ::-1][:, :k], order[:, :k]
    np.testing.assert_array_equal(backend.to_numpy(top.helpful), helpful)
    np.testing.assert_array_equal(backend.to_numpy(top.harmful), harmful)
    for scores, index in ((top.helpful_scores, helpful), (top.harmful_scores, harmful)):
        expected = np.take_along_axis(train.T, index, axis=1)
        np.testing.assert_allclose(backend.to_numpy(scores), expected, atol=1e-6)


def test_top_k_at_the_door():
    block = (slice(0, 1), slice(0, 2), np.ones((1, 2)))
    for blocks, k, words in (([], 1, "no block"), ([block], 3, "between 1 and the 2"),
                             ([block], 0, "at least 1")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            top_k(blocks, k)


def test_streamed_rows_are_held_as_the_memory_allows(monkeypatch):
    rows = np.random.default_rng(0).standard_normal((500, 20))
    stream = ih.StreamedGradients(lambda: (rows[i : i + 50] for i in range(0, 500, 50)))
    inverse = ih.Direct().prepare(ih.Diagonal(np.arange(1.0, 21.0)), damping=0.1)
    monkeypatch.setattr("invhvp._backend.free_memory", lambda like: 8 * 16 * 20 * 8 * 6)
    found = list(ih.Influence(inverse, stream).blocks(ih.DenseGradients(rows[:3])))
    assert max(columns.stop - columns.start for _, columns, _ in found) == 6 * 16
    scores = np.concatenate([block for _, _, block in found], axis=1)
    np.testing.assert_allclose(scores, rows[:3] @ (rows / (np.arange(1.0, 21.0) + 0.1)).T)
