"""Influences of collections, batch by batch, by a model whose scores are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("zarr")

import zarr

from invhvp_torch.influence import (
    NestedTorchCatAggregator,
    SequentialInfluenceCalculator,
    TorchCatAggregator,
    TorchNumpyConverter,
)


class Bilinear:
    """Gradients are x·y, the curvature is a diagonal matrix."""

    def __init__(self):
        self.diagonal = torch.arange(1.0, 4.0, dtype=torch.float64)
        self.solved = 0

    def influence_factors(self, x, y):
        self.solved += len(x)
        return x.double() * y[:, None] / self.diagonal

    def influences_from_factors(self, z_test_factors, x, y, mode="up"):
        scores = z_test_factors @ (x.double() * y[:, None]).T
        if mode == "up":
            return scores
        return z_test_factors[:, None, :] * y[None, :, None].expand(1, len(y), 3)


def collection(n, seed, batch):
    x = torch.from_numpy(np.random.default_rng(seed).integers(0, 255, (n, 3)))  # int64: pixels
    y = torch.linspace(-1, 1, n, dtype=torch.float64)
    return x, y, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch)


@pytest.fixture
def case():
    x_test, y_test, test = collection(5, 0, 2)
    x, y, train = collection(7, 1, 3)
    model = Bilinear()
    rows, columns = x_test * y_test[:, None] / model.diagonal, x * y[:, None]
    return model, test, train, rows, (rows @ columns.T).numpy()


def test_scores_are_those_of_the_formula_and_nothing_is_solved_twice(case):
    model, test, train, rows, expected = case
    calculator = SequentialInfluenceCalculator(model)
    lazy = calculator.influences(test, train)
    assert model.solved == 0
    found = lazy.compute(aggregator=NestedTorchCatAggregator())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-14)
    assert model.solved == 5
    grid = lazy.compute()
    assert [[tuple(block.shape) for block in row] for row in grid] == [
        [(2, 3), (2, 3), (2, 1)], [(2, 3), (2, 3), (2, 1)], [(1, 3), (1, 3), (1, 1)]
    ]  # fmt: skip
    factors = calculator.influence_factors(test).compute(TorchCatAggregator())
    np.testing.assert_allclose(factors.numpy(), rows, rtol=1e-14)
    again = calculator.influences_from_factors(calculator.influence_factors(test), train)
    np.testing.assert_allclose(again.compute(NestedTorchCatAggregator()).numpy(), expected)


def test_rows_read_late_meet_their_own_factors(case):
    model, test, train, _, expected = case
    rows = list(SequentialInfluenceCalculator(model).influences(test, train))
    found = NestedTorchCatAggregator()(rows)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-14)


def test_any_function_may_aggregate(case):
    model, test, train, _, expected = case
    largest = SequentialInfluenceCalculator(model).influences(test, train).compute(
        lambda rows: [max(float(block.max()) for block in row) for row in rows]
    )  # fmt: skip
    np.testing.assert_allclose(largest, [expected[i : i + 2].max() for i in (0, 2, 4)])


def test_zarr_has_the_dtype_of_the_factors(case, tmp_path):
    model, test, train, rows, expected = case
    calculator = SequentialInfluenceCalculator(model)
    stored = calculator.influences(test, train).to_zarr(
        tmp_path / "s", TorchNumpyConverter(), return_stored=True
    )
    assert stored.dtype == np.float64  # where x is int64
    assert stored.metadata.dimension_names == ("test", "train")
    np.testing.assert_array_equal(stored[...], expected)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        calculator.influences(test, train).to_zarr(tmp_path / "s")
    zarr.open_group(tmp_path / "g", mode="w").create_array("mine", shape=(1,), dtype="f8")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        calculator.influences(test, train).to_zarr(tmp_path / "g")
    assert calculator.influence_factors(test).to_zarr(tmp_path / "s", overwrite=True) is None
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "s")[...], rows)
    moved = calculator.influences(test, train, mode="perturbation").to_zarr(
        tmp_path / "p", return_stored=True
    )
    assert moved.shape == (5, 7, 3)
    assert moved.metadata.dimension_names == ("test", "train", "feature_0")
    steps = np.linspace(-1, 1, 7)[:, None]
    np.testing.assert_allclose(moved[...], rows.numpy()[:, None, :] * steps, atol=1e-12)


def test_what_has_no_order_is_refused(case):
    model, test, train, _, _ = case
    calculator = SequentialInfluenceCalculator(model)
    mixed = torch.utils.data.DataLoader(train.dataset, 3, shuffle=True)
    for arguments in ((test, mixed), (mixed, train)):
        with pytest.raises(ValueError, match="shuffle=False"):
            calculator.influences(*arguments)
    with pytest.raises(TypeError, match="pass a list"):
        calculator.influences(test, iter(train))
    with pytest.raises(ValueError, match="no batches"):
        calculator.influence_factors([]).to_zarr("nowhere")


def test_converter_goes_both_ways():
    converter = TorchNumpyConverter()
    x = torch.arange(3.0, requires_grad=True)
    array = converter.to_numpy(x)
    array.setflags(write=False)
    assert torch.equal(converter.from_numpy(array), x.detach())
    assert converter.to_numpy(x.bfloat16()).dtype == np.float32


def test_a_fitted_model_scores_the_same_in_batches():
    from invhvp_torch.influence import DirectInfluence

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    model = model.double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 2
    fitted = DirectInfluence(model, torch.nn.functional.cross_entropy, 0.5).fit([(x, y)])
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    lazy = SequentialInfluenceCalculator(fitted).influences(batches[:1], batches)
    found = lazy.compute(NestedTorchCatAggregator())
    expected = fitted.influences(x[:4], y[:4], x, y)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
