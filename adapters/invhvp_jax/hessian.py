"""The Hessian of a mean loss, as an operator, and what all operators here are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from invhvp.operators import LinearOperator

from .data import Batch, count, read
from .objective import BatchLoss, Loss, Model, Objective, Reduction
from .parameters import Parameters, Tree

Product = Callable[[jax.Array, jax.Array, Batch], jax.Array]


def hessian(
    model: Model | None = None,
    loss: Loss | None = None,
    params: Tree = None,
    data: Any = None,
    *,
    batch_loss: BatchLoss | None = None,
    reduction: Reduction = "mean",
    batch_size: int | None = None,
) -> LinearOperator:
    """Build the Hessian of the mean loss Σ w_i ∇²ℓ_i / Σ w_i in the parameters.

    ℓ_i is the loss of sample i alone, so that batch size, order and a short last batch change
    nothing but rounding. The operator works on arrays (n, k) of the parameters' dtype, in the
    order of `to_array`; its blocks are named by the paths of the leaves.

    Args:
        model: model(params, x) → outputs, with one row a sample.
        loss: loss(output, target), a mean over the samples of a batch.
        params: any pytree of floating arrays of one dtype.
        data: one tuple (x, y) or (x, y, sample_weight), or an iterable of such batches, which is
            read once and kept; NumPy arrays stay on the host and are moved at every product.
        batch_loss: instead of `model` and `loss`: f(params, batch) → per-sample losses (N,), for
            batches that are pytrees of arrays with one row a sample.
        reduction: what `loss` does over a batch: "mean", "sum", or "none" (losses (N,)).
        batch_size: samples at once where the data are one tuple; by default all.

    Raises TypeError or ValueError at the door, and for a loss whose batch mean is not the mean
    over its samples.

    Cost: a column of a product costs about two gradients of the loss; the columns of a block run
    together, and so does their memory. Compiled once for every shape of batch and block.

    Source: Pearlmutter (1994): forward over reverse differentiation.

    Example:
        >>> import jax.numpy as jnp, invhvp_jax as ij
        >>> model = lambda w, x: x @ w
        >>> loss = lambda z, y: jnp.mean((z - y) ** 2)
        >>> H = ij.hessian(model, loss, jnp.zeros(3), (2 * jnp.eye(3), jnp.ones(3)))
        >>> (H @ jnp.ones(3)).round(4)
        Array([2.6667, 2.6667, 2.6667], dtype=float32)
    """
    objective = prepare(model, loss, params, batch_loss=batch_loss, reduction=reduction)
    batches = read(data, batch_size)
    like = objective.check(batches)

    def product(vector: jax.Array, X: jax.Array, batch: Batch) -> jax.Array:
        gradient = jax.grad(objective.total)
        _, push = jax.linearize(lambda v: gradient(v, batch), vector)
        return jax.vmap(push, in_axes=1, out_axes=1)(X)

    return MeanCurvature("Hessian", objective, product, batches, like)


def prepare(
    model: Model | None,
    loss: Loss | None,
    params: Tree,
    *,
    batch_loss: BatchLoss | None,
    reduction: Reduction,
) -> Objective:
    """The objective, with its arguments checked."""
    if params is None:
        raise TypeError("params= is missing: the pytree that the loss is a function of")
    return Objective(
        model=model,
        loss=loss,
        batch_loss=batch_loss,
        reduction=reduction,
        parameters=Parameters(params),
    )


class MeanCurvature(LinearOperator):
    """(1/Σ w_i) Σ_b C_b for the curvature C_b of each batch, known through a jitted product."""

    def __init__(
        self,
        name: str,
        objective: Objective,
        product: Product,
        batches: list[Batch],
        like: jax.Array,
        *,
        psd: bool = False,
    ) -> None:
        parameters = objective.parameters
        super().__init__(parameters.n, like=like, psd=psd, layout=parameters.layout)
        self._name = name
        self._vector = parameters.vector
        self._product = jax.jit(product)
        self._batches = batches
        self._count = objective.weight_sum(batches)

    @property
    def n_samples(self) -> int:
        """Number of samples that the mean is over."""
        return sum(count(batch) for batch in self._batches)

    def _matmat(self, X: jax.Array, /) -> jax.Array:
        if X.shape[1] == 0:
            return X
        total = self._product(self._vector, X, self._batches[0])
        for batch in self._batches[1:]:
            total = total + self._product(self._vector, X, batch)
        return total / self._count

    def _describe(self) -> str:
        n, b = self.n_samples, len(self._batches)
        size = f"{n} sample{'s' * (n != 1)} in {b} batch{'es' * (b != 1)}"
        return f"{self._name} {super()._describe()}, {size}"
