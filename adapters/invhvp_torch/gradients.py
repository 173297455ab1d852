"""Per-sample gradients of a model's loss, as a structured matrix."""

from __future__ import annotations

from typing import Any

import torch

from invhvp.gradients import GradientMatrix
from invhvp.operators.data_parallel import gathered

from . import samples, seeds
from .bridge import bridge_to
from .data import as_batches, check_order
from .distributed import Distributed, check_same_model, own_seed, processes_of, together
from .evaluation import check_independent, evaluation
from .objective import BatchLoss, Loss, Objective, Reduction
from .parameters import Parameters, Selection
from .rows import Rows, join


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
    distributed: Distributed = None,
    array_namespace: Any = None,
    transfer: bool = False,
) -> GradientMatrix:
    """Compute the gradients ∇ℓ_i of every sample's loss, an N × n matrix with samples in rows.

    Weights of linear layers, convolutions, embeddings and attention stay factored, as outer
    products of what a layer was given and what came back, where that is smaller than the rows;
    scales and shifts of normalisations come from the same backward pass. All other parameters
    get exact dense rows, which a note in the log names. With sample weights row i is w_i ∇ℓ_i.
    Arguments are those of `hessian`; the data are read once, and may also be given as
    (model, loss, x, y).

    With `distributed=` each process gets the rows of all of them, in the order of their ranks.

    Raises ValueError for a shuffling loader and where the samples of a batch depend on each
    other (batch normalisation in training mode).

    Cost: one forward and one backward pass a batch, and as much again for parameters of layers
    that have no rule here. The first batch is checked on two of its samples against gradients of
    their own losses; what does not agree is computed the slow way. Memory: N T (o + i) numbers
    for an (o, i) weight applied T times a sample, or N o i where that is less.

    Example:
        >>> import torch, invhvp_torch as it
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
        >>> it.per_sample_gradients(model, torch.nn.functional.cross_entropy, x, y).shape
        (4, 8)
    """
    if targets is not None:
        data = (data, targets)
    processes = processes_of(distributed)
    selected = Parameters(model, parameters)
    bridge = bridge_to(array_namespace, selected.like, transfer=transfer)
    check_same_model(processes, selected)
    with together(processes, selected.like):
        check_order(data)
        objective = Objective(model=model, loss=loss, batch_loss=batch_loss, reduction=reduction)
        check_independent(model, training=training)
        device = selected.like.device
        found: list[dict[str, GradientMatrix]] = []
        seed = own_seed(rng, processes)
        rows = Rows(objective, selected, seeds.of_losses, training=training, seed=seed)
        sentinel = None
        with evaluation(model, training=training, device=device):
            batches = as_batches(data, batch_size, reiterable=False)
            for index, given in enumerate(batches):
                batch = samples.move(given, device)
                if index == 0:
                    rows.probe(batch)
                blocks, sentinel, _ = rows.of(batch, index, sentinel)
                found.append(blocks)
        if not found:
            raise ValueError("the data have no batches")
        rows.log()
        G: GradientMatrix = join(found, selected.layout)
    if processes is not None:
        G = gathered(G, processes)
    return G if bridge is None else bridge.gradients(G)
