"""Gradients of every sample's loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from invhvp.gradients import DenseGradients

from .data import Batch, read
from .hessian import prepare
from .objective import BatchLoss, Loss, Model, Objective, Reduction
from .parameters import Tree


def per_sample_gradients(
    model: Model | None = None,
    loss: Loss | None = None,
    params: Tree = None,
    data: Any = None,
    *,
    batch_loss: BatchLoss | None = None,
    reduction: Reduction = "mean",
    batch_size: int | None = None,
) -> DenseGradients:
    """Compute the gradients ∇ℓ_i of every sample's loss, an N × n matrix with samples in rows.

    With sample weights row i is w_i ∇ℓ_i. Arguments are those of `hessian`.

    Cost: one gradient of the loss a sample. Memory: N n numbers, and while a batch is computed
    its activations for every sample.

    Example:
        >>> import jax.numpy as jnp, invhvp_jax as ij
        >>> loss = lambda z, y: jnp.mean((z - y) ** 2)
        >>> data = (jnp.eye(3), jnp.ones(3))
        >>> ij.per_sample_gradients(lambda w, x: x @ w, loss, jnp.zeros(3), data).shape
        (3, 3)
    """
    objective = prepare(model, loss, params, batch_loss=batch_loss, reduction=reduction)
    batches = read(data, batch_size)
    objective.check(batches)
    parameters = objective.parameters

    @jax.jit
    def weighted(vector: jax.Array, batch: Batch) -> jax.Array:
        found, weight = rows(objective, vector, batch), objective.weight(batch)
        return found if weight is None else found * weight.astype(found.dtype)[:, None]

    parts = [weighted(parameters.vector, batch) for batch in batches]
    whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return DenseGradients(whole, layout=parameters.layout)


def rows(objective: Objective, vector: jax.Array, batch: Batch) -> jax.Array:
    """∇ℓ_i of a batch (N, n), without weights."""
    gradient = jax.grad(objective.of_sample)
    return jax.vmap(lambda sample: gradient(vector, sample))(batch)
