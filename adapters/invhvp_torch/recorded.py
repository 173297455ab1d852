"""Products with the Hessian of a small batch: recorded operations in place of autograd's graph."""

from __future__ import annotations

from typing import Any

import torch

from invhvp import _backend

from .double_backward import MAX_COLUMNS, MIN_COLUMNS, GradientGraph, accumulate
from .evaluation import quiet_vmap
from .tape import Tape

# Where a graph holds more, its operations cost more than calling them, and a replay gains
# nothing (on one core, graph ÷ replay at one vector: 2.0 at .4 MB, 1.4 at 1.5 MB, 1.0 at 5 MB).
SMALL_BYTES = 4_000_000
# Recording takes about a millisecond a node.
_MAX_NODES = 400
# Columns go through together while what they make stays in a core's second-level cache.
_CACHE_BYTES = 1_000_000


class RecordedProducts:
    """The products of a `GradientGraph`, without the graph."""

    def __init__(self, graph: GradientGraph, tape: Tape) -> None:
        self._tape = tape
        self._active = graph.active
        self._sizes = graph.sizes
        self._split = graph.split
        like = tape.constants[0] if tape.constants else torch.empty(0)
        room = float(_CACHE_BYTES)
        if like.device.type != "cpu":
            room = _backend.free_memory(like) / 16
        self._block = int(min(MAX_COLUMNS, max(1.0, room / max(tape.largest, 1))))

    def add_products(self, rows: torch.Tensor, total: torch.Tensor, *, free: bool) -> None:
        """Add the products with the rows (k, n) to `total` (k, n); there is nothing to `free`."""
        del free
        parts = self._split(rows)
        vectors = [parts[i] for i in self._active]
        k, start = rows.shape[0], 0
        while start < k:
            stop = min(start + self._block, k)
            if stop - start < MIN_COLUMNS:
                stop = start + 1
            try:
                self._add(vectors, total, start, stop)
            except (RuntimeError, NotImplementedError):
                if stop - start == 1:
                    raise
                self._block = 1  # an operation that cannot be batched: column by column
                continue
            start = stop

    def _add(self, vectors: list[torch.Tensor], total: torch.Tensor, start: int, stop: int) -> None:
        if stop - start == 1:
            products = self._tape([v[start] for v in vectors], batched=False)
        else:
            with quiet_vmap():
                products = self._tape([v[start:stop] for v in vectors], batched=True)
        accumulate(products, total[start:stop, :], self._sizes)


def settled(graph: GradientGraph, like: torch.Tensor) -> Any:
    """What is kept of a batch: a recording where it is small and proves right, else the graph.

    `like` tells dtype and device. Cost: two products.
    """
    if not (graph.active and graph.n_bytes <= SMALL_BYTES and graph.n_nodes <= _MAX_NODES):
        return graph
    rng = torch.Generator(like.device).manual_seed(0)
    X = torch.randn((2, sum(graph.sizes)), generator=rng, dtype=like.dtype, device=like.device)
    parts = graph.split(X)
    first, second = ([parts[i][j] for i in graph.active] for j in range(2))
    try:
        tape = Tape(lambda *vectors: graph.products(vectors), first)
        found = tape(second, batched=False)
    except (RuntimeError, NotImplementedError, TypeError):
        return graph
    # A recording that took something of the first vector for a constant is far off on another.
    tolerance = 20 * _backend.eps(like.dtype) ** (3 / 4)
    for mine, theirs in zip(found, graph.products(second), strict=True):
        if (mine is None) != (theirs is None):
            return graph
        if mine is None or theirs is None:
            continue
        if not bool((mine - theirs).norm() <= tolerance * theirs.norm()):
            return graph
    return RecordedProducts(graph, tape)
