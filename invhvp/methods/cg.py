"""The conjugate gradient method for all columns at once, each with its own recurrence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .. import _backend, _linalg
from ..protocols import Array
from ._columns import take_columns
from ._krylov import Kernel, KrylovMethod, Look, freeze_columns


@dataclass(frozen=True, kw_only=True)
class CG(KrylovMethod):
    """Solve (A + λI)x_j = b_j by preconditioned conjugate gradients, one recurrence per column.

    The columns share passes over the data, not a Krylov space: BlockCG needs fewer products
    where there are several right-hand sides, this method less memory and arithmetic. Options,
    stopping rule and certificates are those of `BlockCG`.

    Args:
        rtol, atol, etol, maxiter, max_products, max_seconds, preconditioner, recycle, check_every,
            residual_operator, max_restarts, symmetry_tol, reduce: see `BlockCG`.

    Cost per iteration: k products, 10·n·k flops, 11-13 blocks of memory (n × k), one look every
    `check_every` iterations. One pass more for the residual.

    Source: Hestenes & Stiefel (1952); Gauss–Radau bound: Meurant & Tichý (2013), equation 3.5.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.Diagonal(np.arange(1.0, 11.0))
        >>> ih.CG(rtol=1e-10).prepare(A, damping=1e-3).solve(np.ones(10)).iterations
        10
    """

    def _kernel(self, **context: Any) -> Kernel:
        return _ConjugateGradients(**context)


class _State(NamedTuple):
    X: Array  # (n, k)
    W: Array  # (n, k) residuals
    P: Array  # (n, k) search directions
    rho: Array  # (k,) rᵀM⁻¹r
    N: Array  # (k,) ‖r‖
    gamma: Array  # (k,) Gauss–Radau coefficients
    energy: Array  # (k,) accumulated decrease of the squared A-norm error
    size: Array  # (k,) lower bounds on ‖A + λ‖
    asymmetry: Array  # ()
    ok: Array  # (k,)
    first: tuple[Array, Array] | None
    started: bool


class _ConjugateGradients(Kernel):
    def _m(self, R: Array) -> Array:
        return R if self.preconditioner is None else self.preconditioner(R)

    def _dot(self, X: Array, Y: Array) -> Array:
        return _linalg.column_dot(X, Y, reduce=self.reduce)

    def start(self, R: Array) -> _State:
        Z = self._m(R)
        rho = self._dot(R, Z)
        xp = _backend.namespace(rho)
        zero = xp.zeros_like(rho)
        return _State(
            X=_backend.namespace(R).zeros_like(R),
            W=R,
            P=Z,
            rho=rho,
            N=_linalg.column_norms(R, reduce=self.reduce),
            gamma=zero + 1.0 / (self.mu or 1.0),
            energy=zero,
            size=zero,
            asymmetry=xp.sum(zero),
            ok=rho >= 0,
            first=None,
            started=self.traced,
        )

    def step(self, s: _State) -> _State:
        Q = self.product(s.P)
        pq = self._dot(s.P, Q)
        xp = _backend.namespace(pq)
        one = xp.ones_like(pq)
        # A vanished residual has nothing left to do; anything else needs positive curvature.
        idle = s.rho <= 0
        good = pq > 0
        ok = (good | (idle & (s.rho == 0))) & xp.isfinite(pq)
        alpha = xp.where(good & ~idle, s.rho / xp.where(good, pq, one), 0.0 * one)
        X = _linalg.add_scaled(s.X, s.P, alpha)
        R = _linalg.add_scaled(s.W, Q, -alpha)
        Z = self._m(R)
        rho = self._dot(R, Z)
        N = xp.sqrt(rho) if self.preconditioner is None else self._length(R)
        active = alpha > 0
        beta = xp.where(active, rho / xp.where(idle, one, s.rho), 0.0 * one)
        new = _State(
            X=X,
            W=R,
            P=_linalg.add_scaled(Z, s.P, beta),
            rho=rho,
            N=N,
            gamma=self._radau(s.gamma, alpha, beta),
            energy=s.energy + alpha * s.rho,
            size=xp.maximum(s.size, self._length(Q) / xp.where(idle, one, self._length(s.P))),
            asymmetry=self._asymmetry(s, Q),
            ok=ok,
            first=None if s.started else (s.P, Q),
            started=True,
        )
        return freeze_columns(ok, new, s)

    def _length(self, X: Array) -> Array:
        return _linalg.column_norms(X, reduce=self.reduce)

    def _radau(self, gamma: Array, alpha: Array, beta: Array) -> Array:
        """γ ← (γ − α)/(μ(γ − α) + β), restarted at 1/μ where rounding makes it negative."""
        if self.mu is None:
            return gamma
        xp = _backend.namespace(gamma)
        rest = gamma - alpha
        good = rest > 0
        rest = xp.where(good, rest, xp.ones_like(rest))
        return xp.where(good, rest / (self.mu * rest + beta), xp.full_like(rest, 1.0 / self.mu))

    def _asymmetry(self, s: _State, Q: Array) -> Array:
        """p₀ᵀ(Ap₁) against p₁ᵀ(Ap₀), free in the second iteration; in units of the operator."""
        if s.first is None:
            return s.asymmetry
        P0, Q0 = s.first
        gap = self._dot(P0, Q) - self._dot(s.P, Q0)
        scale = self._length(P0) * self._length(s.P)
        xp = _backend.namespace(gap)
        return xp.max(xp.abs(gap) / xp.where(scale > 0, scale, xp.ones_like(scale)))

    def look(self, s: _State) -> Look:
        xp = _backend.namespace(s.N)
        ones = xp.ones_like(s.N)
        x_norms = self._length(s.X)
        size = ones * xp.max(s.size)
        ok = xp.where(s.ok, ones, 0.0 * ones)
        rows = [s.N, s.gamma * s.rho, s.energy, x_norms, ok, size, s.asymmetry * ones]
        return Look.read(rows, s.N.shape[0])

    def residual(self, s: _State) -> Array:
        return s.W

    def solution(self, s: _State) -> Array:
        return s.X

    def suspect(self, s: _State, failed: np.ndarray) -> Array:
        """The search direction of the first column that failed (n, 1)."""
        return take_columns(s.P, np.flatnonzero(failed)[:1], always=True)

    def suspects(self, s: _State) -> Array:
        return s.P
