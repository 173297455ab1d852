"""The loss of every sample, and the proof that a batch's loss is made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from invhvp import _backend

from .data import Batch, count, parts, take
from .parameters import Parameters, Tree

Model: TypeAlias = Callable[[Tree, Any], Any]
Loss: TypeAlias = Callable[[Any, Any], jax.Array]
BatchLoss: TypeAlias = Callable[[Tree, Batch], jax.Array]
Reduction: TypeAlias = Literal["mean", "sum", "none"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is differentiated: ℓ_i, the loss of sample i alone, weighted by its sample weight.

    Args:
        model: (params, x) → outputs with a row for each sample, or None with `batch_loss`.
        loss: loss(output, target), reduced over the batch as `reduction` says.
        batch_loss: instead of both, f(params, batch) → per-sample losses (N,).
        parameters: their structure.
    """

    model: Model | None
    loss: Loss | None
    batch_loss: BatchLoss | None
    reduction: Reduction
    parameters: Parameters

    def __post_init__(self) -> None:
        if (self.loss is None) == (self.batch_loss is None):
            raise TypeError("pass either model and loss, functions, or batch_loss=")
        if (self.model is None) != (self.loss is None):
            raise TypeError("model and loss go together; batch_loss= needs neither")
        if self.reduction not in ("mean", "sum", "none"):
            msg = f'reduction= takes "mean", "sum" or "none", got {self.reduction!r}'
            raise ValueError(msg)

    def total(self, vector: jax.Array, batch: Batch) -> jax.Array:
        """Σ w_i ℓ_i, 0-d."""
        weight = self.weight(batch)
        losses = self.losses(vector, batch)
        return jnp.sum(losses if weight is None else losses * weight.astype(losses.dtype))

    def losses(self, vector: jax.Array, batch: Batch) -> jax.Array:
        """ℓ_i (N,), without weights."""
        params = self.parameters.tree(vector)
        if self.batch_loss is not None:
            return self.batch_loss(params, batch)
        assert self.model is not None
        x, y, _ = parts(batch)
        return jax.vmap(self.of_output)(self.model(params, x), y)

    def of_sample(self, vector: jax.Array, sample: Batch) -> jax.Array:
        """ℓ_i, 0-d, of the sample as a batch of one."""
        alone = jax.tree_util.tree_map(lambda leaf: leaf[None], sample)
        return self.losses(vector, alone).reshape(())

    def of_output(self, output: Any, target: Any) -> jax.Array:
        """ℓ_i, 0-d, of the outputs of one sample."""
        assert self.loss is not None
        alone = jax.tree_util.tree_map(lambda leaf: leaf[None], (output, target))
        return self.loss(*alone).reshape(())

    def outputs(self, vector: jax.Array, x: Any) -> jax.Array:
        """The outputs of every sample as one row (N, m)."""
        assert self.model is not None
        leaves = jax.tree_util.tree_leaves(self.model(self.parameters.tree(vector), x))
        return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)

    def of_row(self, vector: jax.Array, x: Any) -> Callable[[jax.Array, Any], jax.Array]:
        """ℓ_i as a function of a row (m,) of `outputs` and a target."""
        assert self.model is not None
        like = jax.eval_shape(self.model, self.parameters.tree(vector), x)
        leaves, structure = jax.tree_util.tree_flatten(like)

        def loss(row: jax.Array, target: Any) -> jax.Array:
            found, start = [], 0
            for leaf in leaves:
                stop = start + leaf.size // leaf.shape[0]
                found.append(row[start:stop].reshape(leaf.shape[1:]))
                start = stop
            return self.of_output(jax.tree_util.tree_unflatten(structure, found), target)

        return loss

    def weight(self, batch: Batch) -> Any:
        """Sample weights (N,), or None."""
        return None if self.batch_loss is not None else parts(batch)[2]

    def weight_sum(self, batches: list[Batch]) -> Any:
        """Σ w_i over all batches: the number of samples where there are no weights."""
        sums = [self.weight(batch) for batch in batches]
        return sum(
            count(batch) if w is None else jnp.sum(jnp.asarray(w, self.parameters.vector.dtype))
            for batch, w in zip(batches, sums, strict=True)
        )

    # ---------------------------------------------------------------------------------- checks

    def check(self, batches: list[Batch]) -> jax.Array:
        """Raise ValueError unless the loss of a batch is made of those of its samples alone.

        Shapes are checked always, values and derivatives where nothing is traced. Returns an array
        of the parameters' dtype that is traced where anything in the loss is: by it the engine
        knows that there are no values to look at, also where only the data are traced, or numbers
        that the loss closes over.
        """
        vector, batch = self.parameters.vector, batches[0]
        n = count(batch)
        self._check_shapes(batch, n)
        if _backend.is_tracing(vector):
            return vector
        seen = [leaf for batch in batches for leaf in jax.tree_util.tree_leaves(batch)]
        for leaf in (*seen, *jax.make_jaxpr(self.total)(vector, batch).consts):
            if _backend.is_tracing(leaf):
                return jnp.asarray(leaf).reshape(-1)[:1].astype(vector.dtype)
        rows = take(batch, slice(0, min(n, 8)))
        with jax.ensure_compile_time_eval():
            misfits = jax.device_get(jax.jit(self._misfits)(vector, rows))
        if misfits[0] > 1:
            raise ValueError(
                "the loss of a sample depends on the other samples of its batch (batch "
                "statistics?): there are no per-sample losses to take the mean of"
            )
        if misfits[1] > 1:
            msg = (
                f"the loss of a batch is not the {self.reduction} of its samples' losses "
                "(class weights, ignored samples?); pass batch_loss=, a function of (params, "
                'batch) that returns one loss a sample, or loss with reduction="none"'
            )
            raise ValueError(msg)
        return vector

    def _misfits(self, vector: jax.Array, batch: Batch) -> tuple[Any, Any]:
        """Of losses in a batch and alone, and of slopes in the outputs; above 1 is too much."""
        alone = jax.vmap(lambda sample: self.of_sample(vector, sample))(batch)
        first = _misfit(self.losses(vector, batch), alone)
        loss = self.loss
        if loss is None or self.model is None:
            return first, 0.0
        x, y, _ = parts(batch)
        output = self.model(self.parameters.tree(vector), x)
        given = jax.grad(lambda z: jnp.sum(loss(z, y)))(output)
        summed = jax.grad(lambda z: jnp.sum(jax.vmap(self.of_output)(z, y)))(output)
        scale = 1.0 / count(batch) if self.reduction == "mean" else 1.0
        leaves = zip(*map(jax.tree_util.tree_leaves, (given, summed)), strict=True)
        found = [_misfit(left, scale * right) for left, right in leaves]
        return first, jnp.max(jnp.stack(found))

    def _check_shapes(self, batch: Batch, n: int) -> None:
        params = self.parameters.tree(self.parameters.vector)
        if self.batch_loss is not None:
            got = jax.eval_shape(self.batch_loss, params, batch)
            if getattr(got, "shape", None) != (n,):
                msg = f"batch_loss must return one loss a sample, shape ({n},), got {got}"
                raise ValueError(msg)
            return
        assert self.model is not None
        assert self.loss is not None
        x, y, _ = parts(batch)
        output = jax.eval_shape(self.model, params, x)
        shapes = [leaf.shape for leaf in jax.tree_util.tree_leaves(output)]
        if not all(shape and shape[0] == n for shape in shapes):
            msg = f"the model's output must have {n} rows, one a sample, got shapes {shapes}"
            raise ValueError(msg)
        wanted = (n,) if self.reduction == "none" else ()
        got = jax.eval_shape(self.loss, output, y)
        if got.shape != wanted:
            hint = '; pass reduction="none"' if got.shape == (n,) else ""
            msg = (
                f"loss with reduction={self.reduction!r} must return shape {wanted}, got "
                f"{got.shape}{hint}"
            )
            raise ValueError(msg)


def _misfit(a: jax.Array, b: jax.Array) -> jax.Array:
    """Largest difference in units of what rounding explains; NaN is equal to NaN."""
    scale = jnp.max(jnp.abs(b))
    unit = _backend.eps(b.dtype) ** 0.6 * jnp.where(jnp.isfinite(scale), scale, 1.0)
    equal = (a == b) | jnp.isnan(b)
    return jnp.max(jnp.where(equal, 0.0, jnp.abs(a - b) / jnp.maximum(unit, 1e-30)))
