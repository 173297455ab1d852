"""Every operator on every backend: the conformance kit, and algebra as properties."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given

from invhvp.layout import Layout
from invhvp.operators import BlockDiagonal, Dense, Diagonal, RankOneMean
from invhvp.protocols import HasInverse
from invhvp.testing import check_operator
from tests.backends import Backend
from tests.cases import LAYOUT, OPERATORS, N, matrix

NAMES = sorted(OPERATORS)
INDEFINITE = ("dense-indefinite", "diagonal", "sum")
ONE_DAMPING = ("kronecker", "eigen-kronecker")  # one block: no other λ shares the eigenvectors
INVERTIBLE = [n for n in NAMES if n not in ("callback", "damped", "scaled", "sum")]
seeds = st.integers(0, 2**16)


def columns(backend: Backend, seed: int, k: int = 3):
    X = np.random.default_rng(seed).standard_normal((N, k)).astype(backend.np_dtype)
    return backend.asarray(X), X.astype(np.float64)


def size(M: np.ndarray) -> float:
    return float(np.linalg.norm(M, 2))


@pytest.mark.parametrize("name", NAMES)
def test_conformance(backend: Backend, name: str):
    A, M = OPERATORS[name](backend)
    check_operator(A, dense=M, psd=name not in INDEFINITE)
    assert isinstance(A, HasInverse) == (name in INVERTIBLE)


@pytest.mark.parametrize("name", INVERTIBLE)
@given(seed=seeds, log_damping=st.floats(-3, 3))
def test_inverse_times_damped_is_identity(
    backend: Backend, name: str, seed: int, log_damping: float
):
    A, M = OPERATORS[name](backend)
    damping = 10.0**log_damping
    damped = M + damping * np.eye(N)
    values = np.linalg.eigvalsh(damped)
    largest, least = np.max(np.abs(values)), np.min(np.abs(values))
    assume(least > 1e2 * backend.eps * largest)  # below it, rounding decides about SingularError
    condition = largest / least
    K = A.inverse(damping)
    _, X = columns(backend, seed)
    back = backend.to_numpy(K @ backend.asarray(damped @ X))
    assert np.linalg.norm(back - X) <= 30 * condition * backend.eps * np.linalg.norm(X)


@pytest.mark.parametrize("name", [n for n in INVERTIBLE if n not in (*INDEFINITE, *ONE_DAMPING)])
@given(
    seed=seeds,
    weights=st.dictionaries(
        st.sampled_from(LAYOUT.names), st.floats(1e-2, 1e2), min_size=2, max_size=2
    ),
)
def test_damping_by_block_is_a_diagonal(
    backend: Backend, name: str, seed: int, weights: dict[str, float]
):
    A, M = OPERATORS[name](backend)
    damped = M + np.diag(A.layout.shifts(weights))
    B, b = columns(backend, seed)
    X = backend.to_numpy(A.inverse(weights) @ B)
    expected = np.linalg.solve(damped, b)
    allowed = 30 * np.linalg.cond(damped) * backend.eps * np.linalg.norm(expected)
    assert np.linalg.norm(X - expected) <= allowed


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds, alpha=st.floats(-4, 4), exponent=st.integers(-30, 30))
def test_linear_in_the_argument(
    backend: Backend, name: str, seed: int, alpha: float, exponent: int
):
    A, M = OPERATORS[name](backend)
    X, x = columns(backend, seed)
    Y, y = columns(backend, seed + 1)
    allowed = 30 * backend.eps * size(M) * (abs(alpha) * np.linalg.norm(x) + np.linalg.norm(y))
    assert np.linalg.norm(backend.to_numpy(A @ (alpha * X + Y)) - M @ (alpha * x + y)) <= allowed
    scaled = backend.to_numpy(A @ (2.0**exponent * X)) / 2.0**exponent
    assert np.linalg.norm(scaled - M @ x) <= 30 * backend.eps * size(M) * np.linalg.norm(x)


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds, factor=st.sampled_from([-2.0, -0.3, 0.0, 1e-3, 5.0]))
def test_multiples(backend: Backend, name: str, seed: int, factor: float):
    A, M = OPERATORS[name](backend)
    X, x = columns(backend, seed)
    allowed = 30 * backend.eps * abs(factor) * size(M) * np.linalg.norm(x)
    for S in (factor * A, A * factor):
        assert np.linalg.norm(backend.to_numpy(S @ X) - factor * M @ x) <= allowed
        assert not S.psd or np.linalg.eigvalsh(factor * M)[0] > -1e-9
        assert S.layout is A.layout
    sign = np.linalg.norm(backend.to_numpy((-A) @ X) + M @ x)
    assert sign <= 30 * backend.eps * size(M) * np.linalg.norm(x)


@pytest.mark.parametrize("name", NAMES)
def test_sums_and_differences(backend: Backend, name: str):
    A, M = OPERATORS[name](backend)
    D = Diagonal(backend.asarray(np.arange(N)))
    X, x = columns(backend, 0)
    allowed = 30 * backend.eps * (size(M) + N) * np.linalg.norm(x)
    for S, expected in (
        (A + D, M + np.diag(np.arange(N))),
        (D - A, np.diag(np.arange(N)) - M),
        (A / 4.0 + D, M / 4 + np.diag(np.arange(N))),
        (A + backend.asarray(np.eye(N)), M + np.eye(N)),
    ):
        assert np.linalg.norm(backend.to_numpy(S @ X) - expected @ x) <= allowed
    assert (A + D).psd == A.psd
    assert not (D - A).psd


@given(seed=seeds)
def test_order_of_blocks_is_irrelevant(backend: Backend, seed: int):
    blocks = {
        "a": Dense(backend.asarray(matrix(1.0, 2.0, 3.0)), psd=True),
        "b": Diagonal(backend.asarray([4.0, 5.0])),
    }
    one = BlockDiagonal(blocks)
    shapes = {"b": (2,), "a": (3,)}
    other = BlockDiagonal(blocks, Layout.from_shapes(shapes))
    x = np.random.default_rng(seed).standard_normal((5, 2))
    swapped = np.concatenate([x[3:], x[:3]])
    np.testing.assert_array_equal(
        backend.to_numpy(one @ backend.asarray(x))[:3],
        backend.to_numpy(other @ backend.asarray(swapped))[2:],
    )
    first = backend.to_numpy(one.inverse({"a": 1.0, "b": 2.0}) @ backend.asarray(x))
    second = backend.to_numpy(other.inverse({"b": 2.0, "a": 1.0}) @ backend.asarray(swapped))
    np.testing.assert_array_equal(first, np.concatenate([second[2:], second[:2]]))


@pytest.mark.backends("numpy", "torch", "jax", "cupy")  # strict never defers to the right
def test_left_products(backend: Backend):
    A, M = OPERATORS["dense"](backend)
    B, b = columns(backend, 0)
    xp = backend.xp
    for got, expected in ((xp.matrix_transpose(B) @ A, b.T @ M), (B[:, 0] @ A, b[:, 0] @ M)):
        backend.assert_like(got)
        assert got.shape == expected.shape
        np.testing.assert_allclose(backend.to_numpy(got), expected, atol=30 * backend.eps)


def test_rank_one_subsets_have_the_scale_of_the_whole(backend: Backend):
    A, _ = OPERATORS["rank-one-mean-counted"](backend)
    G = backend.to_numpy(A.gradients.to_dense())
    B = A.subset(np.array([4, 1]))
    assert isinstance(B, RankOneMean)
    assert B.n_terms == 2
    expected = G[[4, 1]].T @ G[[4, 1]] * (6 / 2) / A.count
    np.testing.assert_allclose(
        backend.to_numpy(B.to_dense()), expected, rtol=0, atol=30 * backend.eps * size(expected)
    )


def test_reprs_show_no_values_and_make_no_copies(backend: Backend, host_transfers):
    operators = [make(backend)[0] for make in OPERATORS.values()]
    host_transfers.reset()
    for A in operators:
        assert type(A).__name__ in repr(A)
        assert len(repr(A)) < 300
    assert host_transfers.calls == 0
