"""Products with the Hessian of a batch: recorded operations in place of autograd's graph."""

from __future__ import annotations

import math
from typing import Any

import torch

from invhvp import _backend

from .columns import Scratch
from .double_backward import MAX_COLUMNS, GradientGraph
from .tape import Tape

# Recording takes about a quarter of a millisecond a node.
_MAX_NODES = 2_000
# Below this it does not matter how much more a recording holds than the graph.
_UNNOTICED_BYTES = 16_000_000
# Columns go through together while the largest tensor that they make stays near the processor,
# and a few of them beyond that, where each step's own cost is shared (one core, milliseconds of 16
# columns by 1, 2, 4, 8 and 16 together: 64 hidden units, .7 MB a column, 19.3, 17.5, 15.5, 15.5,
# 16.1; convolutions, 1.6 MB, 103, 90, 83, 84, 88; 1024 hidden units, 5.2 MB, 2410, 2470, 2270,
# 2210, 2430).
_FEW = 4
_FEW_BYTES = 32_000_000
_CACHE_BYTES = 4_000_000


class RecordedProducts:
    """The products of a `GradientGraph`, without the graph.

    Args:
        graph: what was recorded.
        tape: the recording.
        scratch: memory for what lies between; of all batches together, which take turns.
    """

    def __init__(self, graph: GradientGraph, tape: Tape, scratch: Scratch) -> None:
        self._tape = tape
        self._scratch = scratch
        self._active = graph.active
        self._outputs = tape.outputs
        self.n_bytes = tape.n_bytes
        like = tape.constants[0] if tape.constants else torch.empty(0)
        largest = max(tape.largest, 1)
        if like.device.type == "cpu":
            block = max(min(_FEW, _FEW_BYTES / largest), _CACHE_BYTES / largest)
        else:
            block = _backend.free_memory(like) / 16 / largest
        self._block = int(min(MAX_COLUMNS, max(1.0, block)))

    def add_products(
        self, vectors: list[torch.Tensor], totals: list[torch.Tensor], *, free: bool
    ) -> None:
        """Add the products with k vectors, in parts of the parameters, to `totals`.

        There is nothing to `free`.
        """
        del free
        given = [vectors[i] for i in self._active]
        into = [totals[i] for i in self._outputs]
        k = len(vectors[0])
        step = -(-k // -(-k // self._block))  # of one size as far as possible: buffers fit again
        for start in range(0, k, step):
            rows = slice(start, start + step)
            self._tape.add([v[rows] for v in given], [t[rows] for t in into], self._scratch)


def settled(graph: GradientGraph, like: torch.Tensor, scratch: Scratch) -> Any:
    """What is kept of a batch: a recording where it proves right, else the graph.

    `like` tells dtype and device. Cost: five products.
    """
    if not graph.active or graph.n_nodes > _MAX_NODES:
        return graph
    rng = torch.Generator(like.device).manual_seed(0)
    X = torch.randn((2, sum(graph.sizes)), generator=rng, dtype=like.dtype, device=like.device)
    vectors = graph.split(X)
    first, second = ([vectors[i][j] for i in graph.active] for j in range(2))
    try:
        recorded = RecordedProducts(
            graph, Tape(lambda *parts: graph.products(parts), first), scratch
        )
        found = [torch.zeros_like(v) for v in vectors]
        recorded.add_products(vectors, found, free=False)
        right = _agree(found, [graph.products(v) for v in (first, second)], like)
    except Exception as error:  # whatever a recording trips over, the graph does without
        if _backend.is_out_of_memory(error):
            raise
        return graph
    # Constants may be what the graph computes anew.
    small = recorded.n_bytes <= max(2 * graph.n_bytes, _UNNOTICED_BYTES)
    return recorded if right and small else graph


def _agree(found: list[torch.Tensor], expected: list[Any], like: torch.Tensor) -> bool:
    """Whether products agree but for rounding.

    A recording that took something of the first vector for a constant is far off on the second.
    """
    eps = _backend.eps(like.dtype)
    for j, products in enumerate(expected):
        whole = math.hypot(*(float(p.norm()) for p in products if p is not None))
        for mine, theirs in zip(found, products, strict=True):
            theirs = torch.zeros_like(mine[j]) if theirs is None else theirs
            # Some parts of a product are rounding alone: a bias before a softmax's.
            tolerance = 20 * eps ** (3 / 4) * float(theirs.norm()) + 100 * eps * whole
            if not float((mine[j] - theirs).norm()) <= tolerance:
                return False
    return True
