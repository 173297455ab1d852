"""Fits that are killed and go on, to the same last bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import invhvp_torch as it
from invhvp_torch.checkpoint import checkpoint_at
from invhvp_torch.kronecker_fit import Fit
from tests.adapters.invhvp_torch.kronecker_models import MORE
from tests.adapters.invhvp_torch.models import BY_NAME, cross_entropy

pytest.importorskip("safetensors")

CASE = MORE[1]
ROOT = Path(__file__).parents[3]


def problem():
    model, x, y = CASE.build(n=10)
    w = torch.linspace(0.5, 1.5, 10, dtype=torch.float64)
    return model, [(x[i : i + 2], y[i : i + 2], w[i : i + 2]) for i in range(0, 10, 2)]


def fit(path, forwards: int = 0, **options):
    """Fit with a checkpoint; with `forwards`, kill this process in the forward pass after it."""
    model, batches = problem()
    seen = []

    def hook(*_):
        seen.append(1)
        if forwards and len(seen) > forwards:
            os.kill(os.getpid(), signal.SIGKILL)

    handle = model.register_forward_hook(hook)
    K = it.ekfac(model, cross_entropy, batches, checkpoint=path, checkpoint_every=1, **options)
    handle.remove()
    return K, len(seen)


KILLED = """
import sys
from tests.adapters.invhvp_torch.test_kfac_checkpoint import fit
fit(sys.argv[1], int(sys.argv[2]), **eval(sys.argv[3]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize(("share", "options"), [(0.85, {}), (0.5, {"memory": 0, "fisher": "sign"})])
def test_a_killed_fit_goes_on_to_the_same_bits(tmp_path, share, options):
    whole, forwards = fit(tmp_path / "whole", **options)
    path = tmp_path / "killed"
    folders = [str(ROOT), str(ROOT / "adapters")]
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), str(int(share * forwards)), repr(options)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert path.exists()
    again, left = fit(path, **options)
    assert left < 0.75 * forwards
    assert repr(again) == repr(whole)
    assert again.exact_traces == whole.exact_traces
    for name, A in whole.blocks.items():
        for key in ("out_vectors", "in_vectors", "eigenvalues", "_M", "_d"):
            mine, theirs = getattr(A, key, None), getattr(again.blocks[name], key, None)
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


def test_a_finished_checkpoint_needs_no_pass(tmp_path):
    whole, _ = fit(tmp_path / "file")
    again, forwards = fit(tmp_path / "file")
    assert torch.equal(whole.to_dense(), again.to_dense())
    assert forwards <= 4  # the probe


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = tmp_path / "file"
    fit(path)
    with pytest.raises(ValueError, match="another model, other options"):
        fit(path, fisher="empirical")
    model, x, y = BY_NAME["mlp"].build()
    with pytest.raises(ValueError, match="another model, other options"):
        it.ekfac(model, cross_entropy, (x, y), checkpoint=path)
    model, batches = problem()
    batches[1] = batches[0]
    with pytest.raises(ValueError, match="the data differ"):
        it.ekfac(model, cross_entropy, batches, checkpoint=path, checkpoint_every=1)


def test_a_checkpoint_of_more_batches_is_refused(tmp_path):
    """All that is left is done already: nothing else would show that the data are others."""
    fit(tmp_path / "file")
    model, batches = problem()
    with pytest.raises(ValueError, match="the data differ"):
        it.ekfac(
            model, cross_entropy, batches[:3], checkpoint=tmp_path / "file", checkpoint_every=1
        )


def test_a_checkpoint_of_fewer_batches_is_refused(tmp_path):
    """What is new would be in the second moments alone."""
    model, batches = problem()
    options = {"checkpoint": tmp_path / "file", "checkpoint_every": 1}
    it.ekfac(model, cross_entropy, batches[:3], **options)
    with pytest.raises(ValueError, match="the data differ"):
        it.ekfac(model, cross_entropy, batches, **options)


def test_a_checkpoint_of_another_loss_is_refused(tmp_path):
    model, batches = problem()
    smooth = torch.nn.CrossEntropyLoss(label_smoothing=0.3)
    it.ekfac(model, smooth, batches, fisher="empirical", checkpoint=tmp_path / "file")
    for loss in (torch.nn.CrossEntropyLoss(label_smoothing=0.1), cross_entropy):
        with pytest.raises(ValueError, match="another model, other options"):
            it.ekfac(model, loss, batches, fisher="empirical", checkpoint=tmp_path / "file")


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "file"
    fit(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="checkpoint file is damaged"):
        fit(path)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_products_of_a_resumed_fit_have_the_same_bits(tmp_path, fisher):
    """A file's tensors lie anywhere in memory, and products round by where they lie."""
    torch.manual_seed(2)
    layers = [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)]
    model = nn.Sequential(*layers).double()
    x, y = torch.randn(30, 2, 4, 4, dtype=torch.float64), torch.randint(3, (30,))
    batches = list(zip(x.split(4), y.split(4), strict=True))
    whole = it.ekfac(model, cross_entropy, batches, fisher=fisher, cache=False)
    options = {"fisher": fisher, "checkpoint": tmp_path / "file", "checkpoint_every": 2}
    for _ in range(2):
        K = it.ekfac(model, cross_entropy, batches, cache=False, **options)
        eye = torch.eye(K.shape[0], dtype=torch.float64)
        assert torch.equal(K @ eye, whole @ eye)


def test_a_resumed_state_is_aligned_as_any_other_tensor(tmp_path):
    names = {f"U:{'x' * i}": torch.ones(i + 1) for i in range(4)}
    saved = checkpoint_at(tmp_path / "file", 1, 0)
    assert saved is not None
    saved.save(names, {"stage": 0})
    found = saved.load(torch.device("cpu"), 0)
    assert found is not None
    assert all(t.data_ptr() % 64 == 0 for t in found[0].values())


def test_other_data_after_a_kill_between_passes_are_refused(tmp_path, monkeypatch):
    """Eigenvectors of some data and moments of others would be of neither."""

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "_read_moments", killed)
        with pytest.raises(Killed):
            fit(tmp_path / "file")
    model, batches = problem()
    batches[1] = batches[0]
    shutil.copy(tmp_path / "file", tmp_path / "other")
    with pytest.raises(ValueError, match="the data differ"):
        it.ekfac(model, cross_entropy, batches, checkpoint=tmp_path / "other", checkpoint_every=1)
    whole, _ = fit(tmp_path / "whole")
    again, _ = fit(tmp_path / "file")
    assert torch.equal(whole.to_dense(), again.to_dense())


def test_a_checkpoint_is_replaced_in_one_step(tmp_path, monkeypatch):
    """A kill between writing and renaming leaves the old file, whole."""
    path = tmp_path / "file"
    fit(path)
    before = path.read_bytes()
    (tmp_path / "file2").write_bytes(before)

    def killed(*_):
        raise KeyboardInterrupt

    path.unlink()
    count = []
    replace = Path.replace

    def sometimes(self, target):
        count.append(1)
        return killed() if len(count) > 3 else replace(self, target)

    monkeypatch.setattr(Path, "replace", sometimes)
    with pytest.raises(KeyboardInterrupt):
        fit(path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "file2"]
    fit(path)
    assert path.read_bytes() == before
