"""Objects made of arrays and plain values, as JSON and tensors, and back.

A class is storable once `register` knows which of its values make it up: one line in `_classes`.
Arrays say where they live by their wrapping: `Small` for float64 k × k algebra (see `_backend`),
`Host` for what is NumPy's by nature; all others live beside the operator, in its dtype or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _backend
from ..protocols import Array
from ._files import StateError


@dataclass(frozen=True, eq=False)
class Small:
    """A small float64 array."""

    array: Array


@dataclass(frozen=True, eq=False)
class Host:
    """A NumPy array on every backend."""

    array: np.ndarray


@dataclass(frozen=True)
class Codec:
    """How a class is taken apart and put together."""

    kind: type
    pack: Callable[[Any], Mapping[str, Any]]
    unpack: Callable[..., Any]


_CODECS: dict[str, Codec] = {}


def register(
    kind: type, pack: Callable[[Any], Mapping[str, Any]], unpack: Callable[..., Any] | None = None
) -> None:
    """Make the objects of a class storable.

    Args:
        kind: the class itself; subclasses outside this library's packages are others.
        pack: gives the values that make up an object: arrays, plain values, lists and mappings
            of them, and objects of other registered classes.
        unpack: called with them as keywords; by default the class.
    """
    _CODECS[kind.__name__] = Codec(kind, pack, kind if unpack is None else unpack)


def codec_of(value: Any) -> Codec | None:
    """The codec of the class of `value`; None where there is none.

    The subclasses that adapters make are stored as what they are subclasses of: they know more of
    a framework, and no more of the matrix. Those of others may be another matrix.
    """
    for kind in type(value).__mro__:
        codec = _CODECS.get(kind.__name__)
        if codec is not None and codec.kind is kind:
            return codec
        if not kind.__module__.startswith("invhvp"):
            break
    return None


def storable(value: Any) -> bool:
    """Whether the class of `value` is registered."""
    return codec_of(value) is not None


class Encoder:
    """Collects `tensors` while it turns objects into JSON values; nothing is stored twice.

    Args:
        known: objects that the reader brings along, by name, stored only if their class can be.
    """

    def __init__(self, known: Mapping[str, Any] | None = None) -> None:
        self.tensors: dict[str, np.ndarray] = {}
        self._known = {id(x): name for name, x in (known or {}).items()}
        self._seen: dict[int, tuple[Any, str]] = {}  # the objects too: ids must stay theirs

    def encode(self, value: Any, path: str) -> Any:
        """The JSON value of an object at a dotted path, which names its tensors.

        Raises TypeError for an object whose class is not registered.
        """
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, np.bool_ | np.integer | np.floating):
            value = value.item()
        if isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"number": str(value)}
        if isinstance(value, list | tuple):
            return [self.encode(item, f"{path}.{i}") for i, item in enumerate(value)]
        if isinstance(value, Mapping) and not storable(value):
            pairs = [[key, self.encode(item, f"{path}.{key}")] for key, item in value.items()]
            return {"mapping": pairs}
        if isinstance(value, Small | Host) or _backend.is_array(value):
            return self._tensor(value, path)
        return self._object(value, path)

    def attempt(self, value: Any, path: str) -> Any:
        """As `encode`, or None, leaving no trace, where some part of it cannot be stored."""
        tensors, seen = dict(self.tensors), dict(self._seen)
        try:
            return self.encode(value, path)
        except TypeError:
            self.tensors, self._seen = tensors, seen
            return None

    def _tensor(self, value: Any, path: str) -> dict[str, str]:
        place = {Small: "small", Host: "host"}.get(type(value), "device")
        array = value.array if place != "device" else value
        name = self._seen.setdefault(id(array), (array, path))[1]
        if name == path:
            host = np.asarray(_backend.to_host(array))
            self.tensors[name] = np.ascontiguousarray(host).reshape(host.shape)
        described = {"tensor": name, "place": place}
        if _backend.dtype_name(array.dtype) == "bfloat16":
            described["dtype"] = "bfloat16"  # NumPy has none: stored as float32, without loss
        return described

    def _object(self, value: Any, path: str) -> dict[str, Any]:
        if id(value) in self._seen:
            return {"same": self._seen[id(value)][1]}
        codec = codec_of(value)
        if codec is None:
            if id(value) in self._known:
                return {"given": self._known[id(value)]}
            msg = f"{type(value).__name__} cannot be stored: it is not made of arrays in memory"
            raise TypeError(msg)
        self._seen[id(value)] = value, path
        fields = codec.pack(value)
        coded = {name: self.encode(field, f"{path}.{name}") for name, field in fields.items()}
        return {"class": codec.kind.__name__, "path": path, "fields": coded}


class Decoder:
    """Puts objects together again, beside the array `like`.

    Args:
        tensors: by name.
        like: an array of the library and device to load on.
        given: objects that were not stored, by name; see `Encoder`.
    """

    def __init__(
        self, tensors: Mapping[str, np.ndarray], like: Array, given: Mapping[str, Any]
    ) -> None:
        self._tensors = tensors
        self._like = like
        self._given = given
        self._objects: dict[str, Any] = {}
        self._placed: dict[tuple[str, str], Any] = {}

    def decode(self, value: Any) -> Any:
        """The object that a JSON value describes. Raises StateError where one is missing."""
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "number" in value:
            return float(value["number"])
        if "mapping" in value:
            return {key: self.decode(item) for key, item in value["mapping"]}
        if "tensor" in value:
            return self._array(**value)
        if "same" in value:
            return self._objects[value["same"]]
        if "given" in value:
            return self._from_caller(value["given"])
        codec = _CODECS.get(value["class"])
        if codec is None:
            msg = f"it holds a {value['class']}, which this version of invhvp does not know"
            raise StateError(msg)
        fields = {name: self.decode(field) for name, field in value["fields"].items()}
        made = self._objects[value["path"]] = codec.unpack(**fields)
        return made

    def _from_caller(self, name: str) -> Any:
        if self._given.get(name) is None:
            msg = (
                f"the {name} of its operator could not be stored, and `@` needs them: pass "
                "operator=, the operator that it was prepared from"
            )
            raise StateError(msg)
        return self._given[name]

    def _array(self, tensor: str, place: str, dtype: str | None = None) -> Any:
        key = tensor, place
        if key not in self._placed:
            self._placed[key] = _placed(self._tensors[tensor], place, dtype, self._like)
        return self._placed[key]


def _placed(host: np.ndarray, place: str, dtype: str | None, like: Array) -> Any:
    if place == "host" or (place == "small" and _backend.small_on_host(like)):
        return host
    name = dtype or host.dtype.name
    if name == "float64" and not _backend.has_float64(like):
        msg = (
            f"it was saved in float64, which {_backend.library_name(like)} on "
            f"{_backend.device(like)} does not have: load it beside another array"
        )
        raise StateError(msg)
    xp = _backend.namespace(like)
    if host.dtype.kind in "iu":
        return xp.asarray(np.array(host), device=_backend.device(like))
    if not hasattr(xp, name):
        msg = f"it was saved in {name}, which {_backend.library_name(like)} does not have"
        raise StateError(msg)
    if name == "bfloat16":
        wide = _backend.from_host(host, like, dtype=xp.float32)
        return xp.astype(wide, xp.bfloat16)
    return _backend.from_host(host, like, dtype=getattr(xp, name))
