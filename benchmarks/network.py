"""A one-layer tanh network on the digits, with its curvature in closed form.

The parameter vector holds the hidden weight (H x 64), the hidden bias (H), the output weight
(10 x H) and the output bias (10), row-major: a Hessian of a few thousand parameters costs a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.optimize

import invhvp as ih
from invhvp_demo import data


@dataclass(frozen=True, eq=False)
class Network:
    """Weights at (what was given of) a minimum, and the samples that they are looked at with."""

    hidden: np.ndarray  # (H, d)
    hidden_bias: np.ndarray  # (H,)
    output: np.ndarray  # (c, H)
    output_bias: np.ndarray  # (c,)
    images: np.ndarray  # (N, d)
    labels: np.ndarray  # (N, c), one-hot

    @property
    def layout(self) -> ih.Layout:
        parts = {n: getattr(self, n).shape for n in _PARTS}
        return ih.Layout.from_shapes(parts)

    @property
    def parameters(self) -> np.ndarray:
        return np.concatenate([getattr(self, n).ravel() for n in _PARTS])

    def at(self, images: np.ndarray, labels: np.ndarray) -> Network:
        """The same weights, other samples."""
        return Network(*(getattr(self, n) for n in _PARTS), images, data.one_hot(labels))

    @cached_property
    def activations(self) -> np.ndarray:
        return np.tanh(self.images @ self.hidden.T + self.hidden_bias)

    @cached_property
    def log_probabilities(self) -> np.ndarray:
        z = self.activations @ self.output.T + self.output_bias
        z = z - np.max(z, axis=1, keepdims=True)
        return z - np.log(np.sum(np.exp(z), axis=1, keepdims=True))

    @property
    def probabilities(self) -> np.ndarray:
        return np.exp(self.log_probabilities)

    def loss(self) -> float:
        """Mean cross-entropy."""
        return -float(np.mean(np.sum(self.labels * self.log_probabilities, axis=1)))

    def gradient(self) -> np.ndarray:
        """Gradient of `loss`, (p,)."""
        h, N = self.activations, len(self.images)
        errors = (self.probabilities - self.labels) / N
        back = (errors @ self.output) * (1 - h**2)
        parts = [back.T @ self.images, back.sum(axis=0), errors.T @ h, errors.sum(axis=0)]
        return np.concatenate([part.ravel() for part in parts])

    def gradients(self) -> ih.StackedGradients:
        """Gradients of the losses of single samples, N rows."""
        return self._rows(self.probabilities - self.labels, self.images, self.activations)

    def gauss_newton(self) -> ih.RankOneMean:
        """Jᵀ(diag(p) − ppᵀ)J in mean: ten rows √p_k Jᵀ(e_k − p) for each sample."""
        P, (N, c) = self.probabilities, self.labels.shape
        errors = np.sqrt(P)[:, :, None] * (np.eye(c)[None, :, :] - P[:, None, :])
        images, h = np.repeat(self.images, c, axis=0), np.repeat(self.activations, c, axis=0)
        return ih.RankOneMean(self._rows(errors.reshape(N * c, c), images, h), count=N)

    def _rows(self, errors: np.ndarray, images: np.ndarray, h: np.ndarray) -> ih.StackedGradients:
        back = (errors @ self.output) * (1 - h**2)
        blocks = {
            "hidden": ih.OuterProductGradients(output_grads=back, inputs=images),
            "hidden_bias": ih.DenseGradients(back),
            "output": ih.OuterProductGradients(output_grads=errors, inputs=h),
            "output_bias": ih.DenseGradients(errors),
        }
        return ih.StackedGradients(blocks, layout=self.layout)

    def curvature(self, *, gauss_newton: bool = False) -> np.ndarray:
        """Hessian of `loss` (p, p), or without the second derivatives of the network."""
        H, d = self.hidden.shape
        c, N = len(self.output_bias), len(self.images)
        h, P = self.activations, self.probabilities
        a = np.concatenate([self.images, np.ones((N, 1))], axis=1)
        g = np.concatenate([h, np.ones((N, 1))], axis=1)
        slope = 1 - h**2
        S = P[:, :, None] * (np.eye(c)[None, :, :] - P[:, None, :]) / N
        errors = (P - self.labels) / N
        mixed = np.matmul(S, self.output[None, :, :] * slope[:, None, :])  # (N, c, H)
        inner = np.matmul((self.output[None, :, :] * slope[:, None, :]).swapaxes(1, 2), mixed)
        if not gauss_newton:
            second = (errors @ self.output) * (-2 * h * slope)
            inner = inner + second[:, :, None] * np.eye(H)[None, :, :]
        A = np.zeros((H, d + 1, H, d + 1))
        for i in range(H):
            for j in range(i, H):
                A[i, :, j, :] = (a * inner[:, i, j, None]).T @ a
                A[j, :, i, :] = A[i, :, j, :].T
        B = np.zeros((c, H + 1, H, d + 1))
        for k in range(c):
            for j in range(H):
                B[k, :, j, :] = (g * mixed[:, k, j, None]).T @ a
                if not gauss_newton:
                    B[k, j, j, :] += (errors[:, k] * slope[:, j]) @ a
        C = np.zeros((c, H + 1, c, H + 1))
        for k in range(c):
            for m in range(c):
                C[k, :, m, :] = (g * S[:, k, m, None]).T @ g
        p, q = H * (d + 1), c * (H + 1)
        cross = B.reshape(q, p)
        full = np.block([[A.reshape(p, p), cross.T], [cross, C.reshape(q, q)]])
        order = np.concatenate([_separated(H, d + 1), p + _separated(c, H + 1)])
        full = full[order][:, order]
        return (full + full.T) / 2


_PARTS = ("hidden", "hidden_bias", "output", "output_bias")


def _separated(rows: int, columns: int) -> np.ndarray:
    """Positions of a weight, then of a bias, in the layer [W | b]."""
    index = np.arange(rows * columns).reshape(rows, columns)
    return np.concatenate([index[:, :-1].ravel(), index[:, -1]])


def unpack(w: np.ndarray, width: int, images: np.ndarray, labels: np.ndarray) -> Network:
    """A network from its parameter vector (p,) and one-hot labels."""
    d, c = images.shape[1], labels.shape[1]
    ends = np.cumsum([width * d, width, c * width])
    hidden, hidden_bias, output, output_bias = np.split(w, ends)
    return Network(
        hidden.reshape(width, d), hidden_bias, output.reshape(c, width), output_bias, images, labels
    )


def train(images: np.ndarray, labels: np.ndarray, *, width: int, l2: float) -> Network:
    """Minimise mean cross-entropy + l2/2 ‖w‖² from a seeded start, until the gradient vanishes."""
    one_hot = data.one_hot(labels)
    d, c = images.shape[1], one_hot.shape[1]
    rng = np.random.default_rng(1)
    start = [
        rng.standard_normal(width * d) / np.sqrt(d),
        np.zeros(width),
        rng.standard_normal(c * width) / np.sqrt(width),
        np.zeros(c),
    ]

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        network = unpack(w, width, images, one_hot)
        return network.loss() + 0.5 * l2 * float(w @ w), network.gradient() + l2 * w

    found = scipy.optimize.minimize(
        objective,
        np.concatenate(start),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 20_000, "maxfun": 40_000, "gtol": 1e-7, "ftol": 0.0, "maxcor": 30},
    )
    return unpack(found.x, width, images, one_hot)
