"""Stochastic Neumann series, without knobs to tune."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..operators import as_operator
from ..protocols import Damping
from ._lissa import LissaInverse
from ._options import check_numbers, check_preconditioner


@dataclass(frozen=True, kw_only=True)
class LiSSA:
    """u ← u − η((A_B + λ + dampen·scale)u − b), η = 1/scale: averaged SGD on ½uᵀAu − bᵀu.

    A_B is the mean over a mini-batch of the operator's terms (`HasTerms`); an operator without
    terms, or whose batches would hold half of them, runs full batches: the Neumann series
    Σ (I − η(A + λ))ʲ ηb. It is for operators whose full products cost too much; where one is
    affordable BlockCG needs a small fraction of the passes.

    The step follows from λmax, the size of the batch and the measured kurtosis of the terms,
    such that u converges in mean square. All right-hand sides share the batches. Of the last
    iterate and the average of (at least) the last half, the one with the smaller true residual
    on the full data is looked at, kept and returned.

    Args:
        scale: 1/η, or "auto". A number is honoured; one that must diverge raises.
        dampen: a second ridge dampen·scale: what is solved, and what residuals and bounds are
            about, is (A + λ + dampen·scale)x = b. 0 ≤ dampen < 1.
        maxiter: steps; by default what the step and λ predict for rtol, at most 100 000.
        rtol, atol: stopping rule ‖r_j‖ ≤ max(rtol·‖b_j‖, atol) on the true residual. The default
            is what averaging reaches; for more use `variance_reduction`.
        batch: terms a step; by default what makes noise no worse than λmax, at least 32.
        rng: an int or a generator: the same seed gives the same batches.
        preconditioner: a Method whose inverse is one fixed positive-definite map P⁻¹ (the ASTRA
            form, u ← u − ηP⁻¹(…)); the step then follows from λmax(P⁻¹(A + λ)).
        variance_reduction: None, or "svrg": gradients are differences to an anchor whose full
            residual is known; converges to any rtol, and each look is the next anchor.
        force: let a scale that must diverge do so.
        max_products, max_seconds: end with the best iterate.
        check_every: steps between looks; by default 10 on full batches, else such that looks
            cost less than half of the steps between them.

    A run that diverges is restarted from its best iterate with half the step, at most three
    times (never with an explicit `scale`), then it is DIVERGED; negative curvature ends it with
    the vector that proves it. A run whose predicted cost is high warns (`InvhvpWarning`) and
    goes on.

    `Solution.products` counts a column on |B| of N terms as |B|/N of a product, and rounds the
    sum up; `passes` likewise.

    Raises ValueError for options out of range, a scale below (λmax + λ)/(2 − dampen), a batch
    for an operator without terms, or a preconditioner that is not one fixed map.
    Cost: 24 products to prepare, some 50 more for the kurtosis, at most 6·4 vectors; a step is
    one product of k columns on |B| terms; memory 6·n·k (8·n·k for SVRG), and that of P⁻¹.

    Source: Agarwal, Bullins & Hazan (2017), LiSSA; Koh & Liang (2017); the mean-square step from
    trace and λmax as in Klochkov & Liu (2024); Johnson & Zhang (2013), SVRG.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.RankOneMean(ih.DenseGradients(np.eye(4)))
        >>> ih.LiSSA(rtol=1e-6).prepare(A, damping=0.25) @ np.ones(4)
        array([2., 2., 2., 2.])
    """

    scale: float | str = "auto"
    dampen: float = 0.0
    maxiter: int | None = None
    rtol: float = 1e-2  # without variance reduction each further digit costs 100 times the steps
    atol: float = 0.0
    batch: int | None = None
    rng: Any = 0
    preconditioner: Any = None
    variance_reduction: str | None = None
    force: bool = False
    max_products: int | None = None
    max_seconds: float | None = None
    check_every: int | None = None

    def __post_init__(self) -> None:
        check_numbers(
            self,
            sizes=("rtol", "atol", "max_seconds"),
            counts=("maxiter", "batch", "check_every", "max_products"),
        )
        if self.scale != "auto" and (
            isinstance(self.scale, str | bool) or not 0 < float(self.scale) < math.inf
        ):
            msg = f'scale must be "auto" or a positive number, got {self.scale!r}'
            raise ValueError(msg)
        if not 0 <= self.dampen < 1:
            msg = f"dampen must lie in [0, 1): it is the ridge in units of scale; got {self.dampen}"
            raise ValueError(msg)
        if self.variance_reduction not in (None, "svrg"):
            msg = f'variance_reduction must be None or "svrg", got {self.variance_reduction!r}'
            raise ValueError(msg)
        if self.preconditioner is None:
            return
        check_preconditioner(self.preconditioner)
        if self.dampen:
            msg = "dampen is a ridge in units of scale and has no meaning with a preconditioner"
            raise ValueError(msg)

    def prepare(self, A: Any, /, damping: Damping) -> LissaInverse:
        """Measure the step; nothing else is precomputed."""
        return LissaInverse(self, as_operator(A), damping)
