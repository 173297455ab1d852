"""Products with the Hessian of one batch: reverse over reverse on a gradient's graph."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from invhvp import _backend

from .evaluation import quiet_vmap
from .objective import Objective
from .parameters import Parameters

# On a CPU several columns at once pay only where the work of one is less than what launching it
# costs (measured up to 16 columns: 2.7 x faster at 1.7e5, 1.3 x at 1.2e6, 0.7 x at 1.4e7
# multiplications a layer pass). Batched convolutions lose everywhere, by up to 1.6 x.
_CPU_WORK = 4_000_000
MIN_COLUMNS = 4
MAX_COLUMNS = 64


class GradientGraph:
    """∇ of a batch's total loss, with the graph that differentiates it once more.

    Args:
        total: Σ w_i ℓ_i of the batch.
        parameters: what it is differentiated in.
        n_samples: samples in the batch.
        n_bytes: an estimate of what the graph holds.
    """

    def __init__(
        self, total: torch.Tensor, parameters: Parameters, n_samples: int, n_bytes: float
    ) -> None:
        self._tensors = parameters.tensors
        self.sizes = [p.numel() for p in self._tensors]
        self.split = parameters.split
        self.n_bytes = n_bytes
        with explained():
            gradient = torch.autograd.grad(
                total, self._tensors, create_graph=True, allow_unused=True
            )
        # What the loss is linear in has a constant gradient, and contributes nothing.
        active = [(i, g) for i, g in enumerate(gradient) if g is not None and g.requires_grad]
        self.active = [i for i, _ in active]
        self._gradient = [g for _, g in active]
        names = [node.name() for node in nodes(*self._gradient)]
        self.n_nodes = len(names)
        if any("Error" in name for name in names):
            # torch would take what lies behind such a node for a constant, without a word.
            raise NotImplementedError(_message("a function marked once_differentiable"))
        self._block = 1
        if not any("onvolution" in name for name in names):
            self._block = self._columns_at_once(total, n_samples, n_bytes)

    def add_products(
        self, vectors: list[torch.Tensor], totals: list[torch.Tensor], *, free: bool
    ) -> None:
        """Add the products with k vectors, in parts of the parameters, to `totals`.

        Both have a tensor (k, *shape) for each parameter. `free` gives the graph up.
        """
        if not self._gradient:
            return
        k, start = len(vectors[0]), 0
        while start < k:
            stop = min(start + self._block, k) if k >= MIN_COLUMNS else start + 1
            try:
                self._add(vectors, totals, slice(start, stop), free=free and stop == k)
            except (RuntimeError, NotImplementedError):
                if stop - start == 1:
                    raise
                self._block = 1  # an operation that cannot be batched: column by column
                continue
            start = stop

    def products(
        self, vectors: Sequence[torch.Tensor], *, free: bool = False, batched: bool = False
    ) -> Sequence[torch.Tensor | None]:
        """The products with one vector, given in parts of `active`; of rows where `batched`."""
        with explained(), quiet_vmap() if batched else nullcontext():
            return torch.autograd.grad(
                self._gradient,
                self._tensors,
                vectors,
                retain_graph=not free or batched,
                allow_unused=True,
                is_grads_batched=batched,
            )

    def _add(
        self,
        vectors: list[torch.Tensor],
        totals: list[torch.Tensor],
        rows: slice,
        *,
        free: bool,
    ) -> None:
        batched = rows.stop - rows.start > 1
        which = rows if batched else rows.start
        given = [vectors[i][which] for i in self.active]
        products = self.products(given, free=free, batched=batched)
        for total, product in zip(totals, products, strict=True):
            if product is not None:
                total[which] += product

    def _columns_at_once(self, total: torch.Tensor, n_samples: int, n_bytes: float) -> int:
        """A rule, not a measurement: the same call gives the same bits."""
        if total.device.type == "cpu" and n_samples * sum(self.sizes) > _CPU_WORK:
            return 1
        if n_bytes <= 0:
            return MAX_COLUMNS
        budget = _backend.free_memory(total.detach()) / 4
        return int(min(MAX_COLUMNS, max(1.0, budget / n_bytes)))


def nodes(*roots: torch.Tensor) -> Iterator[Any]:
    """All nodes of the graph behind some tensors, each once."""
    seen = {root.grad_fn for root in roots}
    stack = list(seen)
    while stack:
        node = stack.pop()
        if node is None:
            continue
        yield node
        fresh = [following for following, _ in node.next_functions if following not in seen]
        seen.update(fresh)
        stack.extend(dict.fromkeys(fresh))


def probe(objective: Objective, parameters: Parameters, batch: Any) -> int:
    """Bytes that the gradient graph of a batch holds, after a look at its second derivatives.

    Raises NotImplementedError where torch has none, or has wrong ones: they are not symmetric.
    Cost: two gradients and two products.
    """
    fixed = itertools.chain(objective.model.parameters(), objective.model.buffers())
    known = {t.untyped_storage().data_ptr() for t in fixed}
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout == torch.strided:
            held[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward = objective.forward(batch)
        graph = GradientGraph(forward.total(), parameters, forward.n, 0.0)
    size = sum(t.untyped_storage().nbytes() for ptr, t in held.items() if ptr not in known)
    del graph
    held.clear()
    tame = objective.forward(batch).tame()
    if tame is not None:
        _check_symmetry(GradientGraph(tame, parameters, forward.n, 0.0), parameters)
    return size


def _check_symmetry(graph: GradientGraph, parameters: Parameters) -> None:
    like = parameters.like
    rng = torch.Generator(like.device).manual_seed(0)
    X = torch.randn((2, parameters.n), generator=rng, dtype=like.dtype, device=like.device)
    HX = torch.zeros_like(X)
    graph.add_products(parameters.split(X), parameters.split(HX), free=True)
    difference = torch.dot(X[0, :], HX[1, :]) - torch.dot(X[1, :], HX[0, :])
    # For normal X the difference is of the size of (H - H^T) x; rounding is that of one product.
    tolerance = 200 * _backend.eps(like.dtype) ** (3 / 4)
    if bool(difference.abs() > tolerance * HX.norm()):
        raise NotImplementedError(
            "torch's second derivatives of this model are not symmetric, so that an operation in "
            "it has a wrong one; torch.nn.utils.weight_norm is known for it. Write it in plain "
            "operations, or leave its parameters out (parameters=)"
        )


@contextmanager
def explained() -> Iterator[None]:
    """Say in whose terms a second derivative is missing."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        missing = re.search(r"derivative for '?([\w:]+)'? is not implemented", text)
        if missing is None and "double backward" not in text:
            raise
        what = missing.group(1) if missing else "an operation of the model"
        raise NotImplementedError(_message(what)) from error


def _message(what: str) -> str:
    return (
        f"{what} has no second derivative in torch. Use a model of plain operations: the "
        "uncompiled module instead of torch.compile's, unfused kernels instead of fused ones, "
        "and torch.backends.cudnn.flags(enabled=False) around recurrent layers"
    )
