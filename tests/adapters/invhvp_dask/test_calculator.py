"""Influences on a cluster of two processes against the same on this machine."""

from __future__ import annotations

import gc

import numpy as np
import pytest

pytest.importorskip("distributed")
pytest.importorskip("torch")
pytest.importorskip("zarr")

import cloudpickle
import dask.array as da
import distributed
import torch
import zarr

import invhvp as ih
from invhvp_dask import (
    DaskInfluenceCalculator,
    DisableClientSingleThreadCheck,
    InvalidDimensionChunksError,
    ThreadSafetyViolationError,
    UnalignedChunksError,
    torch_dataset_to_dask_array,
)
from invhvp_torch.influence import (
    CgInfluence,
    DirectInfluence,
    NestedTorchCatAggregator,
    SequentialInfluenceCalculator,
    TorchNumpyConverter,
)
from tests.adapters.invhvp_dask.models import Bilinear, Handle

# What a cluster of threads and sockets leaves to the garbage collector is not ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def client():
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client
    gc.collect()  # what sockets leave behind ends here, and not in somebody else's test


def collection(n, seed, chunk):
    x = np.random.default_rng(seed).integers(0, 255, (n, 3))  # int64: pixels
    y = np.linspace(-1.0, 1.0, n)
    return x, y, da.from_array(x, (chunk, 3)), da.from_array(y, chunk)


def formula(model, x_test, y_test, x, y):
    rows = x_test * y_test[:, None] / model.diagonal.numpy()
    return rows, rows @ (x * y[:, None]).T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_scores_of_integers_have_the_dtype_of_the_factors(client, tmp_path, dtype):
    model = Bilinear(tmp_path / "notes", dtype)
    x_test, y_test, *test = collection(5, 0, 2)
    x, y, *train = collection(11, 1, 3)
    wanted = np.dtype(str(dtype).rpartition(".")[2])
    test[1], train[1] = test[1].astype(wanted), train[1].astype(wanted)
    calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
    lazy = calculator.influences(*test, *train)
    assert lazy.dtype == wanted
    assert lazy.chunks == ((2, 2, 1), (3, 3, 3, 2))
    before = len(model.solved())  # to find out the dtype
    found = lazy.compute()
    assert found.dtype == wanted
    rows, expected = formula(model, x_test, y_test, x, y)
    np.testing.assert_allclose(found, expected, rtol=1e-12 if dtype is torch.float64 else 1e-5)
    # Three chunks of test samples against four of training samples: solved once each.
    assert sorted(model.solved()[before:]) == [1, 2, 2]
    factors = calculator.influence_factors(*test).compute()
    np.testing.assert_allclose(factors, rows, rtol=1e-6)
    moved = calculator.influences(*test, *train, mode="perturbation")
    assert moved.shape == (5, 11, 3)
    np.testing.assert_allclose(moved.compute(), rows[:, None] * y[:, None], rtol=1e-5)


def test_one_task_owns_each_chunk_of_the_store(client, tmp_path):
    model = Bilinear(tmp_path / "notes")
    x_test, y_test, *test = collection(9, 0, 2)
    x, y, *_ = collection(23, 1, 3)
    train = [da.from_array(a, ((7, 1, 4, 11), *((3,),) * (a.ndim - 1))) for a in (x, y)]
    calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
    stored = calculator.to_zarr(calculator.influences(*test, *train), str(tmp_path / "s"))
    assert stored.chunks == (2, 11)
    assert stored.metadata.dimension_names == ("test", "train")
    _, expected = formula(model, x_test, y_test, x, y)
    np.testing.assert_allclose(stored[...], expected, rtol=1e-12)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        calculator.to_zarr(calculator.influences(*test), str(tmp_path / "s"))
    factors = calculator.to_zarr(calculator.influence_factors(*test), str(tmp_path / "f"))
    assert factors.metadata.dimension_names == ("test", "parameter")
    again = calculator.influences_from_factors(da.from_zarr(str(tmp_path / "f")), *train)
    np.testing.assert_allclose(again.compute(), expected, rtol=1e-12)


@pytest.fixture
def network(tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(40, 5, dtype=torch.float64), torch.arange(40) % 3
    torch.save((x, y), tmp_path / "data.pt")
    layers = torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)
    return torch.nn.Sequential(*layers).double(), Handle(tmp_path / "data.pt"), x, y


@pytest.mark.parametrize("kind", ["direct", "cg"])
def test_fitted_models_score_as_they_do_here(client, network, kind):
    model, data, x, y = network
    loss, loader = torch.nn.functional.cross_entropy, torch.utils.data.DataLoader(data, 20)
    options = {"regularization": 0.3, "second_order_mode": "generalized_gauss_newton"}
    if kind == "direct":
        fitted = DirectInfluence(model, loss, **options).fit(loader)
    else:
        fitted = CgInfluence(model, loss, rtol=1e-12, **options).fit(loader)
    arrays = torch_dataset_to_dask_array(data, chunk_size=15)
    calculator = DaskInfluenceCalculator(fitted, TorchNumpyConverter(), client)
    found = calculator.influences(*(a[:7] for a in arrays), *arrays)
    assert found.dtype == np.float64
    batches = [(x[:15], y[:15]), (x[15:], y[15:])]
    lazy = SequentialInfluenceCalculator(fitted).influences([(x[:7], y[:7])], batches)
    expected = lazy.compute(NestedTorchCatAggregator())
    np.testing.assert_allclose(found.compute(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [DirectInfluence, CgInfluence])
def test_the_training_set_is_not_pickled_with_the_model(network, tmp_path, kind):
    model, _, _, _ = network
    marked = torch.full((4000, 5), 0.123456789, dtype=torch.float64)
    x, y = marked + torch.randn(4000, 5, dtype=torch.float64) * 1e-3, torch.arange(4000) % 3
    torch.save((x[:40], y[:40]), tmp_path / "data.pt")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 1000)
    loss = torch.nn.functional.cross_entropy
    fitted = kind(model, loss, 0.5, second_order_mode="generalized_gauss_newton").fit(loader)
    data_bytes = x.nbytes
    sent = fitted.for_workers()
    if kind is CgInfluence:  # which keeps nothing: it is told what goes along
        assert sent.data_bytes > data_bytes
        handle = torch.utils.data.DataLoader(Handle(tmp_path / "data.pt"), 20)
        sent = fitted.fit(handle).for_workers()
    assert sent.data_bytes < 10_000
    assert len(cloudpickle.dumps(sent)) < data_bytes / 4
    again = cloudpickle.loads(cloudpickle.dumps(sent))
    found = again.influences(x[:3], y[:3], x[3:6], y[3:6])
    expected = fitted.influences(x[:3], y[:3], x[3:6], y[3:6])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_data_that_go_along_are_told_of(network):
    model, _, _, _ = network
    x, y = torch.randn(20, 10_000, dtype=torch.float64)[:, :5], torch.arange(20) % 3
    fitted = CgInfluence(model, torch.nn.functional.cross_entropy, 1.0).fit([(x, y)])
    with pytest.warns(ih.InvhvpWarning, match="opens its files"):
        DaskInfluenceCalculator(fitted, TorchNumpyConverter(), DisableClientSingleThreadCheck)


def test_threads_are_checked_or_take_turns(client, tmp_path, monkeypatch):
    model = Bilinear(tmp_path / "notes")
    x_test, y_test, *test = collection(5, 0, 1)
    _, expected = formula(model, x_test, y_test, x_test, y_test)
    assert list(client.nthreads().values()) == [1, 1]
    with monkeypatch.context() as patch:
        patch.setattr(client, "nthreads", lambda: {"tcp://a": 1, "tcp://b": 4})
        with pytest.raises(ThreadSafetyViolationError, match="threads_per_worker=1"):
            DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
    calculator = DaskInfluenceCalculator(
        model, TorchNumpyConverter(), DisableClientSingleThreadCheck
    )
    found = calculator.influences(*test).compute(scheduler="threads")
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    with pytest.raises(TypeError, match="client must be"):
        DaskInfluenceCalculator(model, TorchNumpyConverter(), dict)


def test_chunks_are_checked(tmp_path):
    calculator = DaskInfluenceCalculator(
        Bilinear(tmp_path / "notes"), TorchNumpyConverter(), DisableClientSingleThreadCheck
    )
    x, y, dx, dy = collection(6, 0, 2)
    with pytest.raises(UnalignedChunksError, match=r"\(2, 2, 2\) and \(3, 3\)"):
        calculator.influences(dx, da.from_array(y, 3))
    with pytest.raises(InvalidDimensionChunksError, match="other axes"):
        calculator.influences(da.from_array(x, (2, 1)), dy)
    with pytest.raises(InvalidDimensionChunksError, match="compute_chunk_sizes"):
        calculator.influences(dx[dy > 0], dy[dy > 0])
    with pytest.raises(ValueError, match="belong together"):
        calculator.influences(dx, dy, dx)
    with pytest.raises(TypeError, match="dask array"):
        calculator.influence_factors(x, y)
    with pytest.raises(ValueError, match="'sideways' is no mode"):
        calculator.influences(dx, dy, mode="sideways")
    with pytest.raises(ValueError, match=r"shape \(N, 3\), got \(6, 2\)"):
        calculator.influences_from_factors(dx[:, :2], dx, dy)
    zarr.open_group(tmp_path / "g", mode="w")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        calculator.to_zarr(calculator.influences(dx, dy), tmp_path / "g")


def test_data_sets_keep_their_dtype_unless_told():
    x, y = torch.randint(0, 255, (7, 2, 2), dtype=torch.uint8), torch.arange(7)
    data = torch.utils.data.TensorDataset(x, y)
    dx, dy = torch_dataset_to_dask_array(data, chunk_size=3)
    assert (dx.dtype, dy.dtype) == (np.uint8, np.int64)
    assert dx.chunks == ((3, 3, 1), (2,), (2,))
    np.testing.assert_array_equal(dx.compute(scheduler="sync"), x)
    fewer = torch_dataset_to_dask_array(data, 4, total_size=5, resulting_dtype=np.float32)
    assert [a.dtype for a in fewer] == [np.float32] * 2
    np.testing.assert_array_equal(fewer[1].compute(scheduler="sync"), np.arange(5.0))
    with pytest.raises(ValueError, match="total_size"):
        torch_dataset_to_dask_array(iter(()), 3)
    with pytest.raises(ValueError, match="at least 1"):
        torch_dataset_to_dask_array(data, 0)
    with pytest.raises(ValueError, match="total_size is 8, but the data set has 7"):
        torch_dataset_to_dask_array(data, 3, total_size=8)
