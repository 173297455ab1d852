"""The damping λ: one number, or one per named block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import _arithmetic, _backend
from ..layout import Layout
from ..protocols import Array, Damping
from .base import LinearOperator


def as_shift(damping: Damping, A: LinearOperator) -> float | Array:
    """λ as a float, a traced 0-d array, or an array (n,) for block-wise damping.

    Raises TypeError for anything else and ValueError for negative or non-finite λ.
    """
    if isinstance(damping, Mapping):
        if A.layout is None:
            msg = (
                f"damping by block needs an operator with a Layout; this {type(A).__name__} has "
                "none: pass layout= when it is built, or one float"
            )
            raise ValueError(msg)
        if any(_backend.is_tracing(value) for value in damping.values()):
            return spread(damping, A.layout, A.like)
        shifts = A.layout.shifts(damping)
        _check_value(float(np.min(shifts)), float(np.max(shifts)))
        return _backend.from_host(shifts, A.like)
    if _backend.is_array(damping) and damping.ndim == 0:
        if _backend.is_tracing(damping):
            return _backend.cast(damping, A.like)
        damping = float(_backend.to_host(damping))
    if isinstance(damping, bool) or not isinstance(damping, int | float | np.number):
        msg = (
            "damping must be a float, a 0-d array or a mapping from block names to floats, got "
            f"{type(damping).__name__}"
        )
        raise TypeError(msg)
    value = float(damping)
    _check_value(value, value)
    return value


def _check_value(smallest: float, largest: float) -> None:
    if not (math.isfinite(smallest) and math.isfinite(largest)) or smallest < 0:
        shown = smallest if smallest < 0 else largest
        msg = f"damping must be finite and not negative, got {shown}"
        raise ValueError(msg)


def spread(damping: Mapping[str, Any], layout: Layout, like: Array) -> Array:
    """λ by block as an array (n,) that depends on the values as arrays: traced, recorded."""
    layout.shifts(dict.fromkeys(damping, 0.0))  # the names are checked there
    one = _backend.namespace(like).ones((layout.n,), dtype=like.dtype, device=_device(like))
    return layout.assemble({name: layout.take(one, name) * damping[name] for name in layout})


def _device(like: Array) -> Any:
    return None if _backend.is_tracing(like) else _backend.device(like)


def by_block(shift: float | Array) -> bool:
    """Whether λ is an array (n,) rather than one number."""
    return getattr(shift, "ndim", 0) > 0


def smallest(shift: float | Array) -> float:
    """Smallest λ, on the host (one transfer for block-wise damping); 0 while tracing."""
    if isinstance(shift, float):
        return shift
    if _backend.is_tracing(shift):
        return 0.0
    return float(np.min(_backend.to_host(shift)))


def scalar(shift: float | Array, what: str) -> float | Array:
    """The shift if it is one number; ValueError where block-wise damping has no meaning."""
    if by_block(shift):
        msg = f"{what} takes one damping value, not one per block"
        raise ValueError(msg)
    return shift


def shifted(X: Array, shift: Any) -> Array:
    """λ ∘ X for a block X (n, k)."""
    return shift[:, None] * X if by_block(shift) else shift * X


def plus_shifted(AX: Array, X: Array, shift: Any) -> Array:
    """AX + λ ∘ X for a block X (n, k)."""
    return _arithmetic.add_scaled(AX, X, shift[:, None] if by_block(shift) else shift)


class Damped(LinearOperator):
    """A + λI, or A + diag(λ) for block-wise damping. One product of A per product."""

    def __init__(self, A: LinearOperator, damping: Damping) -> None:
        super().__init__(A.shape[0], like=A.like, psd=A.psd, layout=A.layout)
        self.operator = A
        self.shift = as_shift(damping, A)
        self.processes = A.processes

    def _matmat(self, X: Array, /) -> Array:
        return plus_shifted(self.operator._matmat(X), X, self.shift)

    def _describe(self) -> str:
        return f"{self.operator!r} + {_text(self.shift)}"


def _text(shift: Any) -> str:
    return f"{shift:g}" if isinstance(shift, float) else "λ by block"
