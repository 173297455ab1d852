"""One run of LiSSA: steps, looks, restarts, verdicts."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import _arithmetic, _backend, _linalg
from .._random import generator
from ..operators.damping import plus_shifted, shifted
from ..operators.data_parallel import agreed
from ..protocols import Array
from ..solution import Curvature, Record, Solution, Status
from ._averages import TailAverage
from ._columns import take_columns
from ._inverse import Products, _log, column_look, pack_solution, residual_error_bounds

if TYPE_CHECKING:
    from ._lissa import LissaInverse

_GLANCE = 50  # steps between glances at ‖u‖: an exploding run is not to cost an epoch
_RESTARTS = 3


class Block(NamedTuple):
    """The outcome for the columns that were solved, in their order."""

    X: Array
    norms: np.ndarray
    bounds: np.ndarray
    status: list[Status]


class Descent:
    """What one call of `solve` iterates, spends and sees; right-hand sides have unit norm."""

    def __init__(self, inverse: LissaInverse, callback: Any) -> None:
        self.inverse, self.method = inverse, inverse.method
        self.callback = callback
        self.started = time.perf_counter()
        self.products = Products(inverse.operator, inverse.shift)
        self.terms = 0  # columns times terms of mini-batches
        self.term_passes = 0
        self.iterations = self.restarts = 0
        self.eta = 1 / inverse.scale
        self.limit = self.method.maxiter or inverse.most_steps(self.eta)
        self.history: list[Record] = []
        self.curvature: Curvature | None = None
        self._random = generator(self.method.rng, inverse.like)
        self._order = np.zeros(0, dtype=int)
        self._svrg = inverse.stochastic and self.method.variance_reduction == "svrg"

    # ------------------------------------------------------------------------------ accounting

    def tally(self) -> Products:
        """Full products and fractions of them together, rounded up."""
        total = Products(self.inverse.operator, self.inverse.shift)
        total.columns = self.products.columns - (-self.terms // self.inverse.n_terms)
        total.passes = self.products.passes - (-self.term_passes // self.inverse.n_terms)
        return total

    def _affordable(self) -> int:
        """Steps until the next look that iterations, products and seconds allow."""
        k, inverse = len(self.open), self.inverse
        steps = min(inverse.check_every(), self.limit - self.iterations)
        most, seconds = self.method.max_products, self.method.max_seconds
        if seconds is not None:
            left = seconds - (time.perf_counter() - self.started)
            if agreed(inverse.operator, left) < 0:
                return 0
        if most is not None:
            left = most - self.tally().columns
            if inverse.stochastic:  # the look at the end is part of the budget
                left = (left - k * (1 if self._svrg else 2)) * inverse.n_terms // inverse.batch
            steps = min(steps, left // k)
        return steps

    def finish(self, X: Array, norms: Any, b_norms: Any, bounds: Any, codes: Any) -> Solution:
        """The `Solution` for all columns."""
        return pack_solution(
            X,
            codes=codes,
            norms=norms,
            b_norms=b_norms,
            bounds=bounds,
            started=self.started,
            products=self.tally(),
            iterations=self.iterations,
            history=tuple(self.history),
            curvature=self.curvature,
        )

    # ------------------------------------------------------------------------------- the solve

    def solve(self, B: Array, b_norms: np.ndarray, U: Array | None, bar: Any) -> Block:
        """Iterate until every column has a status."""
        k = B.shape[1]
        self.b_norms, self.bar = b_norms, bar
        self.targets = np.maximum(self.method.rtol, self.method.atol / b_norms)
        self.open = np.arange(k)
        self.results: dict[int, tuple[Array, float, float, Status]] = {}
        self.B = B
        self.best = _backend.namespace(B).zeros_like(B) if U is None else U
        self.best_R = B if U is None else B - self.products(U)
        norms, self.sizes = column_look(*map(_linalg.column_norms, (self.best_R, self.best)))
        self.best_norms, self.first = norms, np.maximum(norms, 1.0)
        self._start_from_best()
        self._settle()
        while self.open.size:
            steps = self._affordable()
            if steps < 1:
                self._end(Status.MAXITER)
                break
            diverged = self._advance(steps) or self._look()
            if diverged and not self._restart():
                break
            self._settle()
        return self._gathered(k)

    def _start_from_best(self) -> None:
        self.U, self.R = self.best, self.best_R
        self.average = None if self._svrg or not self.inverse.stochastic else TailAverage()

    def _advance(self, steps: int) -> bool:
        """Take some steps; True where the iterate explodes."""
        inverse, k = self.inverse, len(self.open)
        anchor, anchor_R = self.U, self.R
        for i in range(steps):
            if inverse.stochastic:
                part = inverse.operator.subset(self._batch())  # pyright: ignore
                V = self.U - anchor if self._svrg else self.U
                target = anchor_R if self._svrg else self.B
                R = target - plus_shifted(part @ V, V, inverse.shift)
                self.U = _arithmetic.add_scaled(self.U, inverse.precondition(R), self.eta)
                self.terms += k * inverse.batch
                self.term_passes += inverse.batch
                if self.average is not None:
                    self.average.add(self.U)
            else:
                self.U = _arithmetic.add_scaled(self.U, inverse.precondition(self.R), self.eta)
                self.R = self.B - self.products(self.U)
            self.iterations += 1
            self.bar.update(1)
            if (i + 1) % _GLANCE == 0 and self._explodes():
                return True
        return False

    def _batch(self) -> np.ndarray:
        """Indices without replacement, in random passes over the terms."""
        size = self.inverse.batch
        if len(self._order) < size:
            self._order = self._random.permutation(self.inverse.n_terms)
        chosen, self._order = self._order[:size], self._order[size:]
        return np.sort(chosen)

    def _explodes(self) -> bool:
        (sizes,) = column_look(_linalg.column_norms(self.U))
        limit = 10 * np.maximum(self.sizes, 1 / max(self.inverse.least, 1e-8))
        return not bool(np.all(sizes <= limit))

    # ------------------------------------------------------------------------- looks, verdicts

    def _look(self) -> bool:
        """True residuals of the last iterate and of the average; keep the better. Diverged?"""
        k = len(self.open)
        candidates = [self.U]
        if self.average is not None:
            candidates.append(self.average.value())
        xp = _backend.namespace(self.U)
        if self.inverse.stochastic:
            both = self.products(xp.concat(candidates, axis=1))
            residuals = [self.B - both[:, i * k : (i + 1) * k] for i in range(len(candidates))]
            self.R = residuals[0]
        else:
            residuals = [self.R]
        looked = column_look(
            *map(_linalg.column_norms, residuals), *map(_linalg.column_norms, candidates)
        )
        norms, sizes = looked[: len(residuals)], looked[len(residuals) :]
        for X, R, norm, size in zip(candidates, residuals, norms, sizes, strict=True):
            self._keep(X, R, norm, size)
        entry = Record(
            self.iterations,
            self.tally().columns,
            time.perf_counter() - self.started,
            self.best_norms.copy(),
        )
        self.history.append(entry)
        if self.callback is not None:
            self.callback(entry)
        return not bool(np.all(norms[0] <= self._limits()))

    def _limits(self) -> np.ndarray:
        """Residuals above which a column has left what noise explains."""
        inverse = self.inverse
        if not inverse.stochastic and inverse.preconditioner is None:
            return 2 * self.best_norms  # a stable full-batch step never raises the residual
        condition = inverse.top / max(inverse.least, 1e-300)
        return self.first * min(10 * (1 + math.sqrt(condition)), 1e6)

    def _keep(self, X: Array, R: Array, norms: np.ndarray, sizes: np.ndarray) -> None:
        better = norms < self.best_norms  # False for NaN
        if not np.any(better):
            return
        xp = _backend.namespace(X)
        mask = _backend.from_host(better.astype(float), X)[None, :] > 0
        self.best = xp.where(mask, X, self.best)
        self.best_R = xp.where(mask, R, self.best_R)
        self.best_norms = np.where(better, norms, self.best_norms)
        self.sizes = np.where(better, sizes, self.sizes)

    def _floors(self) -> np.ndarray:
        """The residual that rounding leaves behind."""
        size = self.inverse.size if self.inverse.preconditioner is None else 0.0
        return 2 * _backend.eps(self.B.dtype) * np.maximum(size * self.sizes, 1.0)

    def _settle(self) -> None:
        """Take the columns that are done out of the iteration."""
        met = self.best_norms <= self.targets
        floor = ~met & (self.best_norms <= self._floors())
        if not np.any(met | floor):
            return
        self._record(met, Status.CONVERGED)
        self._record(floor, Status.FLOOR)
        rest = np.flatnonzero(~(met | floor))
        for name in ("B", "U", "R", "best", "best_R"):
            setattr(self, name, take_columns(getattr(self, name), rest))
        for name in ("open", "best_norms", "targets", "first", "sizes", "b_norms"):
            setattr(self, name, getattr(self, name)[rest])
        if self.average is not None:
            self.average.take(rest)

    def _record(self, which: np.ndarray, status: Status) -> None:
        bounds = residual_error_bounds(
            self.inverse.operator, self.inverse.shift, self.best_norms, 2 * self._floors()
        )
        for i in np.flatnonzero(which):
            column = _linalg.scale_columns(self.best[:, i : i + 1], self.b_norms[i : i + 1])
            scale = self.b_norms[i]
            result = (column, self.best_norms[i] * scale, bounds[i] * scale, status)
            self.results[int(self.open[i])] = result

    def _end(self, status: Status) -> None:
        """Give every open column its last status."""
        rounded = self.best_norms <= 8 * self._floors()
        if status is Status.MAXITER:
            self._record(rounded, Status.FLOOR)
            self._record(~rounded, status)
        else:
            self._record(np.ones(len(self.open), dtype=bool), status)

    def _restart(self) -> bool:
        """Go back to the best iterate with half the step; False where that is over."""
        status = self._reason()
        if status is None and self.method.scale == "auto" and self.restarts < _RESTARTS:
            self.restarts += 1
            self.eta /= 2
            _log().warning(
                "LiSSA diverged after %d steps; restarting with scale %.4g",
                self.iterations,
                1 / self.eta,
            )
            if self.method.maxiter is None:
                self.limit = self.iterations + self.inverse.most_steps(self.eta)
            self._start_from_best()
            return True
        self._end(status or Status.DIVERGED)
        return False

    def _reason(self) -> Status | None:
        """Why no smaller step can help: NaN in the operator, or negative curvature."""
        (finite,) = column_look(_linalg.column_norms(self.products(self.B)))
        if not np.all(np.isfinite(finite)):
            return Status.NONFINITE
        (sizes,) = column_look(_linalg.column_norms(self.U))
        usable = np.flatnonzero(np.isfinite(sizes) & (sizes > 0))
        if self.inverse.operator.psd or not usable.size:
            return None
        j = usable[np.argmax(sizes[usable])]
        p = _linalg.scale_columns(self.U[:, j : j + 1], 1 / sizes[j : j + 1])
        damped = self.products(p)
        parts = (damped, damped - shifted(p, self.inverse.shift))
        total, bare = column_look(*(_linalg.column_dot(p, part) for part in parts))
        if total[0] >= 0:
            return None
        self.curvature = Curvature(p[:, 0], float(bare[0]))
        return Status.NEGATIVE_CURVATURE

    def _gathered(self, k: int) -> Block:
        columns = [self.results[j] for j in range(k)]
        xp = _backend.namespace(self.B)
        return Block(
            xp.concat([column[0] for column in columns], axis=1),
            np.asarray([column[1] for column in columns]),
            np.asarray([column[2] for column in columns]),
            [column[3] for column in columns],
        )
