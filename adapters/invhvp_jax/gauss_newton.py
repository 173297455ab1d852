"""Gauss–Newton and empirical Fisher matrices of a mean loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from invhvp import _backend
from invhvp.gradients import DenseGradients, StreamedGradients
from invhvp.operators import LinearOperator, RankOneMean

from . import gradients
from .data import Batch, count, parts, read
from .hessian import MeanCurvature, prepare
from .objective import BatchLoss, Loss, Model, Objective, Reduction
from .parameters import Tree


def gauss_newton(
    model: Model | None = None,
    loss: Loss | None = None,
    params: Tree = None,
    data: Any = None,
    *,
    reduction: Reduction = "mean",
    memory: float | None = None,
    batch_size: int | None = None,
) -> LinearOperator:
    """Build the generalised Gauss–Newton matrix Σ w_i J_iᵀ H_i J_i / Σ w_i of the mean loss.

    J_i is the Jacobian of a sample's outputs (m of them) in the parameters, H_i the Hessian of its
    loss in the outputs, from the loss alone. Written as the mean of rank-one matrices, with m
    rows a sample, it has an exact damped inverse (`SampleSpace`), which is a strong preconditioner
    of the Hessian: `BlockCG(preconditioner=Surrogate(gauss_newton, SampleSpace()))`.

    `memory` is how many bytes the N m rows may take, by default half of what is free. Where they
    do not fit, and where something is traced (`jit`, `grad`), products run through the model
    instead. The repr says which. The other arguments are those of `hessian`.

    Raises ValueError where no row has curvature: a loss that is linear in the outputs; where the
    loss is not convex in them, rows do not exist: memory=0.

    Cost: with rows, m backward passes to build; products are then two GEMMs. Without rows, a
    column of a product costs three gradients.

    Source: Schraudolph (2002), equation 10.

    Example:
        >>> import jax.numpy as jnp, invhvp_jax as ij
        >>> loss = lambda z, y: jnp.mean((z - y) ** 2)
        >>> data = (2 * jnp.eye(3), jnp.ones(3))
        >>> K = ij.gauss_newton(lambda w, x: x @ w, loss, jnp.zeros(3), data)
        >>> K.gradients.shape, (K @ jnp.ones(3)).round(4)
        ((3, 3), Array([2.6667, 2.6667, 2.6667], dtype=float32))
    """
    if loss is None:
        raise TypeError("a Gauss-Newton matrix needs model and loss: it is one of a composition")
    objective = prepare(model, loss, params, batch_loss=None, reduction=reduction)
    batches = read(data, batch_size)
    like = objective.check(batches)
    vector = objective.parameters.vector
    outputs = jax.eval_shape(objective.outputs, vector, parts(batches[0])[0]).shape[1]
    n_rows = outputs * sum(count(batch) for batch in batches)
    if _fits(like, vector, n_rows, memory):
        found, lowest, largest = zip(
            *(jax.jit(_Roots(objective))(vector, batch) for batch in batches), strict=True
        )
        _check_curvature(min(map(float, lowest)), max(map(float, largest)), vector)
        return _mean(objective, batches, list(found))

    def product(vector: jax.Array, X: jax.Array, batch: Batch) -> jax.Array:
        x, y, weight = parts(batch)
        z, push = jax.linearize(lambda v: objective.outputs(v, x), vector)
        pull = jax.linear_transpose(push, vector)
        slope = jax.grad(objective.of_row(vector, x))

        def column(v: jax.Array) -> jax.Array:
            curved = jax.vmap(lambda z, y, u: jax.jvp(lambda z: slope(z, y), (z,), (u,))[1])
            bent = curved(z, y, push(v))
            bent = bent if weight is None else bent * weight.astype(bent.dtype)[:, None]
            return pull(bent)[0]

        return jax.vmap(column, in_axes=1, out_axes=1)(X)

    return MeanCurvature("GaussNewton", objective, product, batches, like)


def empirical_fisher(
    model: Model | None = None,
    loss: Loss | None = None,
    params: Tree = None,
    data: Any = None,
    *,
    batch_loss: BatchLoss | None = None,
    reduction: Reduction = "mean",
    memory: float | None = None,
    batch_size: int | None = None,
) -> LinearOperator:
    """Build the mean of w_i g_i g_iᵀ over the per-sample gradients at the given labels.

    Not the Fisher matrix, and no approximation of the Hessian where the model fits its labels.
    Rows beyond `memory` bytes (by default half of what is free) are computed again, batch by
    batch, at every product. The other arguments are those of `hessian`.

    Cost: one gradient a sample to build, N n numbers.

    Source: Kunstner, Balles and Hennig (2019) on what it is and is not.

    Example:
        >>> import jax.numpy as jnp, invhvp as ih, invhvp_jax as ij
        >>> loss = lambda z, y: jnp.mean((z - y) ** 2)
        >>> data = (jnp.eye(3), jnp.ones(3))
        >>> F = ij.empirical_fisher(lambda w, x: x @ w, loss, jnp.zeros(3), data)
        >>> ih.solve(F, jnp.ones(3), ih.SampleSpace(), damping=0.1).status.name
        'CONVERGED'
    """
    objective = prepare(model, loss, params, batch_loss=batch_loss, reduction=reduction)
    batches = read(data, batch_size)
    like = objective.check(batches)
    vector = objective.parameters.vector
    weights = [w for w in map(objective.weight, batches) if w is not None]
    if any(_backend.is_tracing(w) for w in weights):  # a root has no derivative where w = 0

        def product(vector: jax.Array, X: jax.Array, batch: Batch) -> jax.Array:
            G = gradients.rows(objective, vector, batch)
            return G.T @ (objective.weight(batch).astype(G.dtype)[:, None] * (G @ X))

        return MeanCurvature("EmpiricalFisher", objective, product, batches, like, psd=True)

    @jax.jit
    def rows(vector: jax.Array, batch: Batch) -> jax.Array:
        return _weighted(gradients.rows(objective, vector, batch), objective.weight(batch))

    n = sum(count(batch) for batch in batches)
    if _fits(like, vector, n, memory) or _backend.is_tracing(like):
        return _mean(objective, batches, [rows(vector, batch) for batch in batches])
    return _mean(objective, batches, lambda: (rows(vector, batch) for batch in batches))


class _Roots:
    """Rows √w_i r_icᵀJ_i (N m, n) with Σ_c r_ic r_icᵀ = H_i, and the extreme eigenvalues of H_i."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def __call__(self, vector: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        objective = self._objective
        x, y, weight = parts(batch)
        z = objective.outputs(vector, x)
        H = jax.vmap(jax.hessian(objective.of_row(vector, x)))(z, y)  # (N, m, m)
        values, vectors = jnp.linalg.eigh((H + jnp.swapaxes(H, 1, 2)) / 2)
        roots = jnp.sqrt(jnp.maximum(values, 0))[:, :, None] * jnp.swapaxes(vectors, 1, 2)
        roots = _weighted(roots, weight)

        def of_sample(x: Any, root: jax.Array) -> jax.Array:
            alone = jax.tree_util.tree_map(lambda leaf: leaf[None], x)
            _, pull = jax.vjp(lambda v: objective.outputs(v, alone)[0], vector)
            return jax.vmap(lambda r: pull(r)[0])(root)

        rows = jax.vmap(of_sample)(x, roots)
        # An H_i that is indefinite by rounding is so in units of its own largest eigenvalue.
        size = jnp.maximum(jnp.max(jnp.abs(values), axis=1), jnp.finfo(z.dtype).tiny)
        lowest = jnp.min(jnp.min(values, axis=1) / size)
        return rows.reshape(-1, vector.shape[0]), lowest, jnp.max(jnp.abs(values))


def _check_curvature(lowest: float, largest: float, like: jax.Array) -> None:
    if largest == 0:
        raise ValueError(
            "the loss is linear in the model's outputs, so that its Gauss-Newton matrix is zero: "
            "let the loss, not the model, compute what is curved, or use hessian"
        )
    if lowest < -1e3 * _backend.eps(like.dtype):
        raise ValueError(
            "the loss is not convex in the model's outputs, so that its Gauss-Newton matrix is no "
            "mean of rank-one matrices; pass memory=0 for products through the model"
        )


def _weighted(found: jax.Array, weight: Any) -> jax.Array:
    """√w_i times the part of sample i."""
    if weight is None:
        return found
    root = jnp.sqrt(jnp.asarray(weight, found.dtype))
    return found * root.reshape(-1, *[1] * (found.ndim - 1))


def _mean(
    objective: Objective, batches: list[Batch], found: list[jax.Array] | Callable[[], Any]
) -> RankOneMean:
    """(1/Σ w_i) Σ g gᵀ over the rows, held or streamed."""
    for w in map(objective.weight, batches):
        if w is not None and bool(jnp.any(jnp.asarray(w) < 0)):
            raise ValueError("sample weights must not be negative here: the curvature is a mean")
    total = float(objective.weight_sum(batches))
    if not (math.isfinite(total) and total > 0):
        msg = f"the sample weights must be finite with a positive sum, got {total}"
        raise ValueError(msg)
    layout = objective.parameters.layout
    if callable(found):
        n = sum(count(batch) for batch in batches)
        return RankOneMean(StreamedGradients(found, n, layout=layout), count=total)
    whole = found[0] if len(found) == 1 else jnp.concatenate(found)
    return RankOneMean(DenseGradients(whole, layout=layout), count=total)


def _fits(like: jax.Array, vector: jax.Array, n_rows: int, memory: float | None) -> bool:
    """Whether rows are worth holding: they fit, and their values are there."""
    if _backend.is_tracing(like):
        return False
    free = _backend.free_memory(vector) / 2 if memory is None else memory
    return n_rows * vector.shape[0] * _backend.itemsize(vector.dtype) <= free
