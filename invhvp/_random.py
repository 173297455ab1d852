"""Random arrays native to the caller's library and device.

The standard has no random numbers. One tiny class draws what the engine needs; the same seed
gives the same bits within one library, and the global state of no library is touched.
"""

from __future__ import annotations

import sys
from typing import Any

import array_api_compat as compat
import numpy as np

from . import _backend
from .protocols import Array

_SALT = 0x1A2B3C


class Random:
    """Draws arrays like `like` (namespace, device, dtype) from its own stream."""

    def __init__(self, rng: Any, like: Array) -> None:
        self._like = like
        self._host = np.random.default_rng()
        self._native: Any = None
        torch = sys.modules.get("torch")
        if isinstance(rng, np.random.Generator):
            self._host = rng
        elif torch is not None and isinstance(rng, torch.Generator):
            self._native = rng
            self._host = np.random.default_rng(rng.initial_seed() % 2**63)
        elif rng is None:
            pass
        elif isinstance(rng, int | np.integer):
            # Salted: data drawn from default_rng(0) must not meet itself again as a probe.
            self._host = np.random.default_rng([_SALT, int(rng)])
        else:
            msg = (
                f"rng must be an int, a numpy.random.Generator, a torch.Generator or None, "
                f"got {type(rng).__name__}"
            )
            raise TypeError(msg)

    def _torch_generator(self) -> Any:
        if self._native is None:
            torch = sys.modules["torch"]
            self._native = torch.Generator(device=self._like.device)
            self._native.manual_seed(int(self._host.integers(2**62)))
        return self._native

    def normal(self, shape: tuple[int, ...]) -> Array:
        """Standard normal numbers of the given shape."""
        like = self._like
        if compat.is_torch_array(like) and like.device.type != "cpu":
            # Large sketches are drawn where they are used; small CPU ones agree with NumPy.
            return sys.modules["torch"].randn(
                shape, generator=self._torch_generator(), dtype=like.dtype, device=like.device
            )
        if compat.is_cupy_array(like):
            cupy = sys.modules["cupy"]
            if self._native is None:
                self._native = cupy.random.default_rng(int(self._host.integers(2**62)))
            return self._native.standard_normal(shape, dtype=like.dtype)
        if compat.is_jax_array(like):
            random = sys.modules["jax"].random
            key = random.key(int(self._host.integers(2**31)))
            return random.normal(key, shape, dtype=like.dtype)
        return _backend.from_host(self._host.standard_normal(shape), like)

    def rademacher(self, shape: tuple[int, ...]) -> Array:
        """Independent signs ±1 of the given shape."""
        xp = _backend.namespace(self._like)
        draws = self.normal(shape)
        return xp.where(draws >= 0, xp.ones_like(draws), -xp.ones_like(draws))

    def indices(self, high: int, size: int, *, replace: bool = False) -> np.ndarray:
        """`size` indices below `high`, on the host: data batches are chosen there."""
        return self._host.choice(high, size=size, replace=replace)

    def weighted(self, weights: np.ndarray, size: int) -> np.ndarray:
        """At most `size` different indices, drawn in proportion to `weights`, on the host."""
        return np.unique(self._host.choice(weights.size, size, p=weights / np.sum(weights)))

    def permutation(self, n: int) -> np.ndarray:
        """A random order of range(n), on the host."""
        return self._host.permutation(n)


def generator(rng: Any, like: Array) -> Random:
    """The `Random` behind an `rng=` argument: an int, a generator, a `Random` or None."""
    return rng if isinstance(rng, Random) else Random(rng, like)
