"""What estimates of the diagonal and the trace return."""

from __future__ import annotations

from dataclasses import dataclass

from .. import _backend
from ..protocols import Array


@dataclass(frozen=True, kw_only=True)
class DiagonalEstimate:
    """An estimate of diag(A).

    Attributes:
        values: (n,), unbiased.
        standard_error: (n,), of each value; 0 where the values are exact, inf for one sample.
            The samples of XDiag and XNysDiag share a sketch: theirs is too small, for XDiag by up
            to √2.
        samples: how many single estimates `values` is the mean of.
        products: operator-vector products spent.
        kind: "exact", "hutchinson", "xdiag" or "xnysdiag".
    """

    values: Array
    standard_error: Array
    samples: int
    products: int
    kind: str

    def positive(self) -> Array:
        """Estimates that are never negative: max(value, standard error), for a preconditioner.

        Below four samples the standard error is worthless; the root mean square of the samples,
        in expectation the norm of the row, takes its place. Exact entries become |d_i|.
        """
        xp = _backend.namespace(self.values)
        if self.kind == "exact" or self.samples == 1:
            return xp.abs(self.values)
        if self.samples < 4:
            spread = (self.samples - 1) * self.standard_error * self.standard_error
            return xp.sqrt(self.values * self.values + spread)
        return xp.where(self.values > self.standard_error, self.values, self.standard_error)


@dataclass(frozen=True, kw_only=True)
class TraceEstimate:
    """An estimate of tr(A).

    Attributes:
        value: the estimate, unbiased.
        standard_error: of the value; 0 where it is exact, inf for one sample.
        samples: how many single estimates `value` is the mean of.
        products: operator-vector products spent.
        kind: "exact", "hutchinson", "xtrace" or "xnystrace".
    """

    value: float
    standard_error: float
    samples: int
    products: int
    kind: str
