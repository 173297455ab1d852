"""What the checks share: values on the host in float64, sizes of rounding, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _backend
from ..protocols import Array


def host(x: Array) -> np.ndarray:
    """A private float64 copy of the values."""
    return np.array(_backend.to_host(x), dtype=np.float64)


def norm(x: np.ndarray) -> float:
    """Frobenius norm, 0 for an empty array."""
    return float(np.sqrt(np.sum(np.square(x))))


def roundoff(dtype: Any, n: int) -> float:
    """Relative rounding that a product of dimension n in `dtype` may show."""
    return _backend.eps(dtype) * (32 + 2 * math.sqrt(n))


def fail(what: str, cause: str) -> None:
    """Raise the AssertionError of a property that does not hold."""
    msg = f"{what}. {cause}"
    raise AssertionError(msg)


def require(condition: Any, what: str, cause: str) -> None:
    """Fail unless the condition holds."""
    if not bool(condition):
        fail(what, cause)


def close(got: np.ndarray, expected: np.ndarray, allowed: float, what: str, cause: str) -> None:
    """Fail unless ‖got - expected‖_F ≤ allowed; NaN is not close to anything."""
    require(
        got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}", cause
    )
    misfit = norm(got - expected)
    require(misfit <= allowed, f"{what}: off by {misfit:.2e} (allowed {allowed:.2e})", cause)


def same_bits(first: Array, second: Array, what: str, cause: str) -> None:
    """Fail unless two arrays hold the same values."""
    a, b = host(first), host(second)
    require(
        np.array_equal(a, b, equal_nan=True),
        f"{what}: differs by up to {np.max(np.abs(a - b), initial=0.0):.2e} (allowed 0)",
        cause,
    )


def like(x: Any, model: Array, shape: tuple[int, ...], what: str) -> None:
    """Fail unless `x` is an array of the model's library, dtype and device with this shape."""
    require(_backend.is_array(x), f"{what} is a {type(x).__name__}", "It must be an array.")
    mine, theirs = _backend.library_name(x), _backend.library_name(model)
    require(mine == theirs, f"{what} is a {mine} array, expected {theirs}", "Library in = out.")
    require(
        tuple(x.shape) == shape,
        f"{what} has shape {tuple(x.shape)}, expected {shape}",
        "Vectors are columns: (n,) or (n, k) in, the same out.",
    )
    require(
        x.dtype == model.dtype,
        f"{what} has dtype {_backend.dtype_name(x.dtype)}, expected "
        f"{_backend.dtype_name(model.dtype)}",
        "dtype in = dtype out: look for a constant or a default of another precision.",
    )
    require(
        _backend.same_device(x, model),
        f"{what} is on {_backend.device(x)}, expected {_backend.device(model)}",
        "Device in = device out.",
    )


def attempt(action: Callable[[], Any], what: str) -> Any:
    """The result of an action that must not raise."""
    try:
        return action()
    except AssertionError:
        raise
    except Exception as error:
        msg = f"{what} raised {type(error).__name__}: {error}"
        raise AssertionError(msg) from error


def raises(
    kinds: type[Exception] | tuple[type[Exception], ...], action: Callable[[], Any], what: str
) -> None:
    """Fail unless an action raises one of these errors."""
    expected = kinds if isinstance(kinds, tuple) else (kinds,)
    names = " or ".join(kind.__name__ for kind in expected)
    try:
        action()
    except expected:
        return
    except Exception as error:
        msg = f"{what} raised {type(error).__name__}, expected {names}: {error}"
        raise AssertionError(msg) from error
    fail(f"{what} was accepted", f"It must raise {names}: wrong input is refused at the door.")
