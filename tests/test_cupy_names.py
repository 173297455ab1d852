"""What the engine calls on a namespace exists in CuPy, with the same arguments.

Needs CuPy but no GPU: everything runs on NumPy through a namespace that takes notes, and the
notes are then compared with `array_api_compat.cupy`.
"""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import array_api_compat
import array_api_compat.numpy as np_compat
import numpy as np
import pytest

from tests.cases import METHODS
from tests.instruments import replace_everywhere

pytestmark = pytest.mark.cupy


@dataclass(frozen=True)
class Call:
    """A name below the namespace and, for a function, the form of its arguments."""

    name: str
    positional: int | None = None
    keywords: tuple[str, ...] = ()


@dataclass
class Recorder:
    """A namespace that notes what is taken from it and how it is called."""

    wrapped: Any
    calls: set[Call] = field(default_factory=set)
    prefix: str = ""

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.wrapped, name)
        if name.startswith("__"):
            return value
        if inspect.ismodule(value):
            return Recorder(value, self.calls, f"{self.prefix}{name}.")
        if isinstance(value, type) or not callable(value):
            self.calls.add(Call(self.prefix + name))
            return value

        @functools.wraps(value)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.calls.add(Call(self.prefix + name, len(args), tuple(sorted(kwargs))))
            return value(*args, **kwargs)

        return noted

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def misfits(calls: set[Call], namespace: Any) -> list[str]:
    """What of `calls` the namespace does not have, or would not take."""
    found = []
    for call in sorted(calls, key=repr):
        try:
            target = functools.reduce(getattr, call.name.split("."), namespace)
        except AttributeError:
            found.append(f"{call.name}: missing")
            continue
        if call.positional is None:
            continue
        try:
            signature = inspect.signature(target)
        except (TypeError, ValueError):
            continue  # compiled: nothing to compare with
        try:
            signature.bind(*[None] * call.positional, **dict.fromkeys(call.keywords))
        except TypeError as error:
            found.append(f"{call.name}{signature}: {error}")
    return found


@pytest.fixture
def cupy_namespace() -> Any:
    pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
    import array_api_compat.cupy

    return array_api_compat.cupy


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Stands in for NumPy's namespace wherever the engine asks for one."""
    from invhvp import _backend

    recorder = Recorder(np_compat)
    original = _backend.namespace

    def namespace(*arrays: Any, **options: Any) -> Any:
        xp = original(*arrays, **options)
        return recorder if array_api_compat.is_numpy_namespace(xp) else xp

    replace_everywhere(monkeypatch, original, namespace)
    return recorder


def test_recorder_finds_missing_names_and_arguments(cupy_namespace: Any):
    recorder = Recorder(np_compat)
    A = recorder.asarray(np.eye(3))
    recorder.linalg.cholesky(A)
    recorder.zeros((3,), dtype=recorder.float64, device="cpu")
    assert misfits(recorder.calls, cupy_namespace) == []

    recorder.linalg.multi_dot([A, A])
    recorder.matvec(A, A[0])
    recorder.sum(A, axis=0, where=True)
    found = misfits(recorder.calls, cupy_namespace)
    assert [f.partition(":")[0].partition("(")[0] for f in found] == [
        "linalg.multi_dot", "matvec", "sum",
    ]  # fmt: skip


def test_modules_ask_for_their_namespace_where_it_can_be_recorded(recorder: Recorder):
    from invhvp import _linalg

    _linalg.gram(np.ones((4, 2), dtype=np.float32))
    assert recorder.calls


@pytest.mark.parametrize("name", METHODS)
def test_method_uses_only_what_cupy_has(name: str, recorder: Recorder, cupy_namespace: Any):
    import invhvp as ih

    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        G = ih.DenseGradients(rng.standard_normal((12, 8)).astype(dtype))
        B = rng.standard_normal((8, 2)).astype(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whether it converges is not the question here
            ih.solve(ih.RankOneMean(G), B, METHODS[name](), damping=0.5)
    assert recorder.calls
    assert misfits(recorder.calls, cupy_namespace) == []


def test_import_with_cupy_but_without_a_gpu(cupy_namespace: Any):
    code = "import cupy, invhvp, sys; print(cupy.cuda.is_available(), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "False"
