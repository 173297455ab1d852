"""Processes that share the data: torch.distributed as the sum that the engine asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import distributed as dist

from invhvp.operators import LinearOperator
from invhvp.operators.data_parallel import data_parallel, everyones

from . import samples
from .parameters import Parameters

Distributed: TypeAlias = Any
"""None for one process, True for the default group, or a `torch.distributed.ProcessGroup`."""


class AllReduce:
    """The sum of an array over a process group: gloo on CPUs, NCCL on GPUs.

    Takes tensors, and NumPy or CuPy arrays through shared memory; what it is given may be
    overwritten.

    Args:
        group: a process group; by default the one of `init_process_group`.

    Raises RuntimeError where there is no process group. Cost: one all-reduce a call.

    Example:
        >>> import torch, invhvp as ih, invhvp_torch as it
        >>> it.AllReduce()
        Traceback (most recent call last):
        ...
        RuntimeError: no process group: start with torchrun and call ...init_process_group()
    """

    def __init__(self, group: Any = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "no process group: start with torchrun and call "
                "torch.distributed.init_process_group()"
            )
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        if self.rank < 0:
            raise RuntimeError("this process is not a member of the process group")

    def __call__(self, x: Any, /) -> Any:
        if isinstance(x, torch.Tensor):
            return self._sum(x)
        module = type(x).__module__.split(".")[0]
        if module == "numpy":
            return self._sum(torch.from_numpy(x if x.flags.writeable else x.copy())).numpy()
        if module == "cupy":
            import cupy

            return cupy.from_dlpack(self._sum(torch.from_dlpack(x)))
        msg = f"AllReduce takes torch, NumPy and CuPy arrays, got {type(x).__name__} of {module}"
        raise TypeError(msg)

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        # Columns of products are transposed rows: all processes sum rows, whatever they hold, as
        # entries meet by their place in memory.
        rows = x.detach().mT.contiguous() if x.ndim == 2 else x.detach().contiguous()
        dist.all_reduce(rows, group=self.group)
        return rows.mT if x.ndim == 2 else rows

    def __repr__(self) -> str:
        return f"AllReduce(process {self.rank} of {self.size})"

    def __reduce__(self) -> Any:
        return (type(self), (self.group,))


def processes_of(distributed: Distributed) -> AllReduce | None:
    """What `distributed=` asks for; None for one process alone."""
    if distributed is None or distributed is False:
        return None
    if isinstance(distributed, AllReduce):
        return distributed
    if distributed is True:
        return AllReduce()
    if dist.is_available() and isinstance(distributed, dist.ProcessGroup):
        return AllReduce(distributed)
    msg = (
        f"distributed= takes True or a torch.distributed.ProcessGroup, got "
        f"{type(distributed).__name__}"
    )
    raise TypeError(msg)


def own_seed(rng: int, processes: AllReduce | None) -> int:
    """A seed for what is drawn for the samples of this process alone."""
    return rng if processes is None else rng + 1_000_003 * processes.rank


def across(
    A: LinearOperator, processes: AllReduce | None, *, share: float, count: float | None
) -> LinearOperator:
    """The mean over all processes of operators that are means over `share` samples of each.

    A `count` of the caller's is the divisor of all processes, and of A already.
    """
    if processes is None:
        return A
    if count is not None:
        return data_parallel(A, share=float(count), count=float(count), processes=processes)
    return data_parallel(A, share=share, processes=processes)


def check_same_model(processes: AllReduce | None, selected: Parameters) -> None:
    """ValueError where the parameters of processes differ: a mean over them is of no model."""
    if processes is None:
        return
    mine = samples.fingerprint([p.detach() for p in selected.tensors])
    prints = everyones(processes, selected.like, mine).tolist()
    others = [rank for rank, value in enumerate(prints) if value != prints[0]]
    if others:
        msg = (
            f"the parameters of process {', '.join(map(str, others))} differ from those of "
            "process 0: load the same state in every process, or broadcast it from one"
        )
        raise ValueError(msg)


@contextmanager
def together(processes: AllReduce | None, like: torch.Tensor) -> Iterator[None]:
    """All processes come out of this block, or each raises: none waits for one that has failed.

    Nothing inside may wait for other processes.
    """
    if processes is None:
        yield
        return
    try:
        yield
    except BaseException:
        everyones(processes, like, 1.0)
        raise
    failed = everyones(processes, like, 0.0).nonzero()[0].tolist()
    if failed:
        msg = f"process {', '.join(map(str, failed))} of {processes.size} failed; see its error"
        raise RuntimeError(msg)
