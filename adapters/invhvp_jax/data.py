"""The data as a list of batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from invhvp import _backend

Batch = Any


def read(data: Any, batch_size: int | None = None) -> list[Batch]:
    """All batches, kept where they are: JAX arrays on their device, others as NumPy's.

    `data` is one tuple (x, y) or (x, y, sample_weight), one mapping, or an iterable of batches.
    Raises TypeError for anything else, ValueError where there is none or one is empty.
    """
    if data is None:
        raise TypeError("data= is missing: one tuple of arrays (x, y), or an iterable of batches")
    if _is_one_batch(data):
        n = count(data)
        step = n if batch_size is None else batch_size
        if step < 1:
            msg = f"batch_size must be at least 1, got {batch_size}"
            raise ValueError(msg)
        whole = jax.tree_util.tree_map(_array, data)
        return [take(whole, slice(i, i + step)) for i in range(0, n, step)]
    if _backend.is_array(data) or not isinstance(data, Iterable):
        msg = f"data must be a tuple (x, y) or an iterable of batches, got {type(data).__name__}"
        raise TypeError(msg)
    if batch_size is not None:
        raise ValueError("batch_size= goes with one tuple of arrays; batches are used as they are")
    batches = [jax.tree_util.tree_map(_array, batch) for batch in data]
    if not batches:
        raise ValueError("the data have no batches")
    for batch in batches:
        count(batch)
    return batches


def count(batch: Batch) -> int:
    """Number of samples: the length of every array in the batch."""
    leaves = jax.tree_util.tree_leaves(batch)
    shapes: list[tuple[int, ...]] = [tuple(getattr(leaf, "shape", ())) for leaf in leaves]
    if not shapes or not all(shapes):
        msg = f"every array of a batch must have one row a sample, got shapes {shapes}"
        raise ValueError(msg)
    n = shapes[0][0]
    if n == 0 or any(shape[0] != n for shape in shapes):
        msg = f"the arrays of a batch must have the same number of rows, not 0, got {shapes}"
        raise ValueError(msg)
    return n


def take(batch: Batch, rows: slice) -> Batch:
    """Some samples of a batch."""
    return jax.tree_util.tree_map(lambda leaf: leaf[rows], batch)


def parts(batch: Batch) -> tuple[Any, Any, Any]:
    """x, y and the sample weights (n,) or None."""
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        msg = (
            "a batch must be (x, y) or (x, y, sample_weight); for any other pass batch_loss=, a "
            f"function of (params, batch), got {type(batch).__name__}"
        )
        raise TypeError(msg)
    x, y, weight = batch if len(batch) == 3 else (*batch, None)
    if weight is not None and weight.ndim != 1:
        msg = f"sample weights must have shape ({count(batch)},), got {tuple(weight.shape)}"
        raise ValueError(msg)
    return x, y, weight


def _is_one_batch(data: Any) -> bool:
    """(x, y), (x, y, w) or one mapping; a tuple of tuples is a tuple of batches."""
    if isinstance(data, Mapping):
        return True
    if not isinstance(data, tuple) or len(data) not in (2, 3):
        return False
    return all(_backend.is_array(part) for part in data[1:]) and not isinstance(
        data[0], tuple | list
    )


def _array(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    return np.asarray(leaf)
