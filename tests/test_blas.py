"""Products by NumPy's BLAS and by PyTorch's are the same, and both respect what records them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")

from invhvp import _backend, _blas  # noqa: E402


@pytest.fixture(params=[True, False], ids=["numpy", "torch"])
def _which(request, monkeypatch):
    monkeypatch.setattr(_blas, "_numpy_is_faster", lambda: request.param)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _rand(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.usefixtures("_which")
def test_both_multiply():
    X, Y = _rand(6, 4), _rand(5, 4)
    for a, b in ((X, Y.t()), (X.t(), _rand(5, 6).t()), (_rand(6, 8)[:, ::2], X.t())):
        wanted = (a[:, :, None] * b[None, :, :]).sum(1)
        out = torch.empty(wanted.shape, dtype=a.dtype)
        assert _blas.multiply(a, b, out) is out
        for found in (out, _blas.multiply(a, b), _backend.matmul(a, b)):
            torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.usefixtures("_which")
def test_gradients_transforms_and_half_precision_go_through():
    X, Y = _rand(3, 4), _rand(4, 2)
    W = X.clone().requires_grad_()
    _backend.matmul(W, Y).sum().backward()
    torch.testing.assert_close(W.grad, Y.sum(1).expand(3, 4))
    stacked = torch.vmap(lambda v: _backend.matmul(v, Y))(X[None])
    torch.testing.assert_close(stacked[0], X @ Y)
    half = _backend.matmul(X.bfloat16(), Y.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), X @ Y, rtol=0.05, atol=0.05)
    torch.testing.assert_close(_backend.matmul(X[None], Y[None])[0], X @ Y)


def test_threads_decide(monkeypatch):
    for name in ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_blas.os, "cpu_count", lambda: 8)
    assert not _blas._one_thread()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert _blas._one_thread()
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")  # OpenBLAS asks this one first
    assert not _blas._one_thread()
