"""Telling whether stored scores belong to these data and this model, up to rounding."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import _backend, _linalg
from .._random import generator
from ..gradients import GradientMatrix
from ..methods import method_to_dict
from ..protocols import Array

_PROBES = 4  # the norm of four products tells a row's size, whatever single ones do
_SEED = 0x5C0E
_NOISE = 64.0  # units of rounding of the largest row: what cancels in a gradient is of that size


def probes(like: Array, n: int) -> Array:
    """The same random vectors (n, 4) for every run, on every library and device."""
    return _backend.from_host(generator(_SEED, np.zeros(0)).normal((n, _PROBES)), like)


def of_rows(rows: GradientMatrix) -> np.ndarray:
    """Products of every row with the probes, (N, 4): one pass over the gradients."""
    return _on_host(rows @ probes(rows.like, rows.shape[1]))


def of_operator(inverse: Any) -> np.ndarray:
    """VᵀAV for the probes V, (4, 4): four operator-vector products.

    Of an inverse that was loaded without its operator, the inverse itself.
    """
    operator = getattr(inverse, "operator", inverse)
    V = probes(inverse.like, inverse.shape[0])
    try:
        found = operator @ V
    except ValueError:
        found = inverse @ V
    return _on_host(_linalg.gram(V, found))


def _on_host(x: Array) -> np.ndarray:
    return np.asarray(_backend.to_host(x), dtype=np.float64)


def agree(stored: np.ndarray, found: np.ndarray, eps: float) -> bool:
    """Whether two fingerprints differ by rounding alone, row by row.

    Another sample moves a row by its own size; another order of summation by half of the digits
    at the very most, and by the rounding of the largest row where a gradient cancels.
    """
    if stored.shape != found.shape:
        return False
    size = np.linalg.norm(found, axis=1)
    limit = eps**0.5 * size + _NOISE * eps * np.max(size, initial=0.0)
    return bool(np.all(np.linalg.norm(stored - found, axis=1) <= limit))


def digest(found: np.ndarray) -> str:
    """A name for stored values."""
    return hashlib.sha256(np.ascontiguousarray(found).tobytes()).hexdigest()[:16]


def describe(inverse: Any) -> dict[str, Any]:
    """Method and damping as plain JSON values."""
    method = getattr(inverse, "method", None)
    try:
        told: Any = method_to_dict(method)
    except TypeError:
        told = _without_address(repr(inverse if method is None else method))
    damping = getattr(inverse, "damping", None)
    if isinstance(damping, Mapping):
        damping = {name: float(value) for name, value in damping.items()}
    elif damping is not None:
        damping = float(damping)
    return {"method": told, "damping": damping}


def _without_address(text: str) -> str:
    """A repr that another process gives too."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
