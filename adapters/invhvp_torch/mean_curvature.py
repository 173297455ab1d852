"""The mean of a curvature over samples: kept as rows, streamed, or through the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from invhvp import _backend
from invhvp.gradients import GradientMatrix, StackedGradients, StreamedGradients
from invhvp.operators import LinearOperator, RankOneMean

from .bridge import Bridge, TorchDoor, bridge_to
from .curvature import check_count
from .data import Cached, Streamed, read
from .distributed import Distributed, across, check_same_model, own_seed, processes_of, together
from .evaluation import check_independent, evaluation, seed
from .objective import Forward, Objective
from .output_curvature import NotConvexError, OutputCurvature
from .parameters import Parameters
from .rows import Rows, join
from .seeds import Source
from .through_model import ThroughModel

# Rows a sample beyond which recomputing them at every product is dearer than products through
# the model, which cost about two passes a column whatever the number of outputs.
_MOST_STREAMED = 32

THROUGH = "through the model"


@dataclass(frozen=True)
class Kind:
    """Which curvature.

    Args:
        name: for the repr.
        source: its rows, as derivatives of seeds.
        outputs: the Hessian in the outputs, where that is what it is made of; else its rows are
            few, and products through the model use the seeds.
    """

    name: str
    source: Source
    outputs: Callable[[Forward], OutputCurvature] | None


def build(
    kind: Kind,
    model: torch.nn.Module,
    loss: Any,
    data: Any,
    *,
    batch_loss: Any,
    parameters: Any,
    training: bool,
    reduction: Any,
    count: float | None,
    cache: Any,
    memory: float | None,
    batch_size: int | None,
    rng: int,
    distributed: Distributed,
    array_namespace: Any,
    transfer: bool,
) -> LinearOperator:
    """Read the data once, decide where the rows live, and make the operator."""
    processes = processes_of(distributed)
    selected = Parameters(model, parameters)
    bridge = bridge_to(array_namespace, selected.like, transfer=transfer)
    rng = own_seed(rng, processes)
    check_same_model(processes, selected)
    with together(processes, selected.like):
        observed = kind.outputs is not None and batch_loss is not None
        objective = Objective(
            model=model, loss=loss, batch_loss=batch_loss, reduction=reduction, observed=observed
        )
        check_independent(model, training=training)
        if count is not None:
            check_count(count, objective)
        budget = _budget(memory, selected)
        pass_ = Pass(objective, selected, kind.source, training=training, rng=rng)
        with evaluation(model, training=training, device=selected.like.device):
            batches = read(data, selected.like.device, cache=cache, batch_size=batch_size)
            where, definite = pass_.plan(batches, kind, budget)
            try:
                found = pass_.read(batches, keep=where == "cached", convex=where != THROUGH)
            except NotConvexError:
                where, definite = THROUGH, False
                found = pass_.read(batches, keep=False, convex=False)
        total = pass_.weight if count is None else float(count)
        if not (math.isfinite(total) and total > 0):
            msg = f"the sample weights must be finite with a positive sum, got {total}"
            raise ValueError(msg)
        said = f"{pass_.n} sample{'s' * (pass_.n != 1)}"
        if where == THROUGH:
            A: LinearOperator = ThroughModel(
                kind.name,
                objective=objective,
                parameters=selected,
                batches=batches,
                source=kind.source,
                outputs=kind.outputs,
                count=total,
                training=training,
                rng=rng,
                psd=definite,
                said=f"{said}, {where}",
            )
            A = A if bridge is None else bridge.operator(A)
        else:
            G = _matrix(found, pass_, batches, where, bridge)
            said += f", {G.shape[0]} rows "
            said += f"cached in {_size(G.nbytes)}" if where == "cached" else "streamed"
            said += "" if where == "cached" else f" from {len(batches)} batches"
            A = MeanCurvature(kind.name, G, count=total, said=said)
    return across(A, processes, share=total, count=count)


def _matrix(
    found: list[dict[str, GradientMatrix]],
    pass_: Pass,
    batches: Cached | Streamed,
    where: str,
    bridge: Bridge | None,
) -> GradientMatrix:
    """The rows, kept or computed again at every product."""
    layout = pass_.layout
    if where == "cached":
        G: GradientMatrix = join(found, layout)
        return G if bridge is None else bridge.gradients(G)
    convert = None if bridge is None else bridge.gradients
    rows = partial(pass_.stream, batches)
    return StreamedGradients(rows, pass_.n_rows, convert=convert, layout=layout)


class MeanCurvature(RankOneMean, TorchDoor):
    """The mean of rank-one matrices over the samples of a model; made by `gauss_newton` & co."""

    def __init__(self, name: str, gradients: GradientMatrix, *, count: float, said: str) -> None:
        super().__init__(gradients, count=count)
        self._name = name
        self._said = said

    def _matmat(self, X: Any, /) -> Any:
        G = self._gradients
        if not isinstance(G, StreamedGradients):
            return super()._matmat(X)
        total = _backend.namespace(X).zeros_like(X)
        for part in G.parts():  # one pass over the batches, not one each way
            total = total + part.T @ (part @ X)
        return total / self.count

    def __repr__(self) -> str:
        dtype = _backend.dtype_name(self.dtype)
        n = self.shape[0]
        return f"{self._name}({n}x{n}, {self._said}, {dtype}, {self.device})"


class Pass:
    """Passes over the data that give rows."""

    def __init__(
        self,
        objective: Objective,
        parameters: Parameters,
        source: Source,
        *,
        training: bool,
        rng: int,
    ) -> None:
        self._objective = objective
        self._parameters = parameters
        self.layout = parameters.layout
        self._rows = Rows(objective, parameters, source, training=training, seed=rng)
        self._training = training
        self._rng = rng
        self._source = source
        self._columns, self._definite = 1, True
        self.n, self.n_rows, self.weight = 0, 0, 0.0

    def plan(self, batches: Cached | Streamed, kind: Kind, budget: float) -> tuple[str, bool]:
        """Where the rows live, and whether the matrix is known to be positive semidefinite."""
        first = next(iter(batches))
        forward = self._forward(first, 0)
        if forward.n == 0:
            raise ValueError("batch 0 has no samples")
        forward.check(None)
        size = self._parameters.like.element_size()
        if kind.outputs is not None:
            curvature = kind.outputs(forward)
            self._definite = curvature.definite
            # The roots, and what they are made of.
            if 3.0 * forward.n * curvature.rank**2 * size > budget:
                return THROUGH, self._definite
        try:
            self._columns = columns = self._source(forward, 0).count
            if forward.n * columns * size > budget:
                return THROUGH, self._definite
            self._rows.probe(first)
        except NotConvexError:
            return THROUGH, False
        batch = self._rows.row_bytes * columns * forward.n
        if batch * len(batches) <= budget:
            return "cached", True
        if batch <= budget and columns <= _MOST_STREAMED:
            return "streamed", True
        return THROUGH, self._definite

    def read(
        self, batches: Cached | Streamed, *, keep: bool, convex: bool
    ) -> list[dict[str, GradientMatrix]]:
        """Count samples and prove conventions; the rows of all batches where they are kept."""
        found, sentinel = [], None
        self.n, self.n_rows, self.weight = 0, 0, 0.0
        for index, batch in enumerate(batches):
            if keep:
                blocks, sentinel, forward = self._rows.of(batch, index, sentinel)
                found.append(blocks)
            else:
                forward = self._forward(batch, index)
                sentinel = forward.check(sentinel)
                if convex and not self._definite:
                    self._source(forward, index)  # raises where it is not
            self.n_rows += forward.n * self._columns
            self.n += forward.n
            self.weight += forward.weight_sum()
        if keep:
            self._rows.log()
        return found

    def look_at(self, batches: Cached | Streamed) -> None:
        """Learn how rows come about from the first batch; count those of all."""
        self._rows.probe(next(iter(batches)))
        self.read(batches, keep=False, convex=False)
        self._rows.log()

    def stream(self, batches: Cached | Streamed) -> Iterator[StackedGradients]:
        """The rows batch by batch."""
        model, device = self._objective.model, self._parameters.like.device
        for index, batch in enumerate(batches):
            self._parameters.check_unchanged()
            # Left before the rows are handed over: the reader is not inside.
            with evaluation(model, training=self._training, device=device):
                blocks, _, _ = self._rows.of(batch, index, None, check=False)
            yield StackedGradients(blocks, layout=self._parameters.layout)

    def _forward(self, batch: Any, index: int) -> Forward:
        if self._training:
            seed(self._rng + index, self._parameters.like.device)
        return self._objective.forward(batch)


def _budget(memory: float | None, parameters: Parameters) -> float:
    if memory is None:
        return _backend.free_memory(parameters.like) / 2
    if isinstance(memory, bool) or not isinstance(memory, int | float) or not memory >= 0:
        msg = f"memory must be a number of bytes, at least 0, got {memory!r}"
        raise ValueError(msg)
    return float(memory)


def _size(n_bytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes} bytes"
