"""The size of an operator, from a few products."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .. import _backend, _linalg
from .._random import generator
from ..protocols import Array, Reduce


def operator_norm(
    product: Callable[[Array], Array],
    like: Array,
    n: int,
    *,
    steps: int = 6,
    reduce: Reduce | None = None,
) -> float:
    """A lower bound on ‖A‖₂ from `steps` power iterations, usually within a few percent.

    Cost: `steps` products of one column, one transfer to the host.
    """
    v = generator(0, like).normal((n, 1))
    largest = None
    for _ in range(steps):
        norm = _linalg.column_norms(v, reduce=reduce)
        v = product(_linalg.scale_columns(v, 1 / norm))
        size = _linalg.column_norms(v, reduce=reduce)
        xp = _backend.namespace(size)
        largest = size if largest is None else xp.maximum(largest, size)
    assert largest is not None
    value = float(np.asarray(_backend.to_host(largest)).reshape(()))
    return value if np.isfinite(value) else 0.0
