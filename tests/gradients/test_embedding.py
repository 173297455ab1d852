"""Embeddings: repeated and padded rows, what is refused, what is never formed."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from invhvp.gradients import (
    DenseGradients,
    EmbeddingGradients,
    OuterProductGradients,
    StackedGradients,
    _memory,
    concatenate,
)
from invhvp.layout import Layout
from tests.backends import Backend


def lookups(indices, d, n_rows: int, **options) -> EmbeddingGradients:
    return EmbeddingGradients(output_grads=d, indices=indices, n_rows=n_rows, **options)


def dense(indices, d, n_rows: int) -> np.ndarray:
    N, _, size = d.shape
    rows = np.zeros((N, n_rows, size))
    np.add.at(rows, (np.arange(N)[:, None], indices), d)
    return rows.reshape(N, -1)


def random(N: int, T: int, n_rows: int, size: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, n_rows, (N, T)), rng.standard_normal((N, T, size))


def test_a_repeated_row_is_summed_before_it_is_squared(backend: Backend):
    """Gradients 3 and 4 of one row are 7 together, ±5 are nothing."""
    d = backend.asarray([[[3.0], [4.0]], [[5.0], [-5.0]], [[3.0], [4.0]]])
    indices = backend.integers([[1, 1], [0, 0], [1, 2]])
    G = lookups(indices, d, 4)
    np.testing.assert_array_equal(backend.to_numpy(G.row_norms()), [7.0, 0.0, 5.0])
    np.testing.assert_allclose(
        backend.to_numpy(G.column_norms()), [0.0, np.sqrt(58.0), 4.0, 0.0], rtol=4 * backend.eps
    )
    expected = [[49.0, 0.0, 21.0], [0.0, 0.0, 0.0], [21.0, 0.0, 25.0]]
    np.testing.assert_array_equal(backend.to_numpy(G.gram()), expected)


def test_padding_contributes_nothing(backend: Backend):
    indices, d = random(4, 5, 6, 3)
    indices[0] = 2
    G = lookups(backend.integers(indices), backend.asarray(d), 6, padding_index=2)
    expected = dense(indices, d * (indices != 2)[:, :, None], 6)
    found = backend.to_numpy(G.to_dense())
    np.testing.assert_allclose(found, expected, rtol=0, atol=30 * backend.eps)
    assert backend.to_numpy(G.row_norms())[0] == 0.0
    np.testing.assert_array_equal(backend.to_numpy(G.column_norms())[6:9], 0.0)
    np.testing.assert_array_equal(found[:, 6:9], 0.0)


def test_samples_of_different_length_are_padded(backend: Backend):
    made = []
    for T in (2, 5, 1):
        indices, d = random(2, T, 6, 3, seed=T)
        made.append((lookups(backend.integers(indices), backend.asarray(d), 6), indices, d))
    joined = concatenate(G for G, _, _ in made)
    assert tuple(joined.indices.shape) == (6, 5)
    expected = np.concatenate([dense(indices, d, 6) for _, indices, d in made])
    close = {"rtol": 0, "atol": 50 * backend.eps}
    np.testing.assert_allclose(backend.to_numpy(joined.to_dense()), expected, **close)
    U = np.random.default_rng(1).standard_normal((6, 2))
    found = backend.to_numpy(joined.T @ backend.asarray(U))
    np.testing.assert_allclose(found, expected.T @ U, **close)
    norms = backend.to_numpy(joined.column_norms())
    np.testing.assert_allclose(norms, np.linalg.norm(expected, axis=0), **close)


@pytest.mark.parametrize("uses", [1, 2, 3, 13, 16, 17, 33, 64, 65, 300])
def test_any_number_of_uses_of_one_row(uses):
    """The pairwise sum of a row ends at its first use, whatever stands before it."""
    indices = np.repeat([4, 1, 7], [uses, 3, uses])[None, :]
    d = np.arange(1.0, indices.size + 1)[None, :, None]
    G = lookups(indices, d, 9)
    sums = np.zeros(9)
    np.add.at(sums, indices[0], d[0, :, 0])
    np.testing.assert_array_equal(G.T @ np.ones(1), sums)
    np.testing.assert_array_equal(G.to_dense()[0], sums)


def test_a_frequent_row_keeps_the_digits_of_single_precision():
    T = 1 << 17
    d = np.full((1, T, 1), 0.1, dtype=np.float32)
    G = lookups(np.zeros((1, T), dtype=np.int64), d, 2)
    exact = T * float(np.float32(0.1))
    assert float((G.T @ np.ones(1, dtype=np.float32))[0]) == pytest.approx(exact, rel=1e-6)


def test_sums_of_half_precision():
    torch = pytest.importorskip("torch")
    d = torch.full((2, 300, 1), 1.0, dtype=torch.bfloat16)
    G = lookups(torch.zeros((2, 300), dtype=torch.int64), d, 2)
    for found, exact in (
        (G.T @ torch.ones(2, dtype=torch.bfloat16), 600.0),
        (G.to_dense()[1], 300.0),
        (G.row_norms(), 300.0),
        (G.column_norms(), 300.0 * 2**0.5),
    ):
        assert found.dtype == torch.bfloat16
        assert float(found[0]) == pytest.approx(exact, rel=2**-8)


def test_tiny_gradients_keep_their_norms(backend: Backend):
    tiny = 1e-30
    G = lookups(backend.integers([[1, 1]]), backend.asarray([[[tiny], [tiny]]]), 2)
    np.testing.assert_allclose(backend.to_numpy(G.row_norms()) / tiny, [2.0], rtol=1e-5)
    np.testing.assert_allclose(backend.to_numpy(G.column_norms()) / tiny, [0.0, 2.0], rtol=1e-5)


def peak(compute) -> int:
    tracemalloc.start()
    try:
        compute()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_table_of_a_hundred_million_numbers():
    """p = 10⁸: the rows would be 6.4 GB in double precision."""
    indices, d = random(8, 20, 10_000_000, 10)
    G = lookups(indices, d, 10_000_000)
    assert G.shape == (8, 10**8)
    assert G.nbytes == 8 * 20 * 11 * 8
    assert peak(lambda: G.gram(G[2:5])) < 1e6
    assert peak(G.row_norms) < 1e6
    np.testing.assert_allclose(G.row_norms() ** 2, np.diagonal(G.gram()), rtol=1e-12)


def test_temporaries_stay_bounded(monkeypatch):
    monkeypatch.setattr(_memory, "_CAP", 1 << 20)
    indices, d = random(200, 20, 500, 32)
    G = lookups(indices, d, 500)
    rows = dense(indices, d, 500)
    rng = np.random.default_rng(1)
    V, U = rng.standard_normal((16_000, 8)), rng.standard_normal((200, 8))
    assert peak(lambda: G @ V) < 4 << 20
    assert peak(lambda: G.gram()) < 4 << 20
    assert peak(lambda: G.T @ U) < V.nbytes * 2 + d.nbytes + (4 << 20)
    close = {"rtol": 0, "atol": 1e-10}
    np.testing.assert_allclose(G @ V, rows @ V, **close)
    np.testing.assert_allclose(G.T @ U, rows.T @ U, **close)
    np.testing.assert_allclose(G.gram(), rows @ rows.T, **close)
    np.testing.assert_allclose(G.column_norms(), np.linalg.norm(rows, axis=0), **close)
    np.testing.assert_allclose(G.row_norms(), np.linalg.norm(rows, axis=1), **close)
    np.testing.assert_allclose(G.to_dense(), rows, **close)


def test_columns_that_are_no_rows():
    """Vectors as views of (k, p) rows, as gradients of a model come."""
    indices, d = random(5, 4, 6, 3)
    G, rows = lookups(indices, d, 6), dense(indices, d, 6)
    V = np.random.default_rng(1).standard_normal((2, 18)).T
    np.testing.assert_allclose(G @ V, rows @ V, rtol=0, atol=1e-13)


def test_products_with_other_structures(backend: Backend):
    indices, d = random(5, 4, 6, 3)
    G = lookups(backend.integers(indices), backend.asarray(d), 6)
    words = np.eye(6)[indices]
    outer = OuterProductGradients(output_grads=backend.asarray(words), inputs=backend.asarray(d))
    rows = dense(indices, d, 6)
    for other in (outer, DenseGradients(backend.asarray(rows)), G[1:3]):
        expected = rows @ (rows[1:3] if len(other) == 2 else rows).T
        close = {"rtol": 0, "atol": 200 * backend.eps}
        np.testing.assert_allclose(backend.to_numpy(G.gram(other)), expected, **close)
        np.testing.assert_allclose(backend.to_numpy(other.gram(G)), expected.T, **close)
    named = StackedGradients({"table": G}).rescaled({"table": 2.0})
    np.testing.assert_allclose(
        backend.to_numpy(named.to_dense()), 2 * rows, rtol=0, atol=50 * backend.eps
    )


@pytest.mark.parametrize(
    ("indices", "d", "options", "error", "said"),
    [
        ([[0]], np.ones((1, 1, 2)), {}, TypeError, "indices must be an integer array .* list"),
        (np.ones((1, 1)), np.ones((1, 1, 2)), {}, TypeError, "integers, got float64"),
        (np.zeros((1, 1), bool), np.ones((1, 1, 2)), {}, TypeError, "integers, got bool"),
        (np.zeros((1, 2), int), np.ones((1, 1, 2)), {}, ValueError, r"\(1, 2\) and \(1, 1, 2\)"),
        (np.zeros(1, int), np.ones((1, 1, 2)), {}, ValueError, r"\(1,\) and \(1, 1, 2\)"),
        (np.array([[0, 3]]), np.ones((1, 2, 2)), {}, ValueError, r"range\(3\), got 0 to 3"),
        (np.array([[-1, 0]]), np.ones((1, 2, 2)), {}, ValueError, r"range\(3\), got -1 to 0"),
        (np.zeros((1, 1), int), np.ones(3), {}, ValueError, r"\(N, d\) or \(N, T, d\)"),
        (np.zeros((1, 1), int), np.ones((1, 1, 2), int), {}, TypeError, "floating"),
        (np.zeros((1, 1), int), np.ones((1, 1, 2)), {"padding_index": 3}, ValueError, "of the 3"),
        (np.zeros((1, 1), int), np.ones((1, 1, 2)), {"padding_index": -1}, ValueError, "got -1"),
    ],
)
def test_constructor_at_the_door(indices, d, options, error, said):
    with pytest.raises(error, match=said):
        lookups(indices, d, 3, **options)


def test_arrays_of_two_libraries():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="array of torch, indices of numpy"):
        lookups(np.zeros((1, 1), int), torch.ones((1, 1, 2)), 3)


def test_structures_that_differ():
    a = lookups(np.array([[0, 1]]), np.ones((1, 2, 3)), 4)
    b = lookups(np.array([[0, 1]]), np.ones((1, 2, 4)), 3)
    np.testing.assert_array_equal(a.gram(b), a.to_dense() @ b.to_dense().T)
    with pytest.raises(ValueError, match="tables of one shape"):
        concatenate([a, b])
    with pytest.raises(ValueError, match="the layout has 3 parameters, the gradients 12"):
        lookups(np.array([[0, 1]]), np.ones((1, 2, 3)), 4, layout=Layout.from_shapes({"w": (3,)}))
    assert repr(a) == "EmbeddingGradients(1x(4x3), T=2, float64, cpu)"


@pytest.mark.jax
def test_inside_of_jit():
    """Nobody can look at the indices there: the same sums as outside."""
    jax = pytest.importorskip("jax")
    indices, d = random(5, 40, 9, 3)
    rng = np.random.default_rng(1)
    V, U = rng.standard_normal((27, 2)), rng.standard_normal((5, 2))

    def compute(indices, d, V, U):
        G = lookups(indices, d, 9)
        return G @ V, G.T @ U, G.gram(), G.row_norms(), G.column_norms(), G.to_dense()

    arrays = [jax.numpy.asarray(x, dtype="float32") for x in (d, V, U)]
    found = jax.jit(compute)(jax.numpy.asarray(indices, dtype="int32"), *arrays)
    for inside, outside in zip(found, compute(indices, d, V, U), strict=True):
        np.testing.assert_allclose(inside, outside, rtol=0, atol=1e-5 * np.abs(outside).max())
