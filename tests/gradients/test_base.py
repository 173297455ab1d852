"""Every operation of every class against dense float64 rows."""

from __future__ import annotations

import numpy as np
import pytest

from invhvp.gradients import (
    DenseGradients,
    GradientMatrix,
    OuterProductGradients,
    _memory,
    _outer_grams,
    concatenate,
)
from invhvp.protocols import GradientMatrix as Protocol
from tests.backends import SPECS, Backend, load
from tests.gradients.cases import CASES, NUMPY_CASES, Case, dense

N = 6
NUMPY = load(next(spec for spec in SPECS if spec.name == "numpy-f64"))


@pytest.fixture(params=CASES, ids=repr)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=NUMPY_CASES, ids=repr)
def numpy_case(request: pytest.FixtureRequest) -> Case:
    return request.param


ROUTES = [("any", case, None) for case in CASES] + [
    ("formed" if forms_rows else "factored", case, forms_rows)
    for case in CASES
    for forms_rows in (False, True)
    if case.name in ("outer-flat", "outer-T5-wide", "outer-T5-tall", "stacked-permuted")
]


@pytest.fixture(params=ROUTES, ids=lambda route: f"{route[1]}-{route[0]}")
def routed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A case as it is, or with either side of its cost model forced, in chunks of a few rows."""
    _, case, forms_rows = request.param
    if forms_rows is not None:
        monkeypatch.setattr(OuterProductGradients, "_dense_pays", lambda *_, **__: forms_rows)
        monkeypatch.setattr(_outer_grams, "dense_pays", lambda *_, **__: forms_rows)
        monkeypatch.setattr(_memory, "_SMALL", 0)
        monkeypatch.setattr(_memory, "_SIDE", 2)
        monkeypatch.setattr(_memory, "_CAP", 1024)
    return case


def close(backend: Backend, found, expected: np.ndarray, size: np.ndarray | float) -> None:
    """Rounding of sums whose terms add up to `size` in absolute value."""
    backend.assert_like(found)
    assert tuple(found.shape) == expected.shape
    misfit = np.abs(backend.to_numpy(found) - expected)
    assert np.all(misfit <= 20 * backend.eps * size + 1e-300)


def test_attributes(backend: Backend, case: Case):
    G, rows = case.make(backend, np.random.default_rng(0), N)
    assert isinstance(G, GradientMatrix)
    assert isinstance(G, Protocol)
    assert G.shape == rows.shape
    assert G.T.shape == rows.shape[::-1]
    assert len(G) == N
    assert G.ndim == G.T.ndim == 2
    assert G.dtype == G.T.dtype == backend.dtype
    assert G.device == G.T.device == backend.device
    backend.assert_like(G.like)
    assert G.like.shape == (0,)
    assert G.layout is not None
    assert G.layout.n == rows.shape[1]
    assert f"{N}x" in repr(G)
    close(backend, G.to_dense(), rows, np.abs(rows).max() * 5)
    close(backend, G.T.to_dense(), rows.T, np.abs(rows).max() * 5)
    assert isinstance(G.T.T, GradientMatrix)


@pytest.mark.parametrize("k", [None, 4])
def test_products(backend: Backend, routed: Case, k: int | None):
    rng = np.random.default_rng(1)
    G, rows = routed.make(backend, rng, N)
    columns = () if k is None else (k,)
    v = rng.standard_normal((rows.shape[1], *columns))
    u = rng.standard_normal((N, *columns))
    V, U = backend.asarray(v), backend.asarray(u)
    v, u = backend.to_numpy(V), backend.to_numpy(U)
    scale = 25 * np.abs(rows).max()
    close(backend, G @ V, rows @ v, scale * np.abs(v).sum(axis=0))
    close(backend, G.T @ U, rows.T @ u, scale * np.abs(u).sum(axis=0))


def test_products_from_the_left(backend: Backend, case: Case):
    if backend.name.startswith("strict"):
        pytest.skip("array-api-strict refuses foreign right operands")
    rng = np.random.default_rng(2)
    G, rows = case.make(backend, rng, N)
    for shape in [(N,), (3, N)]:
        Y = backend.asarray(rng.standard_normal(shape))
        close(backend, Y @ G, backend.to_numpy(Y) @ rows, 100 * np.abs(rows).max())
    for shape in [(rows.shape[1],), (3, rows.shape[1])]:
        Y = backend.asarray(rng.standard_normal(shape))
        close(backend, Y @ G.T, backend.to_numpy(Y) @ rows.T, 1000 * np.abs(rows).max())


def test_column_order_of_operands_is_free(numpy_case: Case):
    rng = np.random.default_rng(3)
    G, rows = numpy_case.make(NUMPY, rng, N)
    V = rng.standard_normal((4, rows.shape[1])).T
    U = rng.standard_normal((4, N)).T
    np.testing.assert_allclose(G @ V, rows @ V, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(G.T @ U, rows.T @ U, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("M", [None, 9])
def test_gram(backend: Backend, routed: Case, M: int | None):
    rng = np.random.default_rng(4)
    G, rows = routed.make(backend, rng, N)
    other, other_rows = (None, rows) if M is None else routed.make(backend, rng, M)
    bound = 60 * np.abs(rows).max() * np.abs(other_rows).sum(axis=1).max()
    close(backend, G.gram(other), rows @ other_rows.T, bound)
    small = backend.to_numpy(G._small_gram(G if other is None else other))
    assert np.all(np.abs(small - rows @ other_rows.T) <= 20 * backend.eps * bound)
    if other is None:
        own = backend.to_numpy(G.gram())
        np.testing.assert_array_equal(own, own.T)
    else:
        close(backend, G @ other.T, rows @ other_rows.T, bound)


def test_gram_with_another_class(backend: Backend, case: Case):
    rng = np.random.default_rng(5)
    G, rows = case.make(backend, rng, N)
    plain, plain_rows = dense(backend, rng, 4, rows.shape[1])
    bound = 60 * np.abs(rows).max() * np.abs(plain_rows).sum(axis=1).max()
    close(backend, G.gram(plain), rows @ plain_rows.T, bound)
    close(backend, plain.gram(G), plain_rows @ rows.T, bound)


@pytest.mark.parametrize("a", NUMPY_CASES, ids=repr)
@pytest.mark.parametrize("b", NUMPY_CASES, ids=repr)
def test_gram_of_all_pairs(a: Case, b: Case):
    rng = np.random.default_rng(6)
    G, rows = a.make(NUMPY, rng, N)
    H, other_rows = b.make(NUMPY, rng, 4)
    if G.shape[1] == H.shape[1]:
        np.testing.assert_allclose(G.gram(H), rows @ other_rows.T, rtol=1e-11, atol=1e-11)
    else:
        with pytest.raises(ValueError, match="same number of parameters"):
            G.gram(H)


def test_norms(backend: Backend, routed: Case):
    G, rows = routed.make(backend, np.random.default_rng(7), N)
    scale = 25 * np.abs(rows).max()
    close(backend, G.row_norms(), np.linalg.norm(rows, axis=1), scale)
    close(backend, G.column_norms(), np.linalg.norm(rows, axis=0), scale)


@pytest.mark.parametrize(
    "rows",
    [
        slice(-4, 5),
        slice(1, 100, 3),
        np.array([4, 0, 4, -1]),
        np.array([2], dtype=np.uint8),
    ],
    ids=str,
)
def test_rows(backend: Backend, case: Case, rows):
    G, expected = case.make(backend, np.random.default_rng(8), N)
    part = G[rows]
    assert part.shape == expected[rows].shape
    assert part.layout is not None
    close(backend, part.to_dense(), expected[rows], 5 * np.abs(expected).max())
    close(backend, part[-1:].to_dense(), expected[rows][-1:], 5 * np.abs(expected).max())


@pytest.mark.parametrize("rows", [0, [0, 1], np.array([True] * N), np.array([0.0]), None], ids=str)
def test_rows_of_a_wrong_kind(numpy_case: Case, rows):
    G, _ = numpy_case.make(NUMPY, np.random.default_rng(0), N)
    with pytest.raises(TypeError, match="NumPy array of integers"):
        G[rows]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (slice(3, 3), "at least one row"),
        (slice(None, None, -1), "forwards"),
        (np.array([N]), "range"),
        (np.array([-N - 1]), "range"),
        (np.array([], dtype=int), "not empty"),
        (np.array([[0]]), "one-dimensional"),
    ],
    ids=str,
)
def test_rows_that_are_not_there(numpy_case: Case, rows, said: str):
    G, _ = numpy_case.make(NUMPY, np.random.default_rng(0), N)
    with pytest.raises(ValueError, match=said):
        G[rows]


def test_chunks_cover_the_rows_within_the_budget(backend: Backend, case: Case):
    G, rows = case.make(backend, np.random.default_rng(9), N)
    each = rows.shape[1] * np.dtype(backend.np_dtype).itemsize
    slices = list(G.chunks(2 * each + 1))
    assert slices == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert list(G.chunks(1)) == [slice(i, i + 1) for i in range(N)]
    assert list(G.chunks()) == [slice(0, N)]
    parts = list(G.parts(2 * each))
    assert all(len(part) <= 2 for part in parts)
    found = np.concatenate([backend.to_numpy(part.to_dense()) for part in parts])
    np.testing.assert_allclose(found, rows, rtol=20 * backend.eps, atol=50 * backend.eps)


def test_concatenate(backend: Backend, case: Case):
    rng = np.random.default_rng(10)
    made = [case.make(backend, rng, n) for n in (N, 2, 3)]
    joined = concatenate(G for G, _ in made)
    expected = np.concatenate([rows for _, rows in made])
    assert type(joined) is type(made[0][0])
    assert joined.shape == expected.shape
    assert joined.layout is not None
    close(backend, joined.to_dense(), expected, 5 * np.abs(expected).max())
    assert concatenate([joined]) is joined


def test_concatenate_refuses_what_does_not_fit(numpy_case: Case):
    rng = np.random.default_rng(11)
    G, rows = numpy_case.make(NUMPY, rng, N)
    with pytest.raises(ValueError, match="at least one"):
        concatenate([])
    with pytest.raises(TypeError, match="expected a gradient matrix"):
        concatenate([G, rows])
    with pytest.raises(ValueError, match="same number of parameters"):
        concatenate([G, DenseGradients(np.ones((2, rows.shape[1] + 1)))])
    if not isinstance(G, DenseGradients):
        with pytest.raises(TypeError, match="cannot join"):
            concatenate([G, DenseGradients(np.ones((2, rows.shape[1])))])


def test_rescaled(backend: Backend, case: Case):
    G, rows = case.make(backend, np.random.default_rng(12), N)
    factors = {name: 0.5 + 2 * i for i, name in enumerate(G.layout)}
    scaled = G.rescaled(factors)
    c = G.layout.shifts(factors)
    close(backend, scaled.to_dense(), rows * c, 10 * np.abs(rows * c).max())
    assert scaled.layout is G.layout
    close(backend, G.to_dense(), rows, 5 * np.abs(rows).max())
    with pytest.raises(ValueError, match=r"unknown: \['x'\]"):
        G.rescaled({**factors, "x": 1.0})
    with pytest.raises(ValueError, match=f"missing: .*{next(iter(factors))}"):
        G.rescaled({})


def test_nothing_is_copied_to_the_host(backend: Backend, case: Case, host_transfers):
    rng = np.random.default_rng(13)
    G, rows = case.make(backend, rng, N)
    V = backend.asarray(rng.standard_normal((rows.shape[1], 2)))
    planned = host_transfers.transfers  # indices of an embedding are looked at once, when made
    for _ in (G @ V, G.T @ (G @ V), G.gram(), G.row_norms(), G.column_norms(), G[1:4].to_dense()):
        pass
    assert host_transfers.transfers == planned <= 1


@pytest.mark.backends("numpy")
def test_operands_at_the_door(backend: Backend, case: Case):
    G, rows = case.make(backend, np.random.default_rng(0), N)
    p = rows.shape[1]
    wide = np.float64 if backend.np_dtype == np.float32 else np.float32
    name = type(G).__name__
    with pytest.raises(TypeError, match=f"{name} takes arrays of numpy, got list"):
        G @ [1.0]
    with pytest.raises(TypeError, match="nothing is converted silently"):
        G @ np.ones(p, dtype=wide)
    with pytest.raises(TypeError, match="nothing is converted silently"):
        G.T @ np.ones(N, dtype=wide)
    with pytest.raises(ValueError, match=rf"\({p},\) or \({p}, k\).*did you mean G.T @ X"):
        G @ backend.asarray(np.ones(N))
    with pytest.raises(ValueError, match=rf"\({N},\) or \({N}, k\).*did you mean G @ X"):
        G.T @ backend.asarray(np.ones(p))
    with pytest.raises(ValueError, match="vectors are columns: pass the transpose"):
        G @ backend.asarray(np.ones((2, p)))
    with pytest.raises(ValueError, match="takes arrays of shape"):
        G @ backend.asarray(np.ones((p, 1, 1)))
    with pytest.raises(TypeError, match="expected a gradient matrix"):
        G.gram(rows)
    with pytest.raises(TypeError, match="nothing is converted silently"):
        G.gram(DenseGradients(np.ones((2, p), dtype=wide)))
