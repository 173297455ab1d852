"""Per-sample gradients that are computed again, batch by batch, wherever they are used."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from invhvp.gradients import StreamedGradients

from . import seeds
from .bridge import bridge_to
from .data import Cache, check_order, read
from .evaluation import check_independent, evaluation
from .mean_curvature import Pass
from .objective import BatchLoss, Loss, Objective, Reduction
from .parameters import Parameters, Selection


def streamed_gradients(
    model: torch.nn.Module,
    loss: Loss | None = None,
    data: Any = None,
    *,
    batch_loss: BatchLoss | None = None,
    parameters: Selection = None,
    training: bool = False,
    reduction: Reduction = "mean",
    cache: Cache = "auto",
    batch_size: int | None = None,
    rng: int = 0,
    array_namespace: Any = None,
    transfer: bool = False,
) -> StreamedGradients:
    """The gradients ∇ℓ_i of every sample's loss, of which one batch at a time is in memory.

    The same matrix (N, n) as that of `per_sample_gradients`, for training sets whose gradients do
    not fit even as factors: `ih.Influence(inverse, it.streamed_gradients(model, loss, loader))`.
    Arguments are those of `hessian`; the loader must give the same batches at every pass.

    Raises what `per_sample_gradients` raises, and RuntimeError where the data differ between
    passes or the parameters have changed since.

    Cost: a pass to count the samples; at every use one forward and one backward pass a batch.
    Memory: the factored gradients of a batch.

    Example:
        >>> import torch, invhvp_torch as it
        >>> model, loss = torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy
        >>> batches = [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))] * 5
        >>> it.streamed_gradients(model, loss, batches).shape
        (20, 8)
    """
    check_order(data)
    objective = Objective(model=model, loss=loss, batch_loss=batch_loss, reduction=reduction)
    selected = Parameters(model, parameters)
    bridge = bridge_to(array_namespace, selected.like, transfer=transfer)
    check_independent(model, training=training)
    pass_ = Pass(objective, selected, seeds.of_losses, training=training, rng=rng)
    with evaluation(model, training=training, device=selected.like.device):
        batches = read(data, selected.like.device, cache=cache, batch_size=batch_size)
        pass_.look_at(batches)
    convert = None if bridge is None else bridge.gradients
    rows = partial(pass_.stream, batches)
    return StreamedGradients(rows, pass_.n_rows, convert=convert, layout=selected.layout)
