"""Dense per-sample gradients of any parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.func import functional_call, grad, vmap

from invhvp import _backend

from . import samples
from .evaluation import quiet_vmap
from .objective import Objective
from .parameters import Parameters


def graph_rows(
    losses: torch.Tensor, parameters: Parameters, names: list[str], indices: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Rows (len(indices), size) of ∇ℓ_i, one backward pass a sample; right for any model."""
    chosen = [parameters.named[name] for name in names]
    rows = [
        torch.autograd.grad(
            losses[i], chosen, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for i in indices
    ]
    columns = zip(*rows, strict=True)
    return {
        name: torch.stack([_dense(g).reshape(-1) for g in column])
        for name, column in zip(names, columns, strict=True)
    }


def _dense(g: torch.Tensor) -> torch.Tensor:
    """A gradient that `nn.Embedding(sparse=True)` keeps by words, as it stands in the vector."""
    return g.to_dense() if g.is_sparse else g


def vmap_rows(
    objective: Objective,
    parameters: Parameters,
    names: list[str],
    batch: Any,
    seeds: torch.Tensor | None = None,
) -> dict[str, torch.Tensor] | None:
    """Rows (N, size) of ∇ℓ_i, all samples at once; None where the model cannot be vmapped.

    With `seeds` (N, m) rows of ∇⟨seed_i, output_i⟩ instead.
    """
    bound = _Bound(objective)
    values = {f"_objective_model.{name}": parameters.named[name].detach() for name in names}

    def scalar(values: dict[str, torch.Tensor], sample: Any, seed: Any) -> torch.Tensor:
        alone = samples.map_tensors(lambda t: t[None], sample)
        return functional_call(bound, values, (alone, seed))

    rows = next(samples.tensors(batch)).shape[0]
    size = sum(value.numel() for value in values.values()) * parameters.like.element_size()
    # Beside the result: as much again in pieces, and activations that are not known here.
    budget = _backend.free_memory(parameters.like) // 8
    chunk = int(max(1, min(rows, 256, budget // max(1, size))))
    in_dims = (None, 0, None if seeds is None else 0)
    try:
        with quiet_vmap():
            compute = vmap(grad(scalar), in_dims=in_dims, chunk_size=chunk)
            result = compute(values, batch, seeds)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        if _backend.is_out_of_memory(error):
            raise
        return None
    return {name: result[f"_objective_model.{name}"].detach().reshape(rows, -1) for name in names}


class _Bound(torch.nn.Module):
    """A scalar of one sample as a module, so that `functional_call` can replace parameters."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self._objective = objective
        self._objective_model = objective.model

    def forward(self, batch: Any, seed: torch.Tensor | None) -> torch.Tensor:
        forward = self._objective.forward(batch)
        return forward.total() if seed is None else (forward.flat()[0, :] * seed).sum()
