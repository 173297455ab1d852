"""Sums over samples that can be added to each other, saved and continued."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar

from .. import _backend
from ..operators.data_parallel import everyones
from ..protocols import Array, Processes


class Sums:
    """Named sums that can be added to each other; float64 where there is any."""

    _kind: ClassVar[str]

    def __init__(self, shapes: Mapping[str, tuple[int, int]], *, like: Array, **said: Any) -> None:
        if not shapes:
            raise ValueError("an accumulator needs at least one layer")
        self.shapes = {name: (int(o), int(i)) for name, (o, i) in shapes.items()}
        self.total = 0.0
        self._like = _backend.empty_like(like)
        self._said = said
        self._sums: dict[str, Array] = {}

    @property
    def fingerprint(self) -> int:
        """A checksum of what must be equal for sums to be added: kind, layers, options."""
        said = (self._kind, sorted(self.shapes.items()), sorted(self._said.items()))
        return zlib.crc32(repr(said).encode())

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return sum(8 * math.prod(x.shape) for x in self._sums.values())

    def add_sums(self, name: str, **sums: Array) -> None:
        """Add small arrays that were summed elsewhere."""
        for key, value in sums.items():
            value = self._placed(value)
            mine = self._sums.get(f"{name}/{key}")
            self._sums[f"{name}/{key}"] = value if mine is None else mine + value

    def _placed(self, value: Array) -> Array:
        """A sum beside `like` where that has float64: others save it, and add it up."""
        like = self._like
        if _backend.is_numpy(value) and not _backend.is_numpy(like) and _backend.has_float64(like):
            return _backend.from_host(value, like, dtype=_backend.namespace(like).float64)
        return value

    def count(self, total: float) -> None:
        """Add to what the sums are divided by: the samples, or their weights."""
        self.total += float(total)

    def merge(self, other: Any, /) -> Any:
        """The sums over the samples of both; neither is changed.

        Raises ValueError where the other one is about other layers or options.
        """
        self._check(other.fingerprint)
        merged = self._empty()
        for part in (self, other):
            for key, value in part._sums.items():
                name, _, field = key.rpartition("/")
                merged.add_sums(name, **{field: value})
            merged.count(part.total)
        return merged

    def add_processes(self, processes: Processes) -> None:
        """Add the sums of all other processes, in each of them the same layers and options."""
        self._sums = {key: processes(self._sums[key]) for key in sorted(self._sums)}
        self.total = float(everyones(processes, self._like, self.total).sum())

    def state(self) -> dict[str, Any]:
        """The sums by name, with "fingerprint" (an int) and "total" (a float): to be saved."""
        return {**self._sums, "fingerprint": self.fingerprint, "total": self.total}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Raises ValueError where it is about other layers or options."""
        self._check(int(state["fingerprint"]))
        self.total = float(state["total"])
        keys = [key for key in state if key not in ("fingerprint", "total")]
        self._sums = {key: state[key] for key in keys}

    def _check(self, fingerprint: int) -> None:
        if fingerprint != self.fingerprint:
            msg = (
                f"these sums belong to other layers or options than {self!r}: sums are merged and "
                "continued for the same model, parameters, sharing and eigenbases"
            )
            raise ValueError(msg)

    def _empty(self) -> Any:
        raise NotImplementedError

    def checked(self, name: str, d: Array, a: Array) -> tuple[Array, Array]:
        """Both sides, (N·C, T, o) and (N, T, i), at least in single precision."""
        if name not in self.shapes:
            msg = f"unknown layer {name!r}; this accumulator has {list(self.shapes)}"
            raise ValueError(msg)
        o, i = self.shapes[name]
        if d.ndim == 2 and a.ndim == 2:
            d, a = d[:, None, :], a[:, None, :]
        good = d.ndim == a.ndim == 3 and d.shape[1] == a.shape[1]
        if not (good and (d.shape[2], a.shape[2]) == (o, i) and d.shape[0] % a.shape[0] == 0):
            msg = (
                f"layer {name!r} takes output_grads (N·C, T, {o}) and inputs (N, T, {i}), got "
                f"shapes {tuple(d.shape)} and {tuple(a.shape)}"
            )
            raise ValueError(msg)
        return working(d), working(a)

    @property
    def _unit(self) -> float:
        """The rounding of what was added."""
        return _backend.eps(working(self._like).dtype)

    def normalised(self, key: str, count: Any) -> Array:
        if not self.total > 0:
            raise ValueError("no samples have been added: call count() with their number")
        return self._sums[key] / count

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.shapes)} layers, total {self.total:g})"


def working(x: Array) -> Array:
    """Half precision is summed in float32."""
    xp = _backend.namespace(x)
    return xp.astype(x, xp.float32) if _backend.eps(x.dtype) > 2.0**-23 else x
