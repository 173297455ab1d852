"""Handwritten digits with some labels made wrong on purpose, and where their arrays live."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

CLASSES = 10
SIDE = 8  # the images are 8 x 8 pixels

Place = Callable[[np.ndarray], Any]


@dataclass(frozen=True, kw_only=True)
class Digits:
    """A training set with known label errors, and clean held-out images.

    Attributes:
        images: training pixels in [0, 1], (N, 64) float64.
        given: the labels that the classifier is trained on, (N,).
        true: the labels that the images really have, (N,).
        test_images: held-out pixels, (M, 64) float64.
        test_labels: their labels, all of them right, (M,).
    """

    images: np.ndarray
    given: np.ndarray
    true: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def wrong(self) -> np.ndarray:
        """Which training labels were flipped, (N,) booleans."""
        return self.given != self.true


def load(n_train: int = 1000, *, flipped: float = 0.1, seed: int = 0) -> Digits:
    """Shuffle scikit-learn's 1,797 digits and give a fraction of the labels another class.

    Raises ModuleNotFoundError with the remedy where scikit-learn is missing.
    """
    load_digits = require("sklearn.datasets").load_digits
    pixels, labels = load_digits(return_X_y=True)
    pixels = np.asarray(pixels, dtype=np.float64) / 16.0
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    pixels, labels = pixels[order], labels[order]
    true = labels[:n_train]
    chosen = rng.choice(n_train, size=round(flipped * n_train), replace=False)
    given = true.copy()
    given[chosen] = (true[chosen] + rng.integers(1, CLASSES, size=len(chosen))) % CLASSES
    return Digits(
        images=pixels[:n_train],
        given=given,
        true=true,
        test_images=pixels[n_train:],
        test_labels=labels[n_train:],
    )


def one_hot(labels: np.ndarray) -> np.ndarray:
    """Rows of zeros with a one at the label, (N, 10) float64."""
    return np.eye(CLASSES)[labels]


def require(name: str) -> Any:
    """Import a module of the `demo` extra, or say how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = {"sklearn": "scikit-learn"}.get(name.partition(".")[0], name.partition(".")[0])
        msg = f"the demo needs {package}, which is not installed: pip install 'invhvp[demo]'"
        raise ModuleNotFoundError(msg, name=error.name) from error


def place_on(backend: str, device: str | None) -> Place:
    """A function that puts a NumPy array on the chosen backend and device.

    Args:
        backend: "numpy", "torch" or "cupy".
        device: the backend's own word for a device, such as "cuda:1"; None is its default.

    Raises ModuleNotFoundError with the remedy where the backend is missing, ValueError for a
    device that it does not have.
    """
    if backend == "numpy":
        if device not in (None, "cpu"):
            msg = f"NumPy computes on the cpu, not on {device!r}; use --backend torch or cupy"
            raise ValueError(msg)
        return np.asarray
    if backend == "torch":
        torch = _backend_module("torch", "pip install 'invhvp[torch]'")
        try:
            chosen = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            msg = f"torch cannot use the device {device!r}: {str(error).splitlines()[0]}"
            raise ValueError(msg) from error
        return lambda array: torch.asarray(array, device=chosen)
    if backend == "cupy":
        remedy = "pip install 'invhvp[cuda12]' or 'invhvp[cuda13]', for your CUDA version"
        cupy = _backend_module("cupy", remedy)
        return _cupy_place(cupy, device)
    msg = f"the demo runs on numpy, torch or cupy, not on {backend!r}"
    raise ValueError(msg)


def _cupy_place(cupy: Any, device: str | None) -> Place:
    number = (device or "0").removeprefix("cuda").removeprefix(":") or "0"
    try:
        chosen = cupy.cuda.Device(int(number))
        chosen.use()  # also what the arrays that are created later are placed on
    except Exception as error:
        msg = f"CuPy cannot use the device {device or 'cuda:0'!r}: {error}"
        raise ValueError(msg) from error
    return cupy.asarray


def _backend_module(name: str, remedy: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        msg = f"--backend {name} needs {name}, which cannot be imported ({error}): {remedy}"
        raise ModuleNotFoundError(msg, name=name) from error
