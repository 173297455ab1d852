"""Where factors meet training samples: scores, and how scores change with inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from invhvp.gradients import StackedGradients
from invhvp.influence import Influence
from invhvp.methods import MapInverse

from ..gradients import per_sample_gradients
from ..mixed import mixed_gradients
from .modes import InfluenceMode

ByName: TypeAlias = dict[str, torch.Tensor]


def gradients(model: torch.nn.Module, loss: Any, x: Any, y: Any, names: Iterable[str]) -> Any:
    """Per-sample gradients of the named parameters."""
    if isinstance(y, torch.Tensor) and y.ndim == 0:
        msg = "y is one sample's target: pass batches, such as x[:1] and y[:1]"
        raise ValueError(msg)
    return per_sample_gradients(model, loss, x, y, parameters=list(names))


def meet(
    model: torch.nn.Module,
    loss: Any,
    factors: Mapping[str, torch.Tensor],
    names: Mapping[str, Sequence[str]],
    x: Any,
    y: Any,
    mode: InfluenceMode,
) -> ByName:
    """Each part's factors (n_test, p) against the samples; both in `named_parameters()` order."""
    if mode is InfluenceMode.Perturbation:
        return {
            name: mixed_gradients(model, loss, x, y, rows.mT, parameters=list(names[name]))
            for name, rows in factors.items()
        }
    every = gradients(model, loss, x, y, {p: None for part in names.values() for p in part})
    return {name: (part(every, names[name]) @ rows.mT).mT for name, rows in factors.items()}


def part(G: StackedGradients, names: Sequence[str]) -> StackedGradients:
    """The gradients of some parameters."""
    if len(names) == len(G.blocks):
        return G
    return StackedGradients({name: block for name, block in G.blocks.items() if name in names})


def explore(
    inverses: Iterable[Any],
    names: Mapping[str, Sequence[str]],
    G: StackedGradients,
    values: Sequence[float],
) -> dict[float, ByName]:
    """Scores of samples among themselves by λ and block, from what one preparation knows."""
    values = _checked(values)
    found: dict[float, ByName] = {value: {} for value in values}
    for inverse, (block, chosen) in zip(inverses, names.items(), strict=True):
        for value, S in zip(values, _along(inverse, part(G, chosen), values), strict=True):
            found[value][block] = S
    return found


def _along(inverse: Any, G: StackedGradients, values: Sequence[float]) -> list[torch.Tensor]:
    if not isinstance(inverse, MapInverse):
        return [symmetric(S) for S in Influence(inverse, G).damping_curve(G, values).scores]
    B = G.to_dense().mT
    return [symmetric((G @ (inverse.with_damping(value) @ B)).mT) for value in values]


def pair(x_test: Any, y_test: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """The training samples: those given, or the test samples themselves."""
    if (x is None) != (y is None):
        given, missing = ("y", "x") if x is None else ("x", "y")
        msg = f"{given} was given without {missing}: pass both, or neither for the test samples"
        raise ValueError(msg)
    return (x_test, y_test) if x is None else (x, y)


def symmetric(S: torch.Tensor) -> torch.Tensor:
    """The symmetric part: what is left of the rest is rounding and the solver's tolerance."""
    return (S + S.mT) / 2


def check_rows(rows: Any, columns: int, what: str) -> None:
    """Raise unless `rows` are factors (N, columns)."""
    if not isinstance(rows, torch.Tensor):
        msg = f"{what} must be a tensor of rows, got {type(rows).__name__}"
        raise TypeError(msg)
    if rows.ndim != 2 or rows.shape[1] != columns:
        msg = f"{what} must have shape (N, {columns}), got {tuple(rows.shape)}"
        raise ValueError(msg)


def _checked(values: Any) -> list[float]:
    """λ's to explore, as floats: keys by which they are found again.

    Raises ValueError for none, or a bad one.
    """
    found = list(values)
    bad = [v for v in found if isinstance(v, bool) or not (math.isfinite(v) and v >= 0)]
    if bad or not found:
        msg = f"regularization values must be finite and not negative, got {bad or 'none'}"
        raise ValueError(msg)
    return [float(v) for v in found]
