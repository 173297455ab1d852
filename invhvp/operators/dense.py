"""A symmetric matrix that fits in memory."""

from __future__ import annotations

from .. import _arithmetic, _backend, _linalg, _tracing
from ..layout import Layout
from ..protocols import Array, Damping
from .algebra import checked_factor
from .base import LinearOperator
from .damping import as_shift, by_block
from .factor import SymmetricFactor, check_definite
from .low_rank import LowRank


class Dense(LinearOperator):
    """A symmetric matrix `M` of shape (n, n).

    Raises ValueError where M is not square or not symmetric to rounding. Cost: 2 n² flops a column.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.Dense(np.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> A.inverse(1.0) @ np.ones(2)
        array([0.25, 0.25])
    """

    def __init__(
        self, M: Array, *, psd: bool = False, layout: Layout | None = None, check: bool = True
    ) -> None:
        if M.ndim != 2 or M.shape[0] != M.shape[1]:
            msg = f"Dense takes a square matrix, got shape {tuple(M.shape)}"
            raise ValueError(msg)
        super().__init__(M.shape[0], like=M, psd=psd, layout=layout)
        if check and not _backend.is_tracing(M):
            with _tracing.eagerly(M):
                _check_symmetric(M)
        self._M = M

    def _matmat(self, X: Array, /) -> Array:
        return _arithmetic.matmul(self._M, X)

    def to_dense(self) -> Array:
        """The matrix itself, not a copy."""
        return self._M

    def diagonal(self) -> Array:
        """The diagonal (n,)."""
        return _backend.namespace(self._M).linalg.diagonal(self._M)

    def inverse(self, damping: Damping, /) -> DenseInverse:
        """(M + λI)⁻¹ through one float64 factorisation. Raises SingularError."""
        shift = as_shift(damping, self)
        small = _backend.to_small(self._M)
        if not by_block(shift):
            damped = small + shift * _linalg.identity_like(small)
        else:
            damped = small + _linalg.identity_like(small) * _backend.to_small(shift)[:, None]
        return DenseInverse(_linalg.symmetric(damped), self)

    def __mul__(self, factor: float) -> Dense:
        factor = checked_factor(factor)
        return Dense(
            factor * self._M, psd=self.psd and factor >= 0, layout=self.layout, check=False
        )

    __rmul__ = __mul__


class DenseInverse(LinearOperator):
    """The inverse of a factored float64 matrix, acting on arrays like those of `like_operator`."""

    def __init__(self, damped: Array, like_operator: LinearOperator) -> None:
        self._factor = SymmetricFactor(damped)
        super().__init__(
            damped.shape[0],
            like=like_operator.like,
            psd=self._factor.definite,
            layout=like_operator.layout,
        )

    @property
    def definite(self) -> bool:
        """Whether the inverse is positive definite."""
        return self._factor.definite

    def _matmat(self, X: Array, /) -> Array:
        return _backend.lift(self._factor.solve(_backend.to_small(X)), X)

    def power(self, exponent: float, /) -> LowRank:
        """This inverse to a power, from all its eigenpairs. Raises ValueError if indefinite."""
        check_definite(self.definite)
        w, V = self._factor.eigenpairs()
        return LowRank(_backend.lift(V, self.like), w ** (-exponent), layout=self.layout)

    def logdet(self) -> float:
        """The log-determinant of this inverse. Raises ValueError if indefinite."""
        return -self._factor.logdet()


def _check_symmetric(M: Array) -> None:
    xp = _backend.namespace(M)
    look = _backend.to_host(
        xp.stack([xp.max(xp.abs(M - xp.matrix_transpose(M))), xp.max(xp.abs(M))])
    )
    # A NaN entry is left to the solve, which names it; only a finite misfit is an error here.
    if look[0] > 1e3 * _backend.eps(M.dtype) * look[1]:
        msg = (
            f"the matrix is not symmetric: entries differ by up to {float(look[0]):.2e}; pass "
            "(M + M.T) / 2 if that is rounding"
        )
        raise ValueError(msg)
