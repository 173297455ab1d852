"""Per-sample gradients that are stored as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import _arithmetic, _backend
from ..layout import Layout
from ..protocols import Array
from . import _memory, _sums
from ._check import check_data, take_rows
from .base import GradientMatrix


class DenseGradients(GradientMatrix):
    """The rows themselves.

    Args:
        rows: (N, p); not copied.
        layout: names of the parameter blocks.

    Raises TypeError or ValueError for anything but a non-empty floating matrix.
    Cost: 2 N p flops a column of a product, 2 N M p for a Gram matrix.

    Example:
        >>> import numpy as np
        >>> from invhvp.gradients import DenseGradients
        >>> G = DenseGradients(np.array([[1.0, 2.0], [0.0, 3.0]]))
        >>> G @ np.ones(2), G.T @ np.ones(2)
        (array([3., 3.]), array([1., 5.]))
        >>> G.gram()
        array([[5., 6.],
               [6., 9.]])
    """

    def __init__(self, rows: Array, *, layout: Layout | None = None) -> None:
        check_data(rows, "rows", {2: "(N, p)"})
        super().__init__(*rows.shape, like=rows, layout=layout)
        self._rows = rows

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self._n_samples * self._n_parameters * _memory.itemsize(self._like)

    def _dense(self) -> Array:
        return self._rows

    def _take(self, rows: slice) -> DenseGradients:
        return DenseGradients(take_rows(self._rows, rows), layout=self._layout)

    @classmethod
    def _join(cls, matrices: Sequence[Any]) -> DenseGradients:
        rows = [G._rows for G in matrices]
        joined = _backend.namespace(*rows).concat(rows, axis=0)
        return DenseGradients(joined, layout=matrices[0].layout)

    def _scaled(self, factor: float) -> DenseGradients:
        return DenseGradients(factor * self._rows, layout=self._layout)

    def _rescaled(self, factors: Mapping[str, float]) -> DenseGradients:
        assert self._layout is not None
        columns = _backend.from_host(self._layout.shifts(factors), self._like)
        return DenseGradients(self._rows * columns[None, :], layout=self._layout)

    def _matmat(self, V: Array) -> Array:
        return _sums.product(self._rows, V)

    def _rmatmat(self, U: Array) -> Array:
        return _sums.product(_backend.namespace(U).matrix_transpose(self._rows), U)

    def _small_gram(self, other: GradientMatrix) -> Array:
        if not isinstance(other, DenseGradients):
            return super()._small_gram(other)
        xp, right = _backend.namespace(self._like), _sums.wide(other._rows)
        parts = [_sums.wide(self._rows[c, :]) for c in self.chunks()]
        found = [_arithmetic.matmul(x, xp.matrix_transpose(right)) for x in parts]
        return _backend.to_small(xp.concat(found, axis=0))

    def _gram(self, other: GradientMatrix) -> Array:
        xp = _backend.namespace(self._like)
        rows = xp.matrix_transpose(self._rows)
        if isinstance(other, DenseGradients):
            return _sums.product(self._rows, xp.matrix_transpose(other._rows))
        # The other keeps its structure: these rows are its right-hand sides.
        return xp.matrix_transpose(other._matmat(rows))
