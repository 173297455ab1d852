"""U diag(s) Uᵀ: the shape of every low-rank curvature model."""

from __future__ import annotations

import math

import numpy as np

from .. import _arithmetic, _backend, _lapack, _linalg
from ..layout import Layout
from ..protocols import Array, Damping
from ..solution import SingularError
from .algebra import checked_factor
from .base import LinearOperator
from .damping import as_shift, by_block, smallest
from .diagonal import Identity
from .factor import check_definite


class LowRank(LinearOperator):
    """U diag(s) Uᵀ for `vectors` U (n, r) and `values` s (r,).

    Columns that are not orthonormal are replaced by the eigenvectors of the same operator, so
    that `vectors` always is. Cost: 4·n·r flops a column; construction 2·n·r².

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.LowRank(np.array([[1.0], [0.0]]), np.array([3.0]))
        >>> A.inverse(1.0) @ np.ones(2)
        array([0.25, 1.  ])
    """

    def __init__(self, vectors: Array, values: Array, *, layout: Layout | None = None) -> None:
        if vectors.ndim != 2 or values.ndim != 1 or values.shape[0] != vectors.shape[1]:
            msg = (
                "LowRank takes vectors (n, r) and values (r,), got shapes "
                f"{tuple(vectors.shape)} and {tuple(values.shape)}"
            )
            raise ValueError(msg)
        if vectors.shape[1] > vectors.shape[0]:
            msg = f"the rank cannot exceed n, got vectors of shape {tuple(vectors.shape)}"
            raise ValueError(msg)
        U, s = _orthonormal(vectors, _backend.to_small(values))
        psd = not _backend.is_tracing(s) and bool(np.all(_backend.to_host(s) >= 0))
        super().__init__(vectors.shape[0], like=vectors, psd=psd, layout=layout)
        self.vectors = U
        self._s = s

    @property
    def values(self) -> Array:
        """The r eigenvalues beside the vectors, in their dtype."""
        return _backend.lift(self._s, self.like)

    @property
    def rank(self) -> int:
        """Number of columns."""
        return self.vectors.shape[1]

    def _matmat(self, X: Array, /) -> Array:
        return _linalg.between(self.vectors, self._s, X)

    def diagonal(self) -> Array:
        """The diagonal (n,)."""
        xp = _backend.namespace(self.vectors)
        weighted = self.vectors * self.values[None, :]
        return xp.sum(weighted * self.vectors, axis=1, dtype=self.dtype)

    def inverse(self, damping: Damping, /) -> LinearOperator:
        """(U diag(s) Uᵀ + λ)⁻¹ by Woodbury's formula; λ may differ by block.

        Raises SingularError for λ = 0 (unless r = n) and where s + λ vanishes.
        """
        shift = as_shift(damping, self)
        if not by_block(shift):
            return LowRankInverse(self, shift)
        if not smallest(shift) > 0:
            msg = "a low-rank operator with block-wise damping needs λ > 0 in every block"
            raise SingularError(msg)
        return WoodburyInverse(self, shift)

    def __mul__(self, factor: float) -> LowRank:
        return LowRank(self.vectors, checked_factor(factor) * self.values, layout=self.layout)

    __rmul__ = __mul__

    def _describe(self) -> str:
        return f"{self.shape[0]}x{self.shape[0]}, rank {self.rank}"


class LowRankInverse(LinearOperator):
    """x = b/λ − U (s / (λ(s + λ))) Uᵀb, exact for orthonormal U and one λ."""

    def __init__(self, A: LowRank, shift: float | Array) -> None:
        self._A = A
        self._shift = shift
        s = A._s
        self.definite = True
        if not _backend.is_tracing(s) and isinstance(shift, float):
            values = _backend.to_host(s) + shift
            scale = np.max(np.abs(values), initial=shift)
            regular = np.all(np.abs(values) > 1e-15 * scale)  # false for NaN and Inf too
            if not regular or (shift == 0 and A.rank < A.shape[0]):
                msg = f"U diag(s) Uᵀ + λ is singular at λ = {shift:g}; raise the damping"
                raise SingularError(msg)
            self.definite = bool(np.all(values > 0))
        full = isinstance(shift, float) and shift == 0
        self._middle = 1 / s if full else -s / (shift * (s + shift))
        self._full = full
        super().__init__(A.shape[0], like=A.like, psd=self.definite, layout=A.layout)

    def _matmat(self, X: Array, /) -> Array:
        correction = _linalg.between(self._A.vectors, self._middle, X)
        return correction if self._full else _arithmetic.add_scaled(correction, X, 1 / self._shift)

    def power(self, exponent: float, /) -> LinearOperator:
        """This inverse to a power. Raises ValueError if indefinite."""
        check_definite(self.definite)
        A, shift = self._A, self._shift
        values = (A._s + shift) ** -exponent
        if A.rank == A.shape[0]:
            return LowRank(A.vectors, values, layout=self.layout)
        rest = shift**-exponent
        inside = LowRank(A.vectors, values - rest, layout=self.layout)
        total = rest * Identity(A.shape[0], like=self.like, layout=self.layout) + inside
        total._psd = True  # the low-rank part alone may be negative
        return total

    def logdet(self) -> float:
        """The log-determinant of this inverse; one transfer. Raises ValueError if indefinite."""
        check_definite(self.definite)
        A, shift = self._A, self._shift
        n_rest = A.shape[0] - A.rank
        inside = float(np.sum(np.log(_backend.to_host(A._s) + shift)))
        return -inside - (n_rest * math.log(shift) if n_rest else 0.0)


class WoodburyInverse(LinearOperator):
    """(D + U S Uᵀ)⁻¹ = D⁻¹ − F diag(k/(1 + k)) Fᵀ for a positive diagonal D: λ by block.

    With UᵀD⁻¹U = LLᵀ and LᵀSL = V diag(k) Vᵀ, F is D⁻¹U L⁻ᵀV: symmetric for every sign of S, and
    D + U S Uᵀ has the signs of 1 + k.
    """

    def __init__(self, A: LowRank, d: Array) -> None:
        DU = A.vectors / d[:, None]
        L = _lapack.cholesky(_linalg.symmetric(_linalg.gram(A.vectors, DU)))
        xp = _backend.namespace(L)
        s, L = _backend.together(A._s, L)
        k, V = _lapack.eigh(xp.matrix_transpose(L) @ (s[:, None] * L))
        self.definite = A.psd
        if not _backend.is_tracing(k):
            pivots = 1.0 + _backend.to_host(k)
            size = np.max(np.abs(pivots), initial=1.0)
            if not np.all(np.abs(pivots) > A.rank * _backend.eps(k.dtype) * size):
                msg = "U diag(s) Uᵀ + λ is singular to working precision; raise the damping"
                raise SingularError(msg)
            self.definite = bool(np.all(pivots > 0))
        super().__init__(A.shape[0], like=A.like, psd=self.definite, layout=A.layout)
        self._d = d[:, None]
        self._F = _linalg.combine(DU, _lapack.solve_lower(L, V, transpose=True))
        self._middle = (k / (1.0 + k))[:, None]

    def _matmat(self, X: Array, /) -> Array:
        return X / self._d - _linalg.between(self._F, self._middle[:, 0], X)


def _orthonormal(U: Array, s: Array) -> tuple[Array, Array]:
    if _backend.is_tracing(U) or U.shape[1] == 0:
        return U, s
    G = _linalg.gram(U)
    xp = _backend.namespace(G)
    off = float(_backend.to_host(xp.max(xp.abs(G - _linalg.identity_like(G)))))
    if off < 100 * _backend.eps(U.dtype):
        return U, s
    W, T = _linalg.cholqr(U)
    T, s = _backend.together(T, s)
    xp = _backend.namespace(T)
    w, V = _lapack.eigh((T * s[None, :]) @ xp.matrix_transpose(T))
    return _linalg.combine(W, V), w
