"""What a saved inverse remembers of the parameters, the data and the operator behind it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .. import _backend, _linalg
from ..gradients import GradientMatrix
from ..operators import LinearOperator
from ._codec import Encoder, storable
from ._files import StateError

_PIECE = 1 << 24  # numbers that are copied to the host at once
_TOLERANCE = {"float64": 1e-6, "float32": 1e-3}


def described(value: Any) -> Any:
    """Plain values as they are; arrays and gradient matrices by dtype, shape and SHA-256.

    Raises TypeError for anything else.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if _backend.is_array(value):
        return _hashed(_backend.dtype_name(value.dtype), tuple(value.shape), _pieces(value))
    if isinstance(value, GradientMatrix):
        if storable(value):
            encoder = Encoder()
            encoder.encode(value, "gradients")
            return {name: described(array) for name, array in encoder.tensors.items()}
        rows = (part.to_dense() for part in value.parts())
        dtype = _backend.dtype_name(value.dtype)
        return _hashed(dtype, value.shape, (_backend.to_host(block) for block in rows))
    msg = (
        "a fingerprint is made of arrays, gradient matrices, strings and numbers, and lists and "
        f"mappings of them (such as model.state_dict()), got {type(value).__name__}"
    )
    raise TypeError(msg)


def _pieces(x: Any) -> Iterator[np.ndarray]:
    if x.ndim == 0:
        yield _backend.to_host(x)
        return
    step = max(1, _PIECE // max(1, math.prod(x.shape[1:])))
    for start in range(0, x.shape[0], step):
        yield _backend.to_host(x[start : min(start + step, x.shape[0]), ...])


def _hashed(dtype: str, shape: tuple[int, ...], pieces: Iterator[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(np.ascontiguousarray(piece).tobytes())
    return f"{dtype} {'x'.join(map(str, shape)) or 'scalar'} sha256:{digest.hexdigest()}"


def check_given(stored: Any, wanted: Any) -> None:
    """Raise StateError, naming what differs, unless a fingerprint is the stored one."""
    if stored is None:
        raise StateError("it was saved without a fingerprint: there is nothing to compare with")
    different = list(_differences(stored, wanted, "fingerprint"))
    if different:
        msg = (
            f"it belongs to other parameters or data: {'; '.join(different[:3])}"
            f"{'; ...' if len(different) > 3 else ''}"
        )
        raise StateError(msg)


def _differences(stored: Any, wanted: Any, where: str) -> Iterator[str]:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys([*stored, *wanted]):
            missing = [n for n, d in (("file", stored), ("argument", wanted)) if key not in d]
            if missing:
                yield f"{where}[{key!r}] is missing in the {missing[0]}"
            else:
                yield from _differences(stored[key], wanted[key], f"{where}[{key!r}]")
    elif isinstance(stored, list) and isinstance(wanted, list) and len(stored) == len(wanted):
        for i, pair in enumerate(zip(stored, wanted, strict=True)):
            yield from _differences(*pair, f"{where}[{i}]")
    elif stored != wanted:
        yield f"{where} was {_short(stored)}, now {_short(wanted)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def probe(A: LinearOperator) -> dict[str, float] | None:
    """Two numbers of A v for one fixed v of signs, the same on every library; one product."""
    if hasattr(A, "described"):  # an operator that was not stored
        return getattr(A, "probe", None)
    n = A.shape[0]
    signs = 2 * np.random.default_rng(n).integers(0, 2, size=(n, 1), dtype=np.int8) - 1
    v = _backend.from_host(signs, A.like) / math.sqrt(n)
    Av = A._matmat(v)
    norm, dot = _linalg.column_norms(Av), _linalg.column_dot(v, Av)
    host = _backend.to_host(_backend.namespace(norm).concat([norm, dot], axis=0))
    if not np.all(np.isfinite(host)):
        return None
    return {"norm": float(host[0]), "curvature": float(host[1])}


def check_operator(stored: dict[str, float] | None, A: LinearOperator) -> None:
    """Raise StateError unless A multiplies as the operator did that was saved. One product."""
    if stored is None:
        return
    now = probe(A) or {"norm": math.nan, "curvature": math.nan}
    tolerance = _TOLERANCE.get(_backend.dtype_name(A.dtype), 5e-2) * stored["norm"]
    if all(abs(now[key] - stored[key]) <= tolerance for key in stored):
        return
    msg = (
        "operator= is not the one that it was prepared from: on one fixed vector ‖Av‖ and vᵀAv "
        f"were {stored['norm']:.6g} and {stored['curvature']:.6g}, they are {now['norm']:.6g} and "
        f"{now['curvature']:.6g}: other parameters, other data, or another loss"
    )
    raise StateError(msg)
