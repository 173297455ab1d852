"""Checks that the options of iterative methods share."""

from __future__ import annotations

import math
import numbers
from typing import Any


def check_numbers(method: Any, *, sizes: tuple[str, ...], counts: tuple[str, ...]) -> None:
    """Raise ValueError unless sizes are finite and not negative, and counts at least 1."""
    for name in sizes:
        value = getattr(method, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            msg = f"{name} must be finite and not negative, got {value}"
            raise ValueError(msg)
    for name in counts:
        value = getattr(method, name)
        if value is not None and value < 1:
            msg = f"{name} must be at least 1, got {value}"
            raise ValueError(msg)


def check_ranks(method: Any) -> None:
    """Raise ValueError unless rank is a positive integer or "adaptive", max_rank one or None."""
    if method.rank != "adaptive" and not _is_positive(method.rank):
        msg = f'rank must be a positive integer or "adaptive", got {method.rank!r}'
        raise ValueError(msg)
    if method.max_rank is not None and not _is_positive(method.max_rank):
        msg = f"max_rank must be a positive integer, got {method.max_rank!r}"
        raise ValueError(msg)


def _is_positive(value: Any) -> bool:
    integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return integer and int(value) >= 1


def check_preconditioner(preconditioner: Any) -> None:
    """Raise TypeError unless it is a Method or None."""
    if preconditioner is not None and not hasattr(preconditioner, "prepare"):
        msg = (
            "preconditioner takes a Method, such as Jacobi() or Surrogate(K); wrap an inverse "
            f"that is prepared already in Fixed(inverse). Got {type(preconditioner).__name__}"
        )
        raise TypeError(msg)
