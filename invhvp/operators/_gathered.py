"""The gradients of all processes, in each of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _backend
from ..gradients import (
    DenseGradients,
    EmbeddingGradients,
    GradientMatrix,
    OuterProductGradients,
    StackedGradients,
    StreamedGradients,
)
from ..protocols import Array, Processes
from .base import LinearOperator

_KINDS: tuple[type[GradientMatrix], ...] = (
    DenseGradients,
    OuterProductGradients,
    EmbeddingGradients,
    StackedGradients,
)


def gathered(G: GradientMatrix, processes: Processes) -> Any:
    """The rows of all processes in the order of their ranks; factors stay factors.

    Blocks that are factored in some processes and dense in others become dense. Samples of other
    length (T) are padded with terms that are zero. Raises TypeError for streamed gradients in any
    process. Cost: the memory of all rows, and two sums of them.
    """
    streamed = everyones(processes, G.like, isinstance(G, StreamedGradients))
    if streamed.any():
        msg = (
            "the gradients of several processes are gathered where all of them are kept, but "
            f"processes {np.flatnonzero(streamed).tolist()} stream theirs: raise memory=, or use "
            "a method that needs products alone"
        )
        raise TypeError(msg)
    return _gathered(G, processes)


def _gathered(G: GradientMatrix, processes: Processes) -> GradientMatrix:
    kind = next((i for i, cls in enumerate(_KINDS) if isinstance(G, cls)), -1)
    alike = len(set(everyones(processes, G.like, kind).tolist())) == 1
    if alike and isinstance(G, StackedGradients):
        blocks = {name: _gathered(block, processes) for name, block in G.blocks.items()}
        return StackedGradients(blocks, layout=G.layout)
    if alike and isinstance(G, OuterProductGradients):
        # Rows that share their inputs go on sharing them where it is as many in every process.
        shared = G.shape[0] // max(1, G.distinct_inputs.shape[0])
        alike = len(set(everyones(processes, G.like, shared).tolist())) == 1
        inputs = G.distinct_inputs if alike else G.inputs
        d, a = (_terms(x, processes, G.like) for x in (G.output_grads, inputs))
        return OuterProductGradients(output_grads=d, inputs=a, layout=G.layout)
    if alike and isinstance(G, EmbeddingGradients):
        d, indices = (_terms(x, processes, G.like) for x in (G.output_grads, G.indices))
        return EmbeddingGradients(
            output_grads=d, indices=indices, n_rows=G.block_shape[0], layout=G.layout
        )
    return DenseGradients(_rows(G.to_dense(), processes, G.like), layout=G.layout)


def _rows(x: Array, processes: Processes, like: Array) -> Array:
    """Every process's x (N, size), one after the other: a sum with zeros is exact."""
    xp = _backend.namespace(x)
    counts = everyones(processes, like, x.shape[0]).astype(int)
    before, after = counts[: processes.rank].sum(), counts[processes.rank + 1 :].sum()
    parts = [_zeros(x, (int(n), *x.shape[1:])) for n in (before, after)]
    return processes(xp.concat([parts[0], x, parts[1]], axis=0))


def _terms(x: Array, processes: Processes, like: Array) -> Array:
    """The same of x (N, T, ...), where T may differ."""
    most = int(everyones(processes, like, x.shape[1]).max())
    rest = _zeros(x, (x.shape[0], most - x.shape[1], *x.shape[2:]))
    return _rows(_backend.namespace(x).concat([x, rest], axis=1), processes, like)


def _zeros(x: Array, shape: tuple[int, ...]) -> Array:
    return _backend.namespace(x).zeros(shape, dtype=x.dtype, device=_backend.device(x))


def agreed(A: LinearOperator, value: float, reduce: Any = None) -> float:
    """The least value of all processes that take part in the products of A, or share vectors.

    What depends on a clock or on free memory must not differ between them: where one stops or
    solves narrower blocks alone, the others wait for ever. Cost: nothing for one process.
    """
    processes = reduce if hasattr(reduce, "rank") else A.processes
    return value if processes is None else float(everyones(processes, A.like, value).min())


def everyones(processes: Processes, like: Array, value: float) -> np.ndarray:
    """The value of each process, (size,) float64, on the host of each of them."""
    mine = np.zeros(processes.size)
    mine[processes.rank] = float(value)
    # Counts beyond 2^24 are not float32 numbers.
    wide = _backend.namespace(like).float64 if _backend.has_float64(like) else like.dtype
    total = processes(_backend.from_host(mine, like, dtype=wide))
    return np.asarray(_backend.to_host(total), dtype=np.float64)
