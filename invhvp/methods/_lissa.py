"""The inverse that LiSSA prepares: the step, the batches, the cost it predicts."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import _backend, _linalg
from .._random import generator
from ..operators import LinearOperator
from ..operators.damping import smallest
from ..protocols import Array, Damping
from ..solution import InvhvpWarning, Solution
from ._columns import distinct, expand
from ._descent import Descent
from ._inverse import PreparedInverse, Products, codes_for, prepare_preconditioner
from ._lissa_step import Spread, has_terms, measured_size, measured_spread
from ._progress import progress_bar

if TYPE_CHECKING:
    from .lissa import LiSSA

_MARGIN = 1.1  # power iteration stays a little below λmax
_SVRG = 4.0  # differences to an anchor carry the noise of both points
_LEAST_BATCH = 32
_MOST_STEPS = 100_000
_MANY_PASSES = 1000  # predicted passes over the data that are worth a warning


class _Measured(NamedTuple):
    """What does not depend on λ where there is no preconditioner."""

    size: float
    spread: Spread | None
    batch: int


class LissaInverse(PreparedInverse):
    """(A + λ + dampen·scale)⁻¹ by stochastic iteration; every product iterates anew.

    Attributes:
        scale: 1/η of the first step.
        critical_scale: the scale at which a step ceases to be stable in mean square, as measured.
        ridge: dampen·scale, contained in `shift`.
        size: λmax(A), or λmax(P⁻¹(A + λ)), as measured.
        batch: terms a step; all of them for full batches.
        kurtosis: C in s c = s C tr(A), or None where there are no gradients.
    """

    method: LiSSA

    def __init__(
        self, method: LiSSA, A: LinearOperator, damping: Damping, measured: _Measured | None = None
    ) -> None:
        super().__init__(method, A, damping)
        if _backend.is_array(self.shift) and _backend.is_tracing(self.shift):
            raise TypeError(_TRACED)
        self.n_terms = int(A.n_terms) if has_terms(A) else 1  # pyright: ignore
        if method.batch is not None and self.n_terms == 1 and method.batch > 1:
            msg = (
                f"batch needs an operator with terms, such as RankOneMean(G); {type(A).__name__} "
                "has none and runs full batches: leave batch out"
            )
            raise ValueError(msg)
        self.preconditioner = prepare_preconditioner(method, A, damping)
        if self.preconditioner is not None:
            self.products = self.preconditioner.products
        self.least = smallest(self.shift)
        self._measured = self._measure() if measured is None else measured
        self.size = self._measured.size
        self._choose_step()

    # ------------------------------------------------------------------------------ the step

    def _measure(self) -> _Measured:
        preconditioned = self.preconditioner is not None
        products = Products(self.operator, self.shift if preconditioned else 0.0)
        random = generator(self.method.rng, self.like)
        apply = self.precondition if preconditioned else None
        size = measured_size(products, apply, random, self.shape[0])
        spread, asked = None, self.method.batch
        sample = min(self.n_terms, _LEAST_BATCH if asked is None else asked)
        if self.n_terms > 1 and sample < self.n_terms and math.isfinite(size):
            spread = measured_spread(self.operator, products, apply, random, sample)
        self.products += products.columns
        return _Measured(size, spread, sample)

    def _choose_step(self) -> None:
        method, spread = self.method, self._measured.spread
        preconditioned = self.preconditioner is not None
        floor = 0.0 if preconditioned else self.least
        largest = 0.0 if preconditioned else _largest(self.shift)
        top = self.size + largest
        self.batch, self.kurtosis = self._measured.batch, None
        if spread is not None:
            if method.batch is None and not spread.per_batch and top > 0:
                wanted = max(_LEAST_BATCH, math.ceil(spread.constant(floor) / top))
                self.batch = self.n_terms if 2 * wanted > self.n_terms else wanted
            if spread.trace:
                self.kurtosis = spread.constant(floor) / spread.trace
        noise = 0.0 if spread is None else spread.noise(self.batch, self.n_terms, floor)
        self.stochastic = self.batch < self.n_terms
        self.critical_scale = (top + noise) / (2 - method.dampen)
        factor = _SVRG if method.variance_reduction else 1.0
        if method.scale == "auto":
            scale = (_MARGIN * self.size + largest + factor * noise) / (1 - method.dampen)
            self.scale = scale if math.isfinite(scale) and scale > 0 else 1.0
        else:
            self.scale = float(method.scale)
            bound = top / (2 - method.dampen)
            if not method.force and self.scale <= bound:
                stable = max(bound, self.critical_scale)
                msg = (
                    f"scale={self.scale:g} must diverge: λmax is {self.size:.4g} (measured), so "
                    f"the smallest stable scale is {stable:.4g}; pass that or more, "
                    'scale="auto", or force=True'
                )
                raise ValueError(msg)
        self.ridge = method.dampen * self.scale
        if self.ridge:
            self.shift = self.shift + self.ridge
            self.least += self.ridge
        self.top = top + self.ridge

    def predicted_steps(self, eta: float) -> int:
        """Steps until the slowest direction has reached rtol, in the first half of the run."""
        slowest = eta * self.least
        if self.preconditioner is not None:
            floor = getattr(self.preconditioner, "relative_floor", None)
            if floor is None:
                return 1000  # hundreds are the rule where P is any good
            slowest = eta * floor
        if not 0 < self.method.rtol < 1 or not slowest > 0:
            return _MOST_STEPS
        rate = -math.log1p(-slowest) if slowest < 0.99 else 4.0
        steps = math.log(1 / self.method.rtol) / rate
        return min(1 + math.ceil((2 if self.stochastic else 1) * steps), _MOST_STEPS)

    def most_steps(self, eta: float) -> int:
        """The limit where none is given; averaging away the noise takes longer than the rest."""
        steps = self.predicted_steps(eta)
        return min(8 * steps, _MOST_STEPS) if self.stochastic else steps

    def check_every(self) -> int:
        """Steps between looks; a look costs two full products a column (one with SVRG)."""
        if self.method.check_every is not None:
            return self.method.check_every
        return max(50, math.ceil(4 * self.n_terms / self.batch)) if self.stochastic else 10

    def precondition(self, V: Array) -> Array:
        """P⁻¹V, or V."""
        return V if self.preconditioner is None else self.preconditioner._matmat(V)

    # ------------------------------------------------------------------------------ the solve

    def _solve(
        self, B: Array, *, x0: Array | None = None, callback: Any = None, progress: bool = False
    ) -> Solution:
        if _backend.is_tracing(B):
            raise TypeError(_TRACED)
        run = Descent(self, callback)
        if B.shape[1] == 0:
            empty = np.zeros((0,))
            return run.finish(B, empty, empty, empty, codes_for([]))
        self._warn_about_cost()
        columns = distinct(B, merge=x0 is None)
        blocks = []
        with progress_bar(progress, run.limit, "LiSSA") as bar:
            if columns.work.size:
                unit = _linalg.scale_columns(columns.take(B), 1 / columns.work_norms)
                start = None
                if x0 is not None:
                    start = _linalg.scale_columns(columns.take(x0), 1 / columns.work_norms)
                blocks.append(run.solve(unit, columns.work_norms, start, bar))
        return expand(run, B, columns, blocks)

    def _warn_about_cost(self) -> None:
        method = self.method
        if method.maxiter is not None or method.max_products is not None:
            return  # the caller has bounded the cost
        passes = self.predicted_steps(1 / self.scale) * self.batch / self.n_terms
        condition = self.top / self.least if self.least > 0 else math.inf
        rtol = min(max(method.rtol, 1e-16), 0.5)
        rival = min(0.5 * math.sqrt(condition) * math.log(2 / rtol), 10.0 * self.shape[0])
        if passes > _MANY_PASSES and passes > 10 * rival:
            msg = (
                f"LiSSA may need {passes:.0f} passes over the data at damping {self.least:.3g} "
                f"and λmax {self.size:.3g}, conjugate gradients about {rival:.0f}; raise the "
                "damping, precondition, or use BlockCG. max_products= bounds the cost"
            )
            warnings.warn(msg, InvhvpWarning, stacklevel=4)

    def with_damping(self, damping: Damping, /) -> LissaInverse:
        """The inverse at another λ; without a preconditioner nothing is measured again."""
        if self.preconditioner is not None:
            return LissaInverse(self.method, self.operator, damping)
        return LissaInverse(self.method, self.operator, damping, self._measured)


_TRACED = (
    "LiSSA looks at values while it runs and cannot be traced; call it outside of jit, or use "
    "CG(check_every=None)"
)


def _largest(shift: float | Array) -> float:
    return shift if isinstance(shift, float) else float(np.max(_backend.to_host(shift)))
