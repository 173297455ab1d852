"""Operators over the shards of two or three gloo processes equal those over all the data."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn

import invhvp as ih
import invhvp_torch as it
from invhvp_torch.checkpoint import Checkpoint

ENDS = {2: (0, 9, 30), 3: (0, 17, 18, 30)}  # uneven, one of them with a single sample
LOSS = nn.functional.cross_entropy
DAMPING = 0.1
METHODS = {
    "CG": ih.CG(rtol=1e-10),
    "BlockCG": ih.BlockCG(rtol=1e-10),
    "BlockCG with a sketch": ih.BlockCG(
        rtol=1e-10, preconditioner=ih.NystroemPreconditioner(rank=8)
    ),
    "LiSSA": ih.LiSSA(rtol=1e-2, batch=6),
    "Nyström": ih.NystroemSketch(rank=12),
    "Arnoldi": ih.Arnoldi(rank=6),
    "SampleSpace": ih.SampleSpace(),
    "InverseHarmonicMean": ih.InverseHarmonicMean(),
}


def _problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for q in model.parameters():
            q.copy_(torch.randn(q.shape, generator=generator, dtype=torch.float64) / 2)
    x = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    return model, x, torch.randint(3, (30,), generator=generator)


def _computed(data: Any, distributed: Any) -> dict[str, Any]:
    """Everything that is compared, of one process or of several."""
    model, x, y = _problem()
    build = functools.partial(_build, model, data, distributed)
    V = torch.linspace(-1, 1, it.to_array(model).shape[0] * 3).double().reshape(-1, 3)
    found: dict[str, Any] = {}
    operators = {
        "hessian": build(it.hessian),
        "empirical": build(it.empirical_fisher),
        "gauss-newton": build(it.gauss_newton),
        "streamed": build(it.gauss_newton, memory=3000.0),
        "through": build(it.gauss_newton, memory=0.0),
        "fisher": build(it.fisher),
    }
    for name, A in operators.items():
        found[f"{name} @ V"] = A @ V
        found[f"{name} psd"] = A.psd
    found["subset"] = operators["hessian"].subset(np.array([0, 3, 17, 28])) @ V
    B = it.per_sample_gradients(model, LOSS, x[:4], y[:4]).to_dense().T
    for name, method in METHODS.items():
        A = operators["empirical" if name in ("SampleSpace", "InverseHarmonicMean") else "hessian"]
        damping = 3.0 if A is operators["hessian"] else DAMPING
        solution = ih.solve(A, B, method, damping=damping)
        found[name] = solution.x
        found[f"{name} status"] = [status.name for status in solution.status]
        found[f"{name} iterations"] = solution.iterations
    G = it.per_sample_gradients(model, LOSS, data, distributed=distributed)
    found["gradients"] = G.to_dense()
    inverse = ih.SampleSpace().prepare(operators["empirical"], damping=DAMPING)
    found["scores"] = ih.Influence(inverse, G).scores(G[:4])
    for fisher in ("exact", "empirical"):
        K = build(it.ekfac, fisher=fisher)
        found[f"EKFAC {fisher}"] = ih.Direct().prepare(K, damping=DAMPING) @ B
    found["KFAC"] = ih.Direct().prepare(build(it.kfac), damping=DAMPING) @ B
    in_numpy = build(it.hessian, array_namespace=np)
    found["numpy"] = torch.from_numpy(np.ascontiguousarray(in_numpy @ V.numpy()))
    return found


def _build(model: nn.Module, data: Any, distributed: Any, kind: Any, **options: Any) -> Any:
    return kind(model, LOSS, data, distributed=distributed, **options)


def _work(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    _, x, y = _problem()
    mine = slice(ENDS[size][rank], ENDS[size][rank + 1])
    found = _computed((x[mine], y[mine]), True)
    found["errors"] = _errors(rank, (x[mine], y[mine]))
    found["other models"] = _other_models(rank, (x[mine], y[mine]))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _other_models(rank: int, data: Any) -> list[str]:
    """Each process has its own model: nothing that is returned would be of any of them."""
    model, _, _ = _problem()
    with torch.no_grad():
        model[0].bias[2] += 1e-3 * rank  # pyright: ignore
    said = []
    for kind in (it.hessian, it.empirical_fisher, it.ekfac, it.per_sample_gradients):
        try:
            kind(model, LOSS, data, distributed=True)
        except ValueError as error:
            said.append(str(error))
    return said


def _errors(rank: int, data: Any) -> list[str]:
    """One process alone has bad data: each raises, and none hangs."""
    model, _, _ = _problem()
    x, y = data
    broken = (x, y.double() if rank == 0 else y)
    said = []
    for kind in (it.hessian, it.empirical_fisher, it.ekfac):
        try:
            kind(model, LOSS, broken, distributed=True)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


@functools.cache
def _alone() -> dict[str, Any]:
    _, x, y = _problem()
    return _computed((x, y), None)


@pytest.fixture(scope="module", params=[2, 3])
def shared(request: pytest.FixtureRequest, tmp_path_factory: Any) -> list[dict[str, Any]]:
    size = request.param
    folder: Path = tmp_path_factory.mktemp("gloo")
    multiprocessing.spawn(_work, args=(size, str(folder)), nprocs=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


COMPARED = (
    "hessian @ V",
    "empirical @ V",
    "gauss-newton @ V",
    "streamed @ V",
    "through @ V",
    "fisher @ V",
    "subset",
    *METHODS,
    "gradients",
    "scores",
    "EKFAC exact",
    "EKFAC empirical",
    "KFAC",
    "numpy",
)


@pytest.mark.filterwarnings("ignore::invhvp.ConvergenceWarning")
@pytest.mark.parametrize("name", COMPARED)
def test_equal_to_one_process_to_rounding(shared: list[dict[str, Any]], name: str) -> None:
    expected = _alone()[name]
    tolerance = 1e-7 if name in ("LiSSA", "CG", "BlockCG", "BlockCG with a sketch") else 1e-9
    for found in shared:
        error = (found[name] - expected).norm() / expected.norm()
        assert error <= tolerance, name
        torch.testing.assert_close(found[name], shared[0][name], rtol=0.0, atol=0.0)


@pytest.mark.filterwarnings("ignore::invhvp.ConvergenceWarning")
def test_verdicts_are_agreed(shared: list[dict[str, Any]]) -> None:
    for name in METHODS:
        for found in shared:
            assert found[f"{name} status"] == _alone()[f"{name} status"]
            assert found[f"{name} iterations"] == shared[0][f"{name} iterations"]


def test_what_is_psd_in_every_process_is(shared: list[dict[str, Any]]) -> None:
    for found in shared:
        assert not found["hessian psd"]
        assert all(found[f"{name} psd"] for name in ("empirical", "gauss-newton", "through"))


def test_one_bad_shard_stops_all_with_a_reason(shared: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(shared):
        assert len(found["errors"]) == 3
        for said in found["errors"]:
            assert ("process 0" in said) == (rank != 0), said


def test_models_that_differ_are_refused(shared: list[dict[str, Any]]) -> None:
    others = ", ".join(map(str, range(1, len(shared))))
    for found in shared:
        assert len(found["other models"]) == 4
        for said in found["other models"]:
            assert f"parameters of process {others} differ" in said


def _fit(rank: int, folder: str, meet: str, path: Path, kill_after: int) -> None:
    """One process of a fit; SIGKILL where it is about to write file `kill_after`, from 1."""
    saved, save = [], Checkpoint.save

    def counted(self: Checkpoint, tensors: Any, said: Any) -> None:
        saved.append(said["stage"])
        if len(saved) == kill_after:
            ahead = Path(f"{path}.0-of-2.stage-{said['stage']}")
            while rank == 1 and path.name == "between" and not ahead.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, tensors, said)

    Checkpoint.save = counted  # in this process alone
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    model, x, y = _problem()
    mine = slice(ENDS[2][rank], ENDS[2][rank + 1])
    batches = list(zip(x[mine].split(4), y[mine].split(4), strict=True))
    K = it.ekfac(model, LOSS, batches, distributed=True, checkpoint=path, checkpoint_every=1)
    torch.save((K.to_dense(), len(saved)), f"{folder}/{path.name}-{rank}.pt")
    dist.destroy_process_group()


def _killed_and_resumed(rank: int, folder: str) -> None:
    """Fits in children of this process, each of which is killed at another moment."""
    torch.set_num_threads(1)
    for path, *kills in KILLS:
        for attempt, kill_after in enumerate((*(kill[rank] for kill in kills), 0)):
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):  # of a process whose peer was killed
                    meet = f"{folder}/meet-{path}-{attempt}"
                    _fit(rank, folder, meet, Path(folder) / path, kill_after)
                    os._exit(0)
                os._exit(1)
            _, status = os.waitpid(child, 0)
            if kill_after:
                assert os.WIFSIGNALED(status)
                assert os.WTERMSIG(status) == signal.SIGKILL
            ended = Path(folder) / f"ended-{path}-{attempt}-{rank}"
            ended.touch()
            while not ended.with_name(f"ended-{path}-{attempt}-{1 - rank}").exists():
                time.sleep(0.01)


# Process 0 has 3 batches, process 1 has 6: files 1-3 (1-6) are of factors, the next is of their
# eigenvectors, and the rest of moments. Before which file each is killed, attempt by attempt.
KILLS = (
    ("whole",),
    ("early", (3, 2)),
    ("between", (5, 7)),  # 0 has saved the next stage, 1 not yet
    ("twice", (2, 3), (3, 8)),
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")
def test_a_killed_fit_of_several_processes_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    multiprocessing.spawn(_killed_and_resumed, args=(str(tmp_path),), nprocs=2)
    whole, written = torch.load(tmp_path / "whole-0.pt")
    model, x, y = _problem()
    expected = it.ekfac(model, LOSS, (x, y)).to_dense()
    torch.testing.assert_close(whole, expected, rtol=1e-9, atol=1e-12)
    for path, *_ in KILLS:
        for rank in range(2):
            found, left = torch.load(tmp_path / f"{path}-{rank}.pt")
            assert torch.equal(found, whole), path
            if path != "whole" and rank == 0:
                assert left < written, path


def test_the_door_says_what_is_missing() -> None:
    model, x, y = _problem()
    with pytest.raises(RuntimeError, match="init_process_group"):
        it.hessian(model, LOSS, (x, y), distributed=True)
    with pytest.raises(TypeError, match="ProcessGroup, got str"):
        it.hessian(model, LOSS, (x, y), distributed="gloo")  # pyright: ignore
