"""What went into every call of a layer, and the derivative of what came out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Protocol

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from invhvp import _backend
from invhvp.gradients import GradientMatrix

from . import contributions, layers
from .attention import parameter_at, product_with, projections, splits_parameter
from .double_backward import nodes
from .parameters import Parameters


@dataclass(frozen=True)
class Call:
    """One call of a layer, with the place in the graph where its output left it.

    `time_first` says that the output there is (T N, ...), with the samples of one place together;
    `rows` of the weight are those used, where not all are.
    """

    layer: Layer
    x: torch.Tensor
    edge: GradientEdge
    time_first: bool = False
    rows: contributions.Span | None = None


@dataclass(kw_only=True)
class Layer:
    """A module, its rule, and the names of its selected parameters by what it calls them."""

    module: torch.nn.Module
    rule: layers.Rule
    names: dict[str, str]
    calls: list[Call] = field(default_factory=list)
    bias_rows: contributions.Span | None = None  # of a bias that several layers share


class Take(Protocol):
    """Takes calls and the derivatives (N C, ...) of their outputs, for all uses of `names`.

    Nobody needs the parameters in `skipped`.
    """

    @property
    def names(self) -> frozenset[str]: ...
    @property
    def skipped(self) -> frozenset[str]: ...

    def __call__(self, call: Call, d: torch.Tensor | None, /) -> set[str]:
        """Which parameters of the call need nothing else."""
        ...


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
        self.rounded: dict[str, float] = {}  # unit of the coarsest dtype that a layer ran in
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
        self,
        values: torch.Tensor,
        allowed: set[str],
        *,
        keep: bool = True,
        take: Take | None = None,
    ) -> dict[str, GradientMatrix]:
        """Gradients of all values (N, C) in the `allowed` parameters that only layers use.

        Rows are those of (N C,): the values of a sample are together. One backward pass for each
        of the C. A use that was not recorded (a functional call) shows in the graph as an edge
        more into the parameter; such parameters are left out, for others to compute. Without
        `keep` the graph and the recorded calls are given up on the way. `take` gets what it asks
        for as it is, instead.
        """
        n, columns = values.shape
        uses, recorded, calls = self._found(values)
        names = {name for name in allowed if uses[name] and uses[name] == recorded[name]}
        if take is not None:
            _check_taken(take, uses, recorded)
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
        del edges
        if not keep:
            for layer in self.layers:
                layer.calls.clear()
        parts: dict[str, list[contributions.Part]] = {}
        while calls:
            # Taken out of the lists, so that nothing is held that has been used.
            call = calls.pop()
            d = _derivatives(call, tuple(column.pop() for column in slopes), n)
            call, d = self._in_one_dtype(call, d)
            taken = set() if take is None else take(call, d)
            names -= taken
            if taken >= set(call.layer.names.values()):
                continue
            added = _added(call, d)
            for key, name in call.layer.names.items():
                if name in taken:
                    continue
                if key in added:
                    parts.setdefault(name, []).insert(0, added[key])  # in the order of calls
                else:
                    names.discard(name)
        sizes = {name: self._parameters.layout[name].size for name in names}
        blocks = {name: contributions.block(parts[name]) for name in names}
        return {name: block for name, block in blocks.items() if block.shape[1] == sizes[name]}

    def used_otherwise(self, values: torch.Tensor) -> set[str]:
        """The parameters that something else than calls of layers on all samples uses."""
        uses, recorded, _ = self._found(values)
        return {name for name in uses if uses[name] != recorded[name]}

    def _found(self, values: torch.Tensor) -> tuple[Counter[str], Counter[str], list[Call]]:
        """How often each parameter is used, how often in recorded calls, and these calls."""
        n = values.shape[0]
        uses, reached = self._uses(values)
        recorded: Counter[str] = Counter()
        calls = []
        seen = [call for layer in self.layers for call in layer.calls]
        for call in [*seen, *self._attention(reached, n)]:
            if call.edge.node in reached and _by_sample(call.x, n):
                calls.append(call)
                recorded.update(call.layer.names.values())
        return uses, recorded, calls

    def _in_one_dtype(self, call: Call, d: torch.Tensor | None) -> tuple[Call, torch.Tensor | None]:
        """In the dtype of the parameters, where a forward pass under autocast has left others."""
        dtype, x = self._parameters.like.dtype, call.x
        for t in (x, d):
            if t is not None and t.dtype.is_floating_point and t.dtype != dtype:
                for name in call.layer.names.values():
                    unit = max(self.rounded.get(name, 0.0), _backend.eps(t.dtype))
                    self.rounded[name] = unit
        if x.dtype.is_floating_point and x.dtype != dtype:
            call = replace(call, x=x.to(dtype))
        return call, None if d is None else d.to(dtype)

    def _attention(self, reached: dict[Any, None], n: int) -> Iterator[Call]:
        """Calls within `nn.MultiheadAttention`, which hands its weights to a function."""
        if not self._projections:
            return
        for node in reached:
            weight, x, rows = product_with(node)
            layer = self._projections.get(id(weight))
            if layer is not None and x is not None and x.shape[0] % n == 0:
                x = x.detach().unflatten(0, (-1, n)).transpose(0, 1)
                edge = GradientEdge(node, 0)
                yield Call(Layer(**layer), x, edge, time_first=True, rows=rows)

    def _uses(self, values: torch.Tensor) -> tuple[Counter[str], dict[Any, None]]:
        """How often each parameter enters the graph, and all nodes of it, in a fixed order.

        A parameter that is split into rows enters once for each use of any of them.
        """
        names = {id(p): name for name, p in self._parameters.named.items()}
        uses: Counter[str] = Counter()
        reached: dict[Any, None] = {}
        for node in nodes(values):
            reached[node] = None
            for edge in () if splits_parameter(node) else node.next_functions:
                variable, _ = parameter_at(edge)
                if variable is not None and id(variable) in names:
                    uses[names[id(variable)]] += 1
        return uses, reached


def _check_taken(take: Take, uses: Counter[str], recorded: Counter[str]) -> None:
    lost = [name for name in take.names if uses[name] != recorded[name]]
    if lost:
        msg = (
            f"the model uses {lost} in another way than in the first batch; layers must be called "
            "as modules, in every batch, on samples along the first axis. A first batch that has "
            "such a use gives these parameters blocks of their own"
        )
        raise ValueError(msg)


def _derivatives(call: Call, slopes: tuple[torch.Tensor, ...], n: int) -> torch.Tensor | None:
    """The derivatives (N C, ...) of one call; None where they have no axis of samples."""
    if call.time_first:
        slopes = tuple(t.unflatten(0, (-1, n)).transpose(0, 1) for t in slopes)
    if slopes[0].shape[0] != n:
        return None
    return slopes[0] if len(slopes) == 1 else torch.stack(slopes, 1).flatten(0, 1)


def _by_sample(x: torch.Tensor, n: int) -> bool:
    """Whether an input has samples along its first axis: one feature each only as an index."""
    return x.shape[:1] == (n,) and (x.ndim > 1 or not x.is_floating_point())


def _added(call: Call, d: torch.Tensor | None) -> Mapping[str, contributions.Part]:
    """What one call adds to the parameters of its layer; nothing where its rule does not fit."""
    if d is None:
        return {}
    try:
        added = call.layer.rule(call.layer.module, call.x, d)
    except (RuntimeError, ValueError, IndexError) as error:
        if _backend.is_out_of_memory(error):
            raise
        return {}  # another shape than the layer's usual one: others compute it
    spans = {"weight": call.rows, "bias": call.rows or call.layer.bias_rows}
    return {key: _sliced(part, spans.get(key)) for key, part in added.items()}


def _sliced(part: Any, span: contributions.Span | None) -> contributions.Part:
    return part if span is None else contributions.Slice(part, span)
