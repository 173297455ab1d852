"""What may be multiplied with what."""

from __future__ import annotations

from typing import Any

from .. import _backend
from ..protocols import Array


def check_kind(X: Any, like: Array, what: str) -> None:
    """Raise TypeError unless `X` is an array of the library, dtype and device of `like`."""
    if not _backend.is_array(X):
        msg = (
            f"{what} takes arrays of {_backend.library_name(like)}, got {type(X).__name__}; "
            "convert it first"
        )
        raise TypeError(msg)
    mine, theirs = _backend.library_name(like), _backend.library_name(X)
    if mine != theirs:
        msg = f"{what} works on {mine} arrays, got a {theirs} array; convert it first"
        raise TypeError(msg)
    if X.dtype != like.dtype:
        msg = (
            f"{what} works in {_backend.dtype_name(like.dtype)}, got "
            f"{_backend.dtype_name(X.dtype)}; nothing is converted silently"
        )
        raise TypeError(msg)
    if not _backend.same_device(X, like):
        msg = (
            f"{what} works on device {_backend.device(like)}, got an array on "
            f"{_backend.device(X)}; move it first"
        )
        raise TypeError(msg)


def check_library(X: Any, like: Array, what: str) -> None:
    """Raise TypeError for an array of another library, with what to write where it was built."""
    if not _backend.is_array(X):
        return
    mine, theirs = _backend.library_name(like), _backend.library_name(X)
    if mine != theirs:
        msg = (
            f"{what} works on {mine} arrays, got a {theirs} array; build the gradients with "
            f"array_namespace={theirs}, or convert the array first"
        )
        raise TypeError(msg)


def check_data(X: Any, what: str, shapes: dict[int, str]) -> None:
    """Raise unless `X` is a floating array with one of the numbers of axes and no empty one."""
    if not _backend.is_array(X):
        msg = f"{what} must be an array of shape {_one_of(shapes)}, got {type(X).__name__}"
        raise TypeError(msg)
    if not _backend.is_real_floating(X.dtype):
        msg = (
            f"{what} must have a real floating dtype, got {_backend.dtype_name(X.dtype)}; "
            "convert it first"
        )
        raise TypeError(msg)
    if X.ndim not in shapes or 0 in X.shape:
        msg = f"{what} must have shape {_one_of(shapes)}, none of them 0; got {tuple(X.shape)}"
        raise ValueError(msg)


def _one_of(shapes: dict[int, str]) -> str:
    return " or ".join(shapes.values())


def check_rows(rows: Any, N: int) -> slice | Any:
    """A slice start:stop:step within range(N), or a host index array without negatives."""
    if isinstance(rows, slice):
        start, stop, step = rows.indices(N)
        if step < 1:
            msg = f"rows are sliced forwards, got step {step}; index with a NumPy integer array"
            raise ValueError(msg)
        if start >= stop:
            msg = f"a gradient matrix needs at least one row, got {rows} of {N} rows"
            raise ValueError(msg)
        return slice(start, stop, step)
    if not (_backend.is_array(rows) and _backend.is_numpy(rows) and rows.dtype.kind in "iu"):
        msg = (
            "rows are chosen by a slice or by a one-dimensional NumPy array of integers, got "
            f"{type(rows).__name__}; for one row write G[i : i + 1]"
        )
        raise TypeError(msg)
    if rows.ndim != 1 or rows.size == 0:
        msg = f"row indices must be one-dimensional and not empty, got shape {rows.shape}"
        raise ValueError(msg)
    if rows.min() < -N or rows.max() >= N:
        msg = f"row indices must lie in range({N}), got {rows.min()} to {rows.max()}"
        raise ValueError(msg)
    return rows.astype("int64") % N


def take_rows(X: Array, rows: slice | Any) -> Array:
    """Rows of an array of any number of axes, by what `check_rows` returned."""
    if isinstance(rows, slice):
        return X[rows, ...]
    xp = _backend.namespace(X)
    return xp.take(X, xp.asarray(rows, device=_backend.device(X)), axis=0)
