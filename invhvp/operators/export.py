"""Operators and inverses of this library as SciPy's and CuPy's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _backend
from ..protocols import Array
from .base import LinearOperator
from .convert import as_operator


def as_scipy(A: Any, /, *, transfer: bool = False) -> Any:
    """An operator or a prepared inverse as a `scipy.sparse.linalg.LinearOperator`.

    Blocks are multiplied as blocks. An inverse serves as `M=` in SciPy's solvers where it is one
    fixed positive-definite map (`inverse.fixed_spd`); CG and MINRES there need that.

    Args:
        A: anything that `as_operator` takes.
        transfer: accept that every product copies its argument to the library and device of A
            and its result back; needed for all but NumPy.

    Returns: shape (n, n), the dtype of A (float32 for half precision); the adjoint is A itself.
    Arguments of another real dtype are converted, as SciPy does.

    Raises TypeError for an operator of another library without `transfer`, and for complex
    arguments. Cost: that of the product, and with `transfer` two copies.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> from scipy.sparse.linalg import cg
        >>> A = ih.Diagonal(np.arange(1.0, 5.0))
        >>> M = ih.Direct().prepare(A, damping=1e-3)
        >>> x, info = cg(ih.as_scipy(A), np.ones(4), M=ih.as_scipy(M))
        >>> x.round(4), info
        (array([1.    , 0.5   , 0.3333, 0.25  ]), 0)
    """
    from scipy.sparse.linalg import LinearOperator as SciPyOperator

    A = as_operator(A)
    if not _backend.is_numpy(A.like) and not transfer:
        name = _backend.library_name(A.like)
        msg = (
            f"this operator works on {name} arrays on {A.device}, SciPy on NumPy's: pass "
            "transfer=True to accept two copies for every product"
            + (", or use as_cupyx" if name == "cupy" else "")
        )
        raise TypeError(msg)
    name = _backend.dtype_name(A.dtype)
    dtype = np.dtype("float32" if name in ("bfloat16", "float16") else name)

    def product(X: Any) -> np.ndarray:
        X = np.asarray(X)
        if X.dtype.kind not in "fiu":
            msg = f"curvature operators are real, got an array of {X.dtype}"
            raise TypeError(msg)
        Y = _backend.to_host(A @ _backend.from_host(X, A.like))
        return np.asarray(Y, dtype=dtype)

    return _exported(SciPyOperator, A, product, dtype)


def as_cupyx(A: Any, /) -> Any:
    """A CuPy operator or prepared inverse as a `cupyx.scipy.sparse.linalg.LinearOperator`.

    Blocks are multiplied as blocks; nothing leaves the GPU.

    Raises TypeError for an operator that does not work on CuPy arrays: a torch model does with
    `array_namespace=cupy`. Cost: that of the product.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> ih.as_cupyx(ih.Diagonal(np.ones(3)))
        Traceback (most recent call last):
        TypeError: as_cupyx takes operators on CuPy arrays, this one works on numpy: ...
    """
    A = as_operator(A)
    name = _backend.library_name(A.like)
    if name != "cupy":
        msg = (
            f"as_cupyx takes operators on CuPy arrays, this one works on {name}: build it from "
            "CuPy arrays, or from a torch model with array_namespace=cupy"
        )
        raise TypeError(msg)
    # It loads CUDA libraries at import: only where there must be some.
    from cupyx.scipy.sparse.linalg import (  # pyright: ignore[reportMissingImports]
        LinearOperator as CupyxOperator,
    )

    def product(X: Array) -> Array:
        return A @ _backend.cast(X, A.like)

    return _exported(CupyxOperator, A, product, A.dtype)


def _exported(kind: Any, A: LinearOperator, product: Callable[[Any], Any], dtype: Any) -> Any:
    return kind(
        A.shape, matvec=product, rmatvec=product, matmat=product, rmatmat=product, dtype=dtype
    )
