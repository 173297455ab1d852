"""Sums of Kronecker factors and corrected eigenvalues, against dense float64 Fisher blocks."""

from __future__ import annotations

import numpy as np
import pytest

import invhvp as ih
from invhvp import _backend
from invhvp.estimate import BlockAccumulator, FactorAccumulator, MomentAccumulator, _layer_sums
from invhvp.gradients import DenseGradients, OuterProductGradients
from tests.backends import Backend

N, O, I = 9, 3, 4  # noqa: E741


def layer(backend: Backend, T: int, C: int = 1, *, seed: int = 0, correlated: bool = True):
    """d (N C, T, o) and a (N, T, i), as the backend holds them, and placed."""
    rng = np.random.default_rng(seed)
    d, a = rng.standard_normal((N * C, T, O)), rng.standard_normal((N, T, I))
    if correlated:  # positions of a sample resemble each other: expand is far from exact
        d, a = d + 2.0 * rng.standard_normal((N * C, 1, O)), a + rng.standard_normal((N, 1, I))
    d, a = (x.astype(backend.np_dtype) for x in (d, a))
    return d.astype(float), a.astype(float), backend.asarray(d), backend.asarray(a)


def fisher(d: np.ndarray, a: np.ndarray, total: float = N) -> np.ndarray:
    a = np.repeat(a, len(d) // len(a), 0)
    G = np.einsum("nto,nti->noi", d, a).reshape(len(d), -1)
    return G.T @ G / total


def fitted(backend: Backend, d, a, *, sharing: str = "expand", weights=None, total: float = N):
    sums = FactorAccumulator({"w": (O, I)}, like=backend.asarray([]), sharing=sharing)
    sums.add("w", d, a, weights=weights)
    sums.count(total)
    moments = MomentAccumulator(sums.eigenbases(), sums.shapes, like=backend.asarray([]))
    moments.add("w", d, a)
    moments.count(total)
    return sums, moments


def dense(backend: Backend, K) -> np.ndarray:
    return backend.to_numpy(K.to_dense())


def basis(backend: Backend, K) -> np.ndarray:
    return np.kron(backend.to_numpy(K.out_vectors), backend.to_numpy(K.in_vectors))


@pytest.mark.parametrize("T", [1, 2, 12])
@pytest.mark.parametrize("C", [1, 3])
def test_kfac_and_ekfac_equal_their_definitions(backend: Backend, T, C):
    d, a, D, A = layer(backend, T, C)
    sums, moments = fitted(backend, D, A)
    unit = 200 * backend.eps * T
    rows = N * T
    S = np.einsum("nto,ntp->op", d, d) / rows
    M = np.einsum("nti,ntj->ij", a, a) / rows
    found = dense(backend, sums.kronecker()["w"])
    assert np.abs(found - T * np.kron(S, M)).max() <= unit * np.abs(found).max()
    K = moments.eigen_kronecker()["w"]
    backend.assert_like(K @ backend.asarray(np.ones(O * I)))
    F = fisher(d, a)
    Q = basis(backend, K)
    assert np.abs(Q.T @ Q - np.eye(O * I)).max() <= 20 * backend.eps
    s, m = Q.T @ np.kron(S, M) @ Q, np.diag(np.diag(Q.T @ np.kron(S, M) @ Q))
    assert np.abs(s - m).max() <= unit * np.abs(s).max()
    expected = (Q * np.diag(Q.T @ F @ Q)) @ Q.T
    assert np.abs(dense(backend, K) - expected).max() <= unit * np.abs(F).max()
    trace = np.trace(F)
    assert K.trace() == pytest.approx(trace, rel=unit)
    assert sums.traces()["w"] == pytest.approx(trace, rel=unit)
    assert moments.total == sums.total == N


@pytest.mark.parametrize("T", [1, 12])
def test_ekfac_is_the_best_diagonal_and_nearer_than_kfac(backend: Backend, T):
    d, a, D, A = layer(backend, T)
    sums, moments = fitted(backend, D, A)
    F, K = fisher(d, a), moments.eigen_kronecker()["w"]
    error = np.linalg.norm(F - dense(backend, K))
    assert error < 0.99 * np.linalg.norm(F - dense(backend, sums.kronecker()["w"]))
    Q, values = basis(backend, K), backend.to_numpy(K.eigenvalues).reshape(-1)
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = values + 1e-2 * values.max() * rng.standard_normal(values.shape)
        assert error < np.linalg.norm(F - (Q * other) @ Q.T)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_single_sample_at_one_position_is_exact(backend: Backend, sharing):
    d, a, _, _ = layer(backend, 1)
    d, a = d[:1], a[:1]
    sums, moments = fitted(
        backend, backend.asarray(d), backend.asarray(a), sharing=sharing, total=1
    )
    F = fisher(d, a, 1)
    for K in (sums.kronecker()["w"], moments.eigen_kronecker()["w"]):
        assert np.abs(dense(backend, K) - F).max() <= 50 * backend.eps * np.abs(F).max()


def test_independent_factors_are_exact(backend: Backend):
    """Every d with every a: F is a Kronecker product, whatever is sampled."""
    d, a, _, _ = layer(backend, 1)
    d, a = np.repeat(d, N, 0), np.tile(a, (N, 1, 1))
    sums, moments = fitted(backend, backend.asarray(d), backend.asarray(a), total=N * N)
    F = fisher(d, a, N * N)
    for K in (sums.kronecker()["w"], moments.eigen_kronecker()["w"]):
        assert np.abs(dense(backend, K) - F).max() <= 200 * backend.eps * np.abs(F).max()


def test_reduce_is_exact_where_positions_share_the_gradient(backend: Backend):
    """Mean pooling of one repeated d: G = d ⊗ Σ a, a rank-one block for one sample."""
    d, a, _, _ = layer(backend, 5)
    d, a = np.repeat(d[:1, :1, :], 5, 1), a[:1]
    sums, _ = fitted(backend, backend.asarray(d), backend.asarray(a), sharing="reduce", total=1)
    F = fisher(d, a, 1)
    found = dense(backend, sums.kronecker()["w"])
    assert np.abs(found - F).max() <= 200 * backend.eps * np.abs(F).max()
    expand, _ = fitted(backend, backend.asarray(d), backend.asarray(a), total=1)
    assert np.linalg.norm(dense(backend, expand.kronecker()["w"]) - F) > 0.1 * np.linalg.norm(F)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_masked_positions_do_not_count(backend: Backend, sharing):
    d, a, D, A = layer(backend, 3)
    padded_d = np.concatenate([d, np.zeros((N, 2, O))], 1)
    padded_a = np.concatenate([a, 100.0 * np.ones((N, 2, I))], 1)
    short = fitted(backend, D, A, sharing=sharing)
    long = fitted(backend, backend.asarray(padded_d), backend.asarray(padded_a), sharing=sharing)
    for x, y in (
        (short[0].kronecker(), long[0].kronecker()),
        (short[1].eigen_kronecker(), long[1].eigen_kronecker()),
    ):
        M, P = dense(backend, x["w"]), dense(backend, y["w"])
        assert np.abs(M - P).max() <= 300 * backend.eps * np.abs(M).max()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_an_integer_weight_is_a_repeated_sample(backend: Backend, sharing):
    d, a, _, A = layer(backend, 3)
    times = np.arange(N) % 3 + 1
    whole = fitted(
        backend,
        backend.asarray(np.repeat(d, times, 0)),
        backend.asarray(np.repeat(a, times, 0)),
        sharing=sharing,
        total=times.sum(),
    )
    rooted = backend.asarray(d * np.sqrt(times)[:, None, None])
    weights = backend.asarray(times)
    weighted = fitted(backend, rooted, A, sharing=sharing, weights=weights, total=times.sum())
    M, P = (dense(backend, sums.kronecker()["w"]) for sums, _ in (whole, weighted))
    assert np.abs(M - P).max() <= 200 * backend.eps * np.abs(M).max()
    M, P = (dense(backend, moments.eigen_kronecker()["w"]) for _, moments in (whole, weighted))
    assert np.abs(M - P).max() <= 300 * backend.eps * np.abs(M).max()


@pytest.mark.parametrize("T", [1, 3, 12])
@pytest.mark.parametrize("C", [1, 3])
def test_both_ways_to_the_moments_agree(backend: Backend, T, C, monkeypatch):
    d, a, D, A = layer(backend, T, C)
    G = np.einsum("nto,nti->noi", d, np.repeat(a, C, 0))
    expected = np.sum(G * G, 0)
    for pays in (True, False):
        monkeypatch.setattr(_layer_sums, "_pairs_pay", lambda *_, pays=pays, **__: pays)
        found = np.asarray(_backend.to_host(_layer_sums.moments(D, A)))
        assert np.abs(found - expected).max() <= 50 * T * backend.eps * np.abs(expected).max()
        square = float(_backend.to_host(_layer_sums.squares(D, A))[0])
        assert square == pytest.approx(expected.sum(), rel=50 * T * backend.eps)


def test_pairs_of_positions_pay_while_they_are_few():
    assert _layer_sums.pairs_pay(1, 1, 64, 64)
    assert _layer_sums.pairs_pay(8, 10, 64, 64)
    assert not _layer_sums.pairs_pay(200, 1, 64, 64)


# ---------------------------------------------------------------------------------- the monoid


def parts(backend: Backend, cuts: list[slice]):
    _, _, D, A = layer(backend, 3)
    found = []
    for cut in cuts:
        sums = FactorAccumulator({"w": (O, I)}, like=backend.asarray([]))
        sums.add("w", D[cut, :, :], A[cut, :, :])
        sums.count(cut.stop - cut.start)
        found.append(sums)
    return found


def test_shards_in_any_order_are_the_whole(backend: Backend):
    (whole,) = parts(backend, [slice(0, N)])
    first, second, third = parts(backend, [slice(0, 2), slice(2, 7), slice(7, N)])
    before = {key: np.array(_backend.to_host(x)) for key, x in first._sums.items()}
    merges = (first.merge(second).merge(third), third.merge(first.merge(second)))
    M = dense(backend, whole.kronecker()["w"])
    for merged in merges:
        assert merged.total == whole.total
        P = dense(backend, merged.kronecker()["w"])
        assert np.abs(M - P).max() <= 50 * backend.eps * np.abs(M).max()
    for key, x in first._sums.items():
        assert np.array_equal(before[key], _backend.to_host(x))
    both = parts(backend, [slice(0, 2), slice(2, 7)])
    left, right = both[0].merge(both[1]), both[1].merge(both[0])
    for key in left._sums:  # addition of two numbers commutes to the last bit
        assert np.array_equal(_backend.to_host(left._sums[key]), _backend.to_host(right._sums[key]))


def test_a_saved_state_goes_on_to_the_same_bits(backend: Backend):
    first, second = parts(backend, [slice(0, 4), slice(4, N)])
    state = first.state()
    assert all(isinstance(v, int | float) or _backend.is_array(v) for v in state.values())
    again = FactorAccumulator({"w": (O, I)}, like=backend.asarray([]))
    again.load(state)
    a, b = first.merge(second), again.merge(second)
    assert a.total == b.total
    for key in a._sums:
        assert np.array_equal(_backend.to_host(a._sums[key]), _backend.to_host(b._sums[key]))
    other = FactorAccumulator({"w": (O, I)}, like=backend.asarray([]), sharing="reduce")
    with pytest.raises(ValueError, match="other layers or options"):
        other.load(state)
    with pytest.raises(ValueError, match="other layers or options"):
        first.merge(other)


def test_moments_merge_only_in_one_basis(backend: Backend):
    _, _, D, A = layer(backend, 2)
    sums, whole = fitted(backend, D, A)
    halves = []
    for cut in (slice(0, 5), slice(5, N)):
        half = MomentAccumulator(sums.eigenbases(), sums.shapes, like=backend.asarray([]))
        half.add("w", D[cut, :, :], A[cut, :, :])
        half.count(cut.stop - cut.start)
        halves.append(half)
    merged = halves[1].merge(halves[0]).eigen_kronecker()["w"]
    M, P = dense(backend, whole.eigen_kronecker()["w"]), dense(backend, merged)
    assert np.abs(M - P).max() <= 50 * backend.eps * np.abs(M).max()
    (sums,) = parts(backend, [slice(0, 5)])
    other = MomentAccumulator(sums.eigenbases(), sums.shapes, like=backend.asarray([]))
    with pytest.raises(ValueError, match="other layers or options"):
        whole.merge(other)


def test_exact_blocks(backend: Backend):
    rows = np.random.default_rng(1).standard_normal((N, 5))
    G = DenseGradients(backend.asarray(rows))
    sums = BlockAccumulator({"s": 5, "t": 12}, like=backend.asarray([]), most_dense=5)
    d, a, D, A = layer(backend, 1)
    for cut in (slice(0, 4), slice(4, N)):
        sums.add("s", G[cut])
        sums.add("t", OuterProductGradients(output_grads=D, inputs=A)[cut])
        sums.count(cut.stop - cut.start)
    found = sums.operators()
    assert np.abs(dense(backend, found["s"]) - rows.T @ rows / N).max() <= 50 * backend.eps
    diagonal = np.diag(np.diag(fisher(d, a)))
    assert np.abs(dense(backend, found["t"]) - diagonal).max() <= 1e3 * backend.eps
    assert isinstance(found["s"], ih.Dense)
    assert isinstance(found["t"], ih.Diagonal)
    with pytest.raises(ValueError, match="unknown block 'r'"):
        sums.add("r", G)
    sums.add("s", DenseGradients(backend.asarray(np.full((1, 5), np.nan))))
    with pytest.raises(ValueError, match="block 's' contains NaN or Inf"):
        sums.operators()


def test_doors(backend: Backend):
    like = backend.asarray([])
    with pytest.raises(ValueError, match='takes "expand" or "reduce"'):
        FactorAccumulator({"w": (O, I)}, like=like, sharing="both")
    with pytest.raises(ValueError, match="at least one layer"):
        FactorAccumulator({}, like=like)
    sums = FactorAccumulator({"w": (O, I)}, like=like)
    _, _, D, A = layer(backend, 2)
    with pytest.raises(ValueError, match="unknown layer 'v'"):
        sums.add("v", D, A)
    with pytest.raises(ValueError, match="layer 'w' takes output_grads"):
        sums.add("w", A, D)
    sums.add("w", D, A)
    with pytest.raises(ValueError, match="no samples have been added"):
        sums.kronecker()
    sums.count(N)
    sums.add("w", D * np.nan, A)
    with pytest.raises(ValueError, match="S of layer 'w' contains NaN or Inf"):
        sums.eigenbases()
