"""The log-determinant of a damped operator."""

from __future__ import annotations

from typing import Any

from ..operators import as_operator
from ..operators.damping import as_shift, scalar
from ..protocols import HasInverse
from .spectrum import Estimate, spectrum


def logdet(
    A: Any, damping: float, /, *, steps: int = 20, probes: int = 4, rng: Any = 0
) -> Estimate:
    """The log-determinant of A + λI: exact where A factorises itself, else by Lanczos quadrature.

    Dense, diagonal, low-rank, sample-space and block-diagonal operators are factorised, and the
    standard error is 0. Of any other the trace of log(A + λI) is estimated from `probes` Lanczos
    recurrences; `estimate.spectrum` gives the same number for many λ at once.

    Args:
        A: a symmetric operator.
        damping: λ > 0.
        steps: of each Lanczos recurrence.
        probes: recurrences.
        rng: seed.

    Raises ValueError for λ ≤ 0 or an A + λI that is not positive definite (IndefiniteError where
    a Lanczos recurrence proves it).
    Cost: one factorisation, or steps·probes products in `steps` passes.

    Source: Ubaru, Chen & Saad (2017), section 4.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> from invhvp.estimate import logdet
        >>> round(logdet(ih.Diagonal(np.array([1.0, 3.0])), 1.0).value, 6)
        2.079442
    """
    A = as_operator(A)
    value = scalar(as_shift(damping, A), "logdet")
    if not value > 0:
        msg = f"damping must be positive, got {value}"
        raise ValueError(msg)
    if isinstance(A, HasInverse):
        inverse = A.inverse(value)
        if hasattr(inverse, "logdet"):
            return Estimate(-inverse.logdet(), 0.0)  # pyright: ignore[reportAttributeAccessIssue]
    return spectrum(A, steps=steps, probes=probes, rng=rng).logdet(float(value))
