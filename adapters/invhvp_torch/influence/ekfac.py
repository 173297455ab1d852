"""Influence by Kronecker-factored curvature, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from invhvp.layout import Block, Layout
from invhvp.methods import Direct
from invhvp.operators import BlockDiagonal, LinearOperator

from ..kronecker import ekfac, kfac
from .blocks import Blocks, Regularization
from .model import InfluenceModel
from .modes import BlockMode, SecondOrderMode


class EkfacInfluence(InfluenceModel):
    """K-FAC, or EKFAC with `update_diagonal=True`: the Fisher matrix for networks of any size.

    One block for each module that owns parameters; see `it.kfac` and `it.ekfac`. λ = 0 is the
    pseudo-inverse of each layer. The loss is taken for a negative log-likelihood; `fisher` says
    over which labels the expectation is.

    Example:
        >>> import torch
        >>> from invhvp_torch.influence import EkfacInfluence
        >>> model, x, y = torch.nn.Linear(3, 2), torch.eye(3), torch.tensor([0, 1, 0])
        >>> influence = EkfacInfluence(model, update_diagonal=True, hessian_regularization=0.1)
        >>> influence.fit([(x, y)]).influences(x, y).shape
        torch.Size([3, 3])
    """

    __slots__ = ("fisher", "update_diagonal")

    def __init__(
        self,
        model: torch.nn.Module,
        update_diagonal: bool = False,
        hessian_regularization: Regularization = 0.0,
        progress: bool = False,
        *,
        loss: Any = torch.nn.functional.cross_entropy,
        fisher: Any = "exact",
    ) -> None:
        self.update_diagonal, self.fisher = update_diagonal, fisher
        super().__init__(
            model, loss, Direct(singular="truncate"), hessian_regularization,
            BlockMode.LAYER_WISE, SecondOrderMode.FISHER, progress=progress,
        )  # fmt: skip

    def _curvature(self, data: Any) -> LinearOperator:
        build = ekfac if self.update_diagonal else kfac
        K = build(self.model, self.loss, data, fisher=self.fisher, progress=self.progress)
        found = layer_operators(K, self._blocks)
        if len(found) == 1:
            return next(iter(found.values()))
        return BlockDiagonal(found, self._blocks.layout)

    def _describe(self) -> str:
        kind = "EKFAC" if self.update_diagonal else "K-FAC"
        return f"{kind}, {self.fisher} Fisher, {super()._describe()}"


def layer_operators(K: Any, layers: Blocks) -> dict[str, LinearOperator]:
    """The Kronecker-factored blocks of every module, as one operator of its parameters."""
    positions = {name: np.arange(K.shape[0])[block.indices] for name, block in K.layout.items()}
    found: dict[str, LinearOperator] = {}
    for layer, columns in layers.columns.items():
        at = np.sort(columns)
        mine = {name: p for name, p in positions.items() if p[0] in at}
        split = [name for name, p in mine.items() if not np.isin(p, at).all()]
        if split:
            msg = f"the blocks {split} of K-FAC couple several modules: use it.ekfac with ih.Direct"
            raise NotImplementedError(msg)
        layout = Layout(
            {name: Block((p.size,), np.searchsorted(at, p)) for name, p in mine.items()}
        )
        found[layer] = BlockDiagonal({name: K.blocks[name] for name in mine}, layout)
    return found
