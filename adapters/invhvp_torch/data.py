"""Reading the data: kept on the model's device where it fits, else read at every pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from invhvp import _backend

from . import samples

Cache: TypeAlias = bool | Literal["auto"]

TUPLE_BATCH = 1024  # samples at once where the data come as one tuple of tensors


class Cached:
    """Batches kept on the device; `whole` is the one batch that they are views of, if any."""

    def __init__(self, batches: list[Any], whole: Any | None = None) -> None:
        self.batches = batches
        self._whole = whole

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def describe(self) -> str:
        return "cached"

    def joined(self, sizes: list[int]) -> Any | None:
        """All samples as one batch, of which the batches become views; None where ragged."""
        if self._whole is not None:
            return self._whole
        self._whole = whole = samples.concatenate(self.batches)
        if whole is None:
            return None
        start, views = 0, []
        for size in sizes:
            views.append(samples.take(whole, slice(start, start + size)))
            start += size
        self.batches = views  # so that the data are not held twice
        return whole


class Streamed:
    """Batches read again at every pass, which must give the same ones."""

    def __init__(self, data: Iterable[Any], device: torch.device, prints: list[int]) -> None:
        self._data = data
        self._device = device
        self._prints = prints

    def __iter__(self) -> Iterator[Any]:
        position = -1
        for position, batch in enumerate(self._data):
            if position >= len(self._prints):
                break
            if samples.fingerprint(batch) != self._prints[position]:
                msg = f"batch {position} differs from the first pass; {_REMEDY}"
                raise RuntimeError(msg)
            yield samples.move(batch, self._device)
        if position + 1 != len(self._prints):
            count = "more" if position >= len(self._prints) else str(position + 1)
            msg = f"{count} batches where the first pass gave {len(self._prints)}; {_REMEDY}"
            raise RuntimeError(msg)

    def __len__(self) -> int:
        return len(self._prints)

    def describe(self) -> str:
        return "streamed"


_REMEDY = (
    "the data differ from pass to pass (shuffling, random augmentation or an iterable that runs "
    "dry): pass shuffle=False and fixed transforms, or cache=True to read them once"
)


def read(
    data: Any, device: torch.device, *, cache: Cache = "auto", batch_size: int | None = None
) -> Cached | Streamed:
    """Read all batches once; keep them if asked to, or if a quarter of free memory holds them.

    Raises TypeError for what cannot be read twice, ValueError where there is no batch.
    """
    if cache not in (True, False, "auto"):
        msg = f'cache= takes True, False or "auto", got {cache!r}'
        raise ValueError(msg)
    batches = as_batches(data, batch_size, reiterable=True)
    if cache and _is_one_batch(data) and all(t.device == device for t in samples.tensors(data)):
        return Cached(list(batches), whole=data)  # views: nothing to fit
    # A quarter: joining the batches holds them twice for a moment.
    budget = _backend.free_memory(torch.empty(0, device=device)) // 4
    fresh = isinstance(data, DataLoader | list | tuple | Mapping)
    kept: list[Any] | None = [] if cache else None
    prints: list[int] = []
    used = 0
    for batch in batches:
        prints.append(samples.fingerprint(batch) if cache is not True else 0)
        if kept is None:
            continue
        moved = samples.move(batch, device)
        if not fresh:  # an iterable of the caller's may fill the same tensors again
            moved = samples.map_tensors(torch.clone, moved)
        used += samples.n_bytes(moved)
        if cache == "auto" and used > budget:
            kept = None
        else:
            kept.append(moved)
    if not prints:
        raise ValueError("the data have no batches")
    return Streamed(batches, device, prints) if kept is None else Cached(kept)


def as_batches(data: Any, batch_size: int | None, *, reiterable: bool) -> Iterable[Any]:
    """The data as an iterable of batches; one tuple of tensors is cut into several.

    Raises TypeError with the remedy for a data set without batches and for one-shot iterators.
    """
    if data is None:
        raise TypeError("data= is missing: a DataLoader, batches (x, y), or one tuple of tensors")
    if _is_one_batch(data):
        rows = next(samples.tensors(data)).shape[0]
        if not samples.is_sliceable(data, rows):
            return [data]
        step = TUPLE_BATCH if batch_size is None else batch_size
        return [samples.take(data, slice(i, i + step)) for i in range(0, rows, step)]
    if isinstance(data, torch.Tensor):
        raise TypeError("data must be batches (x, y), got one tensor; pass the tuple (x, y)")
    if isinstance(data, Dataset) and not isinstance(data, torch.utils.data.IterableDataset):
        msg = (
            f"{type(data).__name__} gives single samples; wrap it: DataLoader(data, batch_size=256)"
        )
        raise TypeError(msg)
    if not isinstance(data, Iterable):
        msg = f"data must be an iterable of batches, got {type(data).__name__}"
        raise TypeError(msg)
    if reiterable and isinstance(data, Iterator):
        msg = (
            f"a {type(data).__name__} can be read only once, and every product reads the data; "
            "pass a DataLoader or list(batches)"
        )
        raise TypeError(msg)
    if batch_size is not None:
        raise ValueError("batch_size= goes with one tuple of tensors; batches are used as they are")
    return data


def check_order(data: Any) -> None:
    """Raise ValueError for a shuffling loader: row i of a result could be any sample."""
    shuffles = isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler)
    if shuffles:
        raise ValueError(
            "the loader shuffles, so that no row of the result could be told from another; "
            "use shuffle=False"
        )


def _is_one_batch(data: Any) -> bool:
    """(x, y) or (x, y, w) with tensors in it, or one mapping."""
    if isinstance(data, Mapping):
        return any(True for _ in samples.tensors(data))
    if not isinstance(data, tuple) or len(data) not in (2, 3):
        return False
    return all(isinstance(t, torch.Tensor) for t in data[1:]) and isinstance(
        data[0], torch.Tensor | Mapping
    )
