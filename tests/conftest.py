"""Fixtures of every test: the array library, counters of host copies, Hypothesis profiles."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

# PyLops imports all of CuPy where it finds it, which fails on a machine without CUDA.
os.environ.setdefault("CUPY_PYLOPS", "0")

import hypothesis
import pytest

from tests import backends, instruments

# Fixtures here are constants, so that sharing them between examples is harmless.
_SHARED = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
}
hypothesis.settings.register_profile("ci", max_examples=25, derandomize=True, **_SHARED)
hypothesis.settings.register_profile("full", max_examples=1_000, **_SHARED)
hypothesis.settings.register_profile("slow", max_examples=10_000, **_SHARED)
hypothesis.settings.load_profile(os.environ.get("INVHVP_HYPOTHESIS_PROFILE", "ci"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("backends")
        params = backends.backend_params(marker.args if marker else ())
        metafunc.parametrize("backend", params, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[backends.Backend]:
    """An array library with a device and a dtype; see `tests.backends`."""
    backend = backends.load(request.param)
    with backend.scope():
        yield backend


@pytest.fixture
def host_transfers(monkeypatch: pytest.MonkeyPatch) -> instruments.HostTransfers:
    """Counts of the planned copies to the host from here on; `reset()` starts again."""
    return instruments.HostTransfers().watch(monkeypatch)


@pytest.fixture
def torch_syncs() -> Callable[[], AbstractContextManager[instruments.TorchSyncs]]:
    """`with torch_syncs() as syncs:` counts what would make a CUDA tensor wait for the host."""
    pytest.importorskip("torch")
    return instruments.torch_syncs
