"""`python -m invhvp doctor`: what is installed, what it can compute, and what is missing."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

import invhvp as ih
from invhvp import _backend

_PACKAGES = {  # distribution names, and the extras that bring them
    "numpy": (("numpy",), ()),
    "scipy": (("scipy",), ()),
    "array-api-compat": (("array-api-compat",), ()),
    "torch": (("torch",), ("torch",)),
    "jax": (("jax",), ("jax",)),
    "cupy": (("cupy", "cupy-cuda12x", "cupy-cuda13x"), ("cuda12", "cuda13")),
    "dask": (("dask",), ("dask",)),
    "zarr": (("zarr",), ("io",)),
    "safetensors": (("safetensors",), ("io",)),
    "matplotlib": (("matplotlib",), ("plot",)),
    "scikit-learn": (("scikit-learn",), ("demo",)),
    "tqdm": (("tqdm",), ("demo",)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of the command: none."""


def main(options: argparse.Namespace) -> int:  # noqa: ARG001
    """Print what is found; 0 always, for nothing that is missing is an error."""
    print(f"invhvp {ih.__version__}   python {platform.python_version()}   {platform.platform()}")
    print("\nPackages")
    found = installed()
    for name, release in found.items():
        print(f"  {name:17} {release or 'missing: ' + remedy(name)}")
    print("\nBackends (a solve with 4 parameters on each device, in float32 and float64)")
    for name in ("numpy", "torch", "jax", "cupy"):
        if not found[name]:
            print(f"  {name:7} missing: {remedy(name)}")
            continue
        for line in backend(name):
            print(f"  {name:7} {line}")
    print("\nPrecision")
    for line in precision(found):
        print(f"  {line}")
    return 0


def installed() -> dict[str, str | None]:
    """The version of each package, or None."""
    return {name: _version(names) for name, (names, _) in _PACKAGES.items()}


def _version(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def remedy(name: str) -> str:
    """The command that installs what is missing."""
    extras = _PACKAGES[name][1]
    wanted = [f"'invhvp[{extra}]'" for extra in extras] or [name]
    return f"pip install {' or '.join(wanted)}"


def backend(name: str) -> Iterator[str]:
    """A line for each device of an installed backend: its name, and whether a solve works."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a diagnosis, not a place for import-time warnings
        try:
            devices = _DEVICES[name]()
        except Exception as error:
            yield f"installed, but unusable: {_first_line(error)}"
            return
        if not devices:
            yield "no device found"
        for label, place in devices:
            results = ", ".join(f"{d} {tiny_solve(place, d)}" for d in ("float32", "float64"))
            yield f"{label:28} {results}"


def tiny_solve(place: Callable[[np.ndarray], Any], dtype: str) -> str:
    """Solve (A + λI)x = b, whose solution is known: "ok", or what went wrong."""
    A = np.diag(np.arange(1.0, 5.0)) + np.ones((4, 4))
    b = np.asarray([1.0, -2.0, 3.0, 0.5])
    exact = np.linalg.solve(A + 0.1 * np.eye(4), b)
    try:
        matrix, rhs = place(A.astype(dtype)), place(b.astype(dtype))
        if _backend.dtype_name(matrix.dtype) != dtype:
            return f"not available (arrays become {_backend.dtype_name(matrix.dtype)})"
        solution = ih.solve(ih.Dense(matrix), rhs, damping=0.1)
        error = float(np.max(np.abs(_backend.to_host(solution.x) - exact)))
    except Exception as failure:
        return f"failed ({_first_line(failure)})"
    return "ok" if error < 1e-4 else f"wrong by {error:.1e}"


def _numpy() -> list[tuple[str, Callable[[np.ndarray], Any]]]:
    return [(f"cpu ({os.cpu_count()} cores)", np.asarray)]


def _torch() -> list[tuple[str, Callable[[np.ndarray], Any]]]:
    torch = importlib.import_module("torch")
    found = [(f"cpu ({torch.get_num_threads()} threads)", "cpu")]
    if torch.cuda.is_available():
        names = (torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        found += [(f"cuda:{i} {name}", f"cuda:{i}") for i, name in enumerate(names)]
    if torch.backends.mps.is_available():
        found.append(("mps", "mps"))
    return [
        (label, lambda array, device=device: torch.asarray(array, device=device))
        for label, device in found
    ]


def _jax() -> list[tuple[str, Callable[[np.ndarray], Any]]]:
    jax = importlib.import_module("jax")
    return [
        (f"{device}", lambda array, device=device: jax.device_put(array, device))
        for device in jax.devices()
    ]


def _cupy() -> list[tuple[str, Callable[[np.ndarray], Any]]]:
    cupy = importlib.import_module("cupy")
    runtime = cupy.cuda.runtime

    def on(i: int) -> Callable[[np.ndarray], Any]:
        def place(array: np.ndarray) -> Any:
            cupy.cuda.Device(i).use()
            return cupy.asarray(array)

        return place

    names = [runtime.getDeviceProperties(i)["name"] for i in range(runtime.getDeviceCount())]
    return [(f"cuda:{i} {name.decode()}", on(i)) for i, name in enumerate(names)]


_DEVICES = {"numpy": _numpy, "torch": _torch, "jax": _jax, "cupy": _cupy}


def precision(found: dict[str, str | None]) -> Iterator[str]:
    """Settings that change what float32 and float64 mean."""
    yield "the engine's own matrix products never use TF32, whatever these settings say"
    if found["torch"]:
        yield _setting("torch TF32 in matrix products", _torch_tf32)
    if found["jax"]:
        yield _setting("jax float64", _jax_x64)
    override = os.environ.get("NVIDIA_TF32_OVERRIDE")
    yield f"NVIDIA_TF32_OVERRIDE: {override or 'not set'}"


def _torch_tf32() -> str:
    torch = importlib.import_module("torch")
    return "on" if torch.backends.cuda.matmul.allow_tf32 else "off"


def _jax_x64() -> str:
    jax = importlib.import_module("jax")
    if jax.config.jax_enable_x64:
        return "on"
    return "off; switch it on with  jax.config.update('jax_enable_x64', True)"


def _setting(label: str, read: Callable[[], str]) -> str:
    try:
        return f"{label}: {read()}"
    except Exception as error:
        return f"{label}: unknown ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]
