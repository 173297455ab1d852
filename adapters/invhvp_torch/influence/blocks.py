"""Which parameters form a block, in which order they are seen, and the λ of each block."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch

from invhvp.layout import Block, Layout
from invhvp.solution import InvhvpWarning

from ..parameters import Parameters
from .modes import BlockMode
from .scores import check_rows

BlockStructure: TypeAlias = BlockMode | str | Mapping[str, Iterable[str]]
Regularization: TypeAlias = float | Mapping[str, float | None] | None


class Blocks:
    """Named groups of parameters.

    The engine's order is that of `named_parameters()` within the selection; what a caller sees is
    block after block, in the order of the mapping and of the names in it.

    Attributes:
        parameters: names by block, as the caller ordered them.
        names: of all selected parameters, in the engine's order.
        layout: the blocks' positions in the engine's order.
        columns: the same by block, in the caller's order.
    """

    def __init__(self, model: torch.nn.Module, groups: Mapping[str, list[str]]) -> None:
        selected = Parameters(model, [name for group in groups.values() for name in group])
        at = selected.layout
        self.parameters = {name: tuple(group) for name, group in groups.items()}
        self.names = selected.names
        self.columns = {
            name: np.concatenate([np.arange(at.n)[at[p].indices] for p in group])
            for name, group in groups.items()
        }
        self.layout = Layout(
            {name: Block((c.size,), np.sort(c)) for name, c in self.columns.items()}
        )

    @property
    def n(self) -> int:
        """Number of parameters in all blocks."""
        return self.layout.n

    def outside(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (N, n) in the engine's order, as the caller sees them."""
        return _columns(rows, np.concatenate(list(self.columns.values())))

    def inside(self, rows: torch.Tensor) -> torch.Tensor:
        """`outside` backwards."""
        return _columns(rows, np.argsort(np.concatenate(list(self.columns.values()))))

    def split(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows in the engine's order by block, as the caller sees them."""
        return {name: _columns(rows, columns) for name, columns in self.columns.items()}

    @property
    def engine_names(self) -> dict[str, list[str]]:
        """Parameter names by block in the engine's order."""
        return {
            block: [name for name in self.names if name in chosen]
            for block, chosen in self.parameters.items()
        }

    def engine_split(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows by block, both in the engine's order."""
        return {name: _columns(rows, np.sort(columns)) for name, columns in self.columns.items()}

    def inside_by_name(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The caller's rows of some blocks, each in the engine's order.

        Raises ValueError for an unknown block or a wrong number of columns.
        """
        found = {}
        for name, given in rows.items():
            if name not in self.columns:
                msg = f"there is no block {name!r}; there are {list(self.columns)}"
                raise ValueError(msg)
            check_rows(given, self.columns[name].size, f"factors of {name!r}")
            found[name] = _columns(given, np.argsort(self.columns[name]))
        return found


def of_structure(model: torch.nn.Module, structure: BlockStructure) -> Blocks:
    """The blocks of a model.

    Raises ValueError for names that are unknown or in two blocks, UnsupportedModeError for an
    unknown mode. Warns where a mapping names frozen parameters, which are left out.
    """
    if isinstance(structure, Mapping):
        return Blocks(model, _of_mapping(model, structure))
    mode = BlockMode(structure)
    groups: dict[str, list[str]] = {}
    for name in Parameters(model).names:
        layer = name.rpartition(".")[0]
        key = {BlockMode.FULL: "", BlockMode.LAYER_WISE: layer, BlockMode.PARAMETER_WISE: name}
        groups.setdefault(key[mode], []).append(name)
    return Blocks(model, groups)


def by_layer(model: torch.nn.Module, blocks: Blocks) -> Blocks:
    """The same parameters, one block for each module that owns some."""
    layers: dict[str, list[str]] = {}
    for name in blocks.names:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return Blocks(model, layers)


def _of_mapping(
    model: torch.nn.Module, structure: Mapping[str, Iterable[str]]
) -> dict[str, list[str]]:
    known = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in model.named_parameters()}
    taken: dict[int, str] = {}
    frozen: list[str] = []
    groups: dict[str, list[str]] = {}
    for block, names in structure.items():
        if isinstance(names, str):
            msg = f"block {block!r} must list parameter names, got the string {names!r}"
            raise TypeError(msg)
        for name in names:
            if name not in known:
                msg = f"block {block!r} names {name!r}, which is no parameter; there are " + (
                    ", ".join(known)
                )
                raise ValueError(msg)
            parameter = known[name]
            if id(parameter) in taken:
                msg = f"{name!r} is in the blocks {taken[id(parameter)]!r} and {block!r}"
                raise ValueError(msg)
            taken[id(parameter)] = block
            if parameter.requires_grad:
                groups.setdefault(block, []).append(first[id(parameter)])
            else:
                frozen.append(name)
    if frozen:
        msg = f"frozen parameters are left out of the blocks: {', '.join(frozen)}"
        warnings.warn(msg, InvhvpWarning, stacklevel=5)
    if not groups:
        raise ValueError("the block structure names no trainable parameters")
    return groups


def dampings(regularization: Regularization, names: Iterable[str]) -> dict[str, float]:
    """λ of every block; blocks that a mapping does not name or cover have 0.

    Raises ValueError for a name that is neither a block nor the parent of one, and for values
    that are negative or not finite.
    """
    found = dict.fromkeys(names, 0.0)
    if not isinstance(regularization, Mapping):
        return dict.fromkeys(found, _number(regularization))
    # The more specific name wins, whatever the order of the mapping.
    for name in sorted(regularization, key=lambda key: key.count(".") + bool(key)):
        covered = [b for b in found if b == name or not name or b.startswith(f"{name}.")]
        if not covered:
            msg = (
                f"regularization names {name!r}, which is no block and no parent of one; the "
                f"blocks are {list(found)}"
            )
            raise ValueError(msg)
        found |= dict.fromkeys(covered, _number(regularization[name]))
    return found


def _number(value: Any) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        msg = f"regularization must be a number or a mapping of numbers, got {value!r}"
        raise TypeError(msg)
    if not (math.isfinite(value) and value >= 0):
        msg = f"regularization must be finite and not negative, got {value}"
        raise ValueError(msg)
    return float(value)


def _columns(rows: torch.Tensor, columns: np.ndarray) -> torch.Tensor:
    if columns.size and np.array_equal(columns, np.arange(columns[0], columns[0] + columns.size)):
        return rows[:, int(columns[0]) : int(columns[0]) + columns.size]
    return rows[:, torch.as_tensor(columns, device=rows.device)]
