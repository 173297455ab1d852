"""A linear map as the list of operations that it is made of: recorded once, replayed at will."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from .columns import Scratch
from .replay import Replay

aten = torch.ops.aten

_ZEROS = frozenset({aten.zeros_like.default, aten.new_zeros.default})
_VIEWS = frozenset({aten.view.default, aten.expand.default, aten._unsafe_view.default})

# Elementwise and linear in the first argument where the others are constants.
_DIAGONAL = frozenset(
    {
        aten.elu_backward.default,
        aten.gelu_backward.default,
        aten.hardtanh_backward.default,
        aten.leaky_relu_backward.default,
        aten.mul.Scalar,
        aten.neg.default,
        aten.sigmoid_backward.default,
        aten.silu_backward.default,
        aten.softplus_backward.default,
        aten.tanh_backward.default,
        aten.threshold_backward.default,
    }
)


class Tape:
    """A linear function of tensors, as operations on them and constants, without autograd.

    Whatever does not depend on the vectors is computed once, here, and what is linear in them
    is shortened: derivatives of activations become one factor. A replay does the remaining
    operations, for any number of vectors together.

    Args:
        function: linear; from tensors to a sequence of tensors or None.
        vectors: what it is recorded with.

    Raises RuntimeError or NotImplementedError for a function that cannot be recorded.

    Cost: one call of the function. It holds the constants, and nothing of the function.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[torch.Tensor | None]],
        vectors: Sequence[torch.Tensor],
    ) -> None:
        recorder = _Recorder()
        inner = [v.detach() for v in vectors]
        for i, v in enumerate(inner):
            recorder.note(v, recorder.graph.placeholder(f"v{i}"))
        with recorder:
            # Without mutation an operation depends on its arguments alone.
            outputs = torch.func.functionalize(_without_none(function))(*inner)
        found = [t for t in outputs if isinstance(t, torch.Tensor)]
        recorder.graph.output(tuple(recorder.node_of(t) for t in found))
        self.outputs = [i for i, t in enumerate(outputs) if isinstance(t, torch.Tensor)]
        self.n_operations = 0
        self.largest = 0  # bytes of the largest tensor on the way, for one vector
        self.constants = _Shortened(recorder.graph, recorder.constants).constants
        for node in recorder.graph.nodes:
            self.n_operations += node.op == "call_function"
            if node.op == "call_function" and "shape" in node.meta:
                size = math.prod(node.meta["shape"]) * node.meta["dtype"].itemsize
                self.largest = max(self.largest, size)
        self._replay = Replay(recorder.graph, self.constants)

    @property
    def n_bytes(self) -> int:
        """Bytes of the constants."""
        stores = {c.untyped_storage().data_ptr(): c.untyped_storage() for c in self.constants}
        return sum(s.nbytes() for s in stores.values())

    def add(
        self, vectors: Sequence[torch.Tensor], totals: Sequence[torch.Tensor], scratch: Scratch
    ) -> None:
        """Add the function of k vectors, (k, *shape) each, to `totals`, as many for `outputs`.

        `outputs` says which of the function's values are tensors; the others are always None.
        """
        with torch.no_grad():
            self._replay(vectors, totals, scratch)


def _without_none(function: Callable[..., Sequence[torch.Tensor | None]]) -> Callable[..., Any]:
    """Functorch wants tensors: an empty tuple stands for None."""
    return lambda *vectors: tuple(() if t is None else t for t in function(*vectors))


class _Recorder(TorchDispatchMode):
    """Notes every operation whose arguments depend on the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = torch.fx.Graph()
        self.constants: dict[torch.fx.Node, torch.Tensor] = {}
        self._nodes: Any = WeakTensorKeyDictionary()
        self._of_constants: dict[int, torch.fx.Node] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and torch would import its compiler to say so

    def note(self, tensor: torch.Tensor, node: torch.fx.Node) -> None:
        """Remember what a tensor is called."""
        if tensor.layout != torch.strided:
            raise NotImplementedError("a sparse derivative")
        node.meta.update(shape=tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device)
        self._nodes[tensor] = node

    def node_of(self, tensor: torch.Tensor) -> torch.fx.Node:
        """What a tensor is called; one that depends on no input becomes a constant."""
        node = self._nodes.get(tensor)
        if node is None:
            node = self._of_constants.get(id(tensor))
        if node is None:
            node = self._of_constants[id(tensor)] = self.graph.placeholder(
                f"c{len(self.constants)}"
            )
            self.constants[node] = tensor  # kept alive, so that its id stays its own
            node.meta.update(shape=tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device)
        return node

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, torch.Tensor)]
        if not any(a in self._nodes for a in given) or func in _ZEROS:
            return out
        if func._schema.is_mutable:
            msg = f"{func} changes a tensor in place"
            raise NotImplementedError(msg)

        def named(a: Any) -> Any:
            return self.node_of(a) if isinstance(a, torch.Tensor) else a

        node = self.graph.call_function(func, tree_map(named, args), tree_map(named, kwargs))
        if isinstance(out, torch.Tensor):
            self.note(out, node)
            return out
        for i, part in enumerate(out):
            if isinstance(part, torch.Tensor):
                self.note(part, self.graph.call_function(operator.getitem, (node, i)))
        return out


class _Shortened:
    """Rewrites a recorded graph to one with fewer operations and the same values."""

    def __init__(self, graph: torch.fx.Graph, constants: dict[torch.fx.Node, torch.Tensor]) -> None:
        self._graph = graph
        self._values = constants
        graph.eliminate_dead_code()
        seen: dict[str, torch.fx.Node] = {}
        for node in list(graph.nodes):
            if node.op == "call_function":
                with graph.inserting_before(node):
                    new = self._shorter(node)
                # The same operation twice: nodes have names, so that its text says it all.
                new = seen.setdefault(f"{new.target} {new.args} {new.kwargs}", new)
                if new is not node:
                    node.replace_all_uses_with(new)
                    graph.erase_node(node)  # no longer a user of its arguments
        graph.eliminate_dead_code()
        for node in [n for n in graph.nodes if n in constants and not n.users]:
            graph.erase_node(node)
        self.constants = [constants[node].detach() for node in graph.nodes if node in constants]

    def _shorter(self, node: torch.fx.Node) -> torch.fx.Node:
        func: Any = node.target
        x, *others = node.args
        if not isinstance(x, torch.fx.Node):
            return node
        if func is aten.t.default and x.target is aten.t.default:
            return x.args[0]  # type: ignore[return-value]
        if func in _VIEWS and node.meta["shape"] == x.meta["shape"]:
            return x
        if func in (aten.add.Tensor, aten.sub.Tensor):
            return self._sum(node)
        if func is aten.mul.Tensor or func in _DIAGONAL:
            return self._product(node)
        # The two are little more than sums.
        if func in _SOFTMAX and x not in self._values and others[0] in self._values:
            output, dim = others[0], others[1]
            if func is aten._softmax_backward_data.default:
                x = self._call(aten.mul.Tensor, node, x, output)
                factor = self._values[output]
            else:
                factor = self._values[output].exp()
            total = self._call(aten.sum.dim_IntList, node, x, [dim], True)
            part = self._call(aten.mul.Tensor, node, total, self._constant(factor))
            return self._call(aten.sub.Tensor, node, x, part)
        return node

    def _product(self, node: torch.fx.Node) -> torch.fx.Node:
        """One factor for a derivative of an activation, and for two factors in a row."""
        func: Any = node.target
        variable = [a for a in node.all_input_nodes if a not in self._values]
        if len(variable) != 1 or node.meta["shape"] != variable[0].meta["shape"]:
            return node
        x = variable[0]
        if sum(a is x for a in node.args) != 1:
            return node
        factor = self._factor(node)
        if factor is None:
            one = torch.ones((), dtype=x.meta["dtype"], device=x.meta["device"]).expand(
                x.meta["shape"]
            )
            plain = [one if a is x else self._value(a) for a in node.args]
            factor = func(*plain, **{k: self._value(v) for k, v in node.kwargs.items()})
        before = self._factor(x)
        if before is not None and len(x.users) == 1:
            y = self._variable(x)
            if y.meta["shape"] == node.meta["shape"]:
                x, factor = y, before * factor
        return self._scaled(node, x, factor)

    def _sum(self, node: torch.fx.Node) -> torch.fx.Node:
        """Nothing for + 0, and one factor for c x + d x."""
        a, b = node.args[:2]
        if node.kwargs or not (isinstance(a, torch.fx.Node) and isinstance(b, torch.fx.Node)):
            return node
        subtracts = node.target is aten.sub.Tensor
        for x, other in ((a, b), (b, a)):
            zero = other in self._values and not bool(self._values[other].any())
            if zero and x.meta["shape"] == node.meta["shape"] and not (subtracts and x is b):
                return x
        c, d = self._factor(a), self._factor(b)
        if c is None or d is None or self._variable(a) is not self._variable(b):
            return node
        x = self._variable(a)
        if len(a.users) > 1 or len(b.users) > 1 or x.meta["shape"] != node.meta["shape"]:
            return node
        return self._scaled(node, x, c - d if subtracts else c + d)

    def _factor(self, node: torch.fx.Node) -> torch.Tensor | None:
        """The c of a node x c, where c is a constant tensor of its own dtype."""
        if node.target is not aten.mul.Tensor:
            return None
        found = [self._values[a] for a in node.all_input_nodes if a in self._values]
        if len(found) != 1 or len(node.args) != 2 or len(node.all_input_nodes) != 2:
            return None
        return found[0] if found[0].dtype == node.meta["dtype"] else None

    def _variable(self, node: torch.fx.Node) -> torch.fx.Node:
        return next(a for a in node.all_input_nodes if a not in self._values)

    def _scaled(self, node: torch.fx.Node, x: torch.fx.Node, factor: torch.Tensor) -> torch.fx.Node:
        return self._call(aten.mul.Tensor, node, x, self._constant(factor))

    def _call(self, func: Any, like: torch.fx.Node, *args: Any) -> torch.fx.Node:
        node = self._graph.call_function(func, args)
        node.meta = {**like.meta}
        return node

    def _constant(self, value: torch.Tensor) -> torch.fx.Node:
        node = self._graph.placeholder(f"c{len(self._values)}")
        node.meta.update(shape=tuple(value.shape), dtype=value.dtype, device=value.device)
        self._values[node] = value
        return node

    def _value(self, a: Any) -> Any:
        return self._values[a] if isinstance(a, torch.fx.Node) else a


_SOFTMAX = frozenset({aten._softmax_backward_data.default, aten._log_softmax_backward_data.default})
