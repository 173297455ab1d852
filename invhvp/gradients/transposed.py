"""The transpose of a gradient matrix, as a view."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import _backend
from ..protocols import Array

if TYPE_CHECKING:
    from .base import GradientMatrix


class Transposed:
    """Gᵀ, a p × N view of a gradient matrix; `G.T @ U` takes (N,) or (N, k)."""

    __array_ufunc__ = None
    __array_priority__ = 1000
    ndim = 2

    def __init__(self, gradients: GradientMatrix) -> None:
        self.T = gradients
        self.shape = gradients.shape[::-1]
        self.dtype = gradients.dtype
        self.device = gradients.device

    def __matmul__(self, U: Array, /) -> Array:
        return self.T._transposed_matmul(U)

    def __rmatmul__(self, Y: Array, /) -> Array:
        return from_left(Y, self.T)

    def to_dense(self) -> Array:
        """The (p, N) array, a view of the dense rows."""
        dense = self.T.to_dense()
        return _backend.namespace(dense).matrix_transpose(dense)

    def __repr__(self) -> str:
        return f"{self.T!r}.T"


def from_left(Y: Array, transpose: GradientMatrix | Transposed) -> Array:
    """Y M through its transpose: (Mᵀ Yᵀ)ᵀ."""
    xp = _backend.namespace(Y)
    if Y.ndim == 1:
        return transpose @ Y
    return xp.matrix_transpose(transpose @ xp.matrix_transpose(Y))
