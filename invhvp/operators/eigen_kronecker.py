"""A matrix whose eigenvectors are Kronecker products: EKFAC, and what inverts K-FAC."""

from __future__ import annotations

import math
from typing import Any

from .. import _arithmetic, _backend, _linalg
from ..layout import Layout
from ..protocols import Array, Damping
from ..solution import SingularError
from .algebra import checked_factor
from .base import LinearOperator
from .damping import as_shift, by_block
from .factor import check_definite
from .pseudo_inverse import PseudoInverse, kept_eigenvalues


class EigenKronecker(LinearOperator):
    """(U ⊗ V) diag(vec Λ) (U ⊗ V)ᵀ on vec of an (o, i) block, row-major; positive semidefinite.

    X ↦ U (Λ ∘ (Uᵀ X V)) Vᵀ. One eigenbasis serves every λ and every power.

    Args:
        out_vectors: U, (o, o), orthonormal columns.
        in_vectors: V, (i, i), orthonormal columns; None for the identity.
        eigenvalues: Λ, (o, i), not negative.
        layout: names of the parameter blocks.
        like: an array of the dtype of the products, where it is not that of the vectors: bfloat16
            models keep float32 vectors.

    Raises ValueError where shapes do not fit, or an eigenvalue is negative or not finite.
    Cost: 4 o i (o + i) flops a column, two temporaries of its size; o² + i² + o i numbers.

    Source: George et al. (2018), Fast approximate natural gradient descent in a
    Kronecker-factored eigenbasis.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.EigenKronecker(np.eye(2), np.eye(1), np.array([[1.0], [3.0]]))
        >>> A.inverse(1.0) @ np.ones(2)
        array([0.5 , 0.25])
    """

    def __init__(
        self,
        out_vectors: Array,
        in_vectors: Array | None,
        eigenvalues: Array,
        *,
        layout: Layout | None = None,
        like: Array | None = None,
    ) -> None:
        _check_square(out_vectors, "out_vectors")
        if in_vectors is not None:
            _check_square(in_vectors, "in_vectors")
        o = out_vectors.shape[0]
        i = in_vectors.shape[0] if in_vectors is not None else eigenvalues.shape[-1]
        if tuple(eigenvalues.shape) != (o, i):
            msg = f"eigenvalues must have shape {(o, i)}, got {tuple(eigenvalues.shape)}"
            raise ValueError(msg)
        _check_values(eigenvalues)
        super().__init__(o * i, like=out_vectors if like is None else like, psd=True, layout=layout)
        self.out_vectors, self.in_vectors = out_vectors, in_vectors
        self.eigenvalues = eigenvalues

    @property
    def block_shape(self) -> tuple[int, int]:
        """(o, i)."""
        return (self.eigenvalues.shape[0], self.eigenvalues.shape[1])

    def _matmat(self, X: Array, /) -> Array:
        U, V = self.out_vectors, self.in_vectors
        Lambda = _backend.lift(self.eigenvalues, U)
        return sandwich(U, V, X, self.block_shape, scale=Lambda)

    def diagonal(self) -> Array:
        """The diagonal (n,). Cost: o i (o + i) flops."""
        U, V = self.out_vectors, self.in_vectors
        found = _arithmetic.matmul(U * U, _backend.lift(self.eigenvalues, U))
        if V is not None:
            found = _arithmetic.matmul(found, _backend.namespace(V).matrix_transpose(V * V))
        return _backend.cast(_backend.namespace(U).reshape(found, (self._n,)), self.like)

    def trace(self) -> float:
        """The sum of the eigenvalues; one transfer."""
        return _total(self.eigenvalues)

    def frobenius_norm(self) -> float:
        """The root of the sum of squared eigenvalues; one transfer."""
        return math.sqrt(_total(self.eigenvalues * self.eigenvalues))

    def inverse(self, damping: Damping, /) -> EigenKronecker:
        """(A + λI)⁻¹ in the same eigenbasis. Cost: o i divisions.

        Raises SingularError where an eigenvalue plus λ is lost in rounding, ValueError for a λ
        that differs within the block: it does not share the eigenvectors.
        """
        values = _backend.to_small(self.eigenvalues) + one_shift(damping, self)
        if not _backend.is_tracing(values):
            xp = _backend.namespace(values)
            look = _backend.to_host(xp.stack([xp.min(values), xp.max(values)]))
            if not look[0] > 1e-15 * look[1]:
                msg = (
                    "the Kronecker-factored matrix is singular to working precision: eigenvalues "
                    f"plus damping lie in [{look[0]:.2e}, {look[1]:.2e}]; raise the damping"
                )
                raise SingularError(msg)
        return self._with(1.0 / values)

    def pseudo_inverse(self) -> PseudoInverse:
        """A⁺ in the same eigenbasis, with eigenvalues below n·ε·‖A‖ taken for zero."""
        values = _backend.to_small(self.eigenvalues)
        host = _backend.to_host(values)
        kept, truncation = kept_eigenvalues(host, self._n, _backend.eps(self.dtype))
        xp = _backend.namespace(values)
        mask = xp.asarray(kept, device=_backend.device(values))
        inverted = xp.where(mask, 1.0 / xp.where(mask, values, 1.0 + 0.0 * values), 0.0 * values)
        return PseudoInverse(self._with(inverted), truncation)

    def power(self, exponent: float, /) -> EigenKronecker:
        """This matrix to a power. Raises ValueError unless it is positive definite."""
        check_definite(self.definite)
        return self._with(_backend.to_small(self.eigenvalues) ** exponent)

    def logdet(self) -> float:
        """The log-determinant; one transfer. Raises ValueError unless positive definite."""
        check_definite(self.definite)
        values = _backend.to_small(self.eigenvalues)
        return _total(_backend.namespace(values).log(values))

    @property
    def definite(self) -> bool:
        """Whether every eigenvalue is known to be positive."""
        if _backend.is_tracing(self.eigenvalues):
            return False
        xp = _backend.namespace(self.eigenvalues)
        return bool(_backend.to_host(xp.all(self.eigenvalues > 0)))

    def _with(self, values: Array) -> EigenKronecker:
        lifted = _backend.lift(values, self.out_vectors)
        return EigenKronecker(
            self.out_vectors, self.in_vectors, lifted, layout=self.layout, like=self.like
        )

    def __mul__(self, factor: float) -> LinearOperator:
        factor = checked_factor(factor)
        if factor < 0:
            return super().__mul__(factor)
        return self._with(_backend.to_small(self.eigenvalues) * factor)

    __rmul__ = __mul__

    def _describe(self) -> str:
        o, i = self.block_shape
        return f"{self._n}x{self._n}, block {o}x{i}"


def sandwich(
    U: Array | None, V: Array | None, X: Array, shape: tuple[int, int], *, scale: Array
) -> Array:
    """vec(U (Λ ∘ (Uᵀ B V)) Vᵀ) for the blocks B of every column of X; None is the identity."""
    W = _rotated(U, V, blocks_of(X, shape, scale), back=False)
    return columns_of(_rotated(U, V, scale * W, back=True), X)


def blocks_of(X: Array, shape: tuple[int, int], like: Array) -> Array:
    """Columns (n, k) as blocks (k, o, i), in the dtype of `like`."""
    xp = _backend.namespace(X)
    return xp.reshape(_backend.cast(xp.matrix_transpose(X), like), (X.shape[1], *shape))


def columns_of(B: Array, like: Array) -> Array:
    """Blocks (k, o, i) as columns (n, k), in the dtype of `like`."""
    xp = _backend.namespace(B)
    k, o, i = B.shape
    return _backend.cast(xp.matrix_transpose(xp.reshape(B, (k, o * i))), like)


def _rotated(U: Array | None, V: Array | None, B: Array, *, back: bool) -> Array:
    """U B Vᵀ going back, Uᵀ B V going there: one GEMM of all rows, and one for each block."""
    xp = _backend.namespace(B)
    k, o, i = B.shape
    if V is not None:
        right = xp.matrix_transpose(V) if back else V
        B = xp.reshape(_arithmetic.matmul(xp.reshape(B, (k * o, i)), right), (k, o, i))
    if U is not None:
        B = _arithmetic.matmul(U if back else xp.matrix_transpose(U), B)
    return B


def one_shift(damping: Damping, A: LinearOperator) -> Any:
    """λ as one number: a mapping is taken where it says the same for every name."""
    shift = as_shift(damping, A)
    if not by_block(shift):
        return shift
    values = set(map(float, damping.values()))
    if len(values) > 1:
        msg = (
            f"{type(A).__name__} takes one damping value for all that it couples, got "
            f"{dict(damping)}; give its names the same λ"
        )
        raise ValueError(msg)
    return values.pop()


def _check_square(M: Array, name: str) -> None:
    if M.ndim != 2 or M.shape[0] != M.shape[1]:
        msg = f"{name} must be a square matrix, got shape {tuple(M.shape)}"
        raise ValueError(msg)


def _check_values(values: Array) -> None:
    if _backend.is_tracing(values):
        return
    xp = _backend.namespace(values)
    good = xp.all((values >= 0) & xp.isfinite(values))
    if not bool(_backend.to_host(good)):
        raise ValueError("eigenvalues must be finite and not negative: clamp what is rounding")


def _total(values: Array) -> float:
    """The sum of all entries, in float64 where there is any."""
    xp = _backend.namespace(values)
    flat = xp.reshape(values, (-1, 1))
    return float(_backend.to_host(_linalg.column_dot(flat, xp.ones_like(flat)))[0])
