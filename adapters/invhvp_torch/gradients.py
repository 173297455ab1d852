"""Per-sample gradients of a model's loss, as a structured matrix."""

from __future__ import annotations

import logging
from typing import Any

import torch

from invhvp.gradients import DenseGradients, GradientMatrix, StackedGradients, concatenate

from . import samples
from .capture import LinearCalls
from .data import as_batches, check_order
from .evaluation import check_independent, evaluation, seed
from .objective import BatchLoss, Loss, Objective, Reduction, close, is_separable
from .parameters import Parameters, Selection
from .sample_rows import graph_rows, vmap_rows

_LOG = logging.getLogger("invhvp.torch")


def per_sample_gradients(
    model: torch.nn.Module,
    loss: Loss | None = None,
    data: Any = None,
    targets: torch.Tensor | None = None,
    *,
    batch_loss: BatchLoss | None = None,
    parameters: Selection = None,
    training: bool = False,
    reduction: Reduction = "mean",
    batch_size: int | None = None,
    rng: int = 0,
) -> StackedGradients:
    """Compute the gradients ∇ℓ_i of every sample's loss, an N × n matrix with samples in rows.

    Weights of `nn.Linear` stay factored, as outer products of what a layer was given and what
    came back; all other parameters get exact dense rows, which a note in the log names. With
    sample weights row i is w_i ∇ℓ_i. Arguments are those of `hessian`; the data are read once,
    and may also be given as (model, loss, x, y).

    Raises ValueError for a shuffling loader and where the samples of a batch depend on each
    other (batch normalisation in training mode).

    Cost: one forward and one backward pass a batch, and as much again for parameters that are
    not of linear layers. The first batch is checked on two of its samples against gradients of
    their own losses; what does not agree is computed the slow way. Memory: N T (o + i) numbers
    for a linear layer applied T times a sample, N times their size for other parameters.

    Example:
        >>> import torch, invhvp_torch as it
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
        >>> it.per_sample_gradients(model, torch.nn.functional.cross_entropy, x, y).shape
        (4, 8)
    """
    if targets is not None:
        data = (data, targets)
    check_order(data)
    objective = Objective(model=model, loss=loss, batch_loss=batch_loss, reduction=reduction)
    selected = Parameters(model, parameters)
    check_independent(model, training=training)
    device = selected.like.device
    blocks: dict[str, list[GradientMatrix]] = {name: [] for name in selected.names}
    rows: _Rows | None = None
    sentinel = None
    with evaluation(model, training=training, device=device):
        batches = as_batches(data, batch_size, reiterable=False)
        for index, given in enumerate(batches):
            batch = samples.move(given, device)
            if rows is None:
                rows = _Rows(objective, selected, training=training, seed=rng)
                rows.probe(batch)
            found, sentinel = rows.of(batch, index, sentinel)
            for name, block in found.items():
                blocks[name].append(block)
    if rows is None:
        raise ValueError("the data have no batches")
    rows.log()
    joined = {name: _join(parts) for name, parts in blocks.items()}
    return StackedGradients(joined, layout=selected.layout)


class _Rows:
    """Gradients of one batch after another, each parameter in the cheapest way that is right."""

    def __init__(
        self, objective: Objective, parameters: Parameters, *, training: bool, seed: int
    ) -> None:
        self._objective = objective
        self._parameters = parameters
        self._training = training
        self._seed = seed
        self._factored = set(parameters.names)  # until the probe says otherwise
        self._vmapped = set(parameters.names)
        self._separable = False
        self._dense: dict[str, str] = {}

    def probe(self, batch: Any) -> None:
        """Decide on two samples, against the gradients of their own losses."""
        objective, names = self._objective, self._parameters.names
        forward = self._forward(batch, 0)
        self._separable = is_separable(forward, batch, training=self._training)
        # Where the model is sure of a sample, its gradient is little but rounding.
        chosen = torch.argsort(forward.losses().detach(), descending=True)[:2].tolist()
        if self._separable:
            rows = torch.tensor(chosen, device=self._parameters.like.device)
            batch, chosen = samples.take(batch, rows), list(range(len(chosen)))
        with LinearCalls(objective.model, self._parameters) as calls:
            losses = self._forward(batch, 0).losses()
        found = calls.blocks(losses, self._factored)
        truth = graph_rows(losses, self._parameters, list(names), chosen)
        self._factored = {
            name for name, block in found.items() if close(_rows(block)[chosen, :], truth[name])
        }
        rest = [name for name in names if name not in self._factored]
        self._vmapped = set()
        # Masks of training mode belong to the batch: samples alone would draw others.
        if rest and self._separable and not self._training:
            dense = vmap_rows(objective, self._parameters, rest, batch)
            self._vmapped = {
                name
                for name, rows in (dense or {}).items()
                if close(rows, truth[name], slack=100.0)  # another order of everything
            }

    def of(
        self, batch: Any, index: int, sentinel: Any
    ) -> tuple[dict[str, GradientMatrix], tuple[Any, Any] | None]:
        """The blocks of all parameters, and the sentinel of the next check."""
        with LinearCalls(self._objective.model, self._parameters) as calls:
            forward = self._forward(batch, index)
        sentinel = forward.check(sentinel)
        losses = forward.losses()
        blocks = calls.blocks(losses, self._factored) if self._factored else {}
        rest = [name for name in self._parameters.names if name not in blocks]
        quick = [name for name in rest if name in self._vmapped]
        if quick:
            dense = vmap_rows(self._objective, self._parameters, quick, batch) or {}
            self._add(blocks, dense, "vmap")
        slow = [name for name in rest if name not in blocks]
        if slow:
            self._add(blocks, self._one_by_one(batch, losses, slow), "sample by sample")
        return blocks, sentinel

    def _one_by_one(
        self, batch: Any, losses: torch.Tensor, names: list[str]
    ) -> dict[str, torch.Tensor]:
        n = losses.shape[0]
        if not self._separable or self._training:
            return graph_rows(losses, self._parameters, names, range(n))
        # A backward pass costs as much as the samples in the graph: few of them at once.
        parts = []
        for rows in torch.arange(n, device=losses.device).tensor_split(-(-n // 8)):
            piece = samples.take(batch, rows)
            some = self._objective.forward(piece).losses()
            parts.append(graph_rows(some, self._parameters, names, range(some.shape[0])))
        return {name: torch.cat([part[name] for part in parts]) for name in names}

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
        if self._dense:
            names = ", ".join(f"{name} ({how})" for name, how in self._dense.items())
            _LOG.info("dense per-sample gradients for %s", names)


def _rows(block: GradientMatrix) -> torch.Tensor:
    return block.to_dense()


def _join(parts: list[GradientMatrix]) -> GradientMatrix:
    if len({type(part) for part in parts}) > 1:
        parts = [DenseGradients(part.to_dense()) for part in parts]
    return concatenate(parts)
