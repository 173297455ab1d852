"""Preconditioners made from another operator, or from an inverse that exists already."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..operators import LinearOperator, as_operator
from ..protocols import Damping, Method
from ._fixed_map import MapInverse
from .direct import Direct


@dataclass(frozen=True)
class Surrogate:
    """Use (K + λI)⁻¹ of a cheaper operator K in place of (A + λI)⁻¹, at the same damping.

    Args:
        operator: K, of the shape, dtype and device of A.
        method: how K is inverted.

    Raises ValueError where K and A differ in shape. Cost: that of `method` on K.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A, K = ih.Dense(np.array([[2.0, 0.1], [0.1, 1.0]])), ih.Diagonal(np.array([2.0, 1.0]))
        >>> cg = ih.BlockCG(preconditioner=ih.Surrogate(K))
        >>> ih.solve(A, np.ones(2), cg, damping=1e-3).status.name
        'CONVERGED'
    """

    operator: Any
    method: Method = field(default_factory=Direct)

    def prepare(self, A: Any, /, damping: Damping) -> MapInverse:
        A, K = as_operator(A), as_operator(self.operator)
        if K.shape != A.shape:
            msg = f"the surrogate has shape {K.shape}, the operator {A.shape}"
            raise ValueError(msg)
        inverse = self.method.prepare(K, damping=damping)
        return _borrowed(self, A, damping, inverse)


@dataclass(frozen=True)
class Fixed:
    """Use an inverse that is prepared already, whatever its damping.

    Args:
        inverse: any prepared inverse.

    Raises ValueError where the shapes differ. Cost: none of its own.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.Dense(np.array([[2.0, 0.1], [0.1, 1.0]]))
        >>> old = ih.Direct().prepare(A, damping=1e-2)
        >>> cg = ih.BlockCG(preconditioner=ih.Fixed(old))
        >>> ih.solve(A, np.ones(2), cg, damping=1e-3).status.name
        'CONVERGED'
    """

    inverse: Any

    def prepare(self, A: Any, /, damping: Damping) -> MapInverse:
        A = as_operator(A)
        if tuple(self.inverse.shape) != A.shape:
            msg = f"the fixed inverse has shape {self.inverse.shape}, the operator {A.shape}"
            raise ValueError(msg)
        return _borrowed(self, A, damping, self.inverse)


def _borrowed(method: Any, A: LinearOperator, damping: Damping, inverse: Any) -> MapInverse:
    return MapInverse(
        method,
        A,
        damping,
        as_operator(getattr(inverse, "map", inverse), like=A.like),
        exact=False,
        products=getattr(inverse, "products", 0),
        definite=bool(inverse.fixed_spd),
    )
