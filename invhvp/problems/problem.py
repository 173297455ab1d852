"""A linear system whose solution is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from .. import _backend
from ..operators import LinearOperator
from ..protocols import Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """(A + λI) x = b with its answer.

    Attributes:
        name: what it is, with its parameters.
        operator: A; the λ of the problem is not part of it.
        rhs: b of shape (n,) or (n, k).
        damping: λ.
        solution: (A + λI)⁻¹b, rounded from float64 or better to the dtype of `rhs`.
        spectrum: eigenvalues of A in float64 on the host, ascending; None where not known.
        constants: documented values: conditions, counts of iterations, eigenvalues.
        source: where the problem or its values come from.
    """

    name: str
    operator: LinearOperator
    rhs: Array
    damping: float
    solution: Array
    spectrum: np.ndarray | None = None
    constants: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    source: str = ""

    @property
    def condition(self) -> float:
        """Spectral condition number of A + λI; NaN where the spectrum is not known."""
        if self.spectrum is None:
            return float("nan")
        size = np.abs(self.spectrum + self.damping)
        smallest = float(np.min(size))
        return float(np.max(size)) / smallest if smallest > 0 else float("inf")


def reference(like: Array | None) -> Array:
    """The array that says where a problem lives: the caller's, or NumPy float64."""
    return np.zeros(0) if like is None else like


def place(a: np.ndarray, like: Array | None) -> Array:
    """A float64 host array in the library, dtype and device of `like`."""
    return _backend.from_host(np.ascontiguousarray(a, dtype=np.float64), reference(like))
