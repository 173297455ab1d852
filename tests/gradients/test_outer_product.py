"""Outer products: what is refused, what is never formed, what is chosen."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from invhvp.gradients import DenseGradients, OuterProductGradients, StackedGradients, concatenate
from invhvp.layout import Layout
from tests.backends import Backend


def outer(d, a, **options) -> OuterProductGradients:
    return OuterProductGradients(output_grads=d, inputs=a, **options)


def peak(compute) -> int:
    tracemalloc.start()
    try:
        compute()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_hundred_million_parameters_are_never_formed():
    rng = np.random.default_rng(0)
    d = rng.standard_normal((8, 10_000)).astype(np.float32)
    a = rng.standard_normal((8, 10_000)).astype(np.float32)
    G = outer(d, a)
    assert G.shape == (8, 10**8)
    expected = (d @ d.T).astype(np.float64) * (a @ a.T)
    assert peak(lambda: G.gram(G[2:5])) < 1e6
    assert peak(G.row_norms) < 2e6
    np.testing.assert_allclose(G.gram(), expected, rtol=1e-4, atol=1e4)
    np.testing.assert_allclose(G.row_norms() ** 2, np.diagonal(expected), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1000, 300), (300, 1000)])
def test_products_form_no_rows(shape):
    rng = np.random.default_rng(0)
    N, o, i = 100, *shape
    G = outer(rng.standard_normal((N, 1, o)), rng.standard_normal((N, 1, i)))
    V, U = rng.standard_normal((o * i, 2)), rng.standard_normal((N, 2))
    assert peak(lambda: G @ V) < V.nbytes * 1.5
    assert peak(lambda: G.T @ U) < V.nbytes * 1.5
    assert peak(G.column_norms) < V.nbytes * 2


def test_temporaries_stay_bounded(monkeypatch):
    from invhvp.gradients import _memory

    monkeypatch.setattr(_memory, "_CAP", 1 << 20)
    rng = np.random.default_rng(0)
    N, T, o, i = 60, 20, 50, 64
    G = outer(rng.standard_normal((N, T, o)), rng.standard_normal((N, T, i)))
    assert peak(lambda: G.gram(G[:40])) < 4 << 20
    assert peak(lambda: G @ np.ones((o * i, 8))) < 4 << 20
    assert peak(G.row_norms) < 4 << 20


@pytest.mark.parametrize(("T", "o", "i"), [(1, 100, 100), (5, 400, 400), (50, 10, 10)])
def test_the_cheaper_route_is_taken(monkeypatch, T, o, i):
    formed = []
    monkeypatch.setattr(
        OuterProductGradients, "_dense", lambda self: formed.append(self.shape) or _rows(self)
    )
    rng = np.random.default_rng(0)
    G = outer(rng.standard_normal((20, T, o)), rng.standard_normal((20, T, i)))
    rows = _rows(G)
    np.testing.assert_allclose(G.gram(), rows @ rows.T, rtol=1e-9, atol=1e-9)
    assert bool(formed) == (T == 50)


def _rows(G: OuterProductGradients) -> np.ndarray:
    d, a = G.output_grads, G.inputs
    return np.einsum("nto,nti->noi", d, a).reshape(G.shape)


def test_samples_of_different_length_are_padded(backend: Backend):
    rng = np.random.default_rng(0)
    made = [
        outer(
            backend.asarray(rng.standard_normal((2, T, 3))),
            backend.asarray(rng.standard_normal((2, T, 4))),
        )
        for T in (2, 5, 1)
    ]
    joined = concatenate(made)
    assert tuple(joined.output_grads.shape) == (6, 5, 3)
    expected = np.concatenate([backend.to_numpy(G.to_dense()) for G in made])
    np.testing.assert_allclose(backend.to_numpy(joined.to_dense()), expected, rtol=backend.eps * 20)


def test_rows_of_zeros_have_norm_zero(backend: Backend):
    for T in (1, 3):
        G = outer(backend.asarray(np.zeros((2, T, 3))), backend.asarray(np.ones((2, T, 4))))
        np.testing.assert_array_equal(backend.to_numpy(G.row_norms()), 0.0)
        np.testing.assert_array_equal(backend.to_numpy(G.column_norms()), 0.0)


def test_a_bias_is_a_block_of_its_own():
    rng = np.random.default_rng(0)
    d, a = rng.standard_normal((4, 5, 3)), rng.standard_normal((4, 5, 2))
    G = StackedGradients({"w": outer(d, a), "b": DenseGradients(d.sum(axis=1))})
    with_ones = outer(d, np.concatenate([a, np.ones((4, 5, 1))], axis=2))
    np.testing.assert_allclose(G.gram(), with_ones.gram(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("d", "a", "error", "said"),
    [
        (np.ones((3, 2)), np.ones((4, 2)), ValueError, r"\(3, 2\) and \(4, 2\)"),
        (np.ones((3, 5, 2)), np.ones((3, 4, 2)), ValueError, r"\(3, 5, 2\) and \(3, 4, 2\)"),
        (np.ones((3, 1, 2)), np.ones((3, 2)), ValueError, "all but their last axis"),
        (np.ones((0, 2)), np.ones((0, 2)), ValueError, "none of them 0"),
        (np.ones((3, 0, 2)), np.ones((3, 0, 2)), ValueError, "none of them 0"),
        (np.ones(3), np.ones(3), ValueError, r"\(N, o\) or \(N, T, o\)"),
        (np.ones((3, 2)), np.ones((3, 2), dtype=np.float32), TypeError, "float64, got float32"),
        (np.ones((3, 2), dtype=int), np.ones((3, 2)), TypeError, "floating"),
        (np.ones((3, 2)), np.ones((3, 2), dtype=complex), TypeError, "floating"),
        ([[1.0]], np.ones((1, 2)), TypeError, "output_grads must be an array .* got list"),
        (np.ones((1, 2)), None, TypeError, "inputs must be an array"),
    ],
)
def test_constructor_at_the_door(d, a, error, said):
    with pytest.raises(error, match=said):
        outer(d, a)


def test_structures_that_differ():
    a, b = outer(np.ones((2, 3)), np.ones((2, 4))), outer(np.ones((2, 4)), np.ones((2, 3)))
    np.testing.assert_array_equal(a.gram(b), np.full((2, 2), 12.0))
    with pytest.raises(ValueError, match="layers of one shape"):
        concatenate([a, b])
    with pytest.raises(ValueError, match="the layout has 3 parameters, the gradients 12"):
        outer(np.ones((2, 3)), np.ones((2, 4)), layout=Layout.from_shapes({"w": (3,)}))


def test_rescaling_needs_names():
    G = outer(np.ones((2, 3)), np.ones((2, 2)))
    with pytest.raises(TypeError, match="no named blocks"):
        G.rescaled({"w": 2.0})
    layout = Layout.from_shapes({"top": (1, 2), "rest": (2, 2)})
    with pytest.raises(TypeError, match="block of StackedGradients"):
        outer(np.ones((2, 3)), np.ones((2, 2)), layout=layout).rescaled({"top": 1.0, "rest": 2.0})


def test_rows_that_share_inputs_keep_them_once_through_slices_joins_and_multiples():
    rng = np.random.default_rng(0)
    d, a = rng.standard_normal((60, 4)), rng.standard_normal((12, 5))
    G = outer(d, a)
    rows = (d[:, :, None] * np.repeat(a, 5, 0)[:, None, :]).reshape(60, 20)
    assert G.distinct_inputs.shape == (12, 1, 5)
    assert G.inputs.shape == (60, 1, 5)
    assert G.nbytes == d.nbytes + a.nbytes
    assert outer(d, a[:, :3]).nbytes == d.nbytes + a[:, :3].nbytes  # fewer inputs than rows each
    joined = concatenate([G[10:30], G[30:45]._scaled(2.0)])
    assert isinstance(joined, OuterProductGradients)
    assert joined.distinct_inputs.shape == (7, 1, 5)
    np.testing.assert_allclose(joined.to_dense()[:20], rows[10:30])
    np.testing.assert_allclose(joined.to_dense()[20:], 2 * rows[30:45])
    unaligned = G[3:17]
    assert isinstance(unaligned, OuterProductGradients)
    assert unaligned.distinct_inputs.shape == (14, 1, 5)
    np.testing.assert_allclose(unaligned.to_dense(), rows[3:17])
    np.testing.assert_allclose(concatenate([G, unaligned]).to_dense()[60:], rows[3:17])


def test_rows_that_do_not_share_evenly_are_refused():
    with pytest.raises(ValueError, match="several rows for each of the second"):
        outer(np.ones((7, 2)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="several rows for each of the second"):
        outer(np.ones((3, 2)), np.ones((6, 2)))
