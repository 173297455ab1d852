"""Scores of a whole collection: time, memory and error, against pyDVL's sequential calculator.

Every contender runs in a process of its own. pyDVL has an interpreter of its own, which
INVHVP_PYDVL_PYTHON names or the full run makes; otherwise its rows say why they are missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import invhvp as ih

from . import report

_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network on random points labelled by another network; sizes, batches and λ."""

    widths: tuple[int, ...] = (64, 256, 128, 10)
    n_train: int = 4000
    n_test: int = 200
    train_batch: int = 1000
    test_batch: int = 100
    damping: float = 1e-2
    steps: int = 100


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is run; a contender ends after `max_seconds`."""

    cases: tuple[Case, ...]
    max_seconds: float = 900.0
    maxiter: int = 50
    rtol: float = 1e-4
    rank: int = 100


PEER = "pyDVL"  # in an interpreter of its own
FULL = Grid(cases=(Case(),))
QUICK = Grid(
    cases=(Case(widths=(64, 16, 10), n_train=200, n_test=20, train_batch=50, test_batch=10),),
    max_seconds=60.0,
    maxiter=10,
    rank=10,
)

LABELS = {
    "write SampleSpace": "Influence.write, SampleSpace",
    "write BlockCG": "Influence.write, BlockCG",
    "sequential cg": "SequentialInfluenceCalculator, CG",
    "sequential sketch": "SequentialInfluenceCalculator, Nyström",
    "pydvl cg": "pyDVL, SequentialInfluenceCalculator, CG",
    "pydvl sketch": "pyDVL, SequentialInfluenceCalculator, Nyström",
}


def rows(grid: Grid) -> Iterator[dict[str, Any]]:
    """One row for each case and contender."""
    for case in grid.cases:
        given, exact, p = _problem(case, grid)
        sizes = f"{case.n_test} test × {case.n_train} training samples"
        for name, label in LABELS.items():
            found, scores = _run(name, given, grid.max_seconds)
            yield {
                "case": f"MLP, p = {p}, {sizes}, float32",
                "damping": case.damping,
                "method": label,
                "seconds": _sum(found),
                "fit_seconds": found.get("fit_seconds"),
                "score_seconds": found.get("score_seconds"),
                "memory": found.get("memory"),
                "error": None if scores is None else _error(scores, exact),
                "said": found.get("version", found.get("said")),
            }


def _problem(case: Case, grid: Grid) -> tuple[dict[str, Any], np.ndarray, int]:
    """What the contenders get, and the exact scores from float64 gradients."""
    import torch

    import invhvp_torch as it

    from .collection_worker import LOSS, _network

    n = case.n_train + case.n_test
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher, model = (_network(list(case.widths)) for _ in range(2))
        x = torch.randn(n, case.widths[0])
        y = (3 * teacher(x) + 0.5 * torch.randn(n, case.widths[-1])).argmax(dim=1)
    train = (x[: case.n_train], y[: case.n_train])
    test = (x[case.n_train :], y[case.n_train :])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(case.steps):
        optimiser.zero_grad()
        LOSS(model(train[0]), train[1]).backward()
        optimiser.step()
    given = {
        "widths": list(case.widths),
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "train": train,
        "test": test,
        "train_batch": case.train_batch,
        "test_batch": case.test_batch,
        "damping": case.damping,
        "rtol": grid.rtol,
        "maxiter": grid.maxiter,
        "rank": grid.rank,
    }
    model = model.double()
    F = it.empirical_fisher(model, LOSS, (train[0].double(), train[1]))
    inverse = ih.SampleSpace().prepare(F, damping=case.damping)
    G = it.per_sample_gradients(model, LOSS, test[0].double(), test[1])
    scores = ih.Influence(inverse, F.gradients).scores(G)
    return given, scores.numpy(), F.shape[0]


def _run(
    name: str, given: dict[str, Any], max_seconds: float
) -> tuple[dict[str, Any], np.ndarray | None]:
    """What a contender found, and its scores; or what it says of itself, and None."""
    import torch

    python = os.environ.get("INVHVP_PYDVL_PYTHON") if name.startswith("pydvl") else sys.executable
    if not python:
        return {"said": "skipped: INVHVP_PYDVL_PYTHON names no interpreter with pyDVL"}, None
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not name.startswith("pydvl"):
        environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), str(_ROOT / "adapters")])
    with tempfile.TemporaryDirectory() as folder:
        torch.save(given, Path(folder) / "given.pt")
        worker = [python, str(Path(__file__).with_name("collection_worker.py")), name, folder]
        try:
            done = subprocess.run(
                worker, env=environment, timeout=max_seconds, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"said": f"not done after {max_seconds:.0f} s"}, None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"said": f"failed: {last[:200]}"}, None
        found = json.loads((Path(folder) / "found.json").read_text())
        return found, np.load(Path(folder) / "scores.npy")


def _error(scores: np.ndarray, exact: np.ndarray) -> float:
    if scores.shape != exact.shape:
        return float("nan")
    return float(np.linalg.norm(scores - exact) / np.linalg.norm(exact))


def _sum(found: dict[str, Any]) -> float | None:
    return found["fit_seconds"] + found["score_seconds"] if "fit_seconds" in found else None


def markdown(found: list[dict[str, Any]]) -> str:
    """A table for each case."""
    parts = [_LEGEND]
    head = ["method", "seconds", "fit", "scores", "÷ fastest", "memory [MiB]", "error", "says"]
    for (case, damping), group in report.grouped(found, "case", "damping"):
        known = [row["seconds"] for row in group if row["seconds"] is not None]
        lines = []
        for row in group:
            names = ("seconds", "fit_seconds", "score_seconds")
            times = ["–" if row[name] is None else f"{row[name]:.2f}" for name in names]
            ratio = "–" if row["seconds"] is None else f"{row['seconds'] / min(known):.1f}"
            memory = "–" if row["memory"] is None else f"{row['memory'] / 2**20:,.0f}"
            lines.append(
                [row["method"], *times, ratio, memory, report.number(row["error"]), row["said"]]
            )
        parts += [f"## {case}, λ = {damping:.0e}", report.table(head, lines)]
    return "\n\n".join(parts)


_LEGEND = """\
# Scores of a collection

All training against all test samples with the empirical Fisher matrix, which pyDVL calls
Gauss–Newton. Seconds are those of "fit" and of the scores in memory (`Influence.write`: written to
disk and read back); memory is the peak of the process less what it had after its imports. The
error is that of all scores relative to the exact ones from float64 gradients; a sketch of low rank
is another matrix, so that its error cannot be small. pyDVL's calculator solves again for each
batch of training samples."""


if __name__ == "__main__":
    sys.exit("run it as: python -m benchmarks collection")
