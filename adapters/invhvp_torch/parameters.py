"""Which parameters a matrix is about, and how they lie in the parameter vector."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from invhvp.layout import Layout

Selection: TypeAlias = Any
"""A parameter's or module's name, a glob pattern, a module, a parameter, or several of these."""


class Parameters:
    """The selected trainable parameters of a model, in `named_parameters()` order.

    A parameter that is shared under several names is one block, under its first name.

    Args:
        model: the model; its parameters are looked at, never changed.
        selection: None for all trainable parameters; else a name, a glob pattern ("encoder.*"),
            a module (all that is in it), a parameter, or an iterable of these.

    Raises ValueError where nothing matches or a parameter asked for by name is frozen, TypeError
    where the parameters differ in dtype or device.
    """

    def __init__(self, model: torch.nn.Module, selection: Selection = None) -> None:
        if not isinstance(model, torch.nn.Module):
            msg = f"model must be a torch.nn.Module, got {type(model).__name__}"
            raise TypeError(msg)
        chosen = None if selection is None else _chosen(model, selection)
        named = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and (chosen is None or id(parameter) in chosen)
        }
        if not named:
            raise ValueError("the model has no trainable parameters (requires_grad=True)")
        self.named = named
        _check_uniform(named)
        self.layout = Layout.from_shapes({name: tuple(p.shape) for name, p in named.items()})
        everything = tuple(model.parameters())
        self._everything = everything
        self._state = _state(everything)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(self.named)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The parameters themselves, in order."""
        return tuple(self.named.values())

    @property
    def n(self) -> int:
        """Length of the parameter vector."""
        return self.layout.n

    @property
    def like(self) -> torch.Tensor:
        """An empty tensor of the parameters' dtype and device."""
        first = self.tensors[0]
        return torch.empty((0,), dtype=first.dtype, device=first.device)

    def flatten(self) -> torch.Tensor:
        """A copy of the values as one vector (n,)."""
        return torch.cat([p.detach().reshape(-1) for p in self.tensors])

    def split(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Views (k, *shape), one a parameter, of rows (k, n)."""
        parts = rows.split([p.numel() for p in self.tensors], dim=1)
        return [
            part.reshape(rows.shape[0], *p.shape)
            for part, p in zip(parts, self.tensors, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        self.check_unchanged()
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._state = _state(self._everything)  # copies live elsewhere

    def check_unchanged(self) -> None:
        """Raise RuntimeError where the model has been trained, loaded or moved meanwhile."""
        if _state(self._everything) != self._state:
            raise RuntimeError(
                "the model's parameters have changed since this operator was built; build the "
                "operator again, or keep a copy of the model: copy.deepcopy(model)"
            )


def to_array(model: torch.nn.Module, parameters: Selection = None) -> torch.Tensor:
    """Copy the selected parameters into one vector (n,), in the order of every operator here.

    Example:
        >>> import torch, invhvp_torch as it
        >>> it.to_array(torch.nn.Linear(3, 2)).shape
        torch.Size([8])
    """
    return Parameters(model, parameters).flatten()


def from_array(
    model: torch.nn.Module, x: torch.Tensor, parameters: Selection = None
) -> dict[str, torch.Tensor]:
    """View a vector (n,) as named tensors of the parameters' shapes: `to_array` backwards.

    Raises ValueError where `x` has another length.

    Example:
        >>> import torch, invhvp_torch as it
        >>> model = torch.nn.Linear(3, 2)
        >>> it.from_array(model, it.to_array(model))["weight"].shape
        torch.Size([2, 3])
    """
    selected = Parameters(model, parameters)
    if tuple(x.shape) != (selected.n,):
        msg = f"x must have shape ({selected.n},), one number a parameter, got {tuple(x.shape)}"
        raise ValueError(msg)
    blocks = selected.split(x[None, :])
    return {name: block[0] for name, block in zip(selected.names, blocks, strict=True)}


def _state(parameters: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """What changes when an optimiser, `load_state_dict` or `.to` touches the parameters."""
    return [(p.data_ptr(), p._version) for p in parameters]


def _check_uniform(named: Mapping[str, torch.Tensor]) -> None:
    for what in ("dtype", "device"):
        kinds: dict[Any, str] = {}
        for name, parameter in named.items():
            kinds.setdefault(getattr(parameter, what), name)
        if len(kinds) > 1:
            found = ", ".join(f"{kind} ({name!r})" for kind, name in kinds.items())
            msg = (
                f"the parameters must have one {what}, found {found}; convert the model or "
                "select some of them with parameters="
            )
            raise TypeError(msg)
    for name, parameter in named.items():
        if parameter._backward_hooks:
            msg = (
                f"parameter {name!r} has a gradient hook (register_hook), which would change "
                "every derivative; remove it first"
            )
            raise ValueError(msg)


def _chosen(model: torch.nn.Module, selection: Selection) -> set[int]:
    """Ids of the selected parameters, frozen ones only where a whole pattern or module froze."""
    aliases = dict(model.named_parameters(remove_duplicate=False))
    chosen: set[int] = set()
    for item in _items(selection):
        found = _find(model, aliases, item)
        trainable = [p for p in found if p.requires_grad]
        if not found:
            msg = f"parameters={item!r} matches nothing; available: {_available(aliases)}"
            raise ValueError(msg)
        if not trainable:
            msg = (
                f"parameters={_short(item)} selects only frozen parameters; call "
                "requires_grad_(True) on them, or leave them out"
            )
            raise ValueError(msg)
        chosen.update(id(p) for p in trainable)
    if not chosen:
        msg = f"parameters= is empty; available: {_available(aliases)}"
        raise ValueError(msg)
    return chosen


def _items(selection: Selection) -> Iterable[Any]:
    # A Sequential is an iterable of modules too, and a parameter of numbers.
    if isinstance(selection, str | torch.nn.Module | torch.Tensor):
        return [selection]
    if isinstance(selection, Iterable):
        return list(selection)
    msg = (
        "parameters= takes a name, a glob pattern, a module, a parameter or an iterable of "
        f"these, got {type(selection).__name__}"
    )
    raise TypeError(msg)


def _find(
    model: torch.nn.Module, aliases: dict[str, torch.nn.Parameter], item: Any
) -> list[torch.Tensor]:
    if isinstance(item, torch.nn.Module):
        if all(item is not module for module in model.modules()):
            msg = f"parameters= has a {type(item).__name__} that is not a part of the model"
            raise ValueError(msg)
        return list(item.parameters())
    if isinstance(item, torch.Tensor):
        return [p for p in aliases.values() if p is item]
    if not isinstance(item, str):
        msg = (
            "parameters= takes names, glob patterns, modules and parameters, got "
            f"{type(item).__name__}"
        )
        raise TypeError(msg)
    if item in aliases:
        return [aliases[item]]
    module = dict(model.named_modules()).get(item)
    if module is not None:
        return list(module.parameters())
    return [p for name, p in aliases.items() if fnmatch.fnmatchcase(name, item)]


def _available(aliases: dict[str, torch.nn.Parameter]) -> str:
    names = [name if p.requires_grad else f"{name} (frozen)" for name, p in aliases.items()]
    shown = ", ".join(names[:30])
    return shown if len(names) <= 30 else f"{shown}, ... ({len(names)} in all)"


def _short(item: Any) -> str:
    return repr(item) if isinstance(item, str) else type(item).__name__
