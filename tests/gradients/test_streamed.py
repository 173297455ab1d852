"""Batches that are read again: passes, lengths, memory maps and errors."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from invhvp.gradients import DenseGradients, OuterProductGradients, StreamedGradients
from invhvp.layout import Layout
from tests.backends import Backend

ROWS = np.random.default_rng(0).standard_normal((10, 4))


class Reader:
    """Batches of uneven size, with a count of what is read."""

    def __init__(self, rows: np.ndarray = ROWS, sizes: tuple[int, ...] = (3, 1, 4, 2)) -> None:
        self.rows, self.cuts = rows, np.cumsum((0, *sizes))
        self.passes = self.batches = 0

    def __call__(self):
        self.passes += 1
        for i, j in pairwise(self.cuts):
            self.batches += 1
            yield self.rows[i:j]


def test_samples_are_counted_once():
    reader = Reader()
    G = StreamedGradients(reader)
    assert G.shape == (10, 4)
    assert reader.passes == 2  # one for the kind of the rows, one to count them
    reader.passes = reader.batches = 0
    G = StreamedGradients(reader, n_samples=10)
    assert (reader.passes, reader.batches) == (1, 1)


@pytest.mark.parametrize(
    "compute",
    [
        lambda G: G @ np.ones((4, 3)),
        lambda G: G.T @ np.ones(10),
        lambda G: G.row_norms(),
        lambda G: G.column_norms(),
        lambda G: G.to_dense(),
        lambda G: G.gram(),
        lambda G: G.gram(DenseGradients(ROWS)),
        lambda G: DenseGradients(ROWS).gram(G),
        lambda G: list(G.parts(64)),
        lambda G: G[np.array([9, 0])],
        lambda G: G.rescaled({"all": 2.0}).to_dense(),
    ],
)
def test_an_operation_is_one_pass(compute):
    reader = Reader()
    G = StreamedGradients(reader, 10, layout=Layout.from_shapes({"all": (4,)}))
    reader.passes = 0
    compute(G)
    assert reader.passes == 1


def test_slices_and_choices_stop_reading_early():
    reader = Reader()
    G = StreamedGradients(reader, 10)
    part = G[1:4]
    assert isinstance(part, StreamedGradients)
    reader.batches = 0
    np.testing.assert_array_equal(part.to_dense(), ROWS[1:4])
    assert reader.batches == 2
    reader.batches = 0
    chosen = G[np.array([3, 1])]
    assert isinstance(chosen, DenseGradients)
    assert reader.batches == 2
    np.testing.assert_array_equal(chosen.to_dense(), ROWS[[3, 1]])


@pytest.mark.parametrize("start", range(10))
@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_every_slice(start, step):
    G = StreamedGradients(Reader(), 10)
    for stop in range(start + 1, 11):
        part = G[start:stop:step]
        expected = ROWS[start:stop:step]
        assert part.shape == expected.shape
        np.testing.assert_array_equal(part.to_dense(), expected)
        np.testing.assert_array_equal(part[-1:].to_dense(), expected[-1:])


def test_gram_by_panels(monkeypatch):
    from invhvp import _backend

    monkeypatch.setattr(_backend, "free_memory", lambda x: 4 * 300)
    G, H = StreamedGradients(Reader(), 10), StreamedGradients(Reader(ROWS[::-1]), 10)
    np.testing.assert_allclose(G.gram(), ROWS @ ROWS.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(G.gram(H), ROWS @ ROWS[::-1].T, rtol=1e-12, atol=1e-12)


def test_batches_of_several_classes():
    outer = OuterProductGradients(output_grads=np.ones((2, 2)), inputs=np.ones((2, 2)))
    rows = np.concatenate([ROWS[:3], np.ones((2, 4))])
    G = StreamedGradients([ROWS[:3], outer])
    np.testing.assert_array_equal(G.to_dense(), rows)
    np.testing.assert_allclose(G.gram(), rows @ rows.T)


def test_empty_batches_are_left_out():
    G = StreamedGradients([ROWS[:0], ROWS[:3], ROWS[3:3], ROWS[3:]])
    np.testing.assert_array_equal(G @ np.ones(4), ROWS @ np.ones(4))


def test_rows_of_a_memory_map(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, ROWS)
    rows = np.load(path, mmap_mode="r")
    G = StreamedGradients(lambda: (rows[i : i + 4] for i in range(0, 10, 4)))
    np.testing.assert_allclose(G.gram(), ROWS @ ROWS.T)


def test_convert(backend: Backend):
    G = StreamedGradients([ROWS[:7], ROWS[7:]], convert=backend.asarray)
    backend.assert_like(G.like)
    backend.assert_like(G.to_dense())
    names = Layout.from_shapes({"a": (2,), "b": (2,)})
    G = StreamedGradients([ROWS[:7], ROWS[7:]], convert=backend.asarray, layout=names)
    scaled = G.rescaled({"a": 1.0, "b": 3.0})
    expected = ROWS.astype(backend.np_dtype) * np.array([1, 1, 3, 3])
    np.testing.assert_allclose(backend.to_numpy(scaled.to_dense()), expected, rtol=backend.eps)


@pytest.mark.parametrize(
    ("batches", "error", "said"),
    [
        (iter([ROWS]), TypeError, "a list_iterator can be read only once; pass a list"),
        ((b for b in [ROWS]), TypeError, "a generator can be read only once"),
        (3, TypeError, "iterable or a function without arguments, got int"),
        ([], ValueError, "the batches are empty"),
        ([ROWS[:0]], ValueError, "the batches are empty"),
        (list(ROWS), ValueError, r"shape \(n, p\), got \(4,\).*DenseGradients"),
        ([[1.0]], TypeError, "an array .* got list; pass convert="),
        ([ROWS.astype(int)], TypeError, "floating"),
        ([ROWS, ROWS[:, :3]], ValueError, "same number of parameters, got 4 and 3"),
        ([ROWS, ROWS.astype(np.float32)], TypeError, "float64, got float32"),
    ],
)
def test_batches_at_the_door(batches, error, said):
    with pytest.raises(error, match=said):
        StreamedGradients(batches)


def test_a_function_that_returns_a_spent_iterator_is_found_out():
    spent = iter([ROWS[:5], ROWS[5:]])
    G = StreamedGradients(lambda: spent, n_samples=10)
    with pytest.raises(ValueError, match="yielded 5 samples, not 10"):
        G.to_dense()


@pytest.mark.parametrize(("first", "then", "said"), [(10, 8, "8"), (8, 10, "more")])
def test_passes_of_different_length(first, then, said):
    rows = [ROWS[:first]]
    G = StreamedGradients(lambda: [rows[0][:5], rows[0][5:]])
    rows[0] = ROWS[:then]
    for compute in (G.row_norms, G.gram, G.column_norms, lambda: G.T @ np.ones(first)):
        with pytest.raises(ValueError, match=f"yielded {said} samples, not {first}"):
            compute()


def test_a_wrong_number_of_samples():
    with pytest.raises(ValueError, match="n_samples must be at least 1, got 0"):
        StreamedGradients([ROWS], n_samples=0)
    with pytest.raises(ValueError, match="yielded 10 samples, not 12"):
        StreamedGradients([ROWS], n_samples=12).to_dense()


def test_one_memory_map_or_zarr_array_is_read_in_slices(tmp_path, monkeypatch):
    from invhvp.gradients import streamed

    rows = np.random.default_rng(0).standard_normal((11, 4))
    mapped = np.memmap(tmp_path / "rows", dtype=np.float64, mode="w+", shape=(11, 4))
    mapped[:] = rows
    monkeypatch.setattr(streamed, "_BATCH_BYTES", 8 * 4 * 3)  # three rows at a time
    V = np.random.default_rng(1).standard_normal((4, 2))
    sources = [mapped]
    import zarr

    stored = zarr.create_array(str(tmp_path / "rows.zarr"), shape=(11, 4), dtype="float64")
    stored[:] = rows
    sources.append(stored)
    for source in sources:
        G = streamed.StreamedGradients(source)
        assert G.shape == (11, 4)
        np.testing.assert_allclose(G @ V, rows @ V, rtol=1e-14)
        np.testing.assert_allclose(G.gram(), rows @ rows.T, rtol=1e-13)
