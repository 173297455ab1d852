"""PyTorch data sets as Dask arrays that workers read themselves."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
from dask import delayed


def torch_dataset_to_dask_array(
    dataset: Any, chunk_size: int, total_size: int | None = None, resulting_dtype: Any = None
) -> tuple[da.Array, ...]:
    """One Dask array for each part of a sample, such as inputs and targets.

    Each chunk is read by the worker that needs it; the data set itself goes to a worker once, so
    let it be a handle that opens its files, not the data.

    Args:
        dataset: indexable by 0 … N − 1; samples are tuples of tensors, arrays or numbers.
        chunk_size: samples in a chunk.
        total_size: N, by default len(dataset).
        resulting_dtype: of all arrays, as NumPy's; by default what the data set has.

    Raises ValueError for sizes below 1, for N above the length, or where N is neither given nor
    known.

    Example:
        >>> import torch
        >>> data = torch.utils.data.TensorDataset(torch.ones(5, 3), torch.arange(5))
        >>> x, y = torch_dataset_to_dask_array(data, chunk_size=2)
        >>> x.shape, str(x.dtype), y.chunks, y.compute()
        ((5, 3), 'float32', ((2, 2, 1),), array([0, 1, 2, 3, 4]))
    """
    if total_size is None:
        if not hasattr(dataset, "__len__"):
            msg = "the data set does not tell its length: pass total_size="
            raise ValueError(msg)
        total_size = len(dataset)
    if chunk_size < 1 or total_size < 1:
        msg = f"chunk_size and the number of samples must be at least 1, got {chunk_size} and "
        raise ValueError(f"{msg}{total_size}")
    if hasattr(dataset, "__len__") and total_size > len(dataset):
        msg = f"total_size is {total_size}, but the data set has {len(dataset)} samples"
        raise ValueError(msg)
    metas = [_part(part, resulting_dtype) for part in _parts(dataset[0])]
    handle = delayed(dataset, pure=False, traverse=False)
    read = delayed(_read, nout=len(metas), pure=False)
    columns: list[list[da.Array]] = [[] for _ in metas]
    for start in range(0, total_size, chunk_size):
        stop = min(start + chunk_size, total_size)
        values = read(handle, start, stop, resulting_dtype)
        for column, meta, value in zip(columns, metas, values, strict=True):
            shape = (stop - start, *meta.shape)
            column.append(da.from_delayed(value, shape=shape, dtype=meta.dtype))
    return tuple(da.concatenate(column, axis=0) for column in columns)


def _read(dataset: Any, start: int, stop: int, dtype: Any) -> tuple[np.ndarray, ...]:
    samples = [_parts(dataset[i]) for i in range(start, stop)]
    return tuple(
        np.stack([_part(part, dtype) for part in parts]) for parts in zip(*samples, strict=True)
    )


def _parts(sample: Any) -> tuple[Any, ...]:
    return tuple(sample) if isinstance(sample, tuple | list) else (sample,)


def _part(value: Any, dtype: Any) -> np.ndarray:
    return np.asarray(value, dtype=dtype)
