"""The average of the tail of a sequence of iterates, at any time."""

from __future__ import annotations

import numpy as np

from ..protocols import Array
from ._columns import take_columns


class TailAverage:
    """The mean of the last half to three quarters of all iterates so far, from two sums.

    Whenever the number of iterates has doubled, the older sum is dropped and the newer one takes
    its place.
    """

    def __init__(self) -> None:
        self._old: Array | None = None
        self._new: Array | None = None
        self._first = self._middle = self._count = 0

    def add(self, U: Array) -> None:
        """One more iterate."""
        self._new = U if self._new is None else self._new + U
        self._count += 1

    def value(self) -> Array:
        """The average, after at least one more iterate than at the last call."""
        if self._count >= 2 * self._middle:
            self._old, self._first = self._new, self._middle
            self._new, self._middle = None, self._count
        total = self._old if self._new is None else self._old + self._new
        assert total is not None  # an iterate has been added
        return total / (self._count - self._first)

    def take(self, columns: np.ndarray) -> None:
        """Keep only some columns."""
        self._old = None if self._old is None else take_columns(self._old, columns)
        self._new = None if self._new is None else take_columns(self._new, columns)
