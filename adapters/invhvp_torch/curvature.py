"""The Hessian of a model's mean loss, as an operator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from invhvp.operators import LinearOperator

from . import samples
from .bridge import TorchDoor, bridge_to
from .columns import Scratch
from .data import Cache, Cached, Streamed, read
from .distributed import Distributed, across, check_same_model, own_seed, processes_of, together
from .double_backward import GradientGraph
from .evaluation import LOCK, check_independent, evaluation, seed
from .objective import BatchLoss, Loss, Objective, Reduction
from .parameters import Parameters, Selection
from .recorded import settled
from .survey import KeepGraph, Survey


def hessian(
    model: torch.nn.Module,
    loss: Loss | None = None,
    data: Any = None,
    *,
    batch_loss: BatchLoss | None = None,
    parameters: Selection = None,
    training: bool = False,
    reduction: Reduction = "mean",
    count: float | None = None,
    cache: Cache = "auto",
    keep_graph: KeepGraph = "auto",
    batch_size: int | None = None,
    rng: int = 0,
    distributed: Distributed = None,
    array_namespace: Any = None,
    transfer: bool = False,
) -> LinearOperator:
    """Build the Hessian of the mean loss Σ w_i ∇²ℓ_i / Σ w_i in the selected parameters.

    ℓ_i is the loss of sample i alone, so that batch size, order and a short last batch change
    nothing but rounding. The operator works on torch tensors (n, k) of the parameters' dtype and
    device; n and the order are those of `to_array`.

    Args:
        model: left exactly as found: mode, gradients, hooks, buffers, random state.
        loss: loss(output, target), a mean over the samples of a batch.
        data: a DataLoader, any re-iterable of (x, y) or (x, y, sample_weight), or one such tuple
            of tensors.
        batch_loss: instead of `loss`: f(model, batch) → per-sample losses (N,), for batches of
            any kind.
        parameters: a name, a glob pattern, a module, a parameter, or several; gives exactly that
            diagonal block of the whole Hessian.
        training: whether modules are in training mode; dropout masks are then fixed by `rng`.
        reduction: what `loss` does over a batch: "mean", "sum", or "none" (losses (N,)).
        count: what the sum of all losses is divided by; by default the number of samples, or the
            sum of the sample weights. Not with reduction="mean".
        cache: keep the data on the device: True, False, or where a quarter of free memory
            holds them.
        keep_graph: keep what a product with every batch needs (the operations that depend on the
            vectors, recorded from its gradient's graph, or the graph itself): True, False, or
            for as many batches as half of free memory holds. The values are the same.
        batch_size: samples at once where the data are one tuple of tensors.
        rng: the seed of what is random in training mode.
        distributed: for data that are shared out over processes: True for the default process
            group of torch.distributed, or a group. Every process passes its own samples, gets
            the operator of all of them, and takes part in every product.
        array_namespace: `numpy` or `cupy`, for an operator that takes and gives their arrays
            without copies; by default torch.
        transfer: allow NumPy with a model on a GPU, at the price of copies.

    Raises TypeError for data that can be read only once, ValueError for a loss whose batch mean
    is not the mean over its samples, RuntimeError where the data differ between passes or the
    parameters have changed since, NotImplementedError for an operation without a second
    derivative. Products of all threads take turns.

    Cost: a column of a product costs about two gradients of the loss with a kept graph; without
    one, a gradient more for all columns together. Building it costs two or three passes, and a
    first product that records five columns more; recorded columns go through together, and
    up to 128 MB of what they compute on the way stay allocated. Batches of a loader that are too
    small to keep a processor busy go through several at once.

    Example:
        >>> import torch, invhvp_torch as it
        >>> model = torch.nn.Linear(3, 1)
        >>> x, y = torch.eye(3), torch.zeros(3, 1)
        >>> H = it.hessian(model, torch.nn.functional.mse_loss, (x, y), parameters="weight")
        >>> H @ torch.ones(3)
        tensor([0.6667, 0.6667, 0.6667])
    """
    processes = processes_of(distributed)
    selected = Parameters(model, parameters)
    bridge = bridge_to(array_namespace, selected.like, transfer=transfer)
    rng = own_seed(rng, processes)
    check_same_model(processes, selected)
    with together(processes, selected.like):
        objective = Objective(model=model, loss=loss, batch_loss=batch_loss, reduction=reduction)
        check_independent(model, training=training)
        if count is not None:
            check_count(count, objective)
        if keep_graph not in (True, False, "auto"):
            msg = f'keep_graph= takes True, False or "auto", got {keep_graph!r}'
            raise ValueError(msg)
        device = selected.like.device
        with evaluation(model, training=training, device=device):
            batches = read(data, device, cache=cache, batch_size=batch_size)
            survey = Survey(objective, selected, training=training, rng=rng)
            survey.look_at(batches)
        whole = None
        if survey.separable and isinstance(batches, Cached):
            whole = batches.joined(survey.sizes)
            if whole is not None and batch_size is None and not training:
                batches = survey.merged(whole, batches)
        stored = isinstance(batches, Cached) or keep_graph is True
        keep = survey.n_to_keep(keep_graph) if stored else 0
        total = survey.count if count is None else float(count)
        H = (Hessian if whole is None else SampledHessian)(
            objective=objective,
            parameters=selected,
            batches=batches,
            n_samples=sum(survey.sizes),
            count=total,
            training=training,
            rng=rng,
            keep=keep,
            bytes_per_sample=survey.bytes_per_sample,
            whole=whole,
        )
        H = H if bridge is None else bridge.operator(H)
    return across(H, processes, share=total, count=count)


class Hessian(TorchDoor):
    """(1/count) Σ_b ∇² (sum of the losses of batch b); made by `hessian`."""

    def __init__(
        self,
        *,
        objective: Objective,
        parameters: Parameters,
        batches: Cached | Streamed,
        n_samples: int,
        count: float,
        training: bool,
        rng: int,
        keep: int,
        bytes_per_sample: float,
        whole: Any | None = None,
    ) -> None:
        super().__init__(parameters.n, like=parameters.like, layout=parameters.layout)
        self._objective = objective
        self._parameters = parameters
        self._batches = batches
        self._n_samples = n_samples
        self._count = count
        self._training = training
        self._rng = rng
        self._keep = keep
        self._bytes_per_sample = bytes_per_sample
        self._whole = whole
        self._kept: dict[int, Any] = {}
        self._scratch = Scratch()

    @property
    def n_samples(self) -> int:
        """Number of samples that the mean is over."""
        return self._n_samples

    def _matmat(self, X: torch.Tensor, /) -> torch.Tensor:
        self._parameters.check_unchanged()
        device = self._like.device
        complete = len(self._kept) == len(self._batches)
        with _replay(device) if complete else self._evaluation():
            # Copies, because a tensor made in inference mode cannot enter a graph.
            vectors = [part.clone() for part in self._parameters.split(X.detach().mT)]
            totals = [torch.zeros_like(part) for part in vectors]
            if X.shape[1] == 0:
                return torch.zeros_like(X)
            if complete:
                for index in range(len(self._batches)):
                    self._kept[index].add_products(vectors, totals, free=False)
            else:
                self._pass(vectors, totals)
            total = torch.cat([part.flatten(1) for part in totals], dim=1)
        return total.div_(self._count).mT

    def _evaluation(self) -> AbstractContextManager[None]:
        return evaluation(self._objective.model, training=self._training, device=self._like.device)

    def _pass(self, vectors: list[torch.Tensor], totals: list[torch.Tensor]) -> None:
        """Read the data, and differentiate what is not kept."""
        for index, batch in enumerate(self._batches):
            graph = self._kept.get(index)
            if graph is None:
                graph = self._differentiate(index, batch)
                if index < self._keep:
                    graph = self._kept[index] = settled(graph, self._like, self._scratch)
            graph.add_products(vectors, totals, free=index >= self._keep)

    def _differentiate(self, index: int, batch: Any) -> GradientGraph:
        if self._training:
            seed(self._rng + index, self._like.device)
        forward = self._objective.forward(batch)
        return GradientGraph(
            forward.total(), self._parameters, forward.n, self._bytes_per_sample * forward.n
        )

    def _describe(self) -> str:
        n, b = self._n_samples, len(self._batches)
        graphs = "graphs recomputed"
        if self._keep:
            graphs = "graphs kept" if self._keep >= b else f"{self._keep} graphs kept"
        mode = ", training mode" if self._training else ""
        size = f"{n} sample{'s' * (n != 1)} in {b} batch{'es' * (b != 1)}"
        where = self._batches.describe()
        return f"{super()._describe()}, {size}, {where}, {graphs}{mode}"

    def __getstate__(self) -> dict[str, Any]:
        # Graphs are rebuilt where they are needed.
        return {**self.__dict__, "_kept": {}, "_scratch": Scratch()}


class SampledHessian(Hessian):
    """A Hessian whose samples are at hand one by one: it can restrict itself to some of them."""

    @property
    def n_terms(self) -> int:
        """Number of samples."""
        return self._n_samples

    def subset(self, indices: Any, /) -> Hessian:
        """The mean over some samples (repeats count), at the scale of the whole: N/|B| their sum.

        `indices` are integers (m,): a tensor, a NumPy array or a list, in the order of the data.
        """
        if not isinstance(indices, torch.Tensor):
            indices = torch.tensor(indices)  # a copy: NumPy's may be read-only
        rows = indices.to(self._like.device)
        if rows.numel() == 0:
            raise ValueError("a subset needs at least one sample")
        if rows.dtype.is_floating_point or rows.dtype == torch.bool or rows.ndim != 1:
            msg = f"indices must be integers of shape (m,), got {rows.dtype} {tuple(rows.shape)}"
            raise (ValueError if rows.ndim != 1 else TypeError)(msg)
        chosen = samples.take(self._whole, rows)  # raises IndexError outside 0 .. N - 1
        return SampledHessian(
            objective=self._objective,
            parameters=self._parameters,
            batches=Cached([chosen]),
            n_samples=rows.numel(),
            count=self._count * rows.numel() / self._n_samples,
            training=self._training,
            rng=self._rng,
            keep=0,  # a subset serves one or two products
            bytes_per_sample=self._bytes_per_sample,
            whole=chosen,
        )


@contextmanager
def _replay(device: torch.device) -> Iterator[None]:
    """Products that do not run the model leave no trace in it."""
    with LOCK, torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        yield


def check_count(count: float, objective: Objective) -> None:
    """Raise unless `count` is a divisor that goes with the objective."""
    if objective.batch_loss is None and objective.reduction == "mean":
        raise ValueError('count= goes with reduction="sum" or "none", or with batch_loss=')
    if isinstance(count, bool) or not isinstance(count, int | float):
        msg = f"count must be a number, got {type(count).__name__}"
        raise TypeError(msg)
    if not (math.isfinite(count) and count > 0):
        msg = f"count must be positive and finite, got {count}"
        raise ValueError(msg)
