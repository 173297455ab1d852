"""Factorisations and triangular solves of every library; success is decided from values.

NumPy and strict raise, torch raises and synchronises, JAX returns NaN, CuPy returns garbage
without a word: here all of them return NaN.
"""

from __future__ import annotations

import math
import sys

import array_api_compat as compat

from . import _backend
from .protocols import Array


def _nan_like(M: Array) -> Array:
    return _backend.namespace(M).full_like(M, math.nan)


def cholesky(M: Array) -> Array:
    """Lower Cholesky factor of a small or dense symmetric matrix; all NaN if not definite."""
    xp = _backend.namespace(M)
    if compat.is_torch_array(M):
        L, info = sys.modules["torch"].linalg.cholesky_ex(M)  # never raises, never synchronises
        return xp.where(info == 0, L, math.nan)
    try:
        L = xp.linalg.cholesky(M)
    except Exception as error:
        if _backend.is_out_of_memory(error) or "LinAlg" not in type(error).__name__:
            raise
        return _nan_like(M)
    if compat.is_cupy_array(M):  # believe the factor only if it multiplies back
        misfit = xp.max(xp.abs(L @ L.T - M))
        good = misfit <= 1e3 * M.shape[0] * _backend.eps(M.dtype) * xp.max(xp.abs(M))
        return xp.where(good, L, _nan_like(L))
    return L


def eigh(M: Array) -> tuple[Array, Array]:
    """Ascending eigenvalues and eigenvectors of a symmetric matrix; all NaN on failure."""
    xp = _backend.namespace(M)
    M = (M + xp.matrix_transpose(M)) / 2
    try:
        result = xp.linalg.eigh(M)
    except Exception as error:
        if _backend.is_out_of_memory(error) or "LinAlg" not in type(error).__name__:
            raise
        return _nan_like(M[:, 0]), _nan_like(M)
    return result[0], result[1]


def gains_from_batched_eigh(M: Array) -> bool:
    """Whether matrices of the size of M are decomposed faster as one stack than one by one.

    True of CuPy's batched Jacobi method for small ones; elsewhere a stack is only a loop.
    """
    return compat.is_cupy_array(M) and M.shape[0] <= 32


def solve_lower(L: Array, B: Array, *, transpose: bool = False) -> Array:
    """Solve L X = B (or Lᵀ X = B) for a lower-triangular L and a two-dimensional B."""
    xp = _backend.namespace(L)
    if _backend.is_numpy(L):
        from scipy.linalg import solve_triangular

        return solve_triangular(L, B, lower=True, trans=int(transpose), check_finite=False)
    if compat.is_torch_array(L):
        solve = sys.modules["torch"].linalg.solve_triangular
        return solve(L.mT if transpose else L, B, upper=transpose)
    if compat.is_jax_array(L):
        from jax.scipy.linalg import solve_triangular  # pyright: ignore[reportMissingImports]

        return solve_triangular(L, B, lower=True, trans=int(transpose))
    if compat.is_cupy_array(L):
        # cupyx.scipy.linalg needs the CUDA libraries at import: only when it is used.
        from cupyx.scipy.linalg import solve_triangular  # pyright: ignore[reportMissingImports]

        return solve_triangular(L, B, lower=True, trans=int(transpose))
    A = xp.matrix_transpose(L) if transpose else L
    try:
        return xp.linalg.solve(A, B)
    except Exception as error:
        if "LinAlg" not in type(error).__name__:
            raise
        return _nan_like(B)


def inv_lower(L: Array) -> Array:
    """Inverse of a small lower-triangular matrix."""
    if not L.shape[0]:
        return L
    if _backend.is_numpy(
        L
    ):  # several times as fast as SciPy's checks before a solve with the identity
        from scipy.linalg import lapack

        inverse, info = lapack.dtrtri(L, lower=1)  # pyright: ignore[reportAttributeAccessIssue]
        return inverse if info == 0 else _nan_like(L)
    xp = _backend.namespace(L)
    return solve_lower(L, xp.eye(L.shape[0], dtype=L.dtype, device=_backend.device(L)))
