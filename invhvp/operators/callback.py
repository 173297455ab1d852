"""An operator known only through a function."""

from __future__ import annotations

from collections.abc import Callable

from .. import _tracing
from ..layout import Layout
from ..protocols import Array
from .base import LinearOperator, check_kind


class Callback(LinearOperator):
    """Wrap a function `matmat`: (n, k) → (n, k) that multiplies columns by a symmetric matrix.

    Args:
        matmat: the product; it must not change its argument.
        n: dimension.
        like: any array of the library, dtype and device of the products.
        psd: pass True only if the matrix is positive semidefinite by construction.
        layout: names of the parameter blocks.
        differentiable: whether PyTorch can differentiate the product in something that matmat
            closes over, so that solutions have gradients in it; else none are recorded in products
            with columns that have no gradient of their own. JAX needs no such word.

    Raises ValueError at a product of another shape, TypeError at one of another library, dtype or
    device.

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
        differentiable: bool = False,
    ) -> None:
        super().__init__(n, like=like, psd=psd, layout=layout)
        self._function = matmat
        self.differentiable = bool(differentiable)

    def _matmat(self, X: Array, /) -> Array:
        Y = self._function(X)
        check_kind(Y, self._like, "Callback (whose matmat must return what it takes)")
        if tuple(Y.shape) != tuple(X.shape):
            msg = (
                f"matmat must return an array of shape {tuple(X.shape)} for such an argument, "
                f"got {tuple(Y.shape)}"
            )
            raise ValueError(msg)
        # Small arrays are NumPy's where nothing is recorded: an accidental graph must not mix in.
        return Y if self.differentiable else _tracing.unrecorded(Y, X)
