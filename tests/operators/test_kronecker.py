"""Kronecker products beyond the conformance kit: eigenvectors once, named errors, traces."""

from __future__ import annotations

import numpy as np
import pytest

import invhvp as ih
from invhvp import _backend, _lapack
from invhvp.estimate import block_errors
from invhvp.layout import Block, Layout
from invhvp.operators import CurvatureBlocks, kronecker
from tests.backends import Backend
from tests.cases import matrix


def factors(backend: Backend):
    S, A = matrix(2.0, 1.0, 0.1, seed=1), matrix(3.0, 0.5, 0.2, 0.01, seed=2)
    return backend.asarray(S), backend.asarray(A)


def dense(backend: Backend, K) -> np.ndarray:
    return backend.to_numpy(K.to_dense())


def test_one_eigendecomposition_serves_every_damping(backend: Backend, monkeypatch):
    seen = []
    eigh = _lapack.eigh

    def counted(M):
        seen.append(M.shape)
        return eigh(M)

    monkeypatch.setattr(_lapack, "eigh", counted)
    K = ih.Kronecker(*factors(backend), 0.5)
    M = dense(backend, K)
    inverse = ih.Direct().prepare(K, damping=1.0)
    b = np.arange(1.0, 13.0)
    for damping in (1.0, 0.1, 3.0):
        x = backend.to_numpy(inverse.with_damping(damping) @ backend.asarray(b))
        expected = np.linalg.solve(M + damping * np.eye(12), b)
        assert np.linalg.norm(x - expected) <= 300 * backend.eps * np.linalg.norm(expected)
    assert seen == [(3, 3), (4, 4)]


@pytest.mark.parametrize("batched", [True, False])
def test_factors_of_one_size_may_be_decomposed_together(backend: Backend, batched, monkeypatch):
    monkeypatch.setattr(_lapack, "gains_from_batched_eigh", lambda _: batched)
    matrices = {"a": matrix(2.0, 1.0, 0.0, seed=3), "b": matrix(1.0, 4.0, seed=4)}
    matrices["c"] = matrix(5.0, 0.2, 0.1, seed=5)
    found = kronecker.eigenbases({name: backend.asarray(M) for name, M in matrices.items()})
    assert list(found) == ["a", "b", "c"]
    for name, (w, V) in found.items():
        w, V = np.asarray(_backend.to_host(w)), np.asarray(_backend.to_host(V))
        assert w.dtype == V.dtype == np.float64
        assert np.all(w >= 0)
        assert np.abs((V * w) @ V.T - matrices[name]).max() <= 50 * backend.eps


def test_traces_norms_and_determinants(backend: Backend):
    K = ih.Kronecker(*factors(backend), 0.5)
    M = dense(backend, K)
    for A in (K, K.eigen):
        assert A.trace() == pytest.approx(np.trace(M), rel=30 * backend.eps)
        assert A.frobenius_norm() == pytest.approx(np.linalg.norm(M), rel=30 * backend.eps)
        assert A.logdet() == pytest.approx(np.linalg.slogdet(M)[1], rel=1e4 * backend.eps)
        assert A.definite
    assert (2.0 * K).trace() == pytest.approx(2.0 * K.trace())
    assert not (-K).psd


def test_the_identity_needs_no_vectors(backend: Backend):
    U = np.linalg.qr(matrix(1.0, 2.0, 3.0))[0]
    values = np.linspace(0.1, 2.0, 12).reshape(3, 4)
    eye = backend.asarray(np.eye(4))
    with_eye = ih.EigenKronecker(backend.asarray(U), eye, backend.asarray(values))
    without = ih.EigenKronecker(backend.asarray(U), None, backend.asarray(values))
    assert np.allclose(dense(backend, with_eye), dense(backend, without), atol=30 * backend.eps)
    assert np.allclose(
        backend.to_numpy(without.diagonal()), np.diag(dense(backend, without)), atol=1e-6
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_numbers_are_named(backend: Backend, value):
    S, A = matrix(2.0, 1.0), matrix(1.0, 1.0, 2.0)
    S[0, 0] = value
    K = ih.Kronecker(backend.asarray(S), backend.asarray(A))
    with pytest.raises(ValueError, match="factor S contains NaN or Inf"):
        K.inverse(1.0)
    with pytest.raises(ValueError, match="finite and not negative"):
        ih.EigenKronecker(
            backend.asarray(np.eye(2)), None, backend.asarray([[1.0, value], [1.0, 1.0]])
        )


def test_doors(backend: Backend):
    S, A = factors(backend)
    with pytest.raises(ValueError, match=r"factor A must be a square matrix, got shape \(3, 2\)"):
        ih.Kronecker(S, backend.asarray(np.ones((3, 2))))
    with pytest.raises(ValueError, match="not symmetric"):
        ih.Kronecker(S, backend.asarray(np.triu(np.ones((3, 3)))))
    with pytest.raises(ValueError, match="scale must not be negative"):
        ih.Kronecker(S, A, -1.0)
    with pytest.raises(ValueError, match="factor S is not positive semidefinite"):
        ih.Kronecker(backend.asarray(matrix(1.0, -0.5)), A).inverse(1.0)
    with pytest.raises(ValueError, match=r"eigenvalues must have shape \(3, 4\)"):
        ih.EigenKronecker(S, A, backend.asarray(np.ones((4, 3))))
    singular = ih.Kronecker(backend.asarray(np.diag([1.0, 0.0])), A)
    with pytest.raises(ih.SingularError, match="raise the damping"):
        singular.inverse(0.0)
    named = ih.Kronecker(S, A, layout=Layout.from_shapes({"w": (3, 3), "b": (3,)}))
    with pytest.raises(ValueError, match="one damping value for all that it couples"):
        named.inverse({"w": 1.0, "b": 2.0})
    same = dense(backend, named.inverse({"w": 1.0, "b": 1.0}))
    assert np.array_equal(same, dense(backend, named.inverse(1.0)))


def blocks(backend: Backend) -> CurvatureBlocks:
    """[W | b] of a (2, 1) weight and a bias that follows it, and a diagonal."""
    S, A = backend.asarray(matrix(2.0, 1.0)), backend.asarray(matrix(3.0, 0.5))
    layout = Layout({"layer": Block((2, 2), np.array([0, 2, 1, 3])), "free": Block((1,), [4])})
    return CurvatureBlocks(
        {"layer": ih.Kronecker(S, A), "free": ih.Diagonal(backend.asarray([0.0]))},
        layout,
        traces={"layer": 21.0, "free": 0.0},
        parameters={"layer": ("weight", "bias"), "free": ("free",)},
    )


def test_damping_by_block_or_by_parameter(backend: Backend):
    K = blocks(backend)
    M = dense(backend, K)
    by_block = K.inverse({"layer": 0.5, "free": 2.0})
    by_parameter = K.inverse({"weight": 0.5, "bias": 0.5, "free": 2.0})
    expected = np.linalg.inv(M + np.diag([0.5, 0.5, 0.5, 0.5, 2.0]))
    for inverse in (by_block, by_parameter):
        assert np.abs(dense(backend, inverse) - expected).max() <= 100 * backend.eps
    A = ih.Dense(backend.asarray(M + 0.01 * np.eye(5)), layout=Layout.from_shapes(
        {"weight": (2, 1), "bias": (2,), "free": (1,)}))  # fmt: skip
    cg = ih.BlockCG(preconditioner=ih.Surrogate(K))
    damping = {"weight": 0.5, "bias": 0.5, "free": 2.0}
    assert ih.solve(A, backend.asarray(np.ones(5)), cg, damping=damping).status.name == "CONVERGED"
    with pytest.raises(ValueError, match=r"block 'layer' couples \['weight', 'bias'\]"):
        K.inverse({"weight": 0.5, "bias": 1.0, "free": 2.0})
    with pytest.raises(ih.SingularError, match="block 'free': diag"):
        K.inverse(0.0)


def test_what_the_blocks_hold(backend: Backend):
    K = blocks(backend)
    assert K.trace() == pytest.approx(10.5, rel=10 * backend.eps)
    assert K.trace_ratio() == pytest.approx(0.5, rel=10 * backend.eps)
    damping = K.relative_damping(0.1)
    assert damping == pytest.approx({"layer": 0.2625, "free": 0.2625}, rel=1e-5)
    assert np.isfinite(dense(backend, ih.Direct().prepare(K, damping=damping))).all()
    assert "1 Kronecker block with 100 % of the trace" in repr(K)
    assert "trace 0.500 of the exact one" in repr(K)
    assert [line.split()[:2] for line in K.summary().splitlines()[1:]] == [
        ["layer", "Kronecker"],
        ["free", "diagonal"],
    ]
    with pytest.raises(ValueError, match="pass traces="):
        CurvatureBlocks(K.blocks).trace_ratio()


def test_block_errors_equal_dense_ones(backend: Backend):
    rows = np.random.default_rng(0).standard_normal((6, 5))
    F = ih.RankOneMean(ih.DenseGradients(backend.asarray(rows)), count=4.0)
    exact, K = rows.T @ rows / 4.0, blocks(backend)
    M, errors = dense(backend, K), block_errors(K, F)
    for name, where in (("layer", [0, 2, 1, 3]), ("free", [4])):
        f, k = exact[np.ix_(where, where)], M[np.ix_(where, where)]
        expected = np.linalg.norm(f - k) / np.linalg.norm(f)
        assert errors[name] == pytest.approx(expected, rel=1e4 * backend.eps)
    with pytest.raises(TypeError, match="must have gradients"):
        block_errors(K, ih.Dense(backend.asarray(exact), check=False))


@pytest.mark.backends("torch")
def test_half_precision_keeps_single_precision_vectors():
    torch = pytest.importorskip("torch")
    U, values = np.linalg.qr(matrix(1.0, 2.0, 3.0))[0], np.linspace(0.1, 2.0, 12).reshape(3, 4)
    U, values = (torch.from_numpy(M).float() for M in (U, values))
    half = torch.empty(0, dtype=torch.bfloat16)
    K = ih.EigenKronecker(U, None, values, like=half)
    x = torch.linspace(-1, 1, 12).bfloat16()
    found = K.inverse(0.1) @ x
    assert found.dtype == torch.bfloat16
    wide = ih.EigenKronecker(U, None, values).inverse(0.1) @ x.float()
    assert torch.allclose(found.float(), wide, rtol=2**-7, atol=0)
