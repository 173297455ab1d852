"""Which parameters form a Kronecker-factored block, and the two sides of its gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from invhvp.layout import Block, Layout

from . import layers
from .attention import projections
from .capture import Call
from .contributions import Span
from .parameters import Parameters

_PIECE = 64 << 20  # bytes of patches that are formed at once
_MOST_TIED = 4096  # words of an embedding that is tied to a layer: their factor is dense


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A weight, with the bias that belongs to it, as `groups` blocks (o, i).

    Args:
        name: of the block; with several groups "name[0]", "name[1]", ...
        kind: "linear", "transposed" (the weight is (i, o)), "convolution", "embedding", or "tied":
            an embedding whose weight is also the weight (words, size) of linear layers.
        weight, bias: names of the parameters; bias may be None.
        shape: (o, i), with the column of the bias.
        groups: blocks.
    """

    name: str
    kind: str
    weight: str
    bias: str | None
    shape: tuple[int, int]
    groups: int = 1

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks."""
        if self.groups == 1:
            return (self.name,)
        return tuple(f"{self.name}[{g}]" for g in range(self.groups))

    def layout(self, layout: Layout) -> dict[str, Block]:
        """Where [W | b] of every group lies in the parameter vector."""
        (o, i), where = self.shape, layout[self.weight].indices
        assert isinstance(where, slice), "parameters follow one another"
        W = np.arange(where.start, where.stop)
        if self.kind in ("transposed", "embedding"):
            W = W.reshape(-1, o).T
        W = W.reshape(self.groups, o, -1)
        if self.bias is not None:
            where = layout[self.bias].indices
            assert isinstance(where, slice), "parameters follow one another"
            b = np.arange(where.start, where.stop).reshape(self.groups, o, 1)
            W = np.concatenate([W, b], 2)
        return {name: Block((o, i), W[g].reshape(-1)) for g, name in enumerate(self.blocks)}


def find_units(model: nn.Module, parameters: Parameters, allowed: frozenset[str]) -> list[Unit]:
    """The blocks of all weights in `allowed` that have Kronecker structure."""
    names = {id(p): name for name, p in parameters.named.items()}
    uses: dict[str, list[tuple[str, nn.Module, str | None]]] = {}
    owners: dict[str, set[str]] = {}
    for module in model.modules():
        mine = {key: names.get(id(p)) for key, p in module._parameters.items() if p is not None}
        kind, weight = _kind(module), mine.get("weight")
        if kind is None or weight is None:
            continue
        uses.setdefault(weight, []).append((kind, module, mine.get("bias")))
    for layer in projections(model, names).values():
        weight, bias = layer["names"].get("weight"), layer["names"].get("bias")
        if weight is not None and weight not in uses:
            uses[weight] = [("linear", layer["module"], bias)]
    for weight, found in uses.items():
        for _, _, bias in found:
            if bias is not None:
                owners.setdefault(bias, set()).add(weight)
    units = []
    for name in parameters.names:
        if name not in uses or name not in allowed:
            continue
        biases = {bias for _, _, bias in uses[name]}
        bias = biases.pop() if len(biases) == 1 else None
        if bias is not None and (bias not in allowed or owners[bias] != {name}):
            bias = None
        unit = _unit(name, bias, {kind: module for kind, module, _ in uses[name]}, parameters)
        if unit is not None:
            units.append(unit)
    return units


def _kind(module: nn.Module) -> str | None:
    if layers.rule_of(module) is None:
        return None
    if type(module).__name__ == "Conv1D" and not isinstance(module, nn.modules.conv._ConvNd):
        return "transposed"  # of transformers: the weight is (in, out)
    kinds = {
        nn.Linear: "linear",
        nn.Conv1d: "convolution",
        nn.Conv2d: "convolution",
        nn.Conv3d: "convolution",
        nn.Embedding: "embedding",
    }
    return next((kind for cls, kind in kinds.items() if isinstance(module, cls)), None)


def _unit(
    weight: str, bias: str | None, modules: Mapping[str, nn.Module], parameters: Parameters
) -> Unit | None:
    shape, groups = tuple(parameters.named[weight].shape), 1
    kinds = set(modules)
    if kinds == {"embedding", "linear"} and shape[0] <= _MOST_TIED and bias is None:
        kind, o, i = "tied", *shape
    elif len(kinds) > 1:
        return None
    else:
        kind = kinds.pop()
        o, i = shape[0], int(np.prod(shape[1:], dtype=int))
        if kind in ("transposed", "embedding"):
            o, i = i, o
        if kind == "convolution":
            groups = int(getattr(modules[kind], "groups", 1))
            o = o // groups
    name = _joint_name(weight, bias)
    return Unit(
        name=name,
        kind=kind,
        weight=weight,
        bias=bias,
        shape=(o, i + (bias is not None)),
        groups=groups,
    )


def _joint_name(weight: str, bias: str | None) -> str:
    if bias is None:
        return weight
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(weight, bias, strict=False))
    return "".join(a for a, _ in pairs).rstrip("._") or f"{weight}, {bias}"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What remains of a call: nothing of the graph.

    Args:
        module: the layer.
        x: what went in, (N, ...).
        d: derivatives of what came out, (N C, ...).
        rows: of the weight that were used, where not all.
    """

    module: Any
    x: torch.Tensor
    d: torch.Tensor
    rows: Span | None


class Collector:
    """Keeps the calls of the `wanted` units of one batch; those of all others are dropped."""

    def __init__(self, units: list[Unit], wanted: list[Unit], skipped: frozenset[str]) -> None:
        self.names = frozenset(name for unit in units for name in unit.parameters)
        self.skipped = skipped
        self._wanted = {unit.weight: unit for unit in wanted}
        self.calls: dict[str, list[Seen]] = {}

    def __call__(self, call: Call, d: torch.Tensor | None, /) -> set[str]:
        unit = self._wanted.get(call.layer.names.get("weight", ""))
        if unit is not None:
            if d is None:
                msg = f"the derivatives in the layer of {unit.weight!r} have no axis of samples"
                raise ValueError(msg)
            seen = Seen(module=call.layer.module, x=call.x, d=d, rows=call.rows)
            self.calls.setdefault(unit.weight, []).append(seen)
        return set(call.layer.names.values()) & (self.names | self.skipped)


Sides = tuple[slice, torch.Tensor, torch.Tensor]


def sides(unit: Unit, calls: list[Seen]) -> Iterator[list[Sides]]:
    """Samples, d (N C, T, o) and a (N, T, i) of every group; pieces where patches are large.

    The calls of a layer, and of the layers that share its weight, are further positions T: they
    are summed before anything is squared.
    """
    pieces = _pieces(unit, calls[0]) if len(calls) == 1 else [slice(None)]
    for piece in pieces:
        pairs = [_pair(unit, call, piece) for call in calls]
        ds, as_ = [d for d, _ in pairs], [a for _, a in pairs]
        if unit.kind == "tied":  # words stand where the derivatives of a layer do
            most = max(t.shape[0] for t in (*ds, *as_))
            ds, as_ = ([_repeated(t, most) for t in side] for side in (ds, as_))
        d = torch.cat(ds, 1) if len(ds) > 1 else ds[0]
        a = torch.cat(as_, 1) if len(as_) > 1 else as_[0]
        groups = zip(d.chunk(unit.groups, 2), a.chunk(unit.groups, 2), strict=True)
        yield [(piece, *pair) for pair in groups]


def _pair(unit: Unit, call: Seen, piece: slice) -> tuple[torch.Tensor, torch.Tensor]:
    module, x, d = call.module, call.x, call.d
    if piece != slice(None):
        each = d.shape[0] // x.shape[0]
        d, x = d[piece.start * each : piece.stop * each], x[piece]
    if unit.kind == "convolution":
        d, a = d.flatten(2).mT, layers._patches(module, x, module.weight.shape[2:])
    elif unit.kind == "tied" and isinstance(module, nn.Embedding):
        a = _positions(d)
        d = nn.functional.one_hot(x.reshape(x.shape[0], -1), unit.shape[0]).to(a.dtype)
        if module.padding_idx is not None:
            d[..., module.padding_idx] = 0.0  # our own
    else:
        d, a = _positions(d), _positions(x)
        if call.rows is not None:  # a part of a packed projection: no derivative in the others
            after = call.rows.total - call.rows.start - call.rows.size
            d = nn.functional.pad(d, (call.rows.start, after))
    if unit.bias is not None:
        ones = a.new_ones((*a.shape[:2], unit.groups, 1))
        a = torch.cat([a.unflatten(2, (unit.groups, -1)), ones], 3).flatten(2)
    return d, a


def _positions(t: torch.Tensor) -> torch.Tensor:
    """(N, ..., m) as (N, T, m)."""
    return t.reshape(t.shape[0], -1, t.shape[-1])


def _repeated(t: torch.Tensor, rows: int) -> torch.Tensor:
    return t if t.shape[0] == rows else t.repeat_interleave(rows // t.shape[0], 0)


def _pieces(unit: Unit, call: Seen) -> list[slice]:
    """Samples of which the patches are formed at a time."""
    n = call.x.shape[0]
    if unit.kind != "convolution":
        return [slice(None)]
    T = int(np.prod(call.d.shape[2:], dtype=int))
    each = T * unit.groups * unit.shape[1] * call.x.element_size()
    step = max(1, _PIECE // max(1, each))
    if step >= n:
        return [slice(None)]
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]
