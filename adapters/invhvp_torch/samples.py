"""A batch is a tensor or nested tuples, lists and mappings of tensors; samples are rows."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch


def map_tensors(function: Callable[[torch.Tensor], Any], batch: Any) -> Any:
    """Apply a function to every tensor of a batch; what is no tensor stays as it is."""
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, MutableMapping):
        new = copy.copy(batch)  # keeps the class, which a model may insist on
        for key, value in batch.items():
            new[key] = map_tensors(function, value)
        return new
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, item) for item in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map_tensors(function, item) for item in batch)
    return batch


def tensors(batch: Any) -> Iterator[torch.Tensor]:
    """All tensors of a batch, in order."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, tuple | list):
        for item in batch:
            yield from tensors(item)


def move(batch: Any, device: torch.device) -> Any:
    """The batch on a device; nothing is copied that is there already."""
    if hasattr(batch, "to") and not isinstance(batch, torch.Tensor | torch.nn.Module):
        return batch.to(device)  # packed sequences, graphs, token batches
    return map_tensors(lambda t: t.to(device, non_blocking=True), batch)


def take(batch: Any, rows: torch.Tensor | slice) -> Any:
    """Some samples of a batch: views for a slice, copies for an index tensor."""
    if isinstance(rows, slice):
        return map_tensors(lambda t: t[rows], batch)
    return map_tensors(lambda t: t.index_select(0, rows), batch)


def is_sliceable(batch: Any, n: int) -> bool:
    """Whether every leaf of a batch is a tensor with one row a sample."""
    if isinstance(batch, torch.Tensor):
        return batch.ndim > 0 and batch.shape[0] == n
    if isinstance(batch, Mapping):
        return len(batch) > 0 and all(is_sliceable(value, n) for value in batch.values())
    if isinstance(batch, tuple | list):
        return len(batch) > 0 and all(is_sliceable(item, n) for item in batch)
    return False


def concatenate(batches: Sequence[Any]) -> Any | None:
    """One batch of all samples, or None where the shapes or dtypes of the batches differ."""
    rows = [list(tensors(batch)) for batch in batches]
    kinds = [[(t.shape[1:], t.dtype, t.device) for t in row] for row in rows]
    if any(kind != kinds[0] for kind in kinds):
        return None
    if len(batches) == 1:
        return batches[0]
    columns = iter([torch.cat(column) for column in zip(*rows, strict=True)])
    return map_tensors(lambda _: next(columns), batches[0])


def n_bytes(batch: Any) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for t in tensors(batch))


def fingerprint(batch: Any) -> int:
    """A checksum of shapes and values: equal for equal batches. One transfer for CUDA tensors."""
    value = 0
    for t in tensors(batch):
        value = zlib.crc32(repr((tuple(t.shape), t.dtype)).encode(), value)
        if t.numel() and t.layout == torch.strided:
            raw = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            value = zlib.crc32(raw.numpy().data, value)
    return value
