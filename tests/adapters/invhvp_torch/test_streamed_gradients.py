"""Gradients that are computed at every use equal those that are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import invhvp as ih
import invhvp_torch as it

LOSS = nn.functional.cross_entropy


def _problem() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    layers = nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)
    model = nn.Sequential(*layers).double()
    x = torch.randn(23, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (23,), generator=generator)
    return model, [(x[i : i + 7], y[i : i + 7]) for i in range(0, 23, 7)]  # a short last batch


def test_the_rows_and_products_are_those_that_are_kept() -> None:
    model, batches = _problem()
    kept = it.per_sample_gradients(model, LOSS, batches)
    G = it.streamed_gradients(model, LOSS, batches)
    assert isinstance(G, ih.StreamedGradients)
    assert G.layout is not None
    assert kept.layout is not None
    assert G.layout.names == kept.layout.names
    V = torch.linspace(-1, 1, 2 * kept.shape[1], dtype=torch.float64).reshape(-1, 2)
    U = torch.linspace(-1, 1, 2 * kept.shape[0], dtype=torch.float64).reshape(-1, 2)
    for mine, theirs in (
        (G.to_dense(), kept.to_dense()),
        (G @ V, kept @ V),
        (G.T @ U, kept.T @ U),
        (G.gram(), kept.gram()),
        (G[20:23].to_dense(), kept[20:23].to_dense()),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_influence_of_a_training_set_that_is_streamed() -> None:
    model, batches = _problem()
    kept = it.per_sample_gradients(model, LOSS, batches)
    inverse = ih.SampleSpace().prepare(ih.RankOneMean(kept), damping=1e-2)
    G = it.streamed_gradients(model, LOSS, batches)
    mine = ih.Influence(inverse, G).scores(kept[:3])
    torch.testing.assert_close(
        mine, ih.Influence(inverse, kept).scores(kept[:3]), rtol=1e-9, atol=0
    )


def test_in_numpy_arrays() -> None:
    model, batches = _problem()
    G: Any = it.streamed_gradients(model, LOSS, batches, array_namespace=np)
    expected = it.per_sample_gradients(model, LOSS, batches).to_dense().numpy()
    np.testing.assert_allclose(G.to_dense(), expected, rtol=1e-12, atol=1e-14)


def test_the_door() -> None:
    model, batches = _problem()
    x, y = batches[0]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), shuffle=True)
    with pytest.raises(ValueError, match="shuffle=False"):
        it.streamed_gradients(model, LOSS, loader)
    with pytest.raises(TypeError, match="only once"):
        it.streamed_gradients(model, LOSS, iter(batches))
    G = it.streamed_gradients(model, LOSS, batches)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="changed"):
        G.to_dense()
