"""JAX in float64 for every test here; nothing is collected where JAX is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

_NEED_JAX = ["problems.py", "test_[!i]*.py", "test_implicit.py"]
collect_ignore_glob = [] if importlib.util.find_spec("jax") else _NEED_JAX


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    if importlib.util.find_spec("jax") is None:
        yield
        return
    import jax

    with jax.enable_x64(True):
        yield
