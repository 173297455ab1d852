"""Inverses made of approximate eigenpairs: one factorisation serves every λ and every power."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import _arithmetic, _backend, _linalg
from ..operators import LinearOperator, LowRank, PseudoInverse
from ..operators.damping import smallest
from ..operators.pseudo_inverse import kept_eigenvalues
from ..protocols import Array, Damping
from ..solution import IndefiniteError, SingularError, Solution
from ._columns import take_columns
from ._fixed_map import MapInverse
from ._inverse import Products


class SpectralMap(LinearOperator):
    """M^p for M = U diag(v) Uᵀ + w(I − UUᵀ) with orthonormal U (n, r) and v ≠ 0 on the host.

    w = 0 leaves the complement out. Cost: 4·n·r flops a column.
    """

    def __init__(
        self,
        vectors: Array,
        values: np.ndarray,
        rest: float,
        *,
        exponent: float = -1.0,
        layout: Any = None,
    ) -> None:
        n, r = vectors.shape
        whole = r == n
        self.definite = bool(np.all(values > 0)) and (rest > 0 or whole)
        super().__init__(n, like=vectors, psd=self.definite, layout=layout)
        self.vectors, self.values, self.rest = vectors, values, rest
        self._outside = 0.0 if whole or rest == 0 else float(rest**exponent)
        if exponent == -1.0 and self._outside:
            middle = (rest - values) / (rest * values)  # no cancellation where v is close to w
        else:
            middle = values**exponent - self._outside
        self._middle = small_values(middle, vectors)

    def _matmat(self, X: Array, /) -> Array:
        inside = _linalg.between(self.vectors, self._middle, X)
        return _arithmetic.add_scaled(inside, X, self._outside) if self._outside else inside

    def power(self, exponent: float) -> SpectralMap:
        """M to another power. Raises ValueError where M is not positive."""
        if not np.all(self.values > 0):
            msg = "a power of A + λI needs positive eigenvalues; use nonpositive= or more damping"
            raise ValueError(msg)
        return SpectralMap(
            self.vectors, self.values, self.rest, exponent=exponent, layout=self.layout
        )


class SpectralInverse(MapInverse):
    """An approximate inverse whose eigenpairs serve every λ.

    Attributes:
        low_rank: the model of A, a `LowRank` with `.vectors` (n, r) and `.values` (r,).
        operator_size: about ‖A + λI‖, from the eigenvalues.
    """

    def __init__(
        self,
        method: Any,
        A: LinearOperator,
        damping: Damping,
        inverse_map: LinearOperator,
        *,
        state: Any,
        low_rank: LowRank,
        size: float,
        exact: bool = False,
        products: int = 0,
        definite: bool | None = None,
        relative_floor: float | None = None,
    ) -> None:
        super().__init__(
            method,
            A,
            damping,
            inverse_map,
            exact=exact,
            products=products,
            definite=definite,
            relative_floor=relative_floor,
        )
        self.state = state
        self.low_rank = low_rank
        shift = self.shift
        largest = shift if isinstance(shift, float) else float(np.max(_backend.to_host(shift)))
        self.operator_size = size + largest

    def power(self, exponent: float, /) -> LinearOperator:
        """The model of A + λI to any power; −1 is this inverse, −0.5 whitens.

        Raises ValueError for block-wise damping of a solver. Cost: no product.
        """
        if isinstance(self.map, SpectralMap):
            return self.map.power(exponent)
        msg = "powers of A + λI need one damping value, not one per block"
        raise ValueError(msg)

    def with_damping(self, damping: Damping, /) -> MapInverse:
        """The inverse at another λ from the same eigenpairs."""
        return self.method._invert(self.operator, damping, self.state)

    def _solve(self, B: Array, **options: Any) -> Solution:
        with np.errstate(invalid="ignore"):  # NaN and Inf in B are refused once B has been seen
            return super()._solve(B, **options)

    def _size(self, products: Products) -> float:
        return self.operator_size  # known from the eigenvalues: no product


def small_values(values: np.ndarray, like: Array) -> Array:
    """Host numbers where the small algebra beside `like` runs."""
    if _backend.is_tracing(like) or _backend.small_on_host(like):
        return values
    return _backend.from_host(values, like, dtype=_backend.namespace(like).float64)


def woodbury(
    A: LinearOperator,
    vectors: Array,
    values: np.ndarray,
    shift: float | Array,
    *,
    complement: bool = True,
    hint: str = "",
    signed: bool = False,
) -> LinearOperator:
    """(U diag(values) Uᵀ + λ)⁻¹ for a model that must be positive definite; λ may vary by block.

    Without its complement it is U(values + λ)⁻¹Uᵀ. Raises IndefiniteError with the direction
    where it is not, unless `signed`; SingularError where λ = 0 leaves the complement of U without
    an inverse.
    """
    if isinstance(shift, float):
        theta = values + shift
        if not signed and (np.any(theta < 0) or np.any((theta == 0) & (values < 0))):
            j = int(np.argmin(theta))
            raise indefinite(vectors[:, j], float(values[j]), shift, hint)
        partial = complement and vectors.shape[1] < vectors.shape[0]
        if (partial and shift == 0) or np.any(
            np.abs(theta) <= 1e-15 * np.max(np.abs(theta), initial=0.0)
        ):
            msg = "the model of A is singular to working precision; raise the damping"
            raise SingularError(msg)
        return SpectralMap(vectors, theta, shift if complement else 0.0, layout=A.layout)
    if not smallest(shift) > 0:
        msg = "a low-rank model with block-wise damping needs λ > 0 in every block"
        raise SingularError(msg)
    assert A.layout is not None, "only a layout gives λ by block"
    layout = A.layout
    if not signed:
        _check_blockwise(vectors, values, shift, hint)
    blocks = {
        name: float(_backend.to_host(layout.take(shift, name)[:1])[0]) for name in layout.names
    }
    return LowRank(vectors, _backend.from_host(values, vectors), layout=layout).inverse(blocks)


def truncated(A: LinearOperator, vectors: Array, values: np.ndarray) -> LinearOperator:
    """U diag(values)⁻¹Uᵀ without what is rounding: a pseudo-inverse, unless it is all there."""
    kept, truncation = kept_eigenvalues(values, A.shape[0], _backend.eps(A.dtype))
    index = np.flatnonzero(kept)
    inner = SpectralMap(take_columns(vectors, index), values[index], 0.0, layout=A.layout)
    if truncation.rank == truncation.n:
        return inner
    least = float(np.min(np.abs(values[index]), initial=math.inf))  # what is below is left out
    return PseudoInverse(inner, truncation._replace(cut=least if index.size else truncation.cut))


def _check_blockwise(U: Array, values: np.ndarray, d: Array, hint: str) -> None:
    """Raise IndefiniteError unless diag(d) + U Θ Uᵀ is positive definite."""
    if not np.any(values < 0):
        return
    scaled = U / (d**0.5)[:, None]  # D^-½ U = Q L, and I + L Θ Lᵀ decides
    Q, L = _linalg.cholqr(scaled)
    L = np.asarray(_backend.to_host(L))
    w, P = np.linalg.eigh(np.eye(len(values)) + (L * values) @ L.T)
    if w[0] > 0:
        return
    p = _linalg.combine(Q, _backend.from_host(P[:, :1], U)) / (d**0.5)[:, None]
    p = _linalg.scale_columns(p, 1 / _linalg.column_norms(p))
    inside = np.asarray(_backend.to_host(_linalg.gram(U, p)))[:, 0]
    raise indefinite(p[:, 0], float(np.sum(values * inside**2)), smallest(d), hint)


def indefinite(vector: Array, curvature: float, damping: float, hint: str = "") -> IndefiniteError:
    """The error that says that A + λI is not positive definite, with its proof."""
    msg = (
        f"A + λI is not positive definite: A has the curvature {curvature:.3g}, the damping is "
        f"{damping:.3g}; it must exceed {-curvature:.3g}. Raise it, or use a Gauss-Newton operator"
        f"{hint}"
    )
    return IndefiniteError(msg, vector, curvature)
