"""What each kind of layer adds to its parameters' gradients, from what went in and came back.

A rule takes the module, its input x (N, ...) and the derivatives d (N C, ...) in its output, for
C scalars a sample, those of one sample together. Sizes come from the weight tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

from .contributions import PIECE, Lookup, Outer, Part

Rule: TypeAlias = Callable[[Any, torch.Tensor, torch.Tensor], Mapping[str, Part]]


def rule_of(module: nn.Module) -> Rule | None:
    """How the gradients of a module's parameters come about; None where nothing is known.

    A subclass with a forward of its own may do anything with its weight.
    """
    for kind, rule in RULES.items():
        if isinstance(module, kind):
            return rule if type(module).forward is kind.forward else None
    if type(module).__name__ == "Conv1D" and getattr(module, "weight", torch.empty(0)).ndim == 2:
        return _transposed_linear  # of transformers: the weight is (in, out)
    return None


def _terms(t: torch.Tensor) -> torch.Tensor:
    """(N, ..., m) as (N, T, m)."""
    return t.reshape(t.shape[0], -1, t.shape[-1])


def _linear(_module: nn.Linear, x: torch.Tensor, d: torch.Tensor) -> Mapping[str, Part]:
    d = _terms(d)
    return {"weight": Outer(d, _terms(x)), "bias": d.sum(1)}


def _transposed_linear(_module: nn.Module, x: torch.Tensor, d: torch.Tensor) -> Mapping[str, Part]:
    d = _terms(d)
    return {"weight": Outer(_terms(x), d), "bias": d.sum(1)}


def _convolution(module: Any, x: torch.Tensor, d: torch.Tensor) -> Mapping[str, Part]:
    shape = module.weight.shape
    groups = x.shape[1] // shape[1]
    d = d.flatten(2).mT
    N, T, patch = x.shape[0], d.shape[1], x.shape[1] * math.prod(shape[2:])
    step = max(1, PIECE // max(1, T * patch * x.element_size()))
    small = T * (shape[0] + patch) <= shape.numel()
    if small or step >= N:
        weight: Part = Outer(d, _patches(module, x, shape[2:]), groups)
    else:  # patches are up to a kernel's size times the input: a few samples at a time
        each = d.shape[0] // N
        weight = torch.cat(
            [
                Outer(
                    d[i * each : (i + step) * each],
                    _patches(module, x[i : i + step], shape[2:]),
                    groups,
                ).rows()
                for i in range(0, N, step)
            ]
        )
    return {"weight": weight, "bias": d.sum(1)}


def _patches(module: Any, x: torch.Tensor, kernel: torch.Size) -> torch.Tensor:
    """What the kernel is applied to, (N, T, channels · kernel)."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    steps = zip(kernel, module.stride, module.dilation, strict=True)
    for axis, (size, stride, dilation) in enumerate(steps, start=2):
        x = x.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    x = x.movedim(1, 1 + len(kernel))  # (N, places..., channels, kernel...)
    return x.flatten(1 + len(kernel)).flatten(1, len(kernel))


def _embedding(module: nn.Embedding, x: torch.Tensor, d: torch.Tensor) -> Mapping[str, Part]:
    words, size = module.weight.shape
    d = d.reshape(d.shape[0], -1, size)
    return {"weight": Lookup(d, x.reshape(x.shape[0], -1).long(), words, module.padding_idx)}


def _scale_and_shift(x: torch.Tensor, d: torch.Tensor, axes: tuple[int, ...]) -> Mapping[str, Part]:
    """Of y = scale · x + shift, where both are constant along `axes` of x."""
    d = d.unflatten(0, (x.shape[0], -1))
    products = d * x[:, None, ...]
    over = tuple(axis + 1 for axis in axes)
    return {
        name: (t.sum(over) if over else t).flatten(2).flatten(0, 1)
        for name, t in (("weight", products), ("bias", d))
    }


def _layer_norm(module: Any, x: torch.Tensor, d: torch.Tensor) -> Mapping[str, Part]:
    axes = tuple(range(1, x.ndim - module.weight.ndim))
    return _scale_and_shift(F.layer_norm(x, module.weight.shape, eps=module.eps), d, axes)


def _rms_norm(module: Any, x: torch.Tensor, d: torch.Tensor) -> Mapping[str, Part]:
    axes = tuple(range(1, x.ndim - module.weight.ndim))
    return _scale_and_shift(F.rms_norm(x, module.weight.shape, eps=module.eps), d, axes)


def _group_norm(module: nn.GroupNorm, x: torch.Tensor, d: torch.Tensor) -> Mapping[str, Part]:
    normal = F.group_norm(x, module.num_groups, eps=module.eps)
    return _scale_and_shift(normal, d, tuple(range(2, x.ndim)))


def _batch_norm(module: Any, x: torch.Tensor, d: torch.Tensor) -> Mapping[str, Part]:
    normal = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
    return _scale_and_shift(normal, d, tuple(range(2, x.ndim)))


RULES: dict[Any, Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.modules.batchnorm._BatchNorm: _batch_norm,
}
