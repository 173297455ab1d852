"""Whatever multiplies, as one of our operators."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .. import _backend
from ..protocols import Array
from .base import LinearOperator
from .callback import Callback
from .dense import Dense


def as_operator(A: Any, /, *, like: Array | None = None, psd: bool | None = None) -> LinearOperator:
    """Turn a symmetric matrix or any object with `shape` and a product into an operator.

    Args:
        A: an operator of this library (returned as it is), an array (n, n), or anything with
            `shape` and `matmat` or `@`: SciPy, CuPy and PyLops operators and sparse matrices,
            operators of curvlinops and linear_operator (GPyTorch).
        like: an array of the library, dtype and device of the products, where `A` does not say
            (PyLops on CuPy).
        psd: True if A is positive semidefinite by construction.

    Raises TypeError where A cannot multiply, ValueError where it is not square.

    Example:
        >>> import numpy as np, scipy.sparse as sp, invhvp as ih
        >>> ih.as_operator(sp.eye(3)) @ np.ones(3)
        array([1., 1., 1.])
    """
    if isinstance(A, LinearOperator):
        return A
    if _backend.is_array(A):
        return Dense(A, psd=bool(psd))
    shape = getattr(A, "shape", None)
    if shape is None or not (hasattr(A, "matmat") or hasattr(A, "__matmul__")):
        msg = (
            "an operator needs `shape` and `@` (or `matmat`), or pass a function through "
            f"Callback(matmat, n, like=array); got {type(A).__name__}"
        )
        raise TypeError(msg)
    shape = tuple(shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        msg = f"an operator must be square, got shape {shape}"
        raise ValueError(msg)
    matmat = A.matmat if hasattr(A, "matmat") else A.__matmul__
    like = _array_like(A) if like is None else like
    if _backend.library_name(like) == "torch":
        matmat = _without_graph(matmat)
    return Callback(matmat, shape[0], like=like, psd=bool(psd))


def _without_graph(matmat: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A product of which PyTorch keeps no graph: parameters of a foreign operator may want one."""
    torch = sys.modules["torch"]

    def product(X: Array) -> Array:
        with torch.no_grad():
            return matmat(X)

    return product


def _array_like(A: Any) -> Array:
    """An empty array of the library that a foreign operator computes in."""
    dtype = getattr(A, "dtype", None)
    if dtype is None:
        msg = f"{type(A).__name__} does not say its dtype; pass like=, an array it multiplies"
        raise TypeError(msg)
    modules = {cls.__module__.partition(".")[0] for cls in type(A).__mro__}
    if modules & {"cupy", "cupyx"}:
        return sys.modules["cupy"].zeros((0,), dtype=dtype)
    if modules & {"scipy", "pylops", "numpy"}:
        import numpy as np

        return np.zeros((0,), dtype=dtype)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        return torch.zeros((0,), dtype=dtype, device=getattr(A, "device", None))
    msg = f"cannot tell the array library of {type(A).__name__}; pass like=, an array it multiplies"
    raise TypeError(msg)
