"""Kronecker products of two small matrices: K-FAC."""

from __future__ import annotations

from functools import cached_property

from .. import _arithmetic, _backend, _lapack, _linalg
from ..layout import Layout
from ..protocols import Array, Damping
from .algebra import checked_factor
from .base import LinearOperator
from .dense import Dense
from .eigen_kronecker import EigenKronecker, blocks_of, columns_of
from .pseudo_inverse import PseudoInverse


class Kronecker(LinearOperator):
    """scale · S ⊗ A on vec of an (o, i) block, row-major: X ↦ scale · S X A; both psd.

    The damped inverse is the exact one, (scale · S ⊗ A + λI)⁻¹, in the eigenbasis of both factors,
    which is computed once, in float64, for all λ and powers: no factored approximation of the
    damping (the π of Martens and Grosse) is needed.

    Args:
        S: (o, o), the output side.
        A: (i, i), the input side.
        scale: a factor of at least 0.
        layout: names of the parameter blocks.
        like: an array of the dtype of the products, where it is not that of the factors: bfloat16
            models keep float32 factors.

    Raises ValueError where a factor is not square, symmetric and positive semidefinite (the
    latter when first inverted), or not finite. Cost: 2 o i (o + i) flops a column; the
    eigenvectors about 10 (o³ + i³), once.

    Source: Martens and Grosse (2015), Optimizing neural networks with Kronecker-factored
    approximate curvature, §3.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> K = ih.Kronecker(np.diag([1.0, 3.0]), np.array([[2.0]]))
        >>> K.inverse(2.0) @ np.ones(2)
        array([0.25 , 0.125])
    """

    def __init__(
        self,
        S: Array,
        A: Array,
        scale: float = 1.0,
        *,
        layout: Layout | None = None,
        like: Array | None = None,
    ) -> None:
        for name, M in (("S", S), ("A", A)):
            _check_factor(M, name)
        scale = checked_factor(scale)
        if scale < 0:
            msg = f"scale must not be negative, got {scale}; use -K for a negative operator"
            raise ValueError(msg)
        n = S.shape[0] * A.shape[0]
        super().__init__(n, like=S if like is None else like, psd=True, layout=layout)
        self.S, self.A, self.scale = S, A, scale

    @property
    def block_shape(self) -> tuple[int, int]:
        """(o, i)."""
        return (self.S.shape[0], self.A.shape[0])

    def _matmat(self, X: Array, /) -> Array:
        xp, (o, i) = _backend.namespace(X), self.block_shape
        B = blocks_of(X, self.block_shape, self.S)
        k = B.shape[0]
        B = xp.reshape(_arithmetic.matmul(xp.reshape(B, (k * o, i)), self.A), (k, o, i))
        return columns_of(self.scale * _arithmetic.matmul(self.S, B), X)

    def diagonal(self) -> Array:
        """The diagonal (n,)."""
        xp = _backend.namespace(self.S)
        s, a = xp.linalg.diagonal(self.S), xp.linalg.diagonal(self.A)
        found = self.scale * xp.reshape(s[:, None] * a[None, :], (self._n,))
        return _backend.cast(found, self.like)

    def trace(self) -> float:
        """The trace, scale · tr S · tr A; two transfers of a number."""
        traces = [
            float(_backend.to_host(_backend.namespace(M).linalg.trace(M)))
            for M in map(_backend.to_small, (self.S, self.A))
        ]
        return self.scale * traces[0] * traces[1]

    def frobenius_norm(self) -> float:
        """The norm, scale · ‖S‖ · ‖A‖; two transfers of a number."""
        norms = [
            float(_backend.to_host(_backend.namespace(M).linalg.matrix_norm(M)))
            for M in map(_backend.to_small, (self.S, self.A))
        ]
        return self.scale * norms[0] * norms[1]

    @cached_property
    def eigen(self) -> EigenKronecker:
        """The same matrix by its eigenvectors."""
        with _backend.quiet():
            (s, U), (a, V) = eigenbases({"S": self.S, "A": self.A}).values()
        s, a = _backend.together(s, a)
        values = self.scale * (s[:, None] * a[None, :])
        return EigenKronecker(
            _backend.lift(U, self.S),
            _backend.lift(V, self.S),
            _backend.lift(values, self.S),
            layout=self.layout,
            like=self.like,
        )

    def inverse(self, damping: Damping, /) -> EigenKronecker:
        """(scale · S ⊗ A + λI)⁻¹, exact; raises what that of `EigenKronecker` does."""
        return self.eigen.inverse(damping)

    def pseudo_inverse(self) -> PseudoInverse:
        """The inverse on the range, see `EigenKronecker`."""
        return self.eigen.pseudo_inverse()

    def power(self, exponent: float, /) -> EigenKronecker:
        """This matrix to a power. Raises ValueError unless it is positive definite."""
        return self.eigen.power(exponent)

    def logdet(self) -> float:
        """The log-determinant. Raises ValueError unless it is positive definite."""
        return self.eigen.logdet()

    @property
    def definite(self) -> bool:
        """Whether every eigenvalue is known to be positive."""
        return self.eigen.definite

    def __mul__(self, factor: float) -> LinearOperator:
        factor = checked_factor(factor)
        if factor < 0:
            return super().__mul__(factor)
        scale = factor * self.scale
        return Kronecker(self.S, self.A, scale, layout=self.layout, like=self.like)

    __rmul__ = __mul__

    def _describe(self) -> str:
        o, i = self.block_shape
        return f"{self._n}x{self._n}, block {o}x{i}"


def eigenbases(factors: dict[str, Array], *, unit: float = 0.0) -> dict[str, tuple[Array, Array]]:
    """Eigenvalues ≥ 0 (ascending) and eigenvectors of psd matrices by name, small and float64.

    Small factors of one size are decomposed together where the library gains from it. `unit` is
    the rounding that the factors carry, if it is more than that of their dtype.

    Raises ValueError, with the names, for a factor that is not finite or has an eigenvalue that is
    negative by more than rounding. Cost: about 10 m³ flops each, one transfer for all.
    """
    small = {name: _linalg.symmetric(_backend.to_small(M)) for name, M in factors.items()}
    found: dict[str, tuple[Array, Array]] = {}
    groups: dict[int, list[str]] = {}
    for name, M in small.items():
        groups.setdefault(M.shape[0], []).append(name)
    for names in groups.values():
        if len(names) > 1 and _lapack.gains_from_batched_eigh(small[names[0]]):
            xp = _backend.namespace(small[names[0]])
            w, V = _lapack.eigh(xp.stack([small[name] for name in names], axis=0))
            found |= {name: (w[j, :], V[j, :, :]) for j, name in enumerate(names)}
        else:
            found |= {name: _lapack.eigh(small[name]) for name in names}
    tolerance = {name: _tolerance(M, unit) for name, M in factors.items()}
    return {name: _clamped(name, small[name], *found[name], tolerance[name]) for name in factors}


def _tolerance(M: Array, unit: float) -> float:
    """What rounding can make of a zero eigenvalue, relative to the largest."""
    return 1e3 * M.shape[0] * max(_backend.eps(M.dtype), unit)


def _clamped(name: str, M: Array, w: Array, V: Array, tolerance: float) -> tuple[Array, Array]:
    xp = _backend.namespace(w)
    if not _backend.is_tracing(w):
        # NaN goes into some libraries' eigh and numbers come out: look at M, too.
        bad = xp.astype(~(xp.all(xp.isfinite(M)) & xp.all(xp.isfinite(w))), w.dtype)
        look = _backend.to_host(xp.stack([bad, w[0], w[-1]]))
        if look[0]:
            msg = f"the Kronecker factor {name} contains NaN or Inf"
            raise ValueError(msg)
        if look[1] < -tolerance * max(look[2], 0.0):
            msg = (
                f"the Kronecker factor {name} is not positive semidefinite: its eigenvalues lie "
                f"in [{look[1]:.3g}, {look[2]:.3g}]"
            )
            raise ValueError(msg)
    return xp.where(w > 0, w, xp.zeros_like(w)), V


def _check_factor(M: Array, name: str) -> None:
    if M.ndim != 2 or M.shape[0] != M.shape[1]:
        msg = f"the factor {name} must be a square matrix, got shape {tuple(M.shape)}"
        raise ValueError(msg)
    with _backend.quiet():  # Inf - Inf
        Dense(M)  # symmetric, of a real floating dtype
