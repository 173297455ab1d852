"""An operator known only through a function."""

from __future__ import annotations

from collections.abc import Callable

from .. import _backend
from ..layout import Layout
from ..protocols import Array
from .base import LinearOperator


class Callback(LinearOperator):
    """Wrap a function `matmat`: (n, k) → (n, k) that multiplies columns by a symmetric matrix.

    Args:
        matmat: the product; it must not change its argument.
        n: dimension.
        like: any array of the library, dtype and device of the products.
        psd: pass True only if the matrix is positive semidefinite by construction.

    Raises ValueError or TypeError at the first product that has another shape or dtype.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> ih.Callback(lambda X: 2 * X, 3, like=np.ones(1)) @ np.ones(3)
        array([2., 2., 2.])
    """

    def __init__(
        self,
        matmat: Callable[[Array], Array],
        n: int,
        *,
        like: Array,
        psd: bool = False,
        layout: Layout | None = None,
    ) -> None:
        super().__init__(n, like=like, psd=psd, layout=layout)
        self._function = matmat

    def _matmat(self, X: Array, /) -> Array:
        Y = self._function(X)
        if not _backend.is_array(Y) or tuple(Y.shape) != tuple(X.shape) or Y.dtype != X.dtype:
            got = (
                f"shape {tuple(Y.shape)}, dtype {_backend.dtype_name(Y.dtype)}"
                if _backend.is_array(Y)
                else type(Y).__name__
            )
            msg = (
                f"matmat must return an array of shape {tuple(X.shape)} and dtype "
                f"{_backend.dtype_name(X.dtype)} for such an argument, got {got}"
            )
            raise (TypeError if not _backend.is_array(Y) else ValueError)(msg)
        return Y
