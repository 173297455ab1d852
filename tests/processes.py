"""Processes of one computation, as threads: what torch.distributed does, on any array library."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

_PATIENCE = 60.0  # seconds that one thread waits for another: what hangs must fail


class Process:
    """One of `size` threads that sum arrays in the order of their ranks: the same bits for all."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, given: list[Any]) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._given = barrier, given
        self.sums: list[tuple[int, ...]] = []  # shapes, as they were summed

    def __call__(self, x: Any, /) -> Any:
        self.sums.append(tuple(x.shape))
        self._given[self.rank] = x
        self._barrier.wait(_PATIENCE)
        shapes = {tuple(y.shape) for y in self._given}
        assert len(shapes) == 1, f"processes sum arrays of different shapes: {shapes}"
        total = self._given[0]
        for y in self._given[1:]:
            total = total + y
        self._barrier.wait(_PATIENCE)
        return total


def run(
    size: int,
    work: Callable[[Process], Any],
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Any]:
    """What `work(process)` returns in each of `size` threads; the first error that is its own.

    `scope` is that of a backend: JAX's precision belongs to the thread.
    """
    barrier, given = threading.Barrier(size), [None] * size
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            with scope():
                results[rank] = work(Process(rank, size, barrier, given))
        except BaseException as error:
            errors.append(error)
            barrier.abort()  # nobody waits for one that has failed

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if errors:
        raise errors[0]
    return results
