"""Rows that are stored: errors, sharing and long sums."""

from __future__ import annotations

import numpy as np
import pytest

from invhvp.gradients import DenseGradients
from invhvp.layout import Layout


@pytest.mark.parametrize(
    ("rows", "error", "said"),
    [
        ([[1.0]], TypeError, "rows must be an array of shape .N, p., got list"),
        (np.ones((2, 2), dtype=int), TypeError, "floating dtype, got int64"),
        (np.ones(3), ValueError, r"\(N, p\), none of them 0; got \(3,\)"),
        (np.ones((0, 3)), ValueError, "none of them 0"),
        (np.ones((3, 0)), ValueError, "none of them 0"),
    ],
)
def test_constructor_at_the_door(rows, error, said):
    with pytest.raises(error, match=said):
        DenseGradients(rows)


def test_the_layout_must_fit():
    with pytest.raises(ValueError, match="the layout has 2 parameters, the gradients 3"):
        DenseGradients(np.ones((1, 3)), layout=Layout.from_shapes({"w": (2,)}))


def test_rows_are_shared():
    rows = np.ones((4, 3))
    G = DenseGradients(rows)
    assert G.to_dense() is rows
    assert np.shares_memory(G[1:3].to_dense(), rows)
    assert G.nbytes == rows.nbytes
    assert next(iter(G.parts())) is G


def test_long_sums_in_single_precision_keep_their_digits():
    p = 3 * 10**6
    rng = np.random.default_rng(0)
    rows = (1 + rng.random((2, p))).astype(np.float32)
    exact = rows.astype(np.float64)
    G = DenseGradients(rows)
    ones = np.ones(p, dtype=np.float32)
    np.testing.assert_allclose(G @ ones, exact.sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(G.gram(), exact @ exact.T, rtol=1e-6)
    np.testing.assert_allclose(G.row_norms(), np.linalg.norm(exact, axis=1), rtol=1e-6)
    tall = DenseGradients(np.ascontiguousarray(rows.T))
    np.testing.assert_allclose(tall.T @ ones, exact.sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(tall.column_norms(), np.linalg.norm(exact, axis=1), rtol=1e-6)


def test_half_precision_is_multiplied_in_single():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3, 5000)).astype(np.float16)
    G = DenseGradients(rows)
    expected = rows.astype(np.float64) @ rows.astype(np.float64).T
    assert G.gram().dtype == np.float16
    np.testing.assert_allclose(G.gram(), expected, rtol=1e-3, atol=0.1)
    assert G.row_norms().dtype == np.float16


def test_iteration_and_membership_are_refused():
    G = DenseGradients(np.ones((2, 3)))
    with pytest.raises(TypeError, match=r"for one row write G\[i : i \+ 1\]"):
        list(G)
