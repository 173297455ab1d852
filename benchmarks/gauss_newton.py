"""Solves with the empirical Fisher matrix of a network: kept factors against recomputed gradients.

pyDVL, whose name for the matrix is Gauss–Newton, runs in an interpreter of its own: set
INVHVP_PYDVL_PYTHON to one that has it (and torch); otherwise its row says why it is missing.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import invhvp as ih

from . import report


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network on the digits: widths of its layers, samples, right-hand sides, λ."""

    widths: tuple[int, ...] = (64, 512, 512, 10)
    n_train: int = 1437
    k: int = 16
    damping: float = 1e-2
    steps: int = 60


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is run; `max_seconds` and `maxiter` limit those that recompute gradients."""

    cases: tuple[Case, ...]
    max_seconds: float = 120.0
    maxiter: int = 50
    rtol: float = 1e-4


FULL = Grid(cases=(Case(), Case(damping=1e-3)))
QUICK = Grid(cases=(Case(widths=(64, 16, 10), n_train=200, k=4),), max_seconds=5.0, maxiter=10)


class Problem:
    """A trained float32 network, its data, and the matrix in float64 to judge by."""

    def __init__(self, case: Case) -> None:
        import torch
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images / 16, dtype=torch.float32)
        y = torch.tensor(labels)
        n, k = case.n_train, case.k
        self.case = case
        self.loss = torch.nn.functional.cross_entropy
        self.train = (x[:n], y[:n])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = _network(case.widths)
        optimiser = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        for _ in range(case.steps):
            optimiser.zero_grad()
            self.loss(self.model(self.train[0]), self.train[1]).backward()
            optimiser.step()
        optimiser.zero_grad()
        # The hardest ones: where a model is sure, a float32 gradient has few digits.
        with torch.no_grad():
            losses = self.loss(self.model(x[n:]), y[n:], reduction="none")
        hard = n + torch.argsort(losses, descending=True)[:k]
        self.test = (x[hard], y[hard])
        self.p = sum(q.numel() for q in self.model.parameters())

    def judge(self) -> Callable[[Any], float]:
        """The largest true relative residual of a solution, from gradients in float64."""
        import copy

        import torch

        import invhvp_torch as it

        model = copy.deepcopy(self.model).double()
        F = it.empirical_fisher(model, self.loss, _double(self.train))
        B = it.per_sample_gradients(model, self.loss, *_double(self.test)).to_dense().T

        def residual(X: Any) -> float:
            X = torch.as_tensor(X).double()
            R = B - F @ X - self.case.damping * X
            return float((R.norm(dim=0) / B.norm(dim=0)).max())

        return residual


def rows(grid: Grid) -> Iterator[dict[str, Any]]:
    """One row for each case and contender."""
    for case in grid.cases:
        problem = Problem(case)
        judge = problem.judge()
        size = f"p = {problem.p}, N = {case.n_train}, {case.k} right-hand sides"
        for label, run in CONTENDERS.items():
            started = time.perf_counter()
            X, said, own = run(problem, grid)
            seconds = time.perf_counter() - started if own is None else own
            yield {
                "case": f"digits MLP, {size}, float32",
                "damping": case.damping,
                "method": label,
                "seconds": None if X is None else seconds,
                "true_residual": None if X is None else judge(X),
                "said": said,
            }


Run = tuple[Any, str, float | None]
"""The solution, what is said of it, and the seconds where they are not those of the call."""


def sample_space(problem: Problem, grid: Grid) -> Run:
    """Gradients once, as outer products; one Gram matrix, one factorisation."""
    return _ours(problem, ih.SampleSpace(rtol=grid.rtol))


def block_cg(problem: Problem, grid: Grid) -> Run:
    """Gradients once; products are a few GEMMs."""
    return _ours(problem, ih.BlockCG(rtol=grid.rtol, max_seconds=grid.max_seconds))


def _ours(problem: Problem, method: Any) -> Run:
    import invhvp_torch as it

    F = it.empirical_fisher(problem.model, problem.loss, problem.train)
    G = it.per_sample_gradients(problem.model, problem.loss, *problem.test)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ih.ConvergenceWarning)
        solution = ih.solve(F, G, method, damping=problem.case.damping)
    said = f"{report.said(solution)}, {solution.iterations} iterations"
    return solution.x, said, None


def recomputed(problem: Problem, grid: Grid) -> Run:
    """Block CG (O'Leary 1980) that computes all per-sample gradients at every product."""
    import torch
    from torch.func import functional_call, grad, vmap

    model, (x, y) = problem.model, problem.train
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: Any, x: Any, y: Any) -> Any:
        return problem.loss(functional_call(model, values, (x[None],)), y[None])

    def gradients(x: Any, y: Any) -> Any:
        found = vmap(grad(loss), in_dims=(None, 0, 0))(values, x, y)
        return torch.cat([found[name].reshape(len(x), -1) for name in values], 1)

    def product(V: Any) -> Any:
        total = problem.case.damping * V
        for i in range(0, len(x), 256):
            G = gradients(x[i : i + 256], y[i : i + 256])
            total = total + G.T @ (G @ V) / len(x)
        return total

    started = time.perf_counter()
    B = gradients(*problem.test).T
    X, R = torch.zeros_like(B), B
    P, rho = R, (R.T @ R).double()
    norms, iterations = B.norm(dim=0), 0
    while iterations < grid.maxiter and time.perf_counter() - started < grid.max_seconds:
        Q = product(P)
        iterations += 1
        alpha = torch.linalg.lstsq((P.T @ Q).double(), rho).solution.to(B.dtype)
        X, R = X + P @ alpha, R - Q @ alpha
        if bool((R.norm(dim=0) <= grid.rtol * norms).all()):
            return X, f"CONVERGED by its own residual, {iterations} iterations", None
        new = (R.T @ R).double()
        P, rho = R + P @ torch.linalg.lstsq(rho, new).solution.to(B.dtype), new
    return X, f"stopped after {iterations} iterations", None


def pydvl(problem: Problem, grid: Grid) -> Run:
    """pyDVL's block CG, in its own interpreter, timed there without imports."""
    import torch

    interpreter = os.environ.get("INVHVP_PYDVL_PYTHON")
    if not interpreter:
        return None, "skipped: INVHVP_PYDVL_PYTHON names no interpreter with pyDVL", None
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "problem.pt"
        out = Path(folder) / "x.npy"
        torch.save(
            {
                "widths": problem.case.widths,
                "state": problem.model.state_dict(),
                "train": problem.train,
                "test": problem.test,
                "damping": problem.case.damping,
                "rtol": grid.rtol,
                "maxiter": grid.maxiter,
                "threads": torch.get_num_threads(),
            },
            where,
        )
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        try:
            done = subprocess.run(
                [interpreter, "-c", _PYDVL, str(where), str(out)],
                capture_output=True,
                text=True,
                timeout=20 * grid.max_seconds,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None, "over twenty times the cap", None
        if done.returncode:
            return None, f"skipped: {done.stderr.strip().splitlines()[-1]}", None
        version, seconds = done.stdout.strip().splitlines()[-1].split()
        return np.load(out), f"pyDVL {version}, at most {grid.maxiter} iterations", float(seconds)


CONTENDERS: dict[str, Callable[[Problem, Grid], Run]] = {
    "SampleSpace, factors kept": sample_space,
    "BlockCG, factors kept": block_cg,
    "block CG, gradients at every product": recomputed,
    "pyDVL block CG": pydvl,
}

_PYDVL = """
import sys, time
import numpy as np, torch
from torch.utils.data import DataLoader, TensorDataset
import pydvl
from pydvl.influence.torch import CgInfluence, SecondOrderMode
given = torch.load(sys.argv[1])
torch.set_num_threads(given["threads"])
layers, widths = [], given["widths"]
for i, o in zip(widths, widths[1:]):
    layers += [torch.nn.Linear(i, o), torch.nn.Tanh()]
model = torch.nn.Sequential(*layers[:-1])
model.load_state_dict(given["state"])
started = time.perf_counter()
influence = CgInfluence(
    model, torch.nn.functional.cross_entropy, regularization=given["damping"],
    rtol=given["rtol"], maxiter=given["maxiter"], solve_simultaneously=True,
    second_order_mode=SecondOrderMode.GAUSS_NEWTON,
)
influence = influence.fit(DataLoader(TensorDataset(*given["train"]), batch_size=256))
X = influence.influence_factors(*given["test"])
seconds = time.perf_counter() - started
np.save(sys.argv[2], X.detach().numpy().T)
print(pydvl.__version__, seconds)
"""


def markdown(found: list[dict[str, Any]]) -> str:
    """A table for each case."""
    parts = [_LEGEND]
    for (case, damping), group in report.grouped(found, "case", "damping"):
        fastest = min(row["seconds"] for row in group if row["seconds"] is not None)
        lines = [
            [
                row["method"],
                "–" if row["seconds"] is None else f"{row['seconds']:.2f}",
                "–" if row["seconds"] is None else f"{row['seconds'] / fastest:.1f}",
                report.number(row["true_residual"]),
                row["said"],
            ]
            for row in group
        ]
        head = ["method", "seconds", "÷ fastest", "true relative residual", "says of itself"]
        parts += [f"## {case}, λ = {damping:.0e}", report.table(head, lines)]
    return "\n\n".join(parts)


_LEGEND = """\
# The empirical Fisher matrix, inverted

Seconds are those of everything: gradients, preparation, solutions with their certificates. The
residual is the largest of all right-hand sides, recomputed in float64 with gradients in float64.
pyDVL 0.10 solves with another matrix where several right-hand sides are passed at once; with one
its residual is small."""


def _network(widths: tuple[int, ...]) -> Any:
    import torch

    layers: list[Any] = []
    for i, o in itertools.pairwise(widths):
        layers += [torch.nn.Linear(i, o), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1])


def _double(data: tuple[Any, Any]) -> tuple[Any, Any]:
    return data[0].double(), data[1]


if __name__ == "__main__":
    sys.exit("run it as: python -m benchmarks gauss-newton")
