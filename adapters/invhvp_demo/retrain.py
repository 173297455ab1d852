"""Training to machine precision, and again on some of the samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat as compat
import numpy as np

import invhvp as ih
from invhvp import _backend

from . import model
from .model import Array, Samples

_TOLERANCE = 1e-11  # on the gradient norm: far below what one sample in a thousand changes


def train(
    samples: Samples,
    l2: float,
    *,
    weights: Array | None = None,
    start: Array | None = None,
    preconditioner: Any = None,
) -> Array:
    """Minimise `model.objective` by Newton's method; each step is one solve of this library.

    Args:
        samples: what to train on.
        l2: λ of the L2 term, which the Newton system sees as its damping.
        weights: of the samples (N,); by default all are 1.
        start: where to begin (p,).
        preconditioner: a method that solves a similar system fast.

    Raises RuntimeError unless the gradient norm ends at 1e-11 or below.
    """
    w = model.start(samples) if start is None else start
    cg = ih.BlockCG(rtol=1e-4, preconditioner=preconditioner)
    for _ in range(50):
        slope = model.gradient(w, samples, l2, weights)
        if _norm(slope) <= _TOLERANCE:
            return w
        A = model.Hessian(w, samples, weights)
        step = ih.solve(A, -slope, cg, damping=l2).x
        before, length = float(model.objective(w, samples, l2, weights)), 1.0
        # The last steps gain less than the objective can resolve, and are right as they are.
        while float(model.objective(w + length * step, samples, l2, weights)) > before + 1e-12:
            length = length / 2
        w = w + length * step
    msg = "training did not converge: the gradient norm is still above 1e-11"
    raise RuntimeError(msg)


def on_subsets(
    w: Array, samples: Samples, l2: float, inverse: Any
) -> Callable[[np.ndarray], Array]:
    """A function of indices that retrains on those samples alone and returns the parameters (p,).

    The other samples get weight zero; the mean stays over N and the L2 term as it is.

    Args:
        w: optimum on all samples, where each retraining starts.
        samples: all of them.
        l2: as in training.
        inverse: of the damped Hessian at w; it preconditions the Newton systems, whose solutions
            meet their own tolerance whatever it is.
    """
    preconditioner = ih.Fixed(inverse)

    def retrained(kept: np.ndarray) -> Array:
        chosen = np.zeros(len(samples))
        chosen[kept] = 1.0
        weights = _backend.from_host(chosen, samples.images)
        return train(samples, l2, weights=weights, start=w, preconditioner=preconditioner)

    return retrained


def _norm(x: Array) -> float:
    xp = compat.array_namespace(x)
    return float(xp.sqrt(xp.sum(x * x)))
