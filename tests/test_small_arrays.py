"""Small arrays beside PyTorch tensors on the CPU: NumPy's, where nothing is lost by it."""

from __future__ import annotations

import numpy as np
import pytest

import invhvp as ih
from invhvp import _backend

torch = pytest.importorskip("torch")

rng = np.random.default_rng(0)
M = torch.tensor(np.diag(np.arange(1.0, 9.0)) + 0.1)
U, _ = torch.linalg.qr(torch.tensor(rng.standard_normal((8, 3))))
G = torch.tensor(rng.standard_normal((3, 8)))
X = torch.tensor(rng.standard_normal((8, 2)))
LAYOUT = ih.Layout.from_shapes({"a": (3,), "b": (5,)})
BY_BLOCK = {"a": 1.0, "b": 2.0}
MAPS = {
    "dense": lambda: ih.Dense(M).inverse(1.0),
    "indefinite": lambda: ih.Dense(M - 4 * torch.eye(8).double()).inverse(0.0),
    "low rank": lambda: ih.LowRank(U, torch.ones(3).double()).inverse(1.0),
    "woodbury": lambda: ih.LowRank(U, torch.ones(3).double(), layout=LAYOUT).inverse(BY_BLOCK),
    "samples": lambda: ih.RankOneMean(ih.DenseGradients(G)).inverse(1.0),
    "power": lambda: ih.RankOneMean(ih.DenseGradients(G)).inverse(1.0).power(0.5),
    "spectral": lambda: ih.NystroemSketch(rank=8).prepare(ih.Dense(M), damping=1.0).power(-0.5),
}


def test_a_tensor_shares_its_memory():
    x = torch.ones(2, 2, dtype=torch.float64)
    small = _backend.to_small(x)
    assert isinstance(small, np.ndarray)
    assert np.shares_memory(small, x.numpy())
    assert _backend.lift(small, x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_other_precisions_go_there_and_back(dtype: str):
    x = torch.tensor([1.0, 2.5], dtype=getattr(torch, dtype))
    small = _backend.to_small(x)
    assert small.dtype == np.float64
    back = _backend.lift(small, x)
    assert back.dtype == x.dtype
    assert torch.equal(back, x)


def test_arrays_that_torch_does_not_take_are_copied():
    like = torch.zeros(0, dtype=torch.float64)
    fixed = np.arange(3.0)
    fixed.setflags(write=False)
    assert _backend.lift(fixed, like).tolist() == [0.0, 1.0, 2.0]
    assert _backend.lift(fixed[::-1], like).tolist() == [2.0, 1.0, 0.0]


def test_what_is_recorded_or_transformed_stays_a_tensor():
    x = torch.ones(2, dtype=torch.float32, requires_grad=True)
    small = _backend.to_small(x)
    assert small.requires_grad
    with torch.no_grad():
        assert isinstance(_backend.to_small(x), np.ndarray)
    with torch.inference_mode():
        assert isinstance(_backend.to_small(x + 1), np.ndarray)
    torch.func.vmap(lambda row: _check_tensor(_backend.to_small(row)))(torch.ones(2, 2))


def _check_tensor(x):
    assert isinstance(x, torch.Tensor)
    return x


@pytest.mark.parametrize("name", MAPS)
def test_maps_have_derivatives_and_can_be_transformed(name: str):
    A, Z = MAPS[name](), X.clone().requires_grad_()
    expected = A @ X
    (found,) = torch.autograd.grad(torch.sum(X * (A @ Z)), Z)  # A is symmetric
    torch.testing.assert_close(found, expected)
    batched = torch.func.vmap(lambda x: A @ x, in_dims=1, out_dims=1)
    torch.testing.assert_close(batched(X), expected)


def test_derivatives_in_what_a_map_is_made_of():
    leaf = M.clone().requires_grad_()
    (found,) = torch.autograd.grad(torch.sum(X * (ih.Dense(leaf).inverse(1.0) @ X)), leaf)
    solved = ih.Dense(M).inverse(1.0) @ X
    torch.testing.assert_close(found, -solved @ solved.T)


def test_sums_that_others_save_are_tensors():
    sums = ih.estimate.BlockAccumulator({"bias": 8}, like=G)
    for _ in range(2):
        sums.add("bias", ih.DenseGradients(G))
    sums.count(6)
    assert isinstance(sums.state()["bias/matrix"], torch.Tensor)
    torch.testing.assert_close(sums.operators()["bias"].to_dense(), G.T @ G / 3)


class Hidden(ih.LinearOperator):
    def __init__(self, matmat):
        super().__init__(8, like=M, psd=True)
        self._matmat = matmat


@pytest.mark.parametrize("method", [ih.CG(), ih.BlockCG(), ih.BlockCG(recycle=3), ih.Direct()])
def test_a_graph_that_nobody_asked_for_does_not_mix_in(method):
    leaf = M.clone().requires_grad_()
    A = ih.Callback(lambda V: leaf @ V, 8, like=M, psd=True)
    expected = ih.solve(ih.Dense(M, psd=True), X, method, damping=0.1)
    found = ih.solve(A, X, method, damping=0.1)
    assert found.status == expected.status
    assert not found.x.requires_grad
    torch.testing.assert_close(found.x, expected.x)
    if isinstance(method, ih.CG):
        hidden = ih.solve(Hidden(lambda V: leaf @ V), X, method, damping=0.1)
        torch.testing.assert_close(hidden.x, expected.x)
