"""What went into every call of a layer, and the derivative of what came out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from invhvp import _backend
from invhvp.gradients import GradientMatrix

from . import layers
from .attention import product_with, projections
from .double_backward import nodes
from .parameters import Parameters


@dataclass(frozen=True)
class Call:
    """One call of a layer, with the place in the graph where its output left it.

    `time_first` says that the output there is (T N, ...), with the samples of one place together.
    """

    layer: Layer
    x: torch.Tensor
    edge: GradientEdge
    time_first: bool = False


@dataclass(kw_only=True)
class Layer:
    """A module, its rule, and the names of its selected parameters by what it calls them."""

    module: torch.nn.Module
    rule: layers.Rule
    names: dict[str, str]
    calls: list[Call] = field(default_factory=list)


class Calls:
    """Within `with`, records the calls of all layers with selected parameters and a known rule.

    The derivative of an output is asked for at the edge of the graph where the layer left it:
    what happens to the tensor afterwards, in place or not, does not matter, and no derivative of
    a weight is computed.
    """

    def __init__(self, model: torch.nn.Module, parameters: Parameters) -> None:
        names = {id(p): name for name, p in parameters.named.items()}
        self.layers: list[Layer] = []
        for module in model.modules():
            rule = layers.rule_of(module)
            # Not `module.weight`: a parametrised one is computed, and no parameter.
            mine = {key: names.get(id(p)) for key, p in module._parameters.items()}
            found = {key: name for key, name in mine.items() if name is not None}
            if rule is not None and found:
                self.layers.append(Layer(module=module, rule=rule, names=found))
        self._projections = projections(model, names)
        self._parameters = parameters
        self._handles: list[Any] = []

    def __enter__(self) -> Calls:
        for layer in self.layers:

            def record(
                _: torch.nn.Module, inputs: tuple[Any, ...], output: Any, layer: Layer = layer
            ) -> None:
                if inputs and output.requires_grad:
                    call = Call(layer, inputs[0].detach(), get_gradient_edge(output))
                    layer.calls.append(call)

            # First of all hooks: another one may replace the output.
            self._handles.append(layer.module.register_forward_hook(record, prepend=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def blocks(
        self, values: torch.Tensor, allowed: set[str], *, keep: bool = True
    ) -> dict[str, GradientMatrix]:
        """Gradients of all values (N, C) in the `allowed` parameters that only layers use.

        Rows are those of (N C,): the values of a sample are together. One backward pass for each
        of the C. A use that was not recorded (a functional call) shows in the graph as an edge
        more into the parameter; such parameters are left out, for others to compute. Without
        `keep` the graph and the recorded calls are given up on the way.
        """
        n, columns = values.shape
        uses, reached = self._uses(values)
        recorded: Counter[str] = Counter()
        calls = []
        seen = [call for layer in self.layers for call in layer.calls]
        for call in [*seen, *self._attention(reached, n)]:
            if call.edge.node in reached and call.x.ndim > 1 and call.x.shape[0] == n:
                calls.append(call)
                recorded.update(call.layer.names.values())
        names = {name for name in allowed if uses[name] and uses[name] == recorded[name]}
        calls = [call for call in calls if names & set(call.layer.names.values())]
        if not calls:
            return {}
        edges = [call.edge for call in calls]
        slopes = [
            list(
                torch.autograd.grad(values[:, c].sum(), edges, retain_graph=keep or c + 1 < columns)
            )
            for c in range(columns)
        ]
        del edges, seen
        if not keep:
            for layer in self.layers:
                layer.calls.clear()
        parts: dict[str, list[layers.Part]] = {}
        while calls:
            # Taken out of the lists, so that nothing is held that has been used.
            call = calls.pop()
            added = _added(call, tuple(column.pop() for column in slopes), n)
            for key, name in call.layer.names.items():
                if key in added:
                    parts.setdefault(name, []).append(added[key])
                else:
                    names.discard(name)
        sizes = {name: self._parameters.layout[name].size for name in names}
        blocks = {name: layers.block(parts[name]) for name in names}
        return {name: block for name, block in blocks.items() if block.shape[1] == sizes[name]}

    def _attention(self, reached: set[Any], n: int) -> Iterator[Call]:
        """Calls within `nn.MultiheadAttention`, which hands its weights to a function."""
        if not self._projections:
            return
        for node in reached:
            weight, rows = product_with(node)
            layer = self._projections.get(id(weight))
            if layer is not None and rows is not None and rows.shape[0] % n == 0:
                x = rows.detach().unflatten(0, (-1, n)).transpose(0, 1)
                yield Call(Layer(**layer), x, GradientEdge(node, 0), time_first=True)

    def _uses(self, values: torch.Tensor) -> tuple[Counter[str], set[Any]]:
        """How often each parameter enters the graph, and all nodes of the graph."""
        names = {id(p): name for name, p in self._parameters.named.items()}
        uses: Counter[str] = Counter()
        reached = set()
        for node in nodes(values):
            reached.add(node)
            for following, _ in node.next_functions:
                variable = getattr(following, "variable", None)
                if variable is not None and id(variable) in names:
                    uses[names[id(variable)]] += 1
        return uses, reached


def _added(call: Call, slopes: tuple[torch.Tensor, ...], n: int) -> Mapping[str, layers.Part]:
    """What one call adds to the parameters of its layer; nothing where its rule does not fit."""
    if call.time_first:
        slopes = tuple(t.unflatten(0, (-1, n)).transpose(0, 1) for t in slopes)
    if slopes[0].shape[0] != n:
        return {}
    d = slopes[0] if len(slopes) == 1 else torch.stack(slopes, 1).flatten(0, 1)
    try:
        return call.layer.rule(call.layer.module, call.x, d)
    except (RuntimeError, ValueError, IndexError) as error:
        if _backend.is_out_of_memory(error):
            raise
        return {}  # another shape than the layer's usual one: others compute it
