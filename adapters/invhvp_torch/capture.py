"""What went into every call of a linear layer, and the derivative of what came out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from invhvp.gradients import DenseGradients, GradientMatrix, OuterProductGradients

from .double_backward import nodes
from .parameters import Parameters


@dataclass(kw_only=True)
class LinearLayer:
    """A linear module, the selected parameters in it, and its calls in one forward pass."""

    module: torch.nn.Linear
    weight: str | None
    bias: str | None
    calls: list[tuple[torch.Tensor, GradientEdge]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The names of the selected parameters."""
        return [name for name in (self.weight, self.bias) if name is not None]


class LinearCalls:
    """Within `with`, records the calls of all linear layers with selected parameters.

    The derivative of an output is asked for at the edge of the graph where the layer left it:
    what happens to the tensor afterwards, in place or not, does not matter, and no derivative of
    a weight is computed.
    """

    def __init__(self, model: torch.nn.Module, parameters: Parameters) -> None:
        names = {id(p): name for name, p in parameters.named.items()}
        self.layers: list[LinearLayer] = []
        for module in model.modules():
            # A subclass with a forward of its own may do anything with its weight.
            if not isinstance(module, torch.nn.Linear):
                continue
            if type(module).forward is not torch.nn.Linear.forward:
                continue
            # Not `module.weight`: a parametrised one is computed, and no parameter.
            weight = names.get(id(module._parameters.get("weight")))
            bias = names.get(id(module._parameters.get("bias")))
            if weight is not None or bias is not None:
                self.layers.append(LinearLayer(module=module, weight=weight, bias=bias))
        self._parameters = parameters
        self._handles: list[Any] = []

    def __enter__(self) -> LinearCalls:
        for layer in self.layers:

            def record(
                _: torch.nn.Module, inputs: tuple[Any, ...], output: Any, layer: Any = layer
            ) -> None:
                if inputs and output.requires_grad:
                    layer.calls.append((inputs[0].detach(), get_gradient_edge(output)))

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

    def blocks(self, losses: torch.Tensor, allowed: set[str]) -> dict[str, GradientMatrix]:
        """Gradients of all `allowed` parameters whose every use is a recorded call. One backward.

        A use that was not recorded (a tied weight, a functional call) shows in the graph as an
        edge more into the parameter; such parameters are left out, for others to compute.
        """
        uses, reached = self._uses(losses)
        found: list[tuple[LinearLayer, list[str], list[tuple[torch.Tensor, GradientEdge]]]] = []
        for layer in self.layers:
            calls = [call for call in layer.calls if call[1].node in reached]
            rows = all(a.ndim > 1 and a.shape[0] == losses.shape[0] for a, _ in calls)
            names = [n for n in layer.names if n in allowed and uses[n] == len(calls)]
            if calls and rows and names:
                found.append((layer, names, calls))
        edges = [edge for _, _, calls in found for _, edge in calls]
        if not edges:
            return {}
        slopes = iter(torch.autograd.grad(losses.sum(), edges, retain_graph=True))
        blocks: dict[str, GradientMatrix] = {}
        for layer, names, calls in found:
            inputs = [_terms(a) for a, _ in calls]
            outputs = [_terms(next(slopes)) for _ in calls]
            a, d = (
                parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in (inputs, outputs)
            )
            if layer.weight in names:
                blocks[layer.weight] = _weight_block(d, a)
            if layer.bias in names:
                blocks[layer.bias] = DenseGradients(d.sum(1))
        return blocks

    def _uses(self, losses: torch.Tensor) -> tuple[Counter[str], set[Any]]:
        """How often each parameter enters the graph, and all nodes of the graph."""
        names = {id(p): name for name, p in self._parameters.named.items()}
        uses: Counter[str] = Counter()
        reached = set()
        for node in nodes(losses):
            reached.add(node)
            for following, _ in node.next_functions:
                variable = getattr(following, "variable", None)
                if variable is not None and id(variable) in names:
                    uses[names[id(variable)]] += 1
        return uses, reached


def _terms(t: torch.Tensor) -> torch.Tensor:
    """(N, ..., m) as (N, T, m)."""
    return t.reshape(t.shape[0], -1, t.shape[-1])


def _weight_block(d: torch.Tensor, a: torch.Tensor) -> GradientMatrix:
    """Σ_t d_it a_itᵀ, kept factored unless the products are smaller than their factors."""
    T, o, i = d.shape[1], d.shape[2], a.shape[2]
    if T * (o + i) <= o * i:
        return OuterProductGradients(output_grads=d, inputs=a)
    return DenseGradients(torch.bmm(d.mT, a).reshape(d.shape[0], o * i))
