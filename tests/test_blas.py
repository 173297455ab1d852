"""Products by NumPy's BLAS and by PyTorch's are the same, and both respect what records them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")

from invhvp import _arithmetic, _blas  # noqa: E402


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
        for found in (out, _blas.multiply(a, b), _arithmetic.matmul(a, b)):
            torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.usefixtures("_which")
def test_gradients_transforms_and_half_precision_go_through():
    X, Y = _rand(3, 4), _rand(4, 2)
    W = X.clone().requires_grad_()
    _arithmetic.matmul(W, Y).sum().backward()
    torch.testing.assert_close(W.grad, Y.sum(1).expand(3, 4))
    stacked = torch.vmap(lambda v: _arithmetic.matmul(v, Y))(X[None])
    torch.testing.assert_close(stacked[0], X @ Y)
    half = _arithmetic.matmul(X.bfloat16(), Y.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), X @ Y, rtol=0.05, atol=0.05)
    torch.testing.assert_close(_arithmetic.matmul(X[None], Y[None])[0], X @ Y)


def test_threads_decide(monkeypatch):
    for name in ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_blas.os, "cpu_count", lambda: 8)
    assert not _blas._one_thread()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert _blas._one_thread()
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")  # OpenBLAS asks this one first
    assert not _blas._one_thread()


@pytest.mark.usefixtures("_which")
@pytest.mark.parametrize("n", [5, 40_000], ids=["small", "large"])  # beside _LARGE numbers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_in_one_block(n, dtype):
    Z, X = _rand(n, 8, dtype=dtype), _rand(n, 6, dtype=dtype)
    Y, M, f = _rand(n, 8, dtype=dtype), _rand(6, 8, dtype=dtype), _rand(1, 8, dtype=dtype)
    kept = Z.clone()
    cases = (
        (_arithmetic.add_product(Z, X, M), Z + (X[:, :, None] * M[None, :, :]).sum(1)),
        (_arithmetic.add_scaled(Z, Y, f), Z + Y * f),
        (_arithmetic.add_scaled(Z, Y, 0.5), Z + Y / 2),
        (_arithmetic.scale(Y, f), Y * f),
        (_arithmetic.matmul(X, M), (X[:, :, None] * M[None, :, :]).sum(1)),
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for found, wanted in cases:
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(Z, kept)


@pytest.mark.usefixtures("_which")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by its forward mode
def test_sums_are_recorded_transformed_and_mixed():
    Z, X, Y, M, f = _rand(4, 3), _rand(4, 2), _rand(4, 3), _rand(2, 3), _rand(1, 3)
    for which in range(3):
        parts = [Z.clone(), X.clone(), M.clone()]
        parts[which].requires_grad_()
        _arithmetic.add_product(*parts).sum().backward()
        wanted = (torch.ones(4, 3), M.sum(1).expand(4, 2), X.sum(0)[:, None].expand(2, 3))
        torch.testing.assert_close(parts[which].grad, wanted[which].to(Z.dtype))
        parts = [Z.clone(), Y.clone(), f.clone()]
        parts[which].requires_grad_()
        _arithmetic.add_scaled(*parts).sum().backward()
        wanted = (torch.ones(4, 3), f.expand(4, 3), Y.sum(0)[None, :])
        torch.testing.assert_close(parts[which].grad, wanted[which].to(Z.dtype))
    stacked = torch.vmap(lambda z: _arithmetic.add_product(z, X, M))(Z[None])
    torch.testing.assert_close(stacked[0], Z + X @ M)
    stacked = torch.vmap(lambda z: _arithmetic.add_scaled(z, Y, f))(Z[None])
    torch.testing.assert_close(stacked[0], Z + Y * f)
    half = _arithmetic.add_scaled(Z.bfloat16(), Y.bfloat16(), f.bfloat16())
    assert half.dtype == torch.bfloat16
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(Z, Y)
        tangent = torch.autograd.forward_ad.unpack_dual(_arithmetic.add_product(dual, X, M)).tangent
        torch.testing.assert_close(tangent, Y)
        tangent = torch.autograd.forward_ad.unpack_dual(_arithmetic.add_scaled(Z, dual, f)).tangent
        torch.testing.assert_close(tangent, Y * f)
    with torch.inference_mode():
        torch.testing.assert_close(_arithmetic.add_scaled(Z + 0, Y + 0, f + 0), Z + Y * f)
