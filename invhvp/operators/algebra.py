"""Sums and multiples of operators."""

from __future__ import annotations

import math

from .. import _backend
from ..protocols import Array
from .base import LinearOperator


class Sum(LinearOperator):
    """A + B. One product of each per product.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.Diagonal(np.array([1.0, 2.0])) + 3.0 * ih.Identity(2, like=np.ones(1))
        >>> A @ np.ones(2)
        array([4., 5.])
    """

    def __init__(self, A: LinearOperator, B: LinearOperator) -> None:
        if A.shape != B.shape:
            msg = f"cannot add operators of shapes {A.shape} and {B.shape}"
            raise ValueError(msg)
        B.check_operand(_zeros(A), "the second summand")
        super().__init__(A.shape[0], like=A.like, psd=A.psd and B.psd, layout=A.layout or B.layout)
        self.terms = (A, B)
        self.processes = A.processes or B.processes

    def _matmat(self, X: Array, /) -> Array:
        A, B = self.terms
        return A._matmat(X) + B._matmat(X)

    def _describe(self) -> str:
        return " + ".join(map(repr, self.terms))


def _zeros(A: LinearOperator) -> Array:
    return _backend.namespace(A.like).zeros((A.shape[0], 0), dtype=A.dtype, device=A.device)


class Scaled(LinearOperator):
    """α A for an operator without structure of its own (the others stay what they are)."""

    def __init__(self, A: LinearOperator, factor: float) -> None:
        factor = checked_factor(factor)
        super().__init__(A.shape[0], like=A.like, psd=A.psd and factor >= 0, layout=A.layout)
        self.operator = A
        self.factor = factor
        self.processes = A.processes

    def _matmat(self, X: Array, /) -> Array:
        return self.factor * self.operator._matmat(X)

    def _describe(self) -> str:
        return f"{self.factor:g} * {self.operator!r}"


def checked_factor(factor: float) -> float:
    """A finite Python float, or an error that says what was given."""
    if not isinstance(factor, int | float):  # which np.float64 is
        msg = f"an operator can be multiplied by a Python float, got {type(factor).__name__}"
        raise TypeError(msg)
    if not math.isfinite(factor):
        msg = f"the factor must be finite, got {factor}"
        raise ValueError(msg)
    return float(factor)
