"""Blockwise, pseudo-inverses at λ = 0, and the smallest λ."""

from __future__ import annotations

import json

import numpy as np
import pytest

import invhvp as ih
from invhvp.estimate import least_damping
from invhvp.operators import pseudo_inverse
from tests import cases
from tests.cases import matrix

DAMPING = {"weight": 0.5, "bias": 0.125}


@pytest.mark.parametrize("layout", [cases.LAYOUT, cases.PERMUTED])
def test_blocks_are_solved_apart_and_judged_together(backend, layout):
    A, M = cases._block_diagonal(backend, layout)
    B = cases.rows(3).T
    X = np.linalg.solve(M + np.diag(layout.shifts(DAMPING)), backend.to_numpy(backend.asarray(B)))
    for method in (
        ih.BlockCG(rtol=1e-5),
        ih.Direct(),
        ih.CG(rtol=1e-5, preconditioner=ih.Jacobi()),
    ):
        inverse = ih.Blockwise(method).prepare(A, damping=DAMPING)
        sol = inverse.solve(backend.asarray(B))
        assert set(sol.status) == {ih.Status.CONVERGED}
        error = backend.to_numpy(sol.x) - X
        assert np.abs(error).max() <= 1e-4 * np.abs(X).max()
        shifted = M + np.diag(layout.shifts(DAMPING))
        norms = np.sqrt(np.einsum("ij,ij->j", error, shifted @ error))
        assert np.all(norms <= backend.to_numpy(sol.error_bounds) + 1e3 * backend.eps)
        residual = backend.asarray(B) - (A @ sol.x)
        left = backend.to_numpy(residual) - layout.shifts(DAMPING)[:, None] * backend.to_numpy(
            sol.x
        )
        found = backend.to_numpy(sol.residual_norms)
        np.testing.assert_allclose(found, np.linalg.norm(left, axis=0), atol=1e3 * backend.eps)
        np.testing.assert_allclose(
            backend.to_numpy(inverse @ backend.asarray(B)), backend.to_numpy(sol.x), atol=1e-4
        )
        again = inverse.with_damping(0.25).solve(backend.asarray(B[:, 0]))
        right = np.linalg.solve(M + 0.25 * np.eye(cases.N), B[:, 0])
        assert np.abs(backend.to_numpy(again.x) - right).max() <= 1e-4 * np.abs(right).max()


def test_the_status_is_the_worst_of_the_blocks():
    blocks = {"good": ih.Diagonal(np.ones(2)), "bad": ih.Diagonal(np.array([1.0, -3.0]))}
    A = ih.BlockDiagonal(blocks)
    inverse = ih.Blockwise(ih.BlockCG()).prepare(A, damping=0.5)
    B = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    with pytest.warns(ih.ConvergenceWarning, match="NEGATIVE_CURVATURE in column 0"):
        sol = inverse.solve(B)
    assert [s.name for s in sol.status] == ["NEGATIVE_CURVATURE", "CONVERGED", "ZERO"]
    p = sol.curvature.vector
    assert p[0] == p[1] == 0
    np.testing.assert_allclose(p @ (A @ p), sol.curvature.value)
    with pytest.raises(ih.IndefiniteError):
        _ = inverse @ B
    assert not inverse.fixed_spd


def test_blockwise_preconditions_and_is_stored():
    rng = np.random.default_rng(0)
    A, M = np.diag(np.geomspace(1, 1e4, 12)), rng.standard_normal((12, 12))
    A = A + 0.01 * (M + M.T)
    parts = {"a": ih.Dense(A[:5, :5], psd=True), "b": ih.Dense(A[5:, 5:], psd=True)}
    method = ih.Blockwise(ih.Direct())
    K = ih.Surrogate(ih.BlockDiagonal(parts), method)
    cg = ih.BlockCG(preconditioner=K)
    assert ih.solve(ih.Dense(A), np.ones(12), cg, damping=0.1).iterations <= 5
    stored = json.loads(json.dumps(ih.method_to_dict(method)))
    assert ih.method_from_dict(stored) == method


def test_blockwise_refuses_what_has_no_blocks():
    with pytest.raises(TypeError, match="needs a BlockDiagonal operator, got Dense"):
        ih.Blockwise(ih.CG()).prepare(ih.Dense(np.eye(2)), damping=1.0)
    A = ih.BlockDiagonal({"a": ih.Dense(np.eye(2)), "b": ih.Dense(np.eye(2))})
    with pytest.raises(ValueError, match="no value for the block 'b'"):
        ih.Blockwise(ih.CG()).prepare(A, damping={"a": 1.0})


# --------------------------------------------------------------------------------- pseudo-inverses


def singular(backend):
    """Operators of rank 5 of 12, and their matrices."""
    values = [3.0, 2.0, 1.0, 0.5, 0.25] + [0.0] * 7
    dense, M = cases.placed(backend, matrix(*values), psd=True)
    yield dense, M, 5
    yield (*cases._rank_one_mean(backend, 5), 5)
    layout = ih.Layout.from_shapes({"one": (12,), "two": (2,)})
    d = backend.asarray(np.array([2.0, 0.0]))
    whole = np.zeros((14, 14))
    whole[:12, :12], whole[12, 12] = M, 2.0
    yield ih.BlockDiagonal({"one": dense, "two": ih.Diagonal(d)}, layout), whole, 6
    eye = backend.asarray(np.eye(2))
    yield ih.Kronecker(backend.asarray(np.diag([1.0, 0.0])), eye), np.diag([1.0, 1, 0, 0]), 2


def test_pseudo_inverses(backend):
    for A, M, rank in singular(backend):
        found = pseudo_inverse(A)
        assert found.truncation.rank == rank
        right = np.linalg.pinv(M, rcond=1e-4, hermitian=True)
        allowed = 1e4 * backend.eps * np.abs(right).max()
        np.testing.assert_allclose(backend.to_numpy(found.to_dense()), right, atol=allowed)
        inverse = ih.Direct(singular="truncate").prepare(A, damping=0.0)
        assert not inverse.fixed_spd
        assert f"pseudo-inverse of rank {rank} of {len(M)}" in repr(inverse)
        b = backend.asarray(np.ones(len(M)))
        assert inverse.solve(b).status is ih.Status.APPROXIMATE
        X = np.linalg.solve(M + 0.5 * np.eye(len(M)), np.ones(len(M)))
        damped = inverse.with_damping(0.5).solve(b)
        assert damped.status is ih.Status.CONVERGED
        np.testing.assert_allclose(backend.to_numpy(damped.x), X, atol=1e4 * backend.eps)


def test_low_rank_models_at_zero(backend):
    values = np.array([3.0, -2.0, 1.0, 0.5, 0.25, 0.1, 0.01, 0.01, 0.005, 0.001, 0.0, 0.0])
    M = matrix(*values)
    A, M = cases.placed(backend, M)
    w, V = np.linalg.eigh(M)
    b = backend.asarray(np.ones(12))
    kept = np.argsort(-np.abs(w))[:3]
    for complement in ("drop", "damping"):
        method = ih.Arnoldi(
            rank=3, krylov_dimension=7, block=1, tol=1e-5, complement=complement,
            nonpositive="keep", singular="truncate",
        )  # fmt: skip
        inverse = method.prepare(A, damping=0.0)
        right = (V[:, kept] / w[kept]) @ V[:, kept].T @ np.ones(12)
        np.testing.assert_allclose(backend.to_numpy(inverse @ b), right, atol=1e-3)
        assert inverse.truncation.rank == 3
        assert abs(inverse.truncation.cut - 1.0) < 1e-3
        assert inverse.with_damping(1.0).truncation is None
    with pytest.raises(ih.IndefiniteError):
        ih.Arnoldi(rank=3, krylov_dimension=7, singular="truncate").prepare(A, damping=0.0)
    sketch = ih.NystroemSketch(rank=12, singular="truncate").prepare(A, damping=0.0)
    positive = np.sum(w > 12 * backend.eps * 3.0)
    assert sketch.truncation.rank <= positive
    assert np.linalg.eigvalsh(backend.to_numpy(sketch.map.inner.to_dense()))[0] > -1e-2
    for method in (ih.Direct, ih.Arnoldi, ih.NystroemSketch):
        with pytest.raises(ValueError, match="singular must be one of"):
            method(singular="ignore")


def test_another_lambda_costs_direct_no_product(backend):
    M = matrix(*np.geomspace(1.0, 0.1, 12))
    A, seen = cases.counted(ih.Dense(backend.asarray(M)))
    inverse = ih.Direct().prepare(A, damping=0.1)
    assert sum(seen) == 12
    other = inverse.with_damping(0.3)
    assert sum(seen) == 12
    X = backend.to_numpy(other @ backend.asarray(np.ones(12)))
    np.testing.assert_allclose(X, np.linalg.solve(M + 0.3 * np.eye(12), np.ones(12)), atol=1e-4)


def test_least_damping(backend):
    for values, right in (
        ([2.0, 1.0, -0.25], 0.25),
        ([2.0, 1.0, 0.5], 0.0),
        (np.append(np.geomspace(5.0, 0.5, 99), -0.75), 0.75),
    ):
        A, _ = cases.placed(backend, matrix(*values))
        assert abs(least_damping(A) - right) <= 0.02 * right
    psd, _ = cases.placed(backend, matrix(2.0, 1.0, 0.0), psd=True)
    np.testing.assert_allclose(least_damping(psd), 6 * backend.eps, rtol=0.1)
