"""The array libraries that every test of the `backend` fixture runs on.

NumPy hands out read-only arrays, array-api-strict lives on devices that are not the default
one, under a guard (see `instruments`). A backend whose library or device is missing is skipped
with a reason; one that `INVHVP_TEST_BACKENDS` asks for by name fails instead.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np
import pytest

from tests.instruments import guard_strict


class UnavailableError(Exception):
    """The library or the device of a backend is not here."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One array library with one device and one floating dtype.

    Args:
        name: What the test id says, for example `"torch-cpu-f32"`.
        np_dtype: The dtype as NumPy's.
        place: Puts a NumPy array, in its own dtype, on the device.
        scope: A context that the whole test runs in.
    """

    name: str
    np_dtype: np.dtype
    place: Callable[[np.ndarray], Any]
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext

    def asarray(self, a: Any) -> Any:
        """Real numbers of any kind, in this backend's dtype and on its device."""
        return self.place(np.array(a, dtype=self.np_dtype))

    def integers(self, a: Any) -> Any:
        """Indices or labels, as int64 (int32 where JAX has nothing wider)."""
        return self.place(np.array(a, dtype=np.int64))

    def to_numpy(self, x: Any) -> np.ndarray:
        """Values for a comparison: float64 if floating, else as they are; nothing is counted."""
        return to_numpy(x)

    @property
    def eps(self) -> float:
        """Unit spacing of the dtype."""
        return float(np.finfo(self.np_dtype).eps)

    @functools.cached_property
    def _probe(self) -> Any:
        with self.scope():
            return self.asarray([0.0])

    @property
    def xp(self) -> Any:
        return array_api_compat.array_namespace(self._probe)

    @property
    def dtype(self) -> Any:
        return self._probe.dtype

    @property
    def device(self) -> Any:
        return array_api_compat.device(self._probe)

    def assert_like(self, x: Any, *, dtype: Any = None) -> None:
        """Fail unless `x` is this backend's: namespace, device, and dtype (or the one given)."""
        assert array_api_compat.is_array_api_obj(x), f"{type(x)} is not an array"
        assert array_api_compat.array_namespace(x) is self.xp
        assert array_api_compat.device(x) == self.device
        assert x.dtype == (self.dtype if dtype is None else dtype)

    def __repr__(self) -> str:
        return self.name


def to_numpy(x: Any) -> np.ndarray:
    """The values of an array of any library on the host; floating ones as float64."""
    if array_api_compat.is_torch_array(x):
        x = x.detach().cpu()
        a = (x.double() if x.dtype.is_floating_point else x).numpy()
    elif array_api_compat.is_cupy_array(x):
        a = x.get()
    elif type(x).__module__.startswith("array_api_strict"):
        a = guard_strict()(x)
    else:
        a = np.asarray(x)
    return a.astype(np.float64) if np.issubdtype(a.dtype, np.floating) else a


# ------------------------------------------------------------------------------- the libraries


def _numpy(name: str, dtype: str) -> Backend:
    def place(a: np.ndarray) -> np.ndarray:
        a.setflags(write=False)  # mutating an input is an error here
        return a

    return Backend(name=name, np_dtype=np.dtype(dtype), place=place)


def _strict(name: str, dtype: str) -> Backend:
    strict = _library("array_api_strict")
    import array_api_compat.numpy as np_compat

    # Process-wide on purpose: nothing in the engine may need more than this.
    strict.set_array_api_strict_flags(
        api_version=np_compat.__array_api_version__,
        boolean_indexing=False,
        data_dependent_shapes=False,
    )
    guard_strict()
    device = strict.Device(name.removeprefix("strict-"))

    def place(a: np.ndarray) -> Any:
        a.setflags(write=False)
        return strict.asarray(a, device=device, copy=False)

    return Backend(name=name, np_dtype=np.dtype(dtype), place=place)


def _torch(name: str, dtype: str) -> Backend:
    torch = _library("torch")
    device = "cuda" if "cuda" in name else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("PyTorch sees no CUDA device")
    return Backend(
        name=name,
        np_dtype=np.dtype(dtype),
        place=lambda a: torch.from_numpy(a).to(device),
    )


def _cupy(name: str, dtype: str) -> Backend:
    cupy = _library("cupy")
    if not cupy.cuda.is_available():
        raise UnavailableError("CuPy sees no CUDA device")
    return Backend(name=name, np_dtype=np.dtype(dtype), place=cupy.asarray)


def _jax(name: str, dtype: str) -> Backend:
    jax = _library("jax")

    # Without x64 there is no float64 anywhere: how most of JAX's users run.
    def scope() -> AbstractContextManager[Any]:
        return jax.enable_x64(dtype == "float64")

    def place(a: np.ndarray) -> Any:
        narrow = a.dtype == np.int64 and dtype == "float32"
        return jax.numpy.asarray(a.astype(np.int32) if narrow else a)

    return Backend(name=name, np_dtype=np.dtype(dtype), place=place, scope=scope)


def _library(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise UnavailableError(f"{name} is not installed: {error}") from None


@dataclass(frozen=True)
class Spec:
    """How to make a backend, before anything is imported."""

    name: str
    make: Callable[[str, str], Backend]
    dtype: str
    mark: str | None = None


SPECS = (
    Spec("numpy-f32", _numpy, "float32"),
    Spec("numpy-f64", _numpy, "float64"),
    Spec("strict-device1", _strict, "float64"),
    Spec("strict-no_float64", _strict, "float32"),
    Spec("torch-cpu-f32", _torch, "float32"),
    Spec("torch-cpu-f64", _torch, "float64"),
    Spec("jax-f32", _jax, "float32", "jax"),
    Spec("jax-f64", _jax, "float64", "jax"),
    Spec("cupy-f32", _cupy, "float32", "gpu"),
    Spec("cupy-f64", _cupy, "float64", "gpu"),
    Spec("torch-cuda-f32", _torch, "float32", "gpu"),
    Spec("torch-cuda-f64", _torch, "float64", "gpu"),
)


def asked_for() -> tuple[str, ...]:
    """The beginnings of names listed in `INVHVP_TEST_BACKENDS`, or none."""
    names = os.environ.get("INVHVP_TEST_BACKENDS", "")
    return tuple(name.strip() for name in names.split(",") if name.strip())


def backend_params(only: tuple[str, ...] = ()) -> list[Any]:
    """The parameters of the `backend` fixture: those that the test and the environment allow.

    What is missing becomes one skipped parameter per marker, so that the report stays readable.
    """
    for name in (*only, *asked_for()):
        if not any(spec.name.startswith(name) for spec in SPECS):
            raise pytest.UsageError(f"no backend begins with {name!r}: {[s.name for s in SPECS]}")
    params = []
    missing: dict[str | None, dict[str, list[str]]] = {}
    for spec in SPECS:
        if all(not names or spec.name.startswith(names) for names in (only, asked_for())):
            reason = _load(spec)
            if isinstance(reason, Backend) or _insisted_on(spec):
                params.append(pytest.param(spec, id=spec.name, marks=_marks(spec.mark)))
            else:
                missing.setdefault(spec.mark, {}).setdefault(reason, []).append(spec.name)
    for mark, reasons in missing.items():
        text = "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
        marks = [*_marks(mark), pytest.mark.skip(reason=f"no {text}")]
        params.append(pytest.param(None, id=f"no-{mark or 'library'}", marks=marks))
    return params


def _marks(mark: str | None) -> list[pytest.MarkDecorator]:
    return [getattr(pytest.mark, mark)] if mark else []


def _insisted_on(spec: Spec) -> bool:
    """Whether the environment names it; "torch" alone does not insist on a GPU."""
    return any(spec.name.startswith(n) for n in asked_for() if n != "torch" or spec.mark is None)


@functools.cache
def _load(spec: Spec) -> Backend | str:
    try:
        return spec.make(spec.name, spec.dtype)
    except UnavailableError as error:
        return str(error)


def load(spec: Spec) -> Backend:
    """The backend of a spec that `backend_params` let through."""
    backend = _load(spec)
    if isinstance(backend, str):
        pytest.fail(f"INVHVP_TEST_BACKENDS asks for {spec.name}: {backend}", pytrace=False)
    return backend
