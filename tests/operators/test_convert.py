from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator as SciPyOperator
from scipy.sparse.linalg import aslinearoperator

from invhvp.operators import Callback, Dense, as_operator
from invhvp.testing import check_operator
from tests.backends import Backend
from tests.cases import OPERATORS, matrix

M = matrix(*np.geomspace(1.0, 0.1, 6))


def test_our_operators_pass_through(backend: Backend):
    A, _ = OPERATORS["callback"](backend)
    assert as_operator(A) is A


def test_arrays_become_dense(backend: Backend):
    A = as_operator(backend.asarray(M), psd=True)
    assert isinstance(A, Dense)
    assert A.psd
    backend.assert_like(A @ backend.asarray(np.ones(6)))
    with pytest.raises(ValueError, match="square"):
        as_operator(backend.asarray(M[:, :5]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "convert",
    [sp.csr_matrix, sp.csr_array, sp.coo_array, sp.dia_matrix, aslinearoperator],
    ids=["csr_matrix", "csr_array", "coo_array", "dia_matrix", "LinearOperator"],
)
def test_scipy(convert, dtype):
    exact = M.astype(dtype)
    A = as_operator(convert(exact))
    assert A.dtype == dtype
    check_operator(A, dense=exact.astype(np.float64), psd=False)


def test_scipy_operator_from_a_vector_function():
    A = as_operator(SciPyOperator((6, 6), matvec=lambda x: M @ x, dtype=np.float64), psd=True)
    check_operator(A, dense=M, psd=True)


def test_scipy_operator_without_dtype_needs_like():
    class Bare:
        shape = (6, 6)

        def matmat(self, X):
            return M @ X

    with pytest.raises(TypeError, match="like="):
        as_operator(Bare())
    check_operator(as_operator(Bare(), like=np.zeros(0)), dense=M)


def test_pylops():
    pylops = pytest.importorskip("pylops")
    A = as_operator(pylops.MatrixMult(M))
    check_operator(A, dense=M, psd=False)
    D = np.diag(np.arange(1.0, 7.0))
    check_operator(as_operator(pylops.Diagonal(np.arange(1.0, 7.0)), psd=True), dense=D, psd=True)


def test_any_object_with_matmul(backend: Backend):
    placed = backend.asarray(M)

    class Foreign:
        shape = (6, 6)
        dtype = placed.dtype

        def __matmul__(self, X):
            return placed @ X

    A = as_operator(Foreign(), like=placed, psd=True)
    assert isinstance(A, Callback)
    check_operator(A, dense=M.astype(backend.np_dtype).astype(np.float64), psd=True)
    assert (as_operator(placed) + A).psd is False


@pytest.mark.parametrize("thing", [None, 3.0, "A", [[1.0]], lambda X: X])
def test_what_cannot_multiply(thing):
    with pytest.raises(TypeError, match="Callback"):
        as_operator(thing)


def test_what_is_not_square():
    with pytest.raises(ValueError, match="square"):
        as_operator(sp.csr_array(np.ones((2, 3))))
    with pytest.raises(TypeError, match="floating"):
        as_operator(sp.csr_array(np.eye(3, dtype=int)))
