"""A small symmetric matrix, factored once: what every exact inverse is built on."""

from __future__ import annotations

import numpy as np

from .. import _backend, _lapack
from ..protocols import Array
from ..solution import SingularError


class SymmetricFactor:
    """Cholesky factor of a symmetric float64 matrix, or its eigenvectors where it is indefinite.

    Raises SingularError where the smallest eigenvalue is lost in rounding, or the matrix has NaN.
    Cost: m³/3 flops (about 10 m³ if indefinite), 2 m² numbers, one look at the values.

    Attributes:
        definite: whether the matrix is positive definite.
    """

    def __init__(self, M: Array, what: str = "A + λI") -> None:
        xp = _backend.namespace(M)
        self._L = _lapack.cholesky(M)
        self._eigen = None
        self.definite = True
        if _backend.is_tracing(M):
            return
        # A factor that exists can still be worthless: compare its pivots with rounding.
        pivots = xp.linalg.diagonal(self._L)
        look = _backend.to_host(xp.stack([xp.min(pivots), xp.max(pivots)]))
        floor = np.sqrt(M.shape[0] * _backend.eps(M.dtype))
        if np.all(np.isfinite(look)) and look[0] > floor * look[1]:
            return
        w, V = _lapack.eigh(M)
        values = _backend.to_host(w)
        if not np.all(np.isfinite(values)):
            msg = f"{what} contains NaN or Inf"
            raise SingularError(msg)
        size = np.abs(values)
        if not size.min() > M.shape[0] * _backend.eps(M.dtype) * size.max():
            msg = (
                f"{what} is singular to working precision: its eigenvalues lie in "
                f"[{values[0]:.2e}, {values[-1]:.2e}]; raise the damping"
            )
            raise SingularError(msg)
        self.definite = bool(values[0] > 0)
        self._eigen = (w, V)

    def eigenpairs(self) -> tuple[Array, Array]:
        """Eigenvalues ascending and eigenvectors of M; about 10 m³ flops, once."""
        if self._eigen is None:
            xp = _backend.namespace(self._L)
            self._eigen = _lapack.eigh(self._L @ xp.matrix_transpose(self._L))
        return self._eigen

    def logdet(self) -> float:
        """The log-determinant of a positive definite M; one transfer to the host."""
        check_definite(self.definite)
        xp = _backend.namespace(self._L)
        pivots = xp.linalg.diagonal(self._L)
        if self._eigen is not None:
            pivots = xp.sqrt(self._eigen[0])
        return 2.0 * float(_backend.to_host(xp.sum(xp.log(pivots))))

    def solve(self, B: Array) -> Array:
        """M⁻¹B for a two-dimensional B in the precision of M."""
        if self._eigen is None:
            L, B = _backend.together(self._L, B)
            return _lapack.solve_lower(L, _lapack.solve_lower(L, B), transpose=True)
        w, V = self._eigen
        V, B = _backend.together(V, B)
        w, B = _backend.together(w, B)
        xp = _backend.namespace(V)
        return V @ ((xp.matrix_transpose(V) @ B) / w[:, None])


def check_definite(definite: bool) -> None:
    """Raise ValueError where a power or a determinant of A + λI would not be real."""
    if not definite:
        msg = "A + λI is not positive definite; powers and log-determinants need more damping"
        raise ValueError(msg)
