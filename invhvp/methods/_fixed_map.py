"""Inverses that are one fixed linear map: factored, low-rank, diagonal, borrowed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import _backend, _linalg
from ..estimate.norm import operator_norm
from ..operators import LinearOperator
from ..operators.damping import as_shift, smallest
from ..protocols import Array, Damping
from ..solution import Solution, Status
from ._inverse import (
    PreparedInverse,
    Products,
    check_finite_columns,
    codes_for,
    column_look,
    pack_solution,
    residual_error_bounds,
    true_residual,
)

_MORE_REFINEMENTS = 4  # beyond the first, where the tolerance is missed and they still help


class MapInverse(PreparedInverse):
    """A fixed map `inverse_map` ≈ (A + λI)⁻¹; `@` applies it, `solve` also measures it.

    An exact map is refined with the residual it leaves (once, and again while that helps a
    column that misses the tolerance) and judged by the stopping rule of
    its method; an approximate one is reported as APPROXIMATE, with its true residual.

    Attributes:
        relative_floor: μ with A + λI ⪰ μ·M for the preconditioner M that this map inverts, or
            None; it makes the Gauss–Radau bound of preconditioned CG legal.
    """

    def __init__(
        self,
        method: Any,
        A: Any,
        damping: Damping,
        inverse_map: LinearOperator,
        *,
        exact: bool,
        products: int = 0,
        definite: bool | None = None,
        relative_floor: float | None = None,
    ) -> None:
        super().__init__(method, A, damping, products=products)
        self.map = inverse_map
        self.exact = exact
        self.fixed_spd = (
            getattr(inverse_map, "definite", inverse_map.psd) if definite is None else definite
        )
        self._psd = bool(self.fixed_spd)
        self.relative_floor = relative_floor
        self.least = smallest(self.shift)
        self._norm: float | None = None

    def _matmat(self, X: Array, /) -> Array:
        return self.map._matmat(X)

    def _solve(
        self, B: Array, *, x0: Array | None = None, callback: Any = None, progress: bool = False
    ) -> Solution:
        started = time.perf_counter()
        products = Products(self.operator, self.shift)
        X = self.map._matmat(B) if x0 is None else x0 + self.map._matmat(B - products(x0))
        R, norms = true_residual(products, B, X)
        if self.exact:
            X, R, norms = self._refine(products, B, X, R, norms)
        b_norms = _linalg.column_norms(B)
        if _backend.is_tracing(B):
            xp = _backend.namespace(norms)
            codes = xp.full_like(norms, float(Status.APPROXIMATE.code))
            bounds = xp.full_like(norms, float("inf"))
            return self._packed(X, codes, norms, b_norms, bounds, started, products)
        host_norms, host_b = column_look(norms, b_norms)
        check_finite_columns(host_b)
        goals = self._goals(host_b)
        for _ in range(_MORE_REFINEMENTS if self.exact else 0):
            if not np.any(host_norms > goals):
                break
            before = host_norms
            X, R, norms = self._refine(products, B, X, R, norms)
            (host_norms,) = column_look(norms)
            if not np.any((host_norms > goals) & (host_norms <= 0.5 * before)):
                break
        (x_norms,) = column_look(_linalg.column_norms(X))
        # Rounding of the residual itself: it is of the size of b and of the products behind it.
        known = self.operator.psd and self.least > 0
        missed = self.exact and np.any(host_norms > goals)
        size = self._size(products) if known or missed else 0.0
        floors = 4 * _backend.eps(B.dtype) * np.maximum(host_b, size * x_norms)
        statuses = [
            self._status(*column) for column in zip(host_norms, host_b, goals, floors, strict=True)
        ]
        bounds = residual_error_bounds(self.operator, self.shift, host_norms, floors)
        return self._packed(X, codes_for(statuses), host_norms, host_b, bounds, started, products)

    def _refine(
        self, products: Products, B: Array, X: Array, R: Array, norms: Array
    ) -> tuple[Array, Array, Array]:
        """One step of iterative refinement, kept in the columns where it helps."""
        corrected = X + self.map._matmat(R)
        new_R, new_norms = true_residual(products, B, corrected)
        xp = _backend.namespace(norms)
        better = new_norms < norms
        weights = xp.where(better, xp.ones_like(norms), xp.zeros_like(norms))
        flag = _backend.lift(weights, X)[None, :] > 0
        choose = _backend.namespace(X).where
        return (
            choose(flag, corrected, X),
            choose(flag, new_R, R),
            xp.where(better, new_norms, norms),
        )

    def _goals(self, b_norms: np.ndarray) -> np.ndarray:
        if not self.exact:
            return np.full(b_norms.shape, np.inf)
        return np.maximum(self.method.rtol * b_norms, self.method.atol)

    def _packed(
        self,
        X: Array,
        codes: Any,
        norms: Any,
        b_norms: Any,
        bounds: Any,
        started: float,
        products: Products,
    ) -> Solution:
        return pack_solution(
            X,
            codes=codes,
            norms=norms,
            b_norms=b_norms,
            bounds=bounds,
            started=started,
            products=products,
            iterations=1,
        )

    def _status(self, norm: float, b_norm: float, goal: float, floor: float) -> Status:
        if b_norm == 0:
            return Status.ZERO
        if not np.isfinite(norm):
            return Status.NONFINITE
        if not self.exact:
            return Status.APPROXIMATE
        if norm <= goal:
            return Status.CONVERGED
        return Status.FLOOR if norm <= 4 * floor else Status.STAGNATED

    def power(self, exponent: float, /) -> LinearOperator:
        """A + λI to any power where the factorisation gives it; −1 is this inverse, −0.5 whitens.

        Raises ValueError where it does not (λ by block without a block-diagonal A), or A + λI is
        not positive definite. Cost: no product; an eigendecomposition for dense and sample-space
        inverses.
        """
        if not hasattr(self.map, "power"):
            msg = f"{type(self.method).__name__} keeps no eigenvalues of A + λI: it has no powers"
            raise ValueError(msg)
        return self.map.power(-exponent)  # pyright: ignore[reportAttributeAccessIssue]

    def with_damping(self, damping: Damping, /) -> PreparedInverse:
        """The inverse at another λ; a sample-space Gram matrix is kept."""
        rebuild = getattr(self.map, "with_shift", None)
        if rebuild is None or isinstance(damping, Mapping):
            return super().with_damping(damping)
        shift = as_shift(damping, self.operator)
        return MapInverse(self.method, self.operator, damping, rebuild(shift), exact=self.exact)

    def _size(self, products: Products) -> float:
        """A lower bound on ‖A + λI‖, measured by the first solve that needs it."""
        if self._norm is None:
            self._norm = operator_norm(products, self.operator.like, self.shape[0])
        return self._norm
