"""How small a damping may be."""

from __future__ import annotations

from typing import Any

from .. import _backend
from ..operators import as_operator
from .lanczos import eigenpairs
from .norm import operator_norm


def least_damping(A: Any, *, rng: Any = 0) -> float:
    """The λ above which A + λI is positive definite in this precision; 0 where A itself is.

    For an A that is positive semidefinite by construction it is n·ε·‖A‖, which says no more than
    that rounding ends there: A may be regular. For any other it is −λ_min as Lanczos finds it,
    to about one percent.

    Cost: 6 products for a positive semidefinite A, some 10-100 for any other; n where n is small.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> from invhvp.estimate import least_damping
        >>> round(least_damping(ih.Diagonal(np.array([2.0, -0.5]))), 6)
        0.5
    """
    A = as_operator(A)
    rounding = A.shape[0] * _backend.eps(A.dtype)
    if A.psd:
        return rounding * operator_norm(A._matmat, A.like, A.shape[0])
    found = eigenpairs(A, 1, tol=1e-2, which="lowest", dimension=30, rng=rng)
    lowest = float(found.values[0])
    floor = rounding * found.size
    if lowest > floor:
        return 0.0
    return max(floor, -lowest + float(found.residuals[0]))
