"""Products with a mean curvature that go through the model: no row is ever formed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from invhvp import _backend

from .bridge import TorchDoor
from .data import Cached, Streamed
from .double_backward import explained
from .evaluation import evaluation, seed
from .objective import Forward, Objective
from .output_curvature import OutputCurvature
from .parameters import Parameters
from .seeds import Source


class ThroughModel(TorchDoor):
    """(1/count) Σ_b J_bᵀ H_b J_b over batches, where J_b and its transpose are autodiff passes.

    J v comes from differentiating Jᵀu in u (Townsend's double-vjp trick): reverse mode alone, so
    that whatever has a gradient has a product.
    """

    def __init__(
        self,
        name: str,
        *,
        objective: Objective,
        parameters: Parameters,
        batches: Cached | Streamed,
        source: Source,
        outputs: Callable[[Forward], OutputCurvature] | None,
        count: float,
        training: bool,
        rng: int,
        psd: bool,
        said: str,
    ) -> None:
        super().__init__(parameters.n, like=parameters.like, psd=psd, layout=parameters.layout)
        self._name = name
        self._objective = objective
        self._parameters = parameters
        self._batches = batches
        self._source = source
        self._outputs = outputs
        self._count = count
        self._training = training
        self._rng = rng
        self._said = said

    def _matmat(self, X: torch.Tensor, /) -> torch.Tensor:
        self._parameters.check_unchanged()
        model, device = self._objective.model, self._like.device
        with evaluation(model, training=self._training, device=device):
            # Cloned, because a tensor made in inference mode cannot enter a graph.
            rows = X.detach().mT.clone(memory_format=torch.contiguous_format)
            total = torch.zeros_like(rows)
            if rows.shape[0]:
                for index, batch in enumerate(self._batches):
                    if self._training:
                        seed(self._rng + index, device)
                    self._add(self._objective.forward(batch), index, rows, total)
        return (total / self._count).mT

    def _add(self, forward: Forward, index: int, rows: torch.Tensor, total: torch.Tensor) -> None:
        """Add the products of one batch with the rows (k, n) to `total` (k, n), our own."""
        outputs, times = self._middle(forward, index)
        tensors = self._parameters.tensors
        dual = torch.zeros_like(outputs).requires_grad_()
        with explained():
            slopes = torch.autograd.grad(
                outputs, tensors, dual, create_graph=True, allow_unused=True
            )
        active = [i for i, s in enumerate(slopes) if s is not None and s.requires_grad]
        if not active:
            return
        vectors = self._parameters.split(rows)
        sizes = [p.numel() for p in tensors]
        for j in range(rows.shape[0]):
            with explained():
                (forwards,) = torch.autograd.grad(
                    [slopes[i] for i in active],
                    [dual],
                    [vectors[i][j] for i in active],
                    retain_graph=True,
                )
            products = torch.autograd.grad(
                outputs, tensors, times(forwards.detach()), retain_graph=True, allow_unused=True
            )
            for part, product in zip(total[j, :].split(sizes), products, strict=True):
                if product is not None:
                    part += product.reshape(-1)

    def _middle(
        self, forward: Forward, index: int
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """What J is the Jacobian of, and what stands between it and its transpose."""
        if self._outputs is not None:
            return forward.flat(), self._outputs(forward).times
        return self._source(forward, index).values(forward), lambda u: u

    def __repr__(self) -> str:
        dtype = _backend.dtype_name(self.dtype)
        return f"{self._name}({self._describe()}, {self._said}, {dtype}, {self.device})"
