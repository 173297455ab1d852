"""Solves and scores with the empirical Fisher matrix of a network: kept factors against pyDVL.

pyDVL, whose name for the matrix is Gauss–Newton, runs in an interpreter of its own, which
INVHVP_PYDVL_PYTHON names or the full run makes; otherwise its rows say why they are missing.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import invhvp as ih

from . import report
from .contenders import CONTENDERS, Run


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
    """What is run; `max_seconds` and `maxiter` limit those that recompute gradients.

    What takes less than a tenth of the limit is run `repeats` times, and the median is shown.
    """

    cases: tuple[Case, ...]
    repeats: int = 5
    max_seconds: float = 120.0
    maxiter: int = 50
    rtol: float = 1e-4


PEER = "pyDVL"  # in an interpreter of its own
FULL = Grid(cases=(Case(), Case(damping=1e-3)))
QUICK = Grid(
    cases=(Case(widths=(64, 16, 10), n_train=200, k=4),), repeats=1, max_seconds=5.0, maxiter=10
)


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
        self.theirs: dict[str, dict[str, Any]] = {}  # what pyDVL found, once for all rows
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

    def judge(self) -> Judge:
        """What solutions and scores are judged by, in float64."""
        import copy

        import invhvp_torch as it

        model = copy.deepcopy(self.model).double()
        F = it.empirical_fisher(model, self.loss, _double(self.train))
        test = it.per_sample_gradients(model, self.loss, *_double(self.test))
        return Judge(F, test, self.case.damping)


class Judge:
    """The system in float64, with gradients in float64, and its exact scores."""

    def __init__(self, F: Any, test: Any, damping: float) -> None:
        self._F, self._damping = F, damping
        self._B = test.to_dense().T
        inverse = ih.SampleSpace().prepare(F, damping=damping)
        self._scores = ih.Influence(inverse, F.gradients).scores(test)

    def residual(self, X: Any) -> float:
        """The largest true relative residual."""
        import torch

        X = torch.as_tensor(X).double()
        R = self._B - self._F @ X - self._damping * X
        return float((R.norm(dim=0) / self._B.norm(dim=0)).max())

    def scores_error(self, scores: Any) -> float:
        """The error of the scores over the size of the exact ones."""
        import torch

        S = torch.as_tensor(scores).double()
        return float((S - self._scores).norm() / self._scores.norm())


def rows(grid: Grid) -> Iterator[dict[str, Any]]:
    """One row for each case and contender."""
    for case in grid.cases:
        problem = Problem(case)
        judge = problem.judge()
        size = f"p = {problem.p}, N = {case.n_train}, {case.k} right-hand sides"
        for label, contender in CONTENDERS.items():
            run = _median(contender, problem, grid)
            yield {
                "case": f"digits MLP, {size}, float32",
                "damping": case.damping,
                "method": label,
                "seconds": run.seconds(),
                "processor_seconds": run.seconds(clock=1),
                "fit_seconds": run.seconds("fit"),
                "solve_seconds": run.seconds("solve"),
                "true_residual": None if run.x is None else judge.residual(run.x),
                "scores_error": None if run.scores is None else judge.scores_error(run.scores),
                "said": run.said,
            }


def _median(contender: Callable[..., Run], problem: Problem, grid: Grid) -> Run:
    runs = [contender(problem, grid)]
    if (runs[0].seconds() or 0.0) < grid.max_seconds / 10:
        runs += [contender(problem, grid) for _ in range(grid.repeats - 1)]
    for name in runs[0].clocks:
        both = zip(*(run.clocks[name] for run in runs), strict=True)
        runs[0].clocks[name] = [statistics.median(values) for values in both]
    return runs[0]


def markdown(found: list[dict[str, Any]]) -> str:
    """A table for each case."""
    parts = [_LEGEND]
    head = ["method", "seconds", "fit", "solve", "processor", "÷ fastest"]
    head += ["true relative residual", "error of scores", "says of itself"]
    for (case, damping), group in report.grouped(found, "case", "damping"):
        fastest = min(row["seconds"] for row in group if row["seconds"] is not None)
        lines = []
        for row in group:
            names = ("seconds", "fit_seconds", "solve_seconds", "processor_seconds")
            times = ["–" if row[name] is None else f"{row[name]:.2f}" for name in names]
            ratio = "–" if row["seconds"] is None else f"{row['seconds'] / fastest:.1f}"
            errors = [report.number(row[name]) for name in ("true_residual", "scores_error")]
            lines.append([row["method"], *times, ratio, *errors, row["said"]])
        parts += [f"## {case}, λ = {damping:.0e}", report.table(head, lines)]
    return "\n\n".join(parts)


def paragraph(found: list[dict[str, Any]]) -> str:
    """For the README: solutions and scores beside pyDVL's, at the first damping."""
    (_, group), *_ = report.grouped(found, "damping")
    rows = {row["method"]: row for row in group}

    def clock(name: str) -> str:
        return f"{rows[name]['processor_seconds']:.2g} s"

    own, other = rows["SampleSpace, factors kept"], rows["pyDVL block CG"]
    if other["seconds"] is None:
        raise ValueError(f"there is no row of pyDVL to compare with: {other['said']}")
    return (
        f"On a {own['case']} (one thread, λ = {own['damping']:g}, processor seconds from the model "
        f"on) all solutions with their certificates took {clock('SampleSpace, factors kept')}, to "
        f"a true residual of {own['true_residual']:.0e}; pyDVL's block CG took "
        f"{clock('pyDVL block CG')} and ended at {other['true_residual']:.2g}: with several "
        "right-hand sides at once it solves with another matrix. Scores with all training samples "
        f"took {clock('scores, SampleSpace')}, against {clock('scores, pyDVL block CG')}"
    )


_LEGEND = """\
# The empirical Fisher matrix, inverted

Seconds are those of everything: "fit" the gradients of the training samples and what is prepared
of them, "solve" the gradients of the test samples and their solutions with certificates, or their
scores with all training samples; "processor" is the time of the process, which others on the
machine disturb less. The residual is the largest of all right-hand sides, recomputed in float64
with gradients in float64; the error of the scores is relative to the exact ones, as a whole. A
harmonic mean of inverses is another matrix: neither its residual nor its error can be small.
pyDVL 0.10 solves with another matrix where several right-hand sides are passed at once; with one
its residual is small. Its scores cost its solutions and one pass more."""


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
