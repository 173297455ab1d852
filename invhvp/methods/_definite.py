"""A damping that makes an indefinite operator positive definite."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from ..estimate import eigenpairs
from ..operators import LinearOperator
from ..operators.damping import as_shift, smallest
from ..protocols import Damping
from ..solution import InvhvpWarning

_MARGIN = 0.05  # of |θ_min|: what the Ritz value may be wrong by


def definite_damping(A: LinearOperator, damping: Damping) -> tuple[Damping, int]:
    """λ, raised where A + λI is not definite, and the products spent on knowing.

    The lowest eigenvalue θ is measured by Lanczos; where θ + λ is not safely positive, λ becomes
    |θ| + max(λ, 5 % of |θ|), so that the shifted operator is as definite as one asked for, and
    an `InvhvpWarning` says so.
    """
    least = smallest(as_shift(damping, A))
    found = eigenpairs(A, 1, which="lowest", tol=1e-2, maxiter=2)
    theta = float(found.values[0])
    slack = max(_MARGIN * abs(theta), float(found.residuals[0]))
    if theta - slack + least > 0:
        return damping, found.products
    raised = -theta + slack + max(least, _MARGIN * abs(theta))
    warnings.warn(
        f"A has an eigenvalue near {theta:.3g}: the damping was raised from {least:g} to "
        f"{raised:.3g}; the answers are those of A + {raised:.3g} I",
        InvhvpWarning,
        stacklevel=6,
    )
    if isinstance(damping, Mapping):
        return {name: float(value) + raised - least for name, value in damping.items()}, (
            found.products
        )
    return raised, found.products
