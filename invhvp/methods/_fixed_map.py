"""Inverses that are one fixed linear map: factored, low-rank, diagonal, borrowed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import _backend, _linalg, _tracing
from ..estimate.norm import operator_norm
from ..gradients import GradientMatrix
from ..operators import LinearOperator, Truncation
from ..operators.damping import as_shift, smallest
from ..protocols import Array, Damping
from ..solution import Solution, Status
from ._implicit import records_gradients
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

_MOST_REFINEMENTS = 5  # where the tolerance or what rounding allows is missed and they help


class MapInverse(PreparedInverse):
    """A fixed map `inverse_map` ≈ (A + λI)⁻¹; `@` applies it, `solve` also measures it.

    An exact map is refined with the residual it leaves, while that helps a column that misses the
    tolerance or what rounding allows, and judged by the stopping rule of its method; an
    approximate one is reported as APPROXIMATE, with its true residual.

    Attributes:
        relative_floor: μ with A + λI ⪰ μ·M for the preconditioner M that this map inverts, or
            None; it makes the Gauss–Radau bound of preconditioned CG legal.
        known: the operator whose own inverse the map is (A, or its matrix), or None.
    """

    known: LinearOperator | None = None

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

    @property
    def truncation(self) -> Truncation | None:
        """What a pseudo-inverse keeps; None where nothing is left out."""
        return getattr(self.map, "truncation", None)

    def _matmat(self, X: Array, /) -> Array:
        if records_gradients(self, X, of_map=True):  # which is a fixed one only in its value
            return super()._matmat(X)
        return self.map._matmat(X)

    def _structure(self, B: Any) -> dict[str, Any]:
        keeps = isinstance(B, GradientMatrix) and hasattr(self.map, "of_gradients")
        return {"rows": B} if keeps else {}

    def _solve(
        self,
        B: Array,
        *,
        x0: Array | None = None,
        callback: Any = None,
        progress: bool = False,
        rows: GradientMatrix | None = None,
    ) -> Solution:
        started = time.perf_counter()
        products = Products(self.operator, self.shift)
        X = self._first(products, B, x0, rows)
        R, norms = true_residual(products, B, X)
        b_norms = _linalg.column_norms(B) if rows is None else _backend.to_small(rows.row_norms())
        if _tracing.staged(B, self.shift, self.operator.like):
            if self.exact:
                X, R, norms = self._refine(products, B, X, R, norms)
            xp = _backend.namespace(norms)
            codes = xp.full_like(norms, float(Status.APPROXIMATE.code))
            bounds = xp.full_like(norms, float("inf"))
            return self._packed(X, codes, norms, b_norms, bounds, started, products)
        host_norms, host_b, x_norms = column_look(norms, b_norms, _linalg.column_norms(X))
        check_finite_columns(host_b)
        goals = self._goals(host_b)
        # Rounding of the residual itself: it is of the size of b and of the products behind it.
        known = self.operator.psd and self.least > 0
        missed = self.exact and np.any(host_norms > goals)
        size = self._size(products) if known or missed else 0.0
        floors = 4 * _backend.eps(B.dtype) * np.maximum(host_b, size * x_norms)
        for _ in range(_MOST_REFINEMENTS if self.exact else 0):
            # Two passes over A each: none where the tolerance is met to what rounding allows.
            missing = (host_norms > goals) | (host_norms > floors)
            if not np.any(missing):
                break
            before = host_norms
            X, R, norms = self._refine(products, B, X, R, norms)
            (host_norms,) = column_look(norms)
            if not np.any(missing & (host_norms <= 0.5 * before)):
                break
        statuses = [
            self._status(*column) for column in zip(host_norms, host_b, goals, floors, strict=True)
        ]
        bounds = residual_error_bounds(self.operator, self.shift, host_norms, floors)
        return self._packed(X, codes_for(statuses), host_norms, host_b, bounds, started, products)

    def _first(
        self, products: Products, B: Array, x0: Array | None, rows: GradientMatrix | None
    ) -> Array:
        if x0 is not None:
            return x0 + self.map._matmat(B - products(x0))
        if rows is not None:
            return self.map.of_gradients(rows, B)  # pyright: ignore[reportAttributeAccessIssue]
        return self.map._matmat(B)

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
        """The inverse at another λ; a dense matrix or a sample-space Gram matrix is kept."""
        if self.known is not None and not hasattr(self.map, "with_shift"):
            return self.method._invert(self.operator, damping, self.known)
        rebuild = getattr(self.map, "with_shift", None)
        if rebuild is None or isinstance(damping, Mapping):
            return super().with_damping(damping)
        shift = as_shift(damping, self.operator)
        return MapInverse(self.method, self.operator, damping, rebuild(shift), exact=self.exact)

    def __repr__(self) -> str:
        left_out = "" if self.truncation is None else f": {self.truncation}"
        return super().__repr__() + left_out

    def _size(self, products: Products) -> float:
        """‖A + λI‖ about: what the map knows of it, or measured by the first solve in need."""
        if self._norm is None:
            known = getattr(self.map, "damped_norm", None)
            like, n = self.operator.like, self.shape[0]
            self._norm = operator_norm(products, like, n) if known is None else float(known())
        return self._norm
