"""Stored scores: values, metadata, refusals, and what is left when a writer is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import invhvp as ih
from invhvp.influence import read_blocks, top_k
from tests.influence import killed_writer

zarr = pytest.importorskip("zarr")

ROOT = Path(__file__).parents[2]
N, M, BLOCK = killed_writer.N, killed_writer.M, killed_writer.BLOCK
SOLVES, BLOCKS = M // BLOCK[0], (M // BLOCK[0]) * (N // BLOCK[1])


def expected(influence, test):
    G, T = influence.train.to_dense(), test.to_dense()
    return T @ np.linalg.solve(G.T @ G / N + 0.1 * np.eye(G.shape[1]), G.T)


@pytest.mark.parametrize("method", [ih.Direct(), ih.SampleSpace(), ih.BlockCG()], ids=repr)
def test_scores_and_what_is_told_about_them(backend, method, tmp_path):
    rng = np.random.default_rng(0)
    train, test = rng.standard_normal((9, 12)), rng.standard_normal((5, 12))
    G, T = (ih.DenseGradients(backend.asarray(a)) for a in (train, test))
    influence = ih.Influence(method.prepare(ih.RankOneMean(G), damping=0.1), G)
    scores = influence.write(T, tmp_path / "s", block_shape=(2, 4), progress=False)
    M = np.linalg.inv(train.T @ train / 9 + 0.1 * np.eye(12))
    want = test @ M @ train.T
    tolerance = max(1e-4 if isinstance(method, ih.BlockCG) else 0, 3e3 * backend.eps)
    np.testing.assert_allclose(scores[...], want, rtol=0, atol=tolerance * np.abs(want).max())
    assert scores.dtype == backend.np_dtype
    assert scores.metadata.zarr_format == 3
    assert scores.metadata.dimension_names == ("test", "train")
    group = zarr.open_group(tmp_path / "s", mode="r")
    told = group.attrs["invhvp"]
    assert told["damping"] == 0.1
    assert told["method"] == ih.method_to_dict(method)
    assert told["versions"]["invhvp"] == ih.__version__
    assert set(told["fingerprints"]) == {"operator", "train", "test"}
    if told["factors"] == "parameters":
        np.testing.assert_allclose(group["factors"][...], test @ M, atol=tolerance * 30)
        assert np.all(group["relative_residuals"][...] < 1e-3)
    else:
        assert group["factors"].shape == (5, 9)  # in sample space


def test_killed_at_any_moment_and_continued(tmp_path):
    """SIGKILL after a few blocks of each pass; the next run repeats one block at most."""
    for stage, enough in (("factors_written", 1), ("scores_written", 1), ("scores_written", 7)):
        out = tmp_path / f"{stage}{enough}"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        writer = subprocess.Popen(
            [sys.executable, killed_writer.__file__, str(out), "0.05"], env=environment
        )
        try:
            deadline = time.monotonic() + 60
            while _count(out, stage) < enough and time.monotonic() < deadline:
                assert writer.poll() is None
                time.sleep(0.005)
        finally:
            os.kill(writer.pid, signal.SIGKILL)
            writer.wait()
        assert writer.returncode == -signal.SIGKILL
        solved, scored = _count(out, "factors_written"), _count(out, "scores_written")
        assert enough <= solved + scored < SOLVES + BLOCKS
        with pytest.raises(ValueError, match="not complete"):
            list(read_blocks(out))
        influence, test, calls = killed_writer.system()
        scores = influence.write(test, out, block_shape=BLOCK, progress=False)
        assert calls == {"solved": SOLVES - solved, "scored": BLOCKS - scored}
        np.testing.assert_allclose(scores[...], expected(influence, test), rtol=1e-10)


def _count(out, name):
    try:
        return int(np.sum(zarr.open_array(out / name, mode="r")[...]))
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("array", ["factors", "scores", "factors_written", "scores_written"])
@pytest.mark.parametrize("written", [False, True])
def test_no_block_is_lost_whichever_write_is_the_last(array, written, tmp_path, monkeypatch):
    """A writer that ends right before or right after one of its writes."""
    original, seen = zarr.Array.__setitem__, [0]

    def ends(self, key, value):
        if self.basename == array:
            seen[0] += 1
            if seen[0] == 3:
                if written:
                    original(self, key, value)
                raise KeyboardInterrupt
        original(self, key, value)

    influence, test, before = killed_writer.system()
    monkeypatch.setattr(zarr.Array, "__setitem__", ends)
    with pytest.raises(KeyboardInterrupt):
        influence.write(test, tmp_path / "s", block_shape=BLOCK, progress=False)
    monkeypatch.undo()
    influence, test, after = killed_writer.system()
    # The second call may leave the shape of the blocks to the store.
    scores = influence.write(test, tmp_path / "s", progress=False)
    np.testing.assert_allclose(scores[...], expected(influence, test), rtol=1e-10)
    assert SOLVES <= before["solved"] + after["solved"] <= SOLVES + 1
    assert BLOCKS <= before["scored"] + after["scored"] <= BLOCKS + 1


def test_a_complete_store_is_not_computed_again(tmp_path):
    influence, test, _ = killed_writer.system()
    influence.write(test, tmp_path / "s", block_shape=BLOCK, progress=False)
    influence, test, calls = killed_writer.system()
    influence.write(test, tmp_path / "s", progress=False)
    assert calls == {"solved": 0, "scored": 0}
    top = top_k(read_blocks(tmp_path / "s"), 4)
    order = np.argsort(expected(influence, test), axis=1)
    np.testing.assert_array_equal(top.harmful, order[:, :4])
    np.testing.assert_array_equal(top.helpful, order[:, ::-1][:, :4])


def test_streamed_training_gradients_stop_where_nothing_is_left(tmp_path):
    influence, test, _ = killed_writer.system()
    rows = influence.train.to_dense()
    G = ih.StreamedGradients([rows[:13], rows[13:40], rows[40:]])
    streamed = ih.Influence(influence.inverse, G)
    scores = streamed.write(test, tmp_path / "s", block_shape=BLOCK, progress=False)
    np.testing.assert_allclose(scores[...], expected(influence, test), rtol=1e-10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"damping": 0.2}, "damping was 0.1, is 0.2"),
        ({"flipped": True}, "the training gradients have other values"),
    ],
    ids=["damping", "one sample"],
)
def test_a_store_of_something_else_is_refused(change, words, tmp_path):
    influence, test, _ = killed_writer.system()
    influence.write(test, tmp_path / "s", block_shape=BLOCK, progress=False)
    other, test, calls = killed_writer.system(**change)
    with pytest.raises(ValueError, match=words):
        other.write(test, tmp_path / "s", progress=False)
    assert calls == {"solved": 0, "scored": 0}


def test_every_other_difference_is_refused(tmp_path):
    influence, test, _ = killed_writer.system()
    influence.write(test, tmp_path / "s", block_shape=BLOCK, progress=False)
    inverse, train = influence.inverse, influence.train
    rows, changed = train.to_dense(), test.to_dense().copy()
    changed[3, 0] *= 1.0 + 1e-6
    method = ih.BlockCG(rtol=1e-9).prepare(inverse.operator, damping=0.1)
    operator = ih.Direct().prepare(ih.RankOneMean(ih.DenseGradients(1.001 * rows)), damping=0.1)
    cases = {
        "method was": (ih.Influence(method, train), test),
        "the operator has other values": (ih.Influence(operator, train), test),
        "the test gradients have other values": (influence, ih.DenseGradients(changed)),
        "shape was": (influence, test[:7]),
    }
    for words, (other, rows) in cases.items():
        with pytest.raises(ValueError, match=words):
            other.write(rows, tmp_path / "s", progress=False)
    with pytest.raises(ValueError, match="block_shape was"):
        influence.write(test, tmp_path / "s", block_shape=(1, 1), progress=False)
    with pytest.raises(ValueError, match="two numbers"):
        influence.write(test, tmp_path / "t", block_shape=(0, 1), progress=False)
    zarr.open_group(tmp_path / "u", mode="w").create_array("mine", shape=(1,), dtype="f8")
    with pytest.raises(ValueError, match="something else than scores"):
        influence.write(test, tmp_path / "u", progress=False)
    zarr.save_array(tmp_path / "v", np.arange(3.0))
    with pytest.raises(ValueError, match="something else than scores"):
        influence.write(test, tmp_path / "v", progress=False)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "v", mode="r")[...], np.arange(3.0))
    with pytest.raises(ValueError, match="does not hold scores"):
        read_blocks(tmp_path / "u")


def test_rounding_does_not_make_other_data(tmp_path):
    """Sums in another order, as with another number of threads, continue the same store."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((30, 2000)).astype(np.float32)
    rows[4] *= 1e-6
    T = ih.DenseGradients(rows[:3])
    for array in (rows, np.asfortranarray(rows), rows * np.float32(1 + 2**-22)):
        G = ih.DenseGradients(array)
        inverse = ih.SampleSpace().prepare(ih.RankOneMean(G), damping=0.1)
        ih.Influence(inverse, G).write(T, tmp_path / "s", progress=False)


def test_a_run_may_go_on_with_another_library(tmp_path):
    torch = pytest.importorskip("torch")
    rows = np.random.default_rng(0).standard_normal((30, 40))
    for array in (rows, torch.from_numpy(rows)):
        G = ih.DenseGradients(array)
        inverse = ih.Direct().prepare(ih.RankOneMean(G), damping=0.1)
        ih.Influence(inverse, G).write(G[:3], tmp_path / "s", progress=False)


def test_any_zarr_store_and_a_bar(capsys):
    influence, test, _ = killed_writer.system()
    store = zarr.storage.MemoryStore()
    scores = influence.write(test, store)
    np.testing.assert_allclose(scores[...], expected(influence, test), rtol=1e-10)
    told = capsys.readouterr().err
    assert "factors" in told
    assert "scores" in told
    assert sum(block.size for _, _, block in read_blocks(store)) == N * M


def test_without_zarr_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "zarr", None)
    influence, test, _ = killed_writer.system()
    with pytest.raises(ModuleNotFoundError, match=r"invhvp\[io\]"):
        influence.write(test, tmp_path / "s")
