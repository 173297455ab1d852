"""Exact solves with (1/c) GᵀG + λI through the samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..operators import as_operator
from ..protocols import Damping, HasGradients, HasInverse
from ._fixed_map import MapInverse


@dataclass(frozen=True, kw_only=True)
class SampleSpace:
    """Exact inverse of (1/c) Σ g_i g_iᵀ + λI through the N × N Gram matrix (p × p for N ≥ p).

    No product with the operator is iterated: one Gram matrix, one Cholesky factorisation. The
    solution is refined with its true residual where it misses the tolerance, or what rounding
    allows. Right-hand sides given as a gradient matrix stay in its structure, and scores of
    `Influence` come from Gram matrices alone.

    Args:
        rtol, atol: stopping rule ‖r_j‖ ≤ max(rtol·‖b_j‖, atol), against which the answer is
            judged: CONVERGED or FLOOR.

    Raises TypeError where A has no gradients, SingularError for λ = 0 with N < p.
    Cost: the Gram matrix and min(N, p)³/3 flops to prepare, min(N, p)² numbers;
    one application (two products with the gradients; one for a gradient matrix as right-hand
    sides) and one product a solve, and both again for a refinement.

    Source: Woodbury (1950); the empirical-Fisher use follows from the push-through identity.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.RankOneMean(ih.DenseGradients(np.ones((1, 4))))
        >>> ih.SampleSpace().prepare(A, damping=1.0) @ np.ones(4)
        array([0.2, 0.2, 0.2, 0.2])
    """

    rtol: float = 1e-5
    atol: float = 0.0

    def prepare(self, A: Any, /, damping: Damping) -> MapInverse:
        A = as_operator(A)
        if not isinstance(A, HasGradients) or not isinstance(A, HasInverse):
            msg = (
                f"SampleSpace needs an operator with gradients, such as RankOneMean(G); "
                f"{type(A).__name__} has none: use BlockCG or Direct"
            )
            raise TypeError(msg)
        return MapInverse(self, A, damping, A.inverse(damping), exact=True)
