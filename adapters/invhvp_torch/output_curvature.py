"""The Hessian of the loss in the model's outputs, sample by sample: closed forms, and any other."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from invhvp import _backend

from . import samples
from .double_backward import explained
from .objective import Forward

Noise = Callable[..., torch.Tensor]
"""Uniform or normal numbers of a shape: noise("uniform", shape)."""


class OutputCurvature:
    """H_i (m × m) of every sample, times its weight; outputs are flat rows (N, m).

    Attributes:
        rank: number C of columns of `root`.
        definite: whether every H_i is positive semidefinite, as far as is known without a look.
    """

    rank: int
    definite = True

    def root(self) -> torch.Tensor:
        """Rows r_ic (N, C, m) with Σ_c r_ic r_icᵀ = H_i."""
        raise NotImplementedError

    def times(self, u: torch.Tensor) -> torch.Tensor:
        """H_i u_i, (N, m)."""
        raise NotImplementedError

    def sampled(self, count: int, noise: Noise) -> torch.Tensor:
        """Rows (N, count, m) at labels drawn from the model, whose sum of squares has mean H_i."""
        raise NotImplementedError

    def signed(self, count: int, noise: Noise) -> torch.Tensor:
        """Rows (N, count, m): the columns of the root with random signs, summed; mean H_i too."""
        root = self.root()
        signs = _signs(noise, (root.shape[0], count, self.rank), root)
        return signs @ root / math.sqrt(count)


class Softmax(OutputCurvature):
    """s (diag(p) − p pᵀ) at each of P places; p is (N, C, P), s is (N, P)."""

    def __init__(self, p: torch.Tensor, s: torch.Tensor) -> None:
        self._p, self._s = p, s
        self.rank = p.shape[1] * p.shape[2]

    def root(self) -> torch.Tensor:
        # Type-2 columns √p_c (e_c − p) (Dangel et al. 2020, appendix): no eigenvalues needed.
        p, C = self._p.mT, self._p.shape[1]  # (N, P, C)
        eye = torch.eye(C, dtype=p.dtype, device=p.device)
        columns = (self._s[:, :, None] * p).sqrt()[..., None] * (eye - p[:, :, None, :])
        columns = torch.diag_embed(columns.movedim(1, -1), dim1=1, dim2=-1)  # (N, P, C, C, P)
        return columns.flatten(3).flatten(1, 2)

    def times(self, u: torch.Tensor) -> torch.Tensor:
        p = self._p
        pu = p * u.reshape(p.shape)
        return (self._s[:, None, :] * (pu - p * pu.sum(1, keepdim=True))).flatten(1)

    def sampled(self, count: int, noise: Noise) -> torch.Tensor:
        p, (N, C, P) = self._p, self._p.shape
        drawn = noise("uniform", (N, count, 1, P))
        label = (drawn > p.cumsum(1)[:, None, :, :]).sum(2).clamp(max=C - 1)
        chosen = F.one_hot(label, C).movedim(-1, 2)  # (N, count, C, P)
        scale = (self._s / count).sqrt()[:, None, None, :]
        return (scale * (p[:, None, :, :] - chosen)).flatten(2)

    def signed(self, count: int, noise: Noise) -> torch.Tensor:
        p, (N, C, P) = self._p[:, None, :, :], self._p.shape
        signed = p.sqrt() * _signs(noise, (N, count, C, P), p)
        scale = (self._s / count).sqrt()[:, None, None, :]
        return (scale * (signed - p * signed.sum(2, keepdim=True))).flatten(2)


class Diagonal(OutputCurvature):
    """diag(h) with h (N, m); `p` (N, m) where the outputs are logits of independent events."""

    def __init__(self, h: torch.Tensor, p: torch.Tensor | None = None) -> None:
        self._h, self._p = h, p
        self.rank = h.shape[1]

    def root(self) -> torch.Tensor:
        return torch.diag_embed(self._h.sqrt())

    def times(self, u: torch.Tensor) -> torch.Tensor:
        return self._h * u

    def sampled(self, count: int, noise: Noise) -> torch.Tensor:
        shape = (self._h.shape[0], count, self._h.shape[1])
        scale = (self._h / count).sqrt()[:, None, :]
        if self._p is None:
            return scale * noise("normal", shape)
        p = self._p[:, None, :]
        # (p − y)/√(p (1 − p)) has variance 1; where the event is sure there is nothing to draw.
        spread = (p * (1 - p)).sqrt()
        drawn = (p - (noise("uniform", shape) < p).to(p.dtype)) / spread.clamp(min=1e-30)
        return torch.where(spread > 0, scale * drawn, torch.zeros_like(drawn))

    def signed(self, count: int, noise: Noise) -> torch.Tensor:
        shape = (self._h.shape[0], count, self._h.shape[1])
        return (self._h / count).sqrt()[:, None, :] * _signs(noise, shape, self._h)


class General(OutputCurvature):
    """Of any loss, by differentiating it twice in the outputs alone."""

    definite = False

    def __init__(self, forward: Forward) -> None:
        if forward.given is not None:
            leaves, losses = forward.leaves(), forward.given
        else:
            leaves = []
            output = samples.map_tensors(lambda t: _leaf(t, leaves), forward.output)
            losses = _weighted(forward, forward.objective.singles(output, forward.target))
        self._leaves = leaves
        self._n = losses.shape[0]
        self.rank = sum(t.numel() for t in leaves) // self._n
        slopes = torch.autograd.grad(losses.sum(), leaves, create_graph=True, allow_unused=True)
        self._slopes = [(s, leaf) for s, leaf in zip(slopes, leaves, strict=True) if s is not None]
        if not any(s.requires_grad for s, _ in self._slopes):
            raise ValueError(
                "the loss is linear in the model's outputs, so that its Gauss–Newton matrix is "
                "zero: let the loss, not the model, compute what is curved, or use "
                "empirical_fisher or hessian"
            )

    def times(self, u: torch.Tensor) -> torch.Tensor:
        parts = u.split([leaf.numel() // self._n for leaf in self._leaves], 1)
        by_leaf = {id(leaf): part for leaf, part in zip(self._leaves, parts, strict=True)}
        curved = [(s, by_leaf[id(leaf)]) for s, leaf in self._slopes if s.requires_grad]
        with explained():
            found = torch.autograd.grad(
                [s for s, _ in curved],
                self._leaves,
                [part.reshape(s.shape) for s, part in curved],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        return torch.cat([t.detach().reshape(self._n, -1) for t in found], 1)

    def root(self) -> torch.Tensor:
        eye = torch.eye(self.rank, dtype=self._leaves[0].dtype, device=self._leaves[0].device)
        H = torch.stack([self.times(row.expand(self._n, -1)) for row in eye], 1)
        values, vectors = torch.linalg.eigh(((H + H.mT) / 2).double())
        size = values.abs().amax(1, keepdim=True)
        if bool((values < -1e3 * _backend.eps(H.dtype) * size).any()):
            raise NotConvexError(
                "the loss is not convex in the model's outputs, so that its Gauss–Newton matrix is "
                "no mean of rank-one matrices; pass memory=0 for products through the model"
            )
        return (values.clamp(min=0).sqrt()[:, :, None] * vectors.mT).to(H.dtype)


class NotConvexError(ValueError):
    """H_i has negative eigenvalues, so that it has no root."""


def output_curvature(forward: Forward) -> OutputCurvature:
    """The closed form where the loss is a known one, else `General`."""
    if forward.weight is not None and bool((forward.weight < 0).any()):
        raise ValueError("sample weights must not be negative here: the curvature is a mean")
    known = None if forward.given is not None else _known(forward)
    return General(forward) if known is None else known


def known_curvature(forward: Forward) -> OutputCurvature:
    """The closed form; ValueError where the loss is none whose likelihood is known."""
    curvature = output_curvature(forward)
    if not curvature.definite:
        raise ValueError(
            "the Fisher matrix is one of a likelihood, which is known for cross-entropy, squared "
            "error and binary cross-entropy with logits; for this loss use gauss_newton"
        )
    return curvature


def _known(forward: Forward) -> OutputCurvature | None:
    kind, options = _kind(forward.objective.loss)
    z, y = forward.output, forward.target
    if kind is None or not isinstance(z, torch.Tensor) or not isinstance(y, torch.Tensor):
        return None
    z = z.detach()
    mean = options.pop("reduction", "mean") == "mean"
    if kind is F.cross_entropy:
        return _softmax(forward, z, y, options, mean=mean)
    if options or z.shape != y.shape:
        return None
    z = z.reshape(z.shape[0], -1)
    scale = 1.0 / z.shape[1] if mean else 1.0
    if kind is F.mse_loss:
        return Diagonal(_weighted(forward, torch.full_like(z, 2.0 * scale)))
    p = torch.sigmoid(z)
    return Diagonal(_weighted(forward, scale * p * torch.sigmoid(-z)), p)


def _softmax(
    forward: Forward, z: torch.Tensor, y: torch.Tensor, options: dict[str, Any], *, mean: bool
) -> Softmax | None:
    ignored = options.pop("ignore_index", -100)
    options.pop("label_smoothing", None)  # soft labels still sum to one
    if options or z.ndim < 2:
        return None
    p = torch.softmax(z, 1).flatten(2) if z.ndim > 2 else torch.softmax(z, 1)[:, :, None]
    if y.dtype.is_floating_point:
        if y.shape != z.shape:
            return None
        s = y.reshape(p.shape).sum(1)
        s = s / p.shape[2] if mean else s
    else:
        s = (y.reshape(y.shape[0], -1) != ignored).to(z.dtype)
        s = s / s.sum(1, keepdim=True).clamp(min=1.0) if mean else s
    return Softmax(p, _weighted(forward, s))


def _kind(loss: Any) -> tuple[Any, dict[str, Any]]:
    """A loss of torch and its options other than the usual ones; None for any other callable."""
    if isinstance(loss, functools.partial) and not loss.args:
        kind, options = loss.func, dict(loss.keywords)
    else:
        kind, options = loss, {}
    if type(loss) in _MODULES:
        kind, keys = _MODULES[type(loss)]
        options = {key: getattr(loss, key) for key in ("reduction", *keys)}
    options = {key: value for key, value in options.items() if value is not None}
    known = (F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits)
    return (kind if any(kind is k for k in known) else None), options


_MODULES: Mapping[Any, tuple[Any, tuple[str, ...]]] = {
    nn.CrossEntropyLoss: (F.cross_entropy, ("weight", "ignore_index", "label_smoothing")),
    nn.MSELoss: (F.mse_loss, ()),
    nn.BCEWithLogitsLoss: (F.binary_cross_entropy_with_logits, ("weight", "pos_weight")),
}


def _signs(noise: Noise, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.where(noise("uniform", shape) < 0.5, -1.0, 1.0).to(like.dtype)


def _leaf(t: torch.Tensor, leaves: list[torch.Tensor]) -> torch.Tensor:
    if not t.dtype.is_floating_point:
        return t
    t = t.detach().requires_grad_()
    leaves.append(t)
    return t


def _weighted(forward: Forward, t: torch.Tensor) -> torch.Tensor:
    if forward.weight is None:
        return t
    return t * forward.weight.to(t.dtype).reshape(-1, *[1] * (t.ndim - 1))
