"""Products and sums of tall blocks in every library, with as few new blocks as it allows."""

from __future__ import annotations

import sys

import array_api_compat as compat
import numpy as np

from . import _backend, _blas
from .protocols import Array


def matmul(a: Array, b: Array) -> Array:
    """Multiply without TF32: the engine's only matrix product on tall blocks."""
    if _backend.is_numpy(a):
        return a @ b
    if compat.is_torch_array(a):
        if a.device.type == "cuda" and _backend.dtype_name(a.dtype) == "float32":
            flags = sys.modules["torch"].backends.cuda.matmul
            if flags.allow_tf32:
                flags.allow_tf32 = False
                try:
                    return a @ b
                finally:
                    flags.allow_tf32 = True
        return _blas.multiply(a, b)
    if compat.is_jax_array(a):
        return _backend.namespace(a).matmul(a, b, precision="highest")
    return a @ b


def add_product(Z: Array, X: Array, M: Array) -> Array:
    """Compute Z + X M with as few new blocks as the library allows."""
    if compat.is_torch_array(Z):
        return _blas.plus_product(Z, X, M) if Z.device.type == "cpu" else Z + matmul(X, M)
    product = matmul(X, M)
    if _backend.is_numpy(product) and product.dtype == Z.dtype and product.shape == Z.shape:
        product += Z  # it is ours
        return product
    return Z + product


def add_scaled(Z: Array, X: Array, factors: Array | float) -> Array:
    """Compute Z + X · factors, a number or what broadcasts to X, with as few new blocks."""
    if compat.is_torch_array(Z):
        return _blas.plus_scaled(Z, X, factors)
    moved = X * factors
    if _backend.is_numpy(moved) and moved.dtype == Z.dtype and moved.shape == Z.shape:
        moved += Z  # it is ours
        return moved
    return Z + moved


def for_blas(X: Array, Y: Array) -> tuple[Array, Array]:
    """Both, or NumPy views of them where NumPy multiplies for their library."""
    same = Y is X
    if compat.is_torch_array(X) and _backend.on_host(X) and _backend.on_host(Y):
        X, Y = _blas.views(X, Y)
    return X, (X if same else Y)


def gram_rows(X: Array, Y: Array) -> int | None:
    """Rows of a tall block in one XᵀY; None leaves the choice to others.

    OpenBLAS multiplies up to 10⁶ pairs without packing: 10⁶ x 16 in float64 in 10 ms, not 33.
    """
    rows = 1_000_000 // max(1, X.shape[1] * Y.shape[1])
    return rows if _backend.is_numpy(X) and 900 <= rows < 65_536 else None


def scale(X: Array, factors: Array) -> Array:
    """Compute X · factors, which broadcast to X."""
    return _blas.scaled(X, factors) if compat.is_torch_array(X) else X * factors


def column_sums(X: Array) -> Array:
    """The sums over the rows of a tall block, in its dtype.

    NumPy adds row to row; for many rows a product with ones is several times as fast.
    """
    if _backend.is_numpy(X) and X.shape[0] >= 4096:
        return (np.ones((1, X.shape[0]), dtype=X.dtype) @ X)[0, :]
    return _backend.namespace(X).sum(X, axis=0, dtype=X.dtype)
