"""The instruments themselves: what they must catch, and what they must let pass."""

from __future__ import annotations

import contextlib

import array_api_compat
import numpy as np
import pytest

from tests.backends import Backend, Spec, _load, backend_params
from tests.instruments import HostSyncError


def test_every_backend_makes_arrays_like_itself(backend: Backend):
    a = np.arange(6.0).reshape(2, 3)
    x = backend.asarray(a)
    backend.assert_like(x)
    backend.assert_like(backend.xp.zeros_like(x))
    np.testing.assert_array_equal(backend.to_numpy(x), a)
    assert backend.to_numpy(x).dtype == np.float64
    assert backend.eps == np.finfo(backend.np_dtype).eps
    indices = backend.integers([2, 0])
    assert backend.to_numpy(indices).dtype.kind == "i"
    np.testing.assert_array_equal(backend.to_numpy(backend.xp.take(x, indices, axis=1)), a[:, ::-2])


def test_assert_like_tells_dtypes_namespaces_and_devices_apart(backend: Backend):
    wrong = [np.arange(3), backend.integers([0, 1]), 1.0]
    if backend.name == "strict-device1":
        import array_api_strict as strict

        wrong.append(strict.zeros(3, dtype=backend.dtype))
    for x in wrong:
        with pytest.raises(AssertionError):
            backend.assert_like(x)


def test_the_callers_array_stays_writable_and_unshared(backend: Backend):
    a = np.zeros(3, dtype=backend.np_dtype)
    x = backend.asarray(a)
    a[0] = 1.0
    assert backend.to_numpy(x)[0] == 0.0


@pytest.mark.backends("numpy", "strict")
def test_inputs_are_read_only(backend: Backend):
    x = backend.asarray([1.0, 2.0])
    with pytest.raises(ValueError, match="read-only"):
        x += 1.0
    with pytest.raises(ValueError, match="read-only"):
        x[0] = 1.0


@pytest.mark.backends("strict")
def test_strict_device_is_not_the_default_one(backend: Backend):
    assert backend.device != array_api_compat.device(backend.xp.zeros(1))
    assert not backend.xp.get_array_api_strict_flags()["data_dependent_shapes"]
    with pytest.raises(ValueError, match="device"):
        backend.asarray([1.0]) + backend.xp.zeros(1, dtype=backend.dtype)


@pytest.mark.backends("strict")
@pytest.mark.parametrize(
    "copy",
    [
        lambda x: float(x[0]),
        lambda x: int(x[0]),
        lambda x: complex(x[0]),
        lambda x: bool(x[0] > 0.0),
        lambda x: 1 if x[0] > 0.0 else 0,
        list,
        np.asarray,
        np.from_dlpack,
        lambda x: x.to_device(type(x.device)("CPU_DEVICE")),
        lambda x: array_api_compat.to_device(x, type(x.device)("CPU_DEVICE")),
    ],
)
def test_guard_raises_on_hidden_host_copies(backend: Backend, copy):
    with pytest.raises(HostSyncError):
        copy(backend.asarray([1.0, 2.0]))


@pytest.mark.backends("strict")
def test_guard_leaves_the_cpu_device_and_reprs_alone(backend: Backend):
    assert float(backend.xp.sum(backend.xp.ones(3))) == 3.0
    assert "device" in repr(backend.asarray([1.0]))


def test_to_host_passes_the_guard_and_is_counted(backend: Backend, host_transfers):
    from invhvp import _backend

    x = backend.asarray([1.0, 2.0])
    host = _backend.to_host(x)
    assert isinstance(host, np.ndarray)
    np.testing.assert_array_equal(host, [1.0, 2.0])
    assert host_transfers.calls == 1
    assert host_transfers.transfers == (0 if backend.name.startswith("numpy") else 1)
    _backend.to_host(host)
    assert host_transfers.calls == 2
    assert host_transfers.shapes in ([], [(2,)])
    host_transfers.reset()
    assert host_transfers.calls == 0


@pytest.mark.backends("torch-cpu")
def test_torch_syncs_counts_what_waits_and_what_widens(backend: Backend, torch_syncs):
    x = backend.asarray([1.0, 2.0, 3.0])
    with torch_syncs() as quiet:
        x @ x + backend.xp.where(x > 1.0, x, -x)
    assert quiet.total == 0
    assert bool(quiet.float64) == (backend.np_dtype == np.float64)
    with torch_syncs() as loud:
        float(x[0])
        x[x > 1.0]
        with contextlib.suppress(RuntimeError):
            backend.xp.linalg.cholesky(x[:, None] * x[None, :])
    assert set(loud.seen) >= {
        "aten::_local_scalar_dense", "aten::index(mask)", "aten::_linalg_check_errors",
    }  # fmt: skip


def test_environment_selects_backends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("INVHVP_TEST_BACKENDS", "numpy, strict-device1")
    assert [p.id for p in backend_params()] == ["numpy-f32", "numpy-f64", "strict-device1"]
    assert [p.id for p in backend_params(("numpy-f64", "torch"))] == ["numpy-f64"]
    monkeypatch.setenv("INVHVP_TEST_BACKENDS", "numppy")
    with pytest.raises(pytest.UsageError, match="numppy"):
        backend_params()


def test_missing_backends_are_skipped_together_unless_insisted_on(monkeypatch: pytest.MonkeyPatch):
    def load(spec: Spec) -> Backend | str:
        return "no CUDA device" if spec.mark == "gpu" else _load(spec)

    monkeypatch.setattr("tests.backends._load", load)
    monkeypatch.setenv("INVHVP_TEST_BACKENDS", "numpy,torch-cuda")
    assert [p.id for p in backend_params(("numpy-f64", "cupy", "torch-cuda-f32"))] == [
        "numpy-f64", "torch-cuda-f32",
    ]  # fmt: skip
    monkeypatch.delenv("INVHVP_TEST_BACKENDS")
    *_, left_out = backend_params(("numpy", "cupy", "torch-cuda"))
    assert left_out.id == "no-gpu"
    assert {mark.name for mark in left_out.marks} == {"gpu", "skip"}
    assert (
        "cupy-f32, cupy-f64, torch-cuda-f32, torch-cuda-f64: no CUDA"
        in left_out.marks[1].kwargs["reason"]
    )
