"""What a fit of Kronecker factors does where several processes have a share of the data."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from invhvp.operators.data_parallel import everyones

from .distributed import AllReduce, together


@dataclass(frozen=True)
class Shards:
    """The processes of a fit, or one alone."""

    processes: AllReduce | None
    like: torch.Tensor

    @contextmanager
    def together(self) -> Iterator[None]:
        """A pass over the data of each: where one fails, all raise."""
        with together(self.processes, self.like):
            yield

    def add(self, *sums: Any) -> None:
        """Add to these accumulators those of the other processes."""
        if self.processes is not None:
            for found in sums:
                if found is not None:
                    found.add_processes(self.processes)

    def total(self, value: float) -> float:
        """The sum over the processes."""
        if self.processes is None:
            return value
        return float(everyones(self.processes, self.like, value).sum())

    def least(self, value: float) -> float:
        """The least of the processes."""
        if self.processes is None:
            return value
        return float(everyones(self.processes, self.like, value).min())

    def check_alike(self, said: Any) -> None:
        """ValueError where processes see other layers: their sums would not fit."""
        if self.processes is None:
            return
        prints = everyones(self.processes, self.like, zlib.crc32(repr(said).encode()))
        if len(set(prints.tolist())) > 1:
            raise ValueError(
                "processes disagree on which layers have Kronecker structure: pass the same "
                "model everywhere, and samples of one kind"
            )

    @property
    def name(self) -> str:
        """Which process this is, for the names of files; "" for one alone."""
        return "" if self.processes is None else f"{self.processes.rank}-of-{self.processes.size}"
