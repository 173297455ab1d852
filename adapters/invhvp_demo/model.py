"""Multinomial logistic regression: loss, gradients and curvature in closed form.

The parameter vector holds the weight (10 x 64, row-major) and then the bias (10). Everything
here is a function of that vector and of samples, on any array library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import array_api_compat as compat

import invhvp as ih

Array = Any

_AT_ONCE = 16  # columns of a product: what is computed for them stays in the processor's cache


@dataclass(frozen=True)
class Samples:
    """Images (N, d) and one-hot labels (N, c) of one array library, dtype and device."""

    images: Array
    labels: Array

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def layout(self) -> ih.Layout:
        """Weight and bias in the parameter vector."""
        c, d = self.labels.shape[1], self.images.shape[1]
        return ih.Layout.from_shapes({"weight": (c, d), "bias": (c,)})


def start(samples: Samples) -> Array:
    """Zeros (p,): the convex objective makes any start as good as another."""
    xp = compat.array_namespace(samples.images)
    kind = {"dtype": samples.images.dtype, "device": compat.device(samples.images)}
    return xp.zeros((samples.layout.n,), **kind)


def logits(w: Array, samples: Samples) -> Array:
    """Class scores (N, c)."""
    xp = compat.array_namespace(w)
    layout = samples.layout
    weight = xp.reshape(layout.take(w, "weight"), layout["weight"].shape)
    return samples.images @ weight.T + layout.take(w, "bias")[None, :]


def probabilities(w: Array, samples: Samples) -> Array:
    """Softmax of the class scores, (N, c)."""
    xp = compat.array_namespace(w)
    z = logits(w, samples)
    e = xp.exp(z - xp.max(z, axis=1, keepdims=True))
    return e / xp.sum(e, axis=1, keepdims=True)


def losses(w: Array, samples: Samples) -> Array:
    """Cross-entropy of each sample in nats, (N,), without the L2 term."""
    xp = compat.array_namespace(w)
    z = logits(w, samples)
    z = z - xp.max(z, axis=1, keepdims=True)
    return xp.log(xp.sum(xp.exp(z), axis=1)) - xp.sum(z * samples.labels, axis=1)


def objective(w: Array, samples: Samples, l2: float, weights: Array | None = None) -> Array:
    """What training minimises: mean of weighted losses + l2/2 ‖w‖², 0-d."""
    xp = compat.array_namespace(w)
    each = losses(w, samples)
    each = each if weights is None else weights * each
    return xp.sum(each) / len(samples) + 0.5 * l2 * xp.sum(w * w)


def gradient(w: Array, samples: Samples, l2: float, weights: Array | None = None) -> Array:
    """Gradient of `objective`, (p,)."""
    xp = compat.array_namespace(w)
    errors = probabilities(w, samples) - samples.labels
    errors = errors if weights is None else weights[:, None] * errors
    weight = xp.reshape(errors.T @ samples.images, (-1,))
    return xp.concat([weight, xp.sum(errors, axis=0)]) / len(samples) + l2 * w


def gradients(w: Array, samples: Samples) -> ih.StackedGradients:
    """Gradients of the losses of single samples (N x p), kept factored: row i is dᵢaᵢᵀ."""
    return _rows(probabilities(w, samples) - samples.labels, samples.images, samples.layout)


class Hessian(ih.LinearOperator):
    """Exact Hessian of the mean loss, without the L2 term (which is the damping).

    Its product with v is the mean of Sᵢ(Vaᵢ + b) ⊗ [aᵢ, 1] with Sᵢ = diag(pᵢ) − pᵢpᵢᵀ, for the
    softmax pᵢ of sample i. It knows its diagonal, and its terms: one for each sample.

    Args:
        w: parameters (p,) at which the Hessian is taken.
        samples: whose losses it is about.
        weights: of the samples, (N,); by default all are 1.

    Cost: two GEMMs, 4 N p flops a column.

    Source: Böhning (1992), equation 2.
    """

    def __init__(self, w: Array, samples: Samples, weights: Array | None = None) -> None:
        super().__init__(w.shape[0], like=w, psd=True, layout=samples.layout)
        xp = compat.array_namespace(w)
        self._samples, self._w, self._weights = samples, w, weights
        N = len(samples)
        ones = xp.ones_like(samples.images[:, :1])
        self._inputs = xp.concat([samples.images, ones], axis=1)  # the bias belongs to a 1
        self._P = probabilities(w, samples).T[:, None, :]
        self._shares = self._P / N if weights is None else self._P * (weights / N)[None, None, :]

    @property
    def n_terms(self) -> int:
        """Number of samples."""
        return len(self._samples)

    def subset(self, indices: Array, /) -> Hessian:
        """The mean over some of the samples."""
        xp = compat.array_namespace(self._w)
        at = xp.asarray(indices, device=compat.device(self._w))
        some = Samples(*(xp.take(x, at, axis=0) for x in vars(self._samples).values()))
        weights = None if self._weights is None else xp.take(self._weights, at, axis=0)
        return Hessian(self._w, some, weights)

    def diagonal(self) -> Array:
        """The diagonal (p,): means of p(1 − p)a²."""
        xp = compat.array_namespace(self._w)
        variances = (self._shares * (1.0 - self._P))[:, 0, :]
        squares = variances @ self._inputs**2
        return xp.concat([xp.reshape(squares[:, :-1], (-1,)), squares[:, -1]])

    def _matmat(self, V: Array, /) -> Array:
        if V.shape[1] <= _AT_ONCE:
            return self._few(V)
        starts = range(0, V.shape[1], _AT_ONCE)
        parts = [self._few(V[:, i : i + _AT_ONCE]) for i in starts]
        return compat.array_namespace(V).concat(parts, axis=1)

    def _few(self, V: Array) -> Array:
        xp, layout = compat.array_namespace(V), self._samples.layout
        k, (c, d), N = V.shape[1], layout["weight"].shape, len(self._samples)
        weight = xp.reshape(layout.take(V, "weight"), (c, d, k))
        both = xp.concat([weight, layout.take(V, "bias")[:, None, :]], axis=1)
        rows = xp.reshape(xp.permute_dims(both, (0, 2, 1)), (c * k, d + 1))
        moved = xp.reshape(rows @ self._inputs.T, (c, k, N))
        moved = self._shares * (moved - xp.sum(self._P * moved, axis=0)[None, :, :])
        back = xp.reshape(xp.reshape(moved, (c * k, N)) @ self._inputs, (c, k, d + 1))
        back = xp.permute_dims(back, (0, 2, 1))
        weight = xp.reshape(back[:, :d, :], (c * d, k))
        return layout.assemble({"weight": weight, "bias": back[:, d, :]})


def _rows(errors: Array, images: Array, layout: ih.Layout) -> ih.StackedGradients:
    return ih.StackedGradients(
        {
            "weight": ih.OuterProductGradients(output_grads=errors, inputs=images),
            "bias": ih.DenseGradients(errors),
        },
        layout=layout,
    )
