"""Doctests of an adapter are collected where its framework is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_NEEDS = {"invhvp_torch": "torch", "invhvp_jax": "jax", "invhvp_dask": "distributed"}

collect_ignore = [name for name, need in _NEEDS.items() if importlib.util.find_spec(need) is None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Doctests in JAX belong to the tests that need JAX."""
    for item in items:
        if Path(__file__).parent / "invhvp_jax" in item.path.parents:
            item.add_marker(pytest.mark.jax)
