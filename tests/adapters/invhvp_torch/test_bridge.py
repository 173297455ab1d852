"""Torch inside, NumPy (or, with a GPU, CuPy) outside."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

import invhvp as ih
import invhvp_torch as it
from invhvp.protocols import HasTerms
from invhvp.testing import check_gradients, check_operator
from invhvp_torch.bridge import Bridge
from tests.adapters.invhvp_torch.models import BY_NAME, assert_close, cross_entropy

MLP, CNN = BY_NAME["mlp"], BY_NAME["cnn"]
OPERATORS = {
    "hessian": lambda model, data, **o: it.hessian(model, cross_entropy, data, **o),
    "cached": lambda model, data, **o: it.gauss_newton(model, cross_entropy, data, **o),
    "streamed": lambda model, data, **o: it.gauss_newton(
        model, cross_entropy, data, memory=6_000, batch_size=2, **o
    ),
    "through the model": lambda model, data, **o: it.gauss_newton(
        model, cross_entropy, data, memory=0, **o
    ),
    "fisher": lambda model, data, **o: it.fisher(model, cross_entropy, data, kind="mc", **o),
    "empirical": lambda model, data, **o: it.empirical_fisher(model, cross_entropy, data, **o),
}


def _block(n, k, dtype=np.float64):
    return np.random.default_rng(0).standard_normal((n, k)).astype(dtype)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_numpy_in_numpy_out_is_the_torch_operator(name, dtype):
    model, x, y = MLP.build(dtype=dtype)
    A = OPERATORS[name](model, (x, y), array_namespace=np)
    T = OPERATORS[name](model, (x, y))
    assert isinstance(A.like, np.ndarray)
    assert A.psd == T.psd
    assert A.layout.names == T.layout.names
    X = _block(A.shape[0], 3, A.dtype)
    Y = A @ X
    assert isinstance(Y, np.ndarray)
    # NumPy's GEMM and torch's may round otherwise; the products through torch are the same bits.
    assert_close(
        torch.from_numpy(Y), T @ torch.from_numpy(X), 1e-6 if X.dtype == np.float32 else 1e-13
    )
    check_operator(A)


@pytest.mark.parametrize("name", ["hessian", "through the model"])
def test_any_strides_and_read_only_memory_are_views(name):
    model, x, y = MLP.build()
    A = OPERATORS[name](model, (x, y), array_namespace=np)
    X = _block(A.shape[0], 4)
    X.flags.writeable = False
    expected = A @ X
    rows = np.ascontiguousarray(X.T)
    rows.flags.writeable = False
    for same in (rows.T, np.asfortranarray(X), np.repeat(X, 2, axis=1)[:, ::2], X[::-1][::-1]):
        np.testing.assert_array_equal(A @ same, expected)
    np.testing.assert_array_equal(A @ X[:, 0], (A @ X[:, :1])[:, 0])
    np.testing.assert_allclose((A @ X[:, ::-1])[:, ::-1], expected, rtol=1e-13)


def test_memory_is_shared_both_ways():
    like = torch.zeros(0, dtype=torch.float64)
    bridge = Bridge(np, like, transfer=False)
    X = _block(5, 3)
    for view in (X, X.T, X[:, 1:], X[::2]):
        t = bridge.to_torch(view)
        assert t.data_ptr() == view.__array_interface__["data"][0]
        assert t.shape == view.shape
        back = bridge.from_torch(t)
        assert back.__array_interface__["data"][0] == t.data_ptr()
        assert back.strides == view.strides
        np.testing.assert_array_equal(back, view)
    X.flags.writeable = False
    t = bridge.to_torch(X.T)
    assert t.data_ptr() == X.__array_interface__["data"][0]
    assert t.stride() == (1, 3)
    grown = torch.ones(3, requires_grad=True) * 2
    assert bridge.from_torch(grown).tolist() == [2.0, 2.0, 2.0]


def test_gradients_are_views_with_their_structure():
    model, x, y = CNN.build()
    G = it.per_sample_gradients(model, cross_entropy, x, y)
    N = Bridge(np, x, transfer=False).gradients(G)
    for name, block in G.blocks.items():
        assert type(N.blocks[name]) is type(block)
    head = [name for name, block in G.blocks.items() if isinstance(block, ih.OuterProductGradients)]
    for name in head:
        for theirs, ours in (
            (N.blocks[name].inputs, G.blocks[name].inputs),
            (N.blocks[name].output_grads, G.blocks[name].output_grads),
        ):
            assert theirs.__array_interface__["data"][0] == ours.data_ptr()
    N = it.per_sample_gradients(model, cross_entropy, x, y, array_namespace=np)
    check_gradients(N, dense=G.to_dense().numpy())


def test_gradients_refuse_foreign_arrays_with_what_to_write():
    model, x, y = MLP.build()
    G = it.per_sample_gradients(model, cross_entropy, x, y)
    for product in (lambda: G @ np.ones(79), lambda: G.T @ np.ones(len(G))):
        with pytest.raises(TypeError, match="array_namespace=numpy"):
            product()


def test_solves_equal_those_of_torch():
    model, x, y = MLP.build()
    options = {"damping": 5.0}
    solutions = []
    for namespace in (None, np):
        H = it.hessian(model, cross_entropy, (x, y), array_namespace=namespace)
        G = it.per_sample_gradients(model, cross_entropy, x, y, array_namespace=namespace)
        K = it.gauss_newton(model, cross_entropy, (x, y), array_namespace=namespace)
        cg = ih.BlockCG(rtol=1e-10, preconditioner=ih.Surrogate(K, ih.SampleSpace()))
        solutions.append(ih.solve(H, G, cg, **options))
    ours, theirs = solutions
    assert isinstance(theirs.x, np.ndarray)
    assert theirs.converged.all()
    assert ours.passes == theirs.passes
    assert_close(torch.from_numpy(theirs.x), ours.x, 1e-9)


def test_terms_pass_through():
    model, x, y = MLP.build()
    A = it.hessian(model, cross_entropy, (x, y), array_namespace=np)
    T = it.hessian(model, cross_entropy, (x, y))
    assert isinstance(A, HasTerms)
    assert A.n_terms == 7
    rows = np.array([0, 3, 3])
    X = _block(A.shape[0], 2)
    np.testing.assert_array_equal(
        A.subset(rows) @ X, (T.subset(rows) @ torch.from_numpy(X)).numpy()
    )
    assert "in numpy arrays" in repr(A)


@pytest.mark.parametrize("name", OPERATORS)
def test_arrays_of_the_other_library_are_refused_with_what_to_write(name):
    model, x, y = MLP.build()
    data = (x, y)
    X = _block(79, 2)
    with pytest.raises(TypeError, match="array_namespace=numpy"):
        OPERATORS[name](model, data) @ X
    with pytest.raises(TypeError, match="torch"):
        OPERATORS[name](model, data, array_namespace=np) @ torch.from_numpy(X)


@pytest.mark.parametrize("name", OPERATORS)
def test_what_cannot_be_handed_over_is_refused_at_once(name):
    model, x, y = MLP.build()
    build = OPERATORS[name]
    cupy = types.ModuleType("cupy")
    with pytest.raises(TypeError, match=r'model\.to\("cuda"\)'):
        build(model, (x, y), array_namespace=cupy)
    with pytest.raises(TypeError, match="numpy and cupy"):
        build(model, (x, y), array_namespace=types)
    with pytest.raises(ValueError, match="transfer="):
        build(model, (x, y), transfer=True)
    half = model.to(torch.bfloat16)
    for namespace in (np, cupy):
        with pytest.raises(TypeError, match="float32"):
            build(half, (x.to(torch.bfloat16), y), array_namespace=namespace)


def test_numpy_with_a_model_on_a_gpu_needs_transfer():
    like = torch.zeros(0, device="meta")
    with pytest.raises(TypeError, match="transfer=True"):
        Bridge(np, like, transfer=False)


# ------------------------------------------------------------------------------- with a GPU


@pytest.fixture
def cupy():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return pytest.importorskip("cupy")


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATORS)
def test_cupy_in_cupy_out(name, cupy):
    model, x, y = MLP.build()
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    A = OPERATORS[name](model, (x, y), array_namespace=cupy)
    T = OPERATORS[name](model, (x, y))
    X = cupy.asarray(_block(79, 3))
    for view in (X, cupy.ascontiguousarray(X.T).T):
        Y = A @ view
        assert isinstance(Y, cupy.ndarray)
        assert_close(torch.from_dlpack(Y), T @ torch.from_dlpack(X), 1e-12)
    with pytest.raises(TypeError, match="array_namespace=cupy"):
        T @ X


@pytest.mark.gpu
def test_cupy_memory_is_shared(cupy):
    bridge = Bridge(cupy, torch.zeros(0, device="cuda"), transfer=False)
    X = cupy.asarray(_block(5, 3))
    for view in (X, X.T):
        t = bridge.to_torch(view)
        assert t.data_ptr() == view.data.ptr
        assert bridge.from_torch(t).data.ptr == view.data.ptr


@pytest.mark.gpu
def test_solves_on_the_gpu_equal_those_of_torch(cupy):
    model, x, y = MLP.build()
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    found = []
    for namespace in (None, cupy):
        H = it.hessian(model, cross_entropy, (x, y), array_namespace=namespace)
        G = it.per_sample_gradients(model, cross_entropy, x, y, array_namespace=namespace)
        found.append(ih.solve(H, G, ih.BlockCG(rtol=1e-10), damping=0.5))
    assert isinstance(found[1].x, cupy.ndarray)
    assert_close(torch.from_dlpack(found[1].x), found[0].x, 1e-8)


@pytest.mark.gpu
def test_streams_do_not_race(cupy):
    model, x, y = MLP.build(n=500)
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    A = it.hessian(model, cross_entropy, (x, y), array_namespace=cupy)
    expected = A @ cupy.ones((79, 8))
    stream = cupy.cuda.Stream(non_blocking=True)
    big = cupy.random.standard_normal((3000, 3000))
    with stream:
        for _ in range(20):
            X = cupy.zeros((79, 8))
            busy = big @ big  # X is written behind this
            X += 1.0 + 0.0 * busy[0, 0]
            Y = A @ X
            X *= float("nan")  # after the product has read it
            del X
            noise = cupy.full((79, 8), cupy.nan)  # may take the memory of either
            cupy.testing.assert_allclose(Y, expected, rtol=1e-10, atol=1e-12)
            del noise


@pytest.mark.gpu
def test_numpy_copies_with_a_model_on_a_gpu(cupy):
    model, x, y = MLP.build()
    model = model.cuda()
    A = it.hessian(model, cross_entropy, (x, y), array_namespace=np, transfer=True)
    T = it.hessian(model, cross_entropy, (x, y))
    X = _block(79, 2)
    assert_close(torch.from_numpy(A @ X), (T @ torch.from_numpy(X).cuda()).cpu(), 1e-12)
