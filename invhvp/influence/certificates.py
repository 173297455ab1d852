"""Influence with error bars: what is certain about each score, in exact and in float arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .. import _backend, _linalg
from ..estimate.norm import operator_norm
from ..gradients import GradientMatrix
from ..methods._inverse import PreparedInverse, Products
from ..operators.damping import smallest
from ..protocols import Array

_SLACK = 8.0  # units of rounding by which bounds are rounded outwards
_TINY = 2.0**-120  # what underflows in float32 is not certain to be 0
_UNKNOWN = (
    "no bound is known: A is not declared positive semidefinite (psd=True), so that A + λI may "
    "have eigenvalues next to zero"
)
_UNDAMPED = "no bound is known: λ = 0 leaves the smallest eigenvalue of A + λI unknown"


@dataclass(frozen=True, kw_only=True, eq=False)
class CertifiedScores:
    """Scores s with |s − g_testᵀ(A + λI)⁻¹g_train| ≤ error_bounds, all (n_test, n_train).

    Attributes:
        scores: the better of the plain and the corrected value.
        error_bounds: guaranteed for a PSD operator and λ > 0; inf where nothing is known.
        corrected: booleans, where the corrected value was the better one.
        products: operator-vector products that this cost.
        note: why the bounds are inf, or None.
    """

    scores: Array
    error_bounds: Array
    corrected: Array
    products: int
    note: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SelfInfluenceBounds:
    """lower ≤ gᵀ(A + λI)⁻¹g ≤ upper for each training sample, both (n_train,).

    Attributes:
        lower: bᵀx + xᵀr less rounding: the value to use, its error is of second order in r.
        upper: lower plus the squared bound on the error in the A-norm, at most ‖r‖²/λ.
        products: operator-vector products that this cost.
        note: why the bounds are infinite, or None.
    """

    lower: Array
    upper: Array
    products: int
    note: str | None = None


@dataclass(frozen=True, eq=False)
class _Solved:
    """Right-hand sides B, solutions X, and small per-column facts about them."""

    B: Array
    X: Array
    b: Array  # ‖b‖
    x: Array  # ‖x‖
    energy: Array  # upper bound on ‖e‖ in the (A + λI)-norm
    R: Array = None  # b − (A + λI)x, where it was asked for
    r: Array = None  # ‖r‖
    floor: Array = None  # rounding of r


class Certificate:
    """What bounds need to know of a prepared inverse.

    Raises TypeError for an inverse that no method of this library prepared.
    """

    def __init__(self, inverse: Any, train: GradientMatrix) -> None:
        if not isinstance(inverse, PreparedInverse):
            msg = (
                "certificates need the operator behind an inverse, which "
                f"{type(inverse).__name__} does not have; use what method.prepare(A) returns"
            )
            raise TypeError(msg)
        self.inverse = inverse
        self.operator = getattr(inverse, "outer", inverse.operator)
        self.residual_products = Products(self.operator, inverse.shift)
        self.spent = 0
        self.eps = _backend.eps(self.operator.dtype)
        # A dot product of length n rounds like a random walk (Higham & Mary 2019), not like n·u.
        self.dot_unit = (4.0 + math.sqrt(inverse.shape[0])) * self.eps
        self.least = smallest(inverse.shift)
        self.note = None if self.least > 0 else _UNDAMPED
        self.note = self.note if self.operator.psd else _UNKNOWN
        own = getattr(self.operator, "gradients", None) is train
        self._share = 1.0 / self.operator.count if own else 0.0  # pyright: ignore

    @property
    def products(self) -> int:
        """Products spent so far."""
        return self.spent + self.residual_products.columns

    @cached_property
    def size(self) -> float:
        """About ‖A + λI‖, for the rounding of residuals."""
        return operator_norm(self.residual_products, self.operator.like, self.inverse.shape[0])

    def solve(self, rows: GradientMatrix, *, residual: bool) -> _Solved:
        B = _backend.namespace(rows.like).matrix_transpose(rows.to_dense())
        solution = self.inverse.solve(B).raise_if_meaningless()
        self.spent += solution.products
        X = solution.x
        b, x = _linalg.column_norms(B), _linalg.column_norms(X)
        energy = _backend.to_small(solution.error_bounds)
        known = solution.error_norm == "A" and self.note is None
        xp = _backend.namespace(energy)
        energy = energy * (1 + _SLACK * self.eps) if known else xp.full_like(energy, math.inf)
        if not residual:
            return _Solved(B, X, b, x, energy)
        R = B - self.residual_products(X)
        r = _linalg.column_norms(R)
        floor = 4 * self.eps * xp.maximum(self.size * x, b)
        if self.note is None:
            energy = xp.minimum(energy, (r + floor) / math.sqrt(self.least))
        return _Solved(B, X, b, x, energy, R, r, floor)

    def weight(self, norms: Array) -> Array:
        """An upper bound on (gᵀ(A + λI)⁻¹g)^½ from ‖g‖ alone.

        ‖g‖/√λ; less for a g that A = (1/c) Σ g gᵀ contains, as then A + λI ⪰ λI + g gᵀ/c.
        """
        xp = _backend.namespace(norms)
        if self.note is not None:
            return xp.full_like(norms, math.inf)
        weight = norms / xp.sqrt(self.least + self._share * norms * norms)
        return weight * (1 + _SLACK * self.eps)

    def own(self, side: _Solved) -> tuple[Array, Array]:
        """Two-sided bounds on gᵀ(A + λI)⁻¹g (small)."""
        xp = _backend.namespace(side.b)
        inf = xp.full_like(side.b, math.inf)
        if self.note is not None:
            return -inf, inf
        value = _linalg.column_dot(side.B, side.X) + _linalg.column_dot(side.X, side.R)
        rounding = self.dot_unit * side.x * (side.b + side.r) + side.x * side.floor
        low, high = value - rounding, value + rounding + side.energy * side.energy
        # What overflowed says nothing; 0 and ‖g‖²/λ always hold.
        low = xp.where(low > 0, low, xp.zeros_like(low)) * (1 - _SLACK * self.eps)
        most = self.weight(side.b) ** 2
        return low, xp.where(high < most, high, most)


def plain_scores(
    certificate: Certificate, train: GradientMatrix, test: GradientMatrix, blocks: Iterable[slice]
) -> CertifiedScores:
    """g_trainᵀx_test with |error| ≤ ‖g_train‖ in the inverse norm × ‖e_test‖ in the A-norm."""
    norms = _backend.to_small(train.row_norms())
    weight = certificate.weight(norms)
    xp = _backend.namespace(train.like)
    scores, bounds = [], []
    for rows in blocks:
        side = certificate.solve(test[rows], residual=False)
        scores.append(xp.matrix_transpose(train @ side.X))
        bound = _outer(side.energy, weight) + certificate.dot_unit * _outer(side.x, norms)
        bounds.append(_outwards(bound, train.like, certificate))
    values = xp.concat(scores, axis=0)
    return CertifiedScores(
        scores=values,
        error_bounds=xp.concat(bounds, axis=0),
        corrected=xp.zeros_like(values, dtype=xp.bool),
        products=certificate.products,
        note=certificate.note,
    )


def corrected_scores(
    certificate: Certificate,
    train: GradientMatrix,
    test: GradientMatrix,
    train_blocks: Iterable[slice],
    test_blocks: Iterable[slice],
) -> CertifiedScores:
    """b_iᵀx_j + x_iᵀr_j where its bound ‖e_i‖‖e_j‖ (A-norms) beats that of b_iᵀx_j."""
    tests = [certificate.solve(test[rows], residual=True) for rows in test_blocks]
    columns = []
    for rows in train_blocks:
        side = certificate.solve(train[rows], residual=True)
        parts = [_pair(certificate, other, side) for other in tests]
        xp = _backend.namespace(*parts[0])
        columns.append([xp.concat(list(rows), axis=0) for rows in zip(*parts, strict=True)])
    xp = _backend.namespace(*columns[0])
    scores, bounds, chosen = (xp.concat(list(c), axis=1) for c in zip(*columns, strict=True))
    return CertifiedScores(
        scores=scores,
        error_bounds=bounds,
        corrected=chosen,
        products=certificate.products,
        note=certificate.note,
    )


def _pair(certificate: Certificate, test: _Solved, train: _Solved) -> tuple[Array, Array, Array]:
    """Scores, bounds and choice for one block of test and one of training samples."""
    xp = _backend.namespace(test.b)
    unit = certificate.dot_unit
    value = _linalg.gram(test.X, train.B)
    weight = xp.minimum(certificate.weight(train.b), xp.sqrt(certificate.own(train)[1]))
    rounding = unit * _outer(test.x, train.b)
    plain = _outer(test.energy, weight) + rounding
    correction = _linalg.gram(test.R, train.X)
    rounding = rounding + _outer(unit * test.r + test.floor, train.x)
    corrected = _outer(test.energy, train.energy) + rounding
    like = test.B
    better = corrected < plain
    bound = xp.where(better, corrected, plain)
    shown = xp.where(better, value + correction, value)
    chosen = _backend.lift(xp.where(better, xp.ones_like(plain), 0.0 * value), like) > 0
    return _backend.lift(shown, like), _outwards(bound, like, certificate), chosen


def _outer(a: Array, b: Array) -> Array:
    """A bᵀ for small non-negative vectors, with 0 · inf = inf."""
    xp = _backend.namespace(a)
    product = a[:, None] * b[None, :]
    return xp.where(xp.isnan(product), xp.full_like(product, math.inf), product)


def _outwards(bound: Array, like: Array, certificate: Certificate) -> Array:
    """The bound beside `like`, rounded up; only what is exactly 0 stays 0."""
    xp = _backend.namespace(bound)
    up = bound * (1 + _SLACK * certificate.eps) + _TINY
    return _backend.lift(xp.where(bound > 0, up, bound), like)


def self_influence_bounds(
    certificate: Certificate, train: GradientMatrix, blocks: Iterable[slice]
) -> SelfInfluenceBounds:
    """Both bounds for every training sample."""
    lower, upper = [], []
    for rows in blocks:
        low, high = certificate.own(certificate.solve(train[rows], residual=True))
        lower.append(_backend.lift(low, train.like))
        upper.append(_outwards(high, train.like, certificate))
    xp = _backend.namespace(train.like)
    return SelfInfluenceBounds(
        lower=xp.concat(lower, axis=0),
        upper=xp.concat(upper, axis=0),
        products=certificate.products,
        note=certificate.note,
    )
