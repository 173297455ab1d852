"""What finds GPU bugs without a GPU: a guard against hidden host copies, and two counters.

The guard makes every array of array-api-strict on a pretended device behave as a CUDA array
does at its worst: whatever would copy it to the host raises. The one way through is
`invhvp._backend.to_host`. `torch_syncs` counts the operations that make a CUDA tensor wait for
the host, `HostTransfers` the calls of `to_host` itself.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import array_api_compat
import numpy as np
import pytest

IMPLICIT_COPIES = (
    "__float__", "__bool__", "__int__", "__index__", "__complex__", "__iter__", "__array__",
    "__dlpack__",
)  # fmt: skip


class HostSyncError(AssertionError):
    """A device array was copied to the host behind the engine's back.

    An AssertionError, because code under test may well catch RuntimeError and ValueError.
    """


@functools.cache
def guard_strict() -> Callable[[Any], np.ndarray]:
    """Forbid implicit host copies of array-api-strict arrays; return the tests' own way out."""
    import array_api_strict as strict

    cls = type(strict.asarray(0.0))
    cpu = strict.Device("CPU_DEVICE")
    move = cls.to_device

    def forbid(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.device != cpu:
                raise HostSyncError(f"{name} of an array on {self.device}: a hidden host copy")
            return original(self, *args, **kwargs)

        return guarded

    for name in IMPLICIT_COPIES:
        if hasattr(cls, name):
            setattr(cls, name, forbid(name, getattr(cls, name)))

    @functools.wraps(move)
    def to_device(self: Any, device: Any, /, **kwargs: Any) -> Any:
        if device == cpu and self.device != cpu and not _called_from_to_host():
            raise HostSyncError(f"to_device from {self.device} outside invhvp._backend.to_host")
        return move(self, device, **kwargs)

    cls.to_device = to_device
    return lambda x: np.asarray(move(x, cpu))


def _called_from_to_host() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "to_host" and frame.f_globals["__name__"] == "invhvp._backend":
            return True
        frame = frame.f_back
    return False


@dataclass
class HostTransfers:
    """Counts calls of `invhvp._backend.to_host`: all of them, and those that crossed over."""

    calls: int = 0
    transfers: int = 0
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def reset(self) -> None:
        self.calls = self.transfers = 0
        self.shapes.clear()

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> HostTransfers:
        from invhvp import _backend

        original = _backend.to_host

        @functools.wraps(original)
        def to_host(x: Any, *args: Any, **kwargs: Any) -> np.ndarray:
            self.calls += 1
            if not array_api_compat.is_numpy_array(x):
                self.transfers += 1
                self.shapes.append(tuple(x.shape))
            return original(x, *args, **kwargs)

        replace_everywhere(monkeypatch, original, to_host)
        return self


def replace_everywhere(monkeypatch: pytest.MonkeyPatch, original: Any, replacement: Any) -> None:
    """Replace an object under every name that a loaded module of invhvp has for it."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "invhvp":
            for attribute, value in list(vars(module).items()):
                if value is original:
                    monkeypatch.setattr(module, attribute, replacement)


# What makes a CUDA tensor synchronise, by the name of the operator below Python.
TORCH_SYNCS = frozenset(
    {
        "aten::_local_scalar_dense",  # item, float, bool
        "aten::nonzero",
        "aten::masked_select",
        "aten::_unique2",
        "aten::unique_dim",
        "aten::equal",
        "aten::repeat_interleave.Tensor",
        "aten::_linalg_check_errors",  # cholesky, inv, eigh... where `*_ex` was not used
    }
)


@dataclass
class TorchSyncs:
    """Synchronising operators seen, and operators that gave float64, each with its count."""

    seen: Counter[str] = field(default_factory=Counter)
    float64: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.seen.values())


@contextmanager
def torch_syncs() -> Iterator[TorchSyncs]:
    """Count, on the CPU, what would make a CUDA tensor wait for the host.

    Copies between host and device leave no trace on the CPU: the strict guard is for those.
    """
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    syncs = TorchSyncs()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name
            if name in TORCH_SYNCS or f"{name}.{func._overloadname}" in TORCH_SYNCS:
                syncs.seen[name] += 1
            masks = (torch.bool, torch.uint8)
            if name == "aten::index" and any(t is not None and t.dtype in masks for t in args[1]):
                syncs.seen["aten::index(mask)"] += 1
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor) and t.dtype == torch.float64:
                    syncs.float64[name] += 1
            return out

    with Counting(), pytest.MonkeyPatch.context() as patch:
        # Where a look at values is free the engine may take one: here it must not think so.
        patch.setattr("invhvp._backend.on_host", lambda x: isinstance(x, np.ndarray))
        yield syncs
