"""Cycles, looks, true residuals, verdicts: how a block of columns is brought to an end.

A kernel advances an iteration on unit-norm residual columns and can be looked at; this file
decides. It restarts on the true residual where recurrence and truth differ, names what went
wrong, and never calls a column CONVERGED unless its true residual meets the stopping rule.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _backend, _linalg
from ..estimate.norm import operator_norm
from ..operators.damping import shifted
from ..protocols import Array
from ..solution import Curvature, Status
from ._columns import merge_columns, take_columns
from ._inverse import check_finite_columns, column_look, residual_error_bounds
from ._krylov import RADAU_MARGIN, Kernel, Look

if TYPE_CHECKING:
    from ._driver import Run

_REFINEMENTS = 20  # cycles with a residual_operator; each gains the digits of the inner precision


class Block:
    """The columns that are iterated together, through all their cycles."""

    def __init__(self, run: Run, B: Array, b_norms: np.ndarray, x0: Array | None) -> None:
        self.run, self.B, self.b_norms = run, B, b_norms
        method = run.method
        self.X = _backend.namespace(B).zeros_like(B) if x0 is None else x0
        self.R = B
        self.norms, x_norms = b_norms, np.zeros(B.shape[1])
        if x0 is not None:
            self.R = B - run.outer(x0)
            self.norms, x_norms = column_look(run.norms(self.R), run.norms(x0))
            check_finite_columns(x_norms, "x0")
        self.targets = np.maximum(method.rtol * b_norms, method.atol)
        k = B.shape[1]
        self.x_norms = x_norms
        self.energies = np.zeros(k)
        self.status: list[Status | None] = [None] * k
        self.size = float(getattr(run.inverse.preconditioner, "operator_size", 0.0))
        self.measured = False
        self.first = True
        self.refine = run.outer is not run.products
        self.limit = run.iterations + run.maxiter
        sizes = b_norms
        if x0 is not None and run.inverse.outer.psd and run.inverse.least > 0:
            sizes = np.maximum(b_norms, self._norm() * x_norms)
        floors = 4 * _backend.eps(B.dtype) * sizes
        outer, shift = run.inverse.outer, run.inverse.shift
        self.bounds = residual_error_bounds(outer, shift, self.norms, floors)

    def solve(self) -> Block:
        """Cycle until every column has a status."""
        cycles = _REFINEMENTS if self.refine else 1 + self.run.method.max_restarts
        if self.run.method.etol is None:
            self._settle(np.arange(len(self.status)), self.norms <= self.targets)
        for cycle in range(cycles):
            open_ = np.asarray([j for j, s in enumerate(self.status) if s is None], dtype=int)
            if not open_.size:
                break
            ended = self._cycle(open_, last=cycle == cycles - 1)
            if ended:
                break
        for j, status in enumerate(self.status):
            self.status[j] = self._unmet(j) if status is None else status
        return self

    def _settle(self, columns: np.ndarray, met: np.ndarray) -> None:
        for j, good in zip(columns, met, strict=True):
            if good and self.status[j] is None:
                self.status[j] = Status.CONVERGED

    def _cycle(self, open_: np.ndarray, *, last: bool) -> bool:
        """Iterate on the residuals of the open columns; True where no restart can help."""
        run, method = self.run, self.run.method
        scale = self.norms[open_]
        R = take_columns(self.R, open_)
        unit = _linalg.scale_columns(R, 1 / scale)
        inner = _backend.cast(unit, run.inverse.operator.like)
        kernel = run.kernel(guarded=method.check_every != 1)
        before_this = run.iterations
        state, look, reason = self._iterate(kernel, inner, open_, scale)
        if run.iterations == before_this:  # the budget allows no iteration, and no residual either
            for j in open_:
                self.status[j] = Status.MAXITER
            return True
        step = _linalg.scale_columns(_backend.cast(kernel.solution(state), R), scale)
        X = take_columns(self.X, open_) + step
        B = take_columns(self.B, open_)
        true = B - run.outer(X)
        gap = true - _linalg.scale_columns(_backend.cast(kernel.residual(state), R), scale)
        energy = _linalg.column_dot(X, B - true, reduce=method.reduce)
        norms, x_norms, gaps, energies = column_look(
            run.norms(true), run.norms(X), run.norms(gap), energy
        )
        if not np.all(np.isfinite(norms)):
            reason = Status.NONFINITE
        before = self.norms[open_]
        halved = norms <= 0.5 * before
        # CG lowers the A-norm error even where the residual grows; a restart must show for it.
        cut_short = reason in (Status.MAXITER, Status.NEGATIVE_CURVATURE)
        trusted = self.first and kernel.needs_definite and cut_short
        better = np.isfinite(norms) & ((norms < before) | trusted)
        self.first = False
        self._accept(open_, better, X, true, norms, x_norms)
        self._certify(open_, better, look, scale, gaps, energies)
        self._judge(open_, reason, halved, last=last)
        return reason is not None or not halved.any()

    def _iterate(
        self, kernel: Kernel, R: Array, open_: np.ndarray, scale: np.ndarray
    ) -> tuple[Any, Look | None, Status | None]:
        """Advance one cycle; the last good state, what was seen of it, and why it ended."""
        run, method = self.run, self.run.method
        state, look = kernel.start(R), None
        every = method.check_every or 1
        tolerance = 0.9 * self.targets[open_]
        eps = _backend.eps(R.dtype)
        asymmetric = method.symmetry_tol
        asymmetric = 30 * eps if asymmetric is None else asymmetric
        width = R.shape[1]
        while run.iterations < self.limit and not run.out_of_budget(width):
            new, steps = state, 0
            while steps < every and run.iterations < self.limit:
                new = kernel.step(new)
                steps += 1
                run.iterations += 1
            run.bar.update(steps)
            seen = kernel.look(new)
            if np.all(seen.residuals * scale <= tolerance) and method.check_every != 1:
                state, look = new, seen  # frozen at convergence: nothing is left to divide by
                run.record(look, scale, self.b_norms[open_])
                return state, look, None
            if not np.all(seen.ok) or not np.all(np.isfinite(seen.residuals)):
                good = new if method.check_every != 1 else state
                reason = self._breakdown(kernel, good, seen)
                return good, look or Look.nothing(open_.size), reason
            state, look = new, seen
            self.size = max(self.size, look.size)
            run.record(look, scale, self.b_norms[open_])
            # A gap in units of ‖A‖, of which a lower bound will do unless it accuses.
            if look.asymmetry > asymmetric * self.size and (
                look.asymmetry > asymmetric * self._norm()
            ):
                return state, look, Status.NOT_SYMMETRIC
            if method.etol is not None:
                limit = 0.9 * method.etol * np.sqrt(np.maximum(look.energies, 0.0))
                met = np.sqrt(np.maximum(look.squared_bounds, 0.0)) <= limit
                met |= self._plain_bound(look.residuals, scale) <= limit * scale
            else:
                met = look.residuals * scale <= tolerance
            # Rounding averages out: residuals fall to about a tenth of ε‖A‖‖x‖ before they lie.
            x_norms = look.x_norms * scale
            if not self.refine:  # the residual of a restart carries the rounding of all of x
                x_norms = np.maximum(x_norms, self.x_norms[open_])
            floors = 0.1 * eps * look.size * x_norms
            if np.all(met | (look.residuals * scale <= floors)):
                return state, look, None
        return state, look or Look.nothing(open_.size), Status.MAXITER

    def _plain_bound(self, residuals: np.ndarray, scale: np.ndarray) -> np.ndarray:
        least = self.run.inverse.least
        return residuals * scale / math.sqrt(least) if least > 0 else np.full(len(scale), np.inf)

    def _breakdown(self, kernel: Kernel, state: Any, seen: Look) -> Status | None:
        """Why the iteration cannot go on: a proof, NaN, or rounding (None: restart)."""
        run = self.run
        if not kernel.needs_definite:
            return None if np.all(np.isfinite(seen.residuals)) else Status.NONFINITE
        v = kernel.suspect(state, ~seen.ok)
        norm = run.norms(v)
        xp = _backend.namespace(norm)
        v = _linalg.scale_columns(v, 1 / xp.where(norm > 0, norm, xp.ones_like(norm)))
        Av = run.products(v)
        ridge = shifted(v, run.inverse.shift)
        dot = _linalg.column_dot
        q, ridge_q, size, length = column_look(
            dot(v, Av, reduce=run.method.reduce),
            dot(v, ridge, reduce=run.method.reduce),
            run.norms(Av),
            norm,
        )
        if not (np.isfinite(q[0]) and np.isfinite(size[0])):
            return Status.NONFINITE
        # A proof must exceed what rounding in the products of so large an operator explains.
        if length[0] > 0 and (size[0] == 0 or q[0] < -4 * _backend.eps(v.dtype) * self._norm()):
            run.curvature = Curvature(v[:, 0], float(q[0] - ridge_q[0]))
            return Status.NEGATIVE_CURVATURE
        return None

    def _accept(
        self,
        open_: np.ndarray,
        better: np.ndarray,
        X: Array,
        R: Array,
        norms: np.ndarray,
        x_norms: np.ndarray,
    ) -> None:
        chosen = open_[better]
        position = np.arange(len(self.status))
        position[chosen] = len(self.status) + np.flatnonzero(better)
        self.X = merge_columns(self.X, X, position)
        self.R = merge_columns(self.R, R, position)
        self.norms = self.norms.copy()
        self.norms[chosen] = norms[better]
        self.x_norms[chosen] = x_norms[better]

    def _certify(
        self,
        open_: np.ndarray,
        better: np.ndarray,
        look: Look | None,
        scale: np.ndarray,
        gaps: np.ndarray,
        energies: np.ndarray,
    ) -> None:
        """‖e‖_A ≤ min(Gauss–Radau + gap/√λ, ‖r‖/√λ), each with the rounding of r."""
        inverse = self.run.inverse
        norms, x_norms = self.norms[open_], self.x_norms[open_]
        size = self.size
        eps = _backend.eps(self.B.dtype)
        floors = 4 * eps * np.maximum(size * x_norms, self.b_norms[open_])
        plain = residual_error_bounds(inverse.outer, inverse.shift, norms, floors)
        # Radau's bound needs the spectrum to stay above μ under the rounding of the products.
        inner_eps = _backend.eps(inverse.operator.dtype)
        legal = inverse.radau_mu() is not None and (
            0 < 16 * inner_eps * size <= (1 - RADAU_MARGIN) * inverse.least
        )
        if legal and look is not None:
            radau = np.sqrt(np.maximum(look.squared_bounds, 0.0)) * scale
            radau = radau + (gaps + floors) / math.sqrt(inverse.least)
            plain = np.where(np.isfinite(radau), np.minimum(plain, radau), plain)
        chosen = open_[better]
        self.bounds[chosen] = plain[better]
        self.energies[chosen] = np.sqrt(np.maximum(energies[better], 0.0))

    def _judge(
        self, open_: np.ndarray, reason: Status | None, halved: np.ndarray, *, last: bool
    ) -> None:
        if reason in (Status.NOT_SYMMETRIC, Status.NEGATIVE_CURVATURE, Status.NONFINITE):
            # Even a column that looks solved rests on an operator that breaks its promise.
            for j in open_:
                self.status[j] = reason
            return
        met = self.norms[open_] <= self.targets[open_]
        if self.run.method.etol is not None:
            met = self.bounds[open_] <= self.run.method.etol * self.energies[open_]
        self._settle(open_, met)
        for i, j in enumerate(open_):
            if self.status[j] is not None:
                continue
            if reason is Status.MAXITER:
                self.status[j] = reason
            elif last or not halved[i] or self._at_floor(j, 2):
                self.status[j] = self._unmet(j)

    def _norm(self) -> float:
        """‖A + λI‖ by power iteration, once, where a lower bound is not enough."""
        known = self.run.inverse.known_size
        if not self.measured and known > 0:
            self.size, self.measured = max(self.size, known), True
        if not self.measured:
            run = self.run
            like, n = run.inverse.operator.like, run.inverse.shape[0]
            norm = operator_norm(run.products, like, n, reduce=run.method.reduce)
            self.size, self.measured = max(self.size, norm), True
            run.inverse.known_size = self.size
        return self.size

    def _at_floor(self, j: int, units: float) -> bool:
        """Whether rounding leaves a residual like this behind: a few units of ε‖A + λI‖‖x‖."""
        eps = _backend.eps(self.B.dtype)

        def explained(size: float) -> bool:
            limit = units * eps * max(size * self.x_norms[j], self.b_norms[j])
            return bool(self.norms[j] <= limit)

        # The size so far is a lower bound: what it explains needs no measurement.
        return explained(self.size) or explained(self._norm())

    def _unmet(self, j: int) -> Status:
        """FLOOR where rounding explains the residual, else STAGNATED."""
        return Status.FLOOR if self._at_floor(j, 16) else Status.STAGNATED
