"""Recorded operations for several vectors at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
from torch.fx.node import map_arg

from .column_rules import RULES, VIEWS, one_by_one
from .columns import Columns, Scratch


class _Slot(NamedTuple):
    """Stands in a step's arguments for the value of another step."""

    at: int


class _Step(NamedTuple):
    rule: Any
    args: Any
    kwargs: Any
    out: int
    over: tuple[int, ...]  # steps whose results nobody reads any more


class Replay:
    """A recorded graph, run for k vectors together: each product with a matrix is one product.

    Args:
        graph: operations; its placeholders are the vectors, then the constants.
        constants: values of the latter.
    """

    def __init__(self, graph: torch.fx.Graph, constants: Sequence[torch.Tensor]) -> None:
        nodes = list(graph.nodes)
        position = {node: i for i, node in enumerate(nodes)}
        self._size = len(nodes)
        self._inputs = [position[node] for node in nodes if node.op == "placeholder"]
        self._constants = list(constants)
        last = _last_uses(nodes, position)
        self._steps = [
            _Step(
                RULES.get(node.target) or one_by_one(node.target),
                map_arg(node.args, lambda a: _Slot(position[a])),
                map_arg(node.kwargs, lambda a: _Slot(position[a])),
                position[node],
                tuple(i for i, end in last.items() if end == position[node]),
            )
            for node in nodes
            if node.op == "call_function"
        ]
        self._outputs = [position[a] for a in nodes[-1].args[0]]

    def __call__(
        self, vectors: Sequence[torch.Tensor], totals: Sequence[torch.Tensor], scratch: Scratch
    ) -> None:
        """Add the outputs for vectors (k, *shape) to `totals`, (k, *shape) each."""
        values: list[Any] = [None] * self._size
        given = [*(Columns(v, 0) for v in vectors), *self._constants]
        for slot, value in zip(self._inputs, given, strict=True):
            values[slot] = value
        held: dict[int, list[torch.Tensor]] = {}
        for step in self._steps:
            scratch.offer([buffer for slot in step.over for buffer in held.pop(slot, ())])
            values[step.out] = step.rule(
                scratch, *_filled(step.args, values), **_filled(step.kwargs, values)
            )
            held[step.out] = scratch.taken()
            for slot in step.over:
                values[slot] = None
        for slot, total in zip(self._outputs, totals, strict=True):
            value = values[slot]  # a constant where it depends on no vector
            total += value.at(0) if isinstance(value, Columns) else value
        for buffers in held.values():
            scratch.give_back(buffers)


def _last_uses(nodes: list[torch.fx.Node], position: dict[torch.fx.Node, int]) -> dict[int, int]:
    """For each operation the last one that reads its memory, itself or through views."""
    roots: dict[torch.fx.Node, set[torch.fx.Node]] = {}
    last: dict[int, int] = {}
    for node in nodes:
        read = set().union(*(roots.get(a, ()) for a in node.all_input_nodes))
        for root in read:
            last[position[root]] = position[node]
        if node.op == "call_function":
            last[position[node]] = position[node]
            # What has no rule of its own may well give a view.
            owns = node.target in RULES and node.target not in VIEWS
            roots[node] = {node} if owns else read | {node}
    return last


def _filled(given: Any, values: list[Any]) -> Any:
    kind = type(given)
    if kind is _Slot:
        return values[given.at]
    if kind is int or kind is float or kind is bool:
        return given
    if isinstance(given, list | tuple):
        return [_filled(a, values) for a in given]
    if isinstance(given, dict):
        return {name: _filled(a, values) for name, a in given.items()}
    return given
