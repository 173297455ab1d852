"""Which scalars of a sample are differentiated: its loss, or its outputs times fixed numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from .objective import Forward
from .output_curvature import Noise, known_curvature, output_curvature


@dataclass(frozen=True)
class Seeds:
    """C scalars a sample: ⟨vectors_ic, output_i⟩, or the losses w_i ℓ_i themselves.

    Args:
        vectors: (N, C, m), or None for the losses.
        scale: (N,), what the losses are multiplied with, if anything.
    """

    vectors: torch.Tensor | None = None
    scale: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """C."""
        return 1 if self.vectors is None else self.vectors.shape[1]

    def values(self, forward: Forward) -> torch.Tensor:
        """The scalars (N, C), with their graph."""
        if self.vectors is not None:
            return (self.vectors @ forward.flat()[:, :, None])[:, :, 0]
        if self.scale is None:
            return forward.losses()[:, None]
        return (self.scale * forward.unweighted())[:, None]

    def take(self, rows: torch.Tensor) -> Seeds:
        """Those of some samples."""
        vectors = None if self.vectors is None else self.vectors[rows, :, :]
        return Seeds(vectors, None if self.scale is None else self.scale[rows])


Source: TypeAlias = Callable[[Forward, int], Seeds]
"""The seeds of a batch, from its forward pass and its number."""


def of_losses(_forward: Forward, _index: int) -> Seeds:
    """w_i ℓ_i: the per-sample gradients themselves."""
    return Seeds()


def of_empirical_fisher(forward: Forward, _index: int) -> Seeds:
    """√w_i ℓ_i, so that products of two gradients carry the weight w_i."""
    if forward.weight is None:
        return Seeds()
    if bool((forward.weight < 0).any()):
        raise ValueError("sample weights must not be negative here: the curvature is a mean")
    return Seeds(scale=forward.weight.to(forward.leaves()[0].dtype).sqrt())


def of_gauss_newton(forward: Forward, _index: int) -> Seeds:
    """The root of the output Hessian: as many scalars as it has columns."""
    return Seeds(output_curvature(forward).root())


def of_fisher(forward: Forward, _index: int) -> Seeds:
    """The same, where the loss is a likelihood."""
    return Seeds(known_curvature(forward).root())


@dataclass(frozen=True)
class OfSampledFisher:
    """Gradients at labels drawn from the model; the same ones at every pass."""

    count: int
    rng: int

    def __call__(self, forward: Forward, index: int) -> Seeds:
        return Seeds(known_curvature(forward).sampled(self.count, _noise(forward, self.rng, index)))


@dataclass(frozen=True)
class OfSigns:
    """The columns of the root with random signs, summed: one scalar a sample, unbiased."""

    count: int
    rng: int

    def __call__(self, forward: Forward, index: int) -> Seeds:
        return Seeds(output_curvature(forward).signed(self.count, _noise(forward, self.rng, index)))


def _noise(forward: Forward, rng: int, index: int) -> Noise:
    like = forward.leaves()[0]
    # Drawn on the host, so that a seed means the same on every device.
    generator = torch.Generator().manual_seed(rng * 1_000_003 + index)

    def noise(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
        draw = torch.randn if kind == "normal" else torch.rand
        return draw(shape, generator=generator, dtype=like.dtype).to(like.device)

    return noise


def of_kind(fisher: str, count: int, rng: int) -> Source:
    """Of the Fisher matrix of a kind: "exact", "mc", "sign" or "empirical"."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        msg = f"samples must be an integer of at least 1, got {count!r}"
        raise ValueError(msg)
    sources = {
        "exact": of_gauss_newton,
        "mc": OfSampledFisher(count, rng),
        "sign": OfSigns(count, rng),
        "empirical": of_empirical_fisher,
    }
    if fisher not in sources:
        msg = f"fisher= takes one of {', '.join(map(repr, sources))}, got {fisher!r}"
        raise ValueError(msg)
    return sources[fisher]
