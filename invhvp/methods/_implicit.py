"""Gradients of solutions where PyTorch records them: the backward pass is another solve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .. import _backend, _tracing
from ..gradients import GradientMatrix
from ..operators import LinearOperator
from ..operators.damping import shifted, spread
from ..protocols import Array, Damping
from ..solution import Solution


def records_gradients(inverse: Any, B: Array, *, of_map: bool = False) -> bool:
    """Whether PyTorch records a gradient in λ, in what A is made of, or (not `of_map`) in B."""
    if not _tracing.recording(B):
        return False
    return any(_depends(x) for x in (None if of_map else B, inverse.damping, inverse.operator))


def with_gradients(inverse: Any, B: Array, solution: Solution) -> Solution:
    """The solution with the derivatives of the exact one: X + (A + λI)⁻¹(B − (A + λI)X).

    First derivatives, and in B alone those of any order. Cost: one pass more where A has a
    gradient, and for every backward pass one solve with the same method, which warns or raises
    as any other.
    """
    X, R, A = solution.x, B, inverse.operator
    if _depends(inverse.damping):
        R = R - shifted(X, _recorded(inverse.damping, A, X))
    if _depends(A):
        R = R - _backend.cast(A._matmat(_backend.cast(X, A.like)), X)
    x = _tracing.with_residual(X, R, lambda G: inverse @ G, once=R is not B)
    return replace(solution, x=x)


def _depends(x: Any) -> bool:
    """Whether a tensor with a gradient is in an operator, in its parts or in a collection."""
    if isinstance(x, LinearOperator | GradientMatrix):
        if getattr(x, "differentiable", False):
            return True
        return any(_depends(part) for part in vars(x).values())
    if isinstance(x, Mapping):
        return any(_depends(part) for part in x.values())
    if isinstance(x, tuple | list):
        return any(_depends(part) for part in x)
    return _tracing.wants_gradient(x)


def _recorded(damping: Damping, A: LinearOperator, X: Array) -> Array:
    """λ with its gradients: a 0-d array, or an array (n,) where it is given by block."""
    if isinstance(damping, Mapping):
        assert A.layout is not None
        return spread(damping, A.layout, X)
    return _backend.cast(damping, X)
