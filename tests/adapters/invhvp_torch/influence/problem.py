"""One small network with its dense float64 matrices, which every model is held against."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from invhvp_torch.influence import BlockMode, SecondOrderMode
from tests.adapters.invhvp_torch import models, references

LOSS = torch.nn.functional.cross_entropy
N_TRAIN, N_TEST = 15, 3

# Out of the model's order, and without the first layer's bias, which is held fixed.
SUBSET = {"out": ["2.bias", "2.weight"], "in": ["0.weight"]}
STRUCTURES = {
    "full": BlockMode.FULL,
    "layers": BlockMode.LAYER_WISE,
    "parameters": BlockMode.PARAMETER_WISE,
    "subset": SUBSET,
}
GROUPS = {
    "full": {"": ["0.weight", "0.bias", "2.weight", "2.bias"]},
    "layers": {k: [f"{k}.weight", f"{k}.bias"] for k in ("0", "2")},
    "parameters": {f"{k}.{p}": [f"{k}.{p}"] for k in ("0", "2") for p in ("weight", "bias")},
    "subset": SUBSET,
}


@cache
def mlp():
    """Model (26 parameters), training and test samples; a few steps from a random start."""
    rng = torch.Generator().manual_seed(3)
    x = torch.randn((N_TRAIN + N_TEST, 4), generator=rng, dtype=torch.float64)
    y = torch.randint(0, 3, (N_TRAIN + N_TEST,), generator=rng)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)
        model = torch.nn.Sequential(*layers).double()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        LOSS(model(x), y).backward()
        optimiser.step()
    optimiser.zero_grad()
    return model, (x[:N_TRAIN], y[:N_TRAIN]), (x[N_TRAIN:], y[N_TRAIN:])


def loader(batch_size: int = 14, **options):
    """Batches of 14 and 1: what weighs batches equally gets it wrong."""
    _, (x, y), _ = mlp()
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, **options)


@cache
def matrix(mode: SecondOrderMode | str) -> np.ndarray:
    """The dense matrix of all parameters."""
    mode = SecondOrderMode(mode)
    model, (x, y), _ = mlp()
    if mode in (SecondOrderMode.HESSIAN, SecondOrderMode.GAUSS_NEWTON):
        H, G = models.reference(model, LOSS, x, y)
        return (H if mode is SecondOrderMode.HESSIAN else G.T @ G / len(y)).numpy()
    return references.gauss_newton_reference(model, LOSS, x, y).numpy()


@cache
def rows(test: bool = False) -> np.ndarray:
    """Per-sample gradients (N, p)."""
    model, train, held_out = mlp()
    return models.reference(model, LOSS, *(held_out if test else train))[1].numpy()


def index(structure: str) -> dict[str, np.ndarray]:
    """Positions of every block in the whole parameter vector, as the caller lists them."""
    model, _, _ = mlp()
    start, at = 0, {}
    for name, p in model.named_parameters():
        at[name] = np.arange(start, start + p.numel())
        start += p.numel()
    return {k: np.concatenate([at[n] for n in names]) for k, names in GROUPS[structure].items()}


def blocks(M: np.ndarray, structure: str) -> dict[str, np.ndarray]:
    return {name: M[np.ix_(at, at)] for name, at in index(structure).items()}


def by_block(values: np.ndarray, structure: str) -> dict[str, np.ndarray]:
    return {name: values[:, at] for name, at in index(structure).items()}


def least(mode: SecondOrderMode) -> float:
    """A small λ with which every block of the matrix is positive definite."""
    lowest = float(np.linalg.eigvalsh(matrix(mode))[0])
    return max(1e-3, -1.1 * lowest)


def close(actual, expected, eps: float) -> None:
    """Equal as matrices, to `eps` of the largest entry."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= eps * np.abs(expected).max()


def assert_blocks(actual: Mapping, expected: Mapping, eps: float) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        close(actual[name].numpy(), value, eps)
