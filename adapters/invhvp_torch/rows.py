"""Rows of derivatives, batch after batch, each parameter in the cheapest way that is right."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch

from invhvp import _backend
from invhvp.gradients import DenseGradients, GradientMatrix, StackedGradients, concatenate
from invhvp.layout import Layout

from . import samples
from .capture import Calls, Take
from .evaluation import seed
from .objective import Forward, Objective, close, is_separable
from .parameters import Parameters
from .sample_rows import graph_rows, vmap_rows
from .seeds import Seeds, Source

_PROBED = 4 << 20  # parameters whose dense rows are compared at once

_LOG = logging.getLogger("invhvp.torch")


class Rows:
    """Gradients of C scalars a sample; the C rows of a sample are together.

    Args:
        objective: model and loss.
        parameters: what is differentiated in.
        source: which scalars.
        training: whether the model is in training mode.
        seed: of what is random then.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: Parameters,
        source: Source,
        *,
        training: bool,
        seed: int,
    ) -> None:
        self._objective = objective
        self._parameters = parameters
        self._source = source
        self._training = training
        self._seed = seed
        self._factored = set(parameters.names)  # until the probe says otherwise
        self._vmapped = set(parameters.names)
        self._separable = False
        self._irregular: set[str] = set()
        self._dense: dict[str, str] = {}
        self.row_bytes = 0.0

    def probe(self, batch: Any) -> None:
        """Decide on two samples, against the gradients of their own scalars."""
        objective, names = self._objective, self._parameters.names
        with Calls(objective.model, self._parameters) as calls:
            forward = self._forward(batch, 0)
        self._separable = is_separable(forward, batch, training=self._training)
        # Two samples may go through a layer together where more of them do not.
        self._irregular = calls.used_otherwise(self._trial(forward).values(forward))
        # Where the model is sure of a sample, its gradient is little but rounding.
        chosen = torch.argsort(forward.losses().detach(), descending=True)[:2].tolist()
        device = self._parameters.like.device
        if self._separable:
            rows = torch.tensor(chosen, device=device)
            batch, chosen = samples.take(batch, rows), list(range(len(chosen)))
        with Calls(objective.model, self._parameters) as calls:
            forward = self._forward(batch, 0)
        seeds = self._trial(forward)
        values = seeds.values(forward)
        found = calls.blocks(values, self._factored)
        self._factored, truth, sizes = set(), {}, self._parameters.layout
        for group in _groups({name: sizes[name].size for name in names}):
            right = graph_rows(values[:, 0], self._parameters, group, chosen)
            for name in group:
                unit = calls.rounded.get(name, 0.0) / _backend.eps(right[name].dtype)
                slack = max(1.0, unit) ** (3 / 4)
                mine = found[name].to_dense()[chosen, :] if name in found else None
                if mine is not None and close(mine, right[name], slack=slack):
                    self._factored.add(name)
                else:
                    truth[name] = right[name]
        rest = list(truth)
        self.row_bytes = sum(found[name].nbytes for name in self._factored) / forward.n
        self.row_bytes += sum(rows.nbytes for rows in truth.values()) / len(chosen)
        self._vmapped = set()
        # Masks of training mode belong to the batch: samples alone would draw others.
        if rest and self._separable and not self._training:
            vectors = None if seeds.vectors is None else seeds.vectors[:, 0, :]
            dense = vmap_rows(objective, self._parameters, rest, batch, vectors)
            self._vmapped = {
                name
                for name, rows in (dense or {}).items()
                if close(rows, truth[name], slack=100.0)  # another order of everything
            }

    def _trial(self, forward: Any) -> Seeds:
        """One scalar a sample that no rounding spoils, of the kind that `source` gives."""
        if forward.output is None or self._source(forward, 0).vectors is None:
            return Seeds()
        flat = forward.flat().detach()
        slopes = torch.linspace(1, 2, flat.numel(), dtype=flat.dtype, device=flat.device)
        return Seeds(slopes.reshape(flat.shape)[:, None, :])

    @property
    def factored(self) -> frozenset[str]:
        """The parameters whose layers have a rule that proved right, for all of the first batch."""
        return frozenset(self._factored - self._irregular)

    def of(
        self,
        batch: Any,
        index: int,
        sentinel: Any,
        *,
        check: bool = True,
        take: Take | None = None,
    ) -> tuple[dict[str, GradientMatrix], Any, Forward]:
        """The blocks of all parameters, the sentinel of the next check, the forward pass.

        What `take` takes is not among the blocks.
        """
        with Calls(self._objective.model, self._parameters) as calls:
            forward = self._forward(batch, index)
        if check:
            sentinel = forward.check(sentinel)
        seeds = self._source(forward, index)
        values = seeds.values(forward)
        taken = frozenset() if take is None else take.names | take.skipped
        keep = len(self._factored | taken) < len(self._parameters.names)
        blocks = {}
        if self._factored:
            blocks = calls.blocks(values, self._factored, keep=keep, take=take)
        rest = [name for name in self._parameters.names if name not in blocks]
        rest = [name for name in rest if name not in taken]
        # A vmapped loss is that of the objective; a rescaled one goes through the graph.
        quick = [name for name in rest if name in self._vmapped and seeds.scale is None]
        if quick:
            self._add(blocks, self._vmap(batch, seeds, quick), "vmap")
        slow = [name for name in rest if name not in blocks]
        if slow:
            if not keep:  # a rule that does not fit this batch
                values = seeds.values(self._forward(batch, index))
            rows = self._one_by_one(batch, values, seeds, slow)
            self._add(blocks, rows, "sample by sample")
        return blocks, sentinel, forward

    def _vmap(self, batch: Any, seeds: Seeds, names: list[str]) -> dict[str, torch.Tensor]:
        if seeds.vectors is None:
            return vmap_rows(self._objective, self._parameters, names, batch) or {}
        columns = []
        for c in range(seeds.count):
            vectors = seeds.vectors[:, c, :]
            rows = vmap_rows(self._objective, self._parameters, names, batch, vectors)
            if rows is None:
                return {}
            columns.append(rows)
        return _interleaved(columns, names)

    def _one_by_one(
        self, batch: Any, values: torch.Tensor, seeds: Seeds, names: list[str]
    ) -> dict[str, torch.Tensor]:
        n = values.shape[0]
        if not self._separable or self._training:
            return self._graph_rows(values, names)
        # A backward pass costs as much as the samples in the graph: few of them at once.
        parts = []
        for rows in torch.arange(n, device=values.device).tensor_split(-(-n // 8)):
            forward = self._objective.forward(samples.take(batch, rows))
            parts.append(self._graph_rows(seeds.take(rows).values(forward), names))
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def _graph_rows(self, values: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
        n, columns = values.shape
        found = [
            graph_rows(values[:, c], self._parameters, names, range(n)) for c in range(columns)
        ]
        return _interleaved(found, names)

    def _add(
        self, blocks: dict[str, GradientMatrix], dense: dict[str, torch.Tensor], how: str
    ) -> None:
        for name, rows in dense.items():
            blocks[name] = DenseGradients(rows)
            self._dense[name] = how

    def _forward(self, batch: Any, index: int) -> Any:
        if self._training:
            seed(self._seed + index, self._parameters.like.device)
        return self._objective.forward(batch)

    def log(self) -> None:
        """Name the parameters that no layer's rule was right for."""
        if self._dense:
            names = ", ".join(f"{name} ({how})" for name, how in self._dense.items())
            _LOG.info("dense per-sample gradients for %s", names)


def _groups(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names in order, as many together as have no more than a few million parameters."""
    group: list[str] = []
    for name, size in sizes.items():
        if group and size + sum(sizes[other] for other in group) > _PROBED:
            yield group
            group = []
        group.append(name)
    yield group


def join(batches: list[dict[str, GradientMatrix]], layout: Layout) -> StackedGradients:
    """The samples of all batches, one after the other; the blocks leave the batches for it."""
    joined = {name: _join([blocks.pop(name) for blocks in batches]) for name in layout.names}
    return StackedGradients(joined, layout=layout)


def _join(parts: list[GradientMatrix]) -> GradientMatrix:
    # Which slices of a weight came together is also part of the structure.
    kinds = {(type(part), part.block_shape, *getattr(part, "blocks", ())) for part in parts}
    if len(kinds) > 1:
        parts = [DenseGradients(part.to_dense()) for part in parts]
    return concatenate(parts)


def _interleaved(
    columns: list[dict[str, torch.Tensor]], names: list[str]
) -> dict[str, torch.Tensor]:
    """Rows of C scalars (N, size) each, as (N C, size)."""
    if len(columns) == 1:
        return columns[0]
    return {name: torch.stack([rows[name] for rows in columns], 1).flatten(0, 1) for name in names}
