"""What can go wrong between a model, a cluster and the chunks of arrays: errors at the door."""

from __future__ import annotations

import math
from typing import Any

import dask.array as da


class ThreadSafetyViolationError(ValueError):
    """Workers with several threads, for a model that must not be evaluated by two at once."""


class InvalidDimensionChunksError(ValueError):
    """An array is chunked along another axis than the samples, or in chunks of unknown size."""


class UnalignedChunksError(ValueError):
    """Inputs and targets of the same samples come in different chunks."""


class DisableClientSingleThreadCheck:
    """Passed in place of a client: use whatever scheduler is active, and check no threads.

    The model is evaluated under a lock all the same, so that the threads of a worker take turns.
    """


def check_threads(model: Any, client: Any) -> None:
    """Raise `ThreadSafetyViolationError` where a worker has several threads."""
    if getattr(model, "is_thread_safe", False):
        return
    several = {worker: n for worker, n in client.nthreads().items() if n > 1}
    if several:
        msg = (
            f"{len(several)} of the workers have several threads ({max(several.values())}), and "
            f"{type(model).__name__} must not be evaluated by two at once; start the cluster with "
            "threads_per_worker=1 and more workers"
        )
        raise ThreadSafetyViolationError(msg)


def check_mode(mode: Any) -> None:
    """Raise ValueError unless `mode` is one that influence models have."""
    if str(mode) not in ("up", "perturbation"):
        msg = f"{mode!r} is no mode of influence; there are 'up', 'perturbation'"
        raise ValueError(msg)


def check_rows(array: Any, name: str) -> None:
    """Raise unless `array` is a Dask array chunked along its first axis alone, in known sizes."""
    if not isinstance(array, da.Array):
        msg = f"{name} must be a dask array, got {type(array).__name__}; da.from_array wraps one"
        raise TypeError(msg)
    if array.ndim == 0 or any(math.isnan(n) for n in array.shape):
        msg = f"{name} needs samples and known sizes; call {name}.compute_chunk_sizes() first"
        raise InvalidDimensionChunksError(msg)
    if any(len(chunks) > 1 for chunks in array.chunks[1:]):
        msg = (
            f"{name} is chunked along other axes than the samples: {array.chunks[1:]}; rechunk "
            f"with {name}.rechunk((n,) + {tuple(array.shape[1:])})"
        )
        raise InvalidDimensionChunksError(msg)


def check_aligned(x: da.Array, y: da.Array, names: tuple[str, str]) -> None:
    """Raise unless both hold the same samples in the same chunks."""
    for array, name in zip((x, y), names, strict=True):
        check_rows(array, name)
    if x.chunks[0] != y.chunks[0]:
        msg = (
            f"{names[0]} and {names[1]} have different chunks of samples: {x.chunks[0]} and "
            f"{y.chunks[0]}; rechunk one like the other"
        )
        raise UnalignedChunksError(msg)
