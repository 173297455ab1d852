"""The curvature matrix of every block, from one reading of the data where they fit."""

from __future__ import annotations

from typing import Any

import torch

from invhvp.operators import BlockDiagonal, LinearOperator

from .. import samples
from ..curvature import hessian
from ..data import Cached, read
from ..gauss_newton import empirical_fisher, fisher, gauss_newton
from .blocks import Blocks
from .modes import SecondOrderMode

_BUILD = {
    SecondOrderMode.HESSIAN: hessian,
    SecondOrderMode.GAUSS_NEWTON: empirical_fisher,
    SecondOrderMode.GENERALIZED_GAUSS_NEWTON: gauss_newton,
    SecondOrderMode.FISHER: fisher,
}


def curvature(
    model: torch.nn.Module, loss: Any, data: Any, blocks: Blocks, mode: SecondOrderMode
) -> LinearOperator:
    """The operator of one block, or the block-diagonal operator of several."""
    build = _BUILD[mode]
    options: dict[str, Any] = {}
    if len(blocks.parameters) > 1:
        data, options = _read_once(data, next(model.parameters()).device)
    found = {
        name: build(model, loss, data, parameters=list(names), **options)
        for name, names in blocks.parameters.items()
    }
    if len(found) == 1:
        return next(iter(found.values()))
    return BlockDiagonal(found, blocks.layout)


def _read_once(data: Any, device: torch.device) -> tuple[Any, dict[str, int]]:
    """Data that several operators can share without a copy each, and their options."""
    batches = read(data, device)
    if not isinstance(batches, Cached):
        return data, {}
    sizes = [next(samples.tensors(batch)).shape[0] for batch in batches]
    whole = batches.joined(sizes)
    if isinstance(whole, list | tuple) and all(isinstance(t, torch.Tensor) for t in whole):
        return tuple(whole), {"batch_size": max(sizes)}
    return list(batches), {}
