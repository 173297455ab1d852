"""The first pass over the data: what is counted, proved and measured before any product."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

from invhvp import _backend

from . import samples
from .data import Cached, Streamed
from .double_backward import probe
from .evaluation import seed
from .objective import Objective, is_separable
from .parameters import Parameters

KeepGraph: TypeAlias = bool | Literal["auto"]

# Batches join up to this much of a graph: a larger one keeps a processor busy by itself.
JOINED_BYTES = 16_000_000


class Survey:
    """The pass at construction: counts samples, proves conventions, looks at one graph."""

    def __init__(
        self, objective: Objective, parameters: Parameters, *, training: bool, rng: int
    ) -> None:
        self._objective = objective
        self._parameters = parameters
        self._training = training
        self._rng = rng
        self.sizes: list[int] = []
        self.count = 0.0
        self.bytes_per_sample = 0.0
        self.separable = True

    def look_at(self, batches: Cached | Streamed) -> None:
        sentinel = None
        for index, batch in enumerate(batches):
            if self._training:
                seed(self._rng + index, self._parameters.like.device)
            forward = self._objective.forward(batch)
            if forward.n == 0:
                msg = f"batch {index} has no samples"
                raise ValueError(msg)
            sentinel = forward.check(sentinel)
            self.sizes.append(forward.n)
            self.count += forward.weight_sum()
            self.separable = self.separable and samples.is_sliceable(batch, forward.n)
            if index == 0:
                self.separable = is_separable(forward, batch, training=self._training)
                size = probe(self._objective, self._parameters, batch)
                self.bytes_per_sample = size / forward.n
        if not (math.isfinite(self.count) and self.count > 0):
            msg = f"the sample weights must be finite with a positive sum, got {self.count}"
            raise ValueError(msg)

    def merged(self, whole: Any, batches: Cached) -> Cached:
        """Batches that are too small to keep a processor busy, several in one."""
        total = sum(self.sizes)
        step = total
        if self.bytes_per_sample > 0:
            room = float(JOINED_BYTES)
            if self._parameters.like.device.type != "cpu":
                room = _backend.free_memory(self._parameters.like) / 32
            step = min(total, int(room / self.bytes_per_sample))
        if step <= max(self.sizes):
            return batches
        self.sizes = [min(step, total - start) for start in range(0, total, step)]
        views = [samples.take(whole, slice(i, i + step)) for i in range(0, total, step)]
        return Cached(views, whole=whole)

    def n_to_keep(self, keep_graph: KeepGraph) -> int:
        """How many batches' graphs are kept."""
        if keep_graph is not True and keep_graph is not False:
            budget = _backend.free_memory(self._parameters.like) // 2
            for index, size in enumerate(self.sizes):
                budget -= self.bytes_per_sample * size
                if budget < 0:
                    return index
        return len(self.sizes) if keep_graph else 0
