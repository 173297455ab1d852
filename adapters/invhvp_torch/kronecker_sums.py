"""What the recorded calls of a layer add to its Kronecker factors and eigenvalues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch

from invhvp.estimate import MomentAccumulator

from . import kronecker_embedding
from .kronecker_layers import Seen, Unit, sides
from .objective import Forward

Calls: TypeAlias = dict[str, list[Seen]]
"""By layer, what went into each call, and the derivatives in what came out."""


def add_factors(sums: Any, unit: Unit, calls: list[Seen], forward: Forward) -> None:
    """Add what the calls of a layer in one batch give to its factors."""
    weights = forward.weight
    if unit.kind == "embedding":
        kronecker_embedding.add_factors(sums, unit, calls, weights)
        return
    for name, piece, d, a in _sides(unit, calls):
        w = None if weights is None else weights[piece].to(torch.promote_types(a.dtype, d.dtype))
        if w is not None and w.shape[0] != a.shape[0]:
            w = w.repeat_interleave(a.shape[0] // w.shape[0])
        sums.add(name, d, a, weights=w)


def add_moments(sums: MomentAccumulator, unit: Unit, calls: list[Seen]) -> None:
    """Add what they give to the second moments along its eigenvectors."""
    if unit.kind == "embedding":
        kronecker_embedding.add_moments(sums, unit, calls)
        return
    for name, _, d, a in _sides(unit, calls):
        sums.add(name, d, a)


def _sides(
    unit: Unit, calls: list[Seen]
) -> Iterator[tuple[str, slice, torch.Tensor, torch.Tensor]]:
    for groups in sides(unit, calls):
        for name, (piece, d, a) in zip(unit.blocks, groups, strict=True):
            yield name, piece, d, a


def n_bytes(calls: Calls) -> int:
    """Bytes of what was recorded."""
    return sum(call.x.nbytes + call.d.nbytes for found in calls.values() for call in found)
