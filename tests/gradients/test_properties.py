"""Algebra that holds for every gradient matrix, on NumPy float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invhvp.gradients import DenseGradients, OuterProductGradients, StackedGradients
from invhvp.layout import Block, Layout

sizes = st.integers(1, 6)


@st.composite
def matrices(draw, N: int | None = None):
    """A stack of an outer product and a dense block at shuffled positions."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    N = draw(sizes) if N is None else N
    T, o, i, q = draw(sizes), draw(sizes), draw(sizes), draw(sizes)
    scale = 10.0 ** draw(st.integers(-12, 12))
    d = scale * rng.standard_normal((N, T, o))
    weight = OuterProductGradients(output_grads=d, inputs=rng.standard_normal((N, T, i)))
    kind = draw(st.sampled_from(["outer", "stacked", "dense"]))
    if kind == "outer":
        return weight
    if kind == "dense":
        return DenseGradients(weight.to_dense())
    order = rng.permutation(o * i + q)
    layout = Layout({"w": Block((o, i), order[: o * i]), "q": Block((q,), order[o * i :])})
    free = DenseGradients(scale * rng.standard_normal((N, q)))
    return StackedGradients({"w": weight, "q": free}, layout=layout)


def close(found, expected, size):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * size + 1e-300)


def vectors(G, seed: int, *shape: int):
    return np.random.default_rng(seed).standard_normal(shape)


@given(G=matrices(), seed=st.integers(0, 2**32), factor=st.floats(-1e3, 1e3))
def test_linearity(G, seed, factor):
    v, w = vectors(G, seed, 2, G.shape[1], 3)
    size = np.abs(G.to_dense()).max() * (1 + abs(factor)) * G.shape[1] * 100
    close(G @ (v + factor * w), G @ v + factor * (G @ w), size)


@given(G=matrices(), seed=st.integers(0, 2**32))
def test_the_transpose_is_the_adjoint(G, seed):
    v = vectors(G, seed, G.shape[1])
    u = vectors(G, seed + 1, G.shape[0])
    size = np.abs(u).sum() * np.abs(v).sum() * np.abs(G.to_dense()).max()
    close((G @ v) @ u, v @ (G.T @ u), size * 100)


@given(G=matrices())
def test_the_gram_matrix_is_the_product_with_the_transpose(G):
    rows = G.to_dense()
    gram = G.gram()
    size = np.abs(rows).max() ** 2 * G.shape[1] * 100
    if isinstance(G, OuterProductGradients):  # factors do not cancel where their sum may
        size = (np.linalg.norm(G.output_grads, axis=2).sum(axis=1).max() ** 2) * (
            np.linalg.norm(G.inputs, axis=2).max() ** 2 * 100
        )
    if isinstance(G, StackedGradients):
        size = size + (np.abs(G.blocks["w"].output_grads).max() ** 2) * 1e6
    close(gram, rows @ rows.T, size)
    close(gram, gram.T, size)
    close(np.sqrt(np.diagonal(gram)) ** 2, G.row_norms() ** 2, size)


@given(G=matrices(N=6), start=st.integers(0, 5), length=sizes, step=sizes, seed=st.integers(0, 99))
def test_slicing_commutes(G, start, length, step, seed):
    rows = slice(start, start + length, step)
    order = np.random.default_rng(seed).integers(-6, 6, size=length)
    v = vectors(G, seed, G.shape[1])
    size = np.abs(G.to_dense()).max() * np.abs(v).sum() * 100
    for chosen in (rows, order):
        part = G[chosen]
        np.testing.assert_array_equal(part.to_dense(), G.to_dense()[chosen])
        close(part @ v, (G @ v)[chosen], size)
        np.testing.assert_allclose(part.row_norms(), G.row_norms()[chosen], rtol=1e-7)


@given(G=matrices(), seed=st.integers(0, 2**32))
def test_order_of_samples_is_free(G, seed):
    order = np.random.default_rng(seed).permutation(len(G))
    u = vectors(G, seed, len(G), 2)
    size = np.abs(G.to_dense()).max() * np.abs(u).sum() * 100
    close(G[order].T @ u[order], G.T @ u, size)
    np.testing.assert_allclose(
        G[order].column_norms(), G.column_norms(), rtol=1e-7, atol=1e-14 * size
    )


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_single_precision_norms_neither_underflow_nor_overflow(scale):
    rng = np.random.default_rng(0)
    rows = (scale * rng.standard_normal((4, 5))).astype(np.float32)
    G = DenseGradients(rows)
    expected = np.linalg.norm(rows.astype(np.float64), axis=1)
    np.testing.assert_allclose(G.row_norms(), expected, rtol=1e-6)
    np.testing.assert_allclose(
        G.column_norms(), np.linalg.norm(rows.astype(np.float64), axis=0), rtol=1e-6
    )
