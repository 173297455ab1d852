"""The minimum residual method, for curvature that is not positive definite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from .. import _backend, _linalg
from ..protocols import Array
from ._krylov import Kernel, KrylovMethod, Look, freeze_columns


@dataclass(frozen=True, kw_only=True)
class Minres(KrylovMethod):
    """Solve (A + λI)x_j = b_j for symmetric A of any signature by minimal residuals.

    All columns share passes over the data, each has its own recurrence. Residuals never grow.
    Negative eigenvalues are no obstacle; eigenvalues near −λ make the iteration slow, and in
    float32 they put the floor high: the driver then restarts on the true residual. A singular,
    inconsistent system ends as STAGNATED at its least-squares residual. Error bounds exist only
    for a PSD operator with λ > 0, where BlockCG needs fewer products.

    Args:
        rtol, atol, maxiter, max_products, max_seconds, check_every, residual_operator,
            symmetry_tol, reduce: see `BlockCG`.
        preconditioner: a Method whose inverse is one fixed positive-definite map.
        max_restarts: restarts on the true residual.

    Cost per iteration: k products, 14·n·k flops, 17-19 blocks of memory (n × k).

    Source: Paige & Saunders (1975), section 4; the stopping test for singular systems is that of
    Choi, Paige & Saunders (2011).

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.Diagonal(np.array([-2.0, -1.0, 1.0, 3.0]))
        >>> ih.solve(A, np.ones(4), ih.Minres(rtol=1e-10), damping=0.5).x.round(6)
        array([-0.666667, -2.      ,  0.666667,  0.285714])
    """

    _blocks_held: ClassVar[int] = 19

    max_restarts: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.etol is not None:
            msg = "Minres certifies no error on the way; use rtol, or BlockCG for etol"
            raise ValueError(msg)
        if self.indefinite != "raise":
            msg = "Minres solves indefinite systems as they are; it does not shift them"
            raise ValueError(msg)

    def _kernel(self, **context: Any) -> Kernel:
        return _MinimalResiduals(**context)


class _State(NamedTuple):
    X: Array  # (n, k)
    R: Array  # (n, k) residual
    r1: Array  # (n, k) last Lanczos vector, not normalised
    r2: Array  # (n, k) this one
    y: Array  # (n, k) M⁻¹r2
    w1: Array  # (n, k) last direction but one
    w2: Array  # (n, k) last direction
    beta: Array  # (k,) norm of r2 in M⁻¹
    old_beta: Array
    dbar: Array
    epsilon: Array
    phibar: Array  # (k,) residual norm in M⁻¹
    cs: Array
    sn: Array
    size: Array  # () lower bound on the norm of the Lanczos matrix
    asymmetry: Array  # ()
    ok: Array  # (k,)
    first: tuple[Array, Array] | None
    started: bool


class _MinimalResiduals(Kernel):
    needs_definite: ClassVar[bool] = False

    def _m(self, R: Array) -> Array:
        return R if self.preconditioner is None else self.preconditioner(R)

    def _dot(self, X: Array, Y: Array) -> Array:
        return _linalg.column_dot(X, Y, reduce=self.reduce)

    def _length(self, R: Array, Z: Array) -> Array:
        xp = _backend.namespace(product := self._dot(R, Z))
        return xp.sqrt(xp.where(product > 0, product, 0.0 * product))

    def start(self, R: Array) -> _State:
        y = self._m(R)
        beta = self._length(R, y)
        xp = _backend.namespace(beta)
        zero, zeros = xp.zeros_like(beta), _backend.namespace(R).zeros_like(R)
        return _State(
            X=zeros,
            R=R,
            r1=zeros,
            r2=R,
            y=y,
            w1=zeros,
            w2=zeros,
            beta=beta,
            old_beta=zero,
            dbar=zero,
            epsilon=zero,
            phibar=beta,
            cs=zero - 1.0,
            sn=zero,
            size=xp.sum(zero),
            asymmetry=xp.sum(zero),
            ok=beta >= 0,
            first=None,
            started=self.traced,
        )

    def step(self, s: _State) -> _State:
        xp = _backend.namespace(s.beta)
        safe = xp.where(s.beta > 0, s.beta, xp.ones_like(s.beta))
        scale, add = _linalg.scale_columns, _linalg.add_scaled
        v = scale(s.y, 1 / safe)
        q = self.product(v)
        y = q
        if s.started:
            old = xp.where(s.old_beta > 0, s.old_beta, xp.ones_like(s.beta))
            y = add(y, s.r1, -s.beta / old)
        alpha = self._dot(v, y)
        r2 = add(y, s.r2, -alpha / safe)
        y = self._m(r2)
        beta = self._length(r2, y)

        # One plane rotation turns the new column of the Lanczos matrix upper triangular.
        delta = s.cs * s.dbar + s.sn * alpha
        gbar = s.sn * s.dbar - s.cs * alpha
        gamma = xp.sqrt(gbar * gbar + beta * beta)
        moving = (s.beta > 0) & (gamma > 0)
        gamma = xp.where(gamma > 0, gamma, xp.ones_like(gamma))
        cs, sn = gbar / gamma, beta / gamma
        phi = xp.where(moving, cs * s.phibar, 0.0 * s.phibar)
        phibar = xp.where(moving, sn * s.phibar, s.phibar)
        w = scale(add(add(v, s.w1, -s.epsilon), s.w2, -delta), 1 / gamma)
        safe_beta = xp.where(beta > 0, beta, xp.ones_like(beta))
        carried = xp.where(moving, sn * sn, xp.ones_like(sn))
        fresh = xp.where(moving & (beta > 0), phibar * cs / safe_beta, 0.0 * cs)
        size = xp.maximum(
            s.size, xp.max(xp.sqrt(alpha * alpha + beta * beta + s.old_beta * s.old_beta))
        )
        # ‖A r‖ of the last residual: it vanishes where only least squares is left to do.
        gradient = xp.sqrt(gbar * gbar + (s.cs * beta) ** 2)
        eps = _backend.eps(r2.dtype)
        stuck = moving & (gradient <= 10 * eps**0.5 * size) & (sn >= 1 - 1e3 * eps)
        new = _State(
            X=add(s.X, w, phi),
            R=add(scale(s.R, carried), r2, -fresh),
            r1=s.r2,
            r2=r2,
            y=y,
            w1=s.w2,
            w2=w,
            beta=beta,
            old_beta=s.beta,
            dbar=-s.cs * beta,
            epsilon=s.sn * beta,
            phibar=phibar,
            cs=cs,
            sn=sn,
            size=size,
            asymmetry=self._asymmetry(s, v, q),
            ok=xp.isfinite(beta) & xp.isfinite(alpha) & ~stuck,
            first=None if s.started else (v, q),
            started=True,
        )
        return freeze_columns(new.ok, new, s)

    def _asymmetry(self, s: _State, v: Array, q: Array) -> Array:
        """v₀ᵀ(Av₁) against v₁ᵀ(Av₀), free in the second iteration; in units of the operator."""
        if s.first is None:
            return s.asymmetry
        v0, q0 = s.first
        gap = self._dot(v0, q) - self._dot(v, q0)
        xp = _backend.namespace(gap)
        left, right = (_linalg.column_norms(x, reduce=self.reduce) for x in (v0, v))
        scale = left * right
        return xp.max(xp.abs(gap) / xp.where(scale > 0, scale, xp.ones_like(scale)))

    def look(self, s: _State) -> Look:
        residuals = _linalg.column_norms(s.R, reduce=self.reduce)
        xp = _backend.namespace(residuals)
        ones, zeros = xp.ones_like(residuals), xp.zeros_like(residuals)
        x_norms = _linalg.column_norms(s.X, reduce=self.reduce)
        ok = xp.where(s.ok, ones, zeros)
        unknown = xp.full_like(residuals, math.inf)  # no Gauss-Radau bound goes with this method
        rows = [residuals, unknown, zeros, x_norms, ok, s.size * ones, s.asymmetry * ones]
        return Look.read(rows, residuals.shape[0])

    def residual(self, s: _State) -> Array:
        return s.R

    def residual_norms(self, s: _State) -> Array:
        return _linalg.column_norms(s.R, reduce=self.reduce)

    def solution(self, s: _State) -> Array:
        return s.X
