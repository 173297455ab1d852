"""Ten dampings at once against one: `solve_path` over λ from 1 down to the case's own.

Both solve with the same kept Hessian, in turns; the single solve is `BlockCG` at the smallest λ,
which is the hardest. What the other nine cost is the ratio. Residuals of all λ are recomputed
in float64.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import invhvp as ih

from . import peers, report
from .peers import options as options
from .peers import varied as varied


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is run: both to `rtol`, in `rounds` unless they take longer than `max_seconds`."""

    cases: tuple[peers.Case, ...]
    dampings: int = 10
    rtol: float = 1e-5
    rounds: int = 5
    max_seconds: float = 60.0


FULL = Grid(cases=tuple(c for c in peers.FULL.cases if c.network in ("logreg", "mlp", "cnn")))
QUICK = Grid(cases=peers.QUICK.cases, dampings=3, rounds=1)


def rows(grid: Grid) -> Iterator[dict[str, Any]]:
    """One row for each Hessian."""
    for case in grid.cases:
        if case.matrix == "hessian":
            yield _case(case, grid)


def _case(case: peers.Case, grid: Grid) -> dict[str, Any]:
    from .peers import judge
    from .peers.networks import Problem

    given = judge.problem(case)
    problem, wide = Problem(given), judge.wide(given)
    A, exact = (judge.curvature(p, case.matrix) for p in (problem, wide))
    B, truth = problem.gradients().T, wide.gradients().T
    dampings = [float(value) for value in np.geomspace(1.0, case.damping, grid.dampings)]
    contenders = {
        "path": lambda: ih.solve_path(A, B, dampings=dampings, rtol=grid.rtol),
        "one": lambda: ih.solve(A, B, ih.BlockCG(rtol=grid.rtol), damping=dampings[-1]),
    }
    A @ B  # what is kept for a block of this size
    seconds, last = _in_turns(contenders, grid)
    path, one = last["path"], last["one"]
    said = dict.fromkeys(report.said(solution) for solution in path)
    return {
        "case": judge.described(given),
        "matrix": case.matrix,
        "damping": case.damping,
        "dampings": dampings,
        "path_seconds": seconds["path"],
        "one_seconds": seconds["one"],
        "ratio": seconds["path"] / seconds["one"],
        "path_passes": path.passes,
        "one_passes": one.passes,
        "path_products": path.products,
        "one_products": one.products,
        "path_residual": max(
            judge.residual(exact, truth, solution.x, damping)
            for solution, damping in zip(path, dampings, strict=True)
        ),
        "one_residual": judge.residual(exact, truth, one.x, dampings[-1]),
        "said": ", ".join(said),
    }


def _in_turns(
    contenders: dict[str, Callable[[], Any]], grid: Grid
) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of the processor of each, and its last answer."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    last: dict[str, Any] = {}
    for _ in range(grid.rounds):
        for name, run in contenders.items():
            started = time.process_time()
            last[name] = run()
            seconds[name].append(time.process_time() - started)
        if sum(map(sum, seconds.values())) > grid.max_seconds:
            break
    return {name: statistics.median(values) for name, values in seconds.items()}, last


def markdown(found: list[dict[str, Any]]) -> str:
    """A line for each case."""
    head = ["Hessian", "λ", "all, s", "one, s", "ratio", "passes", "products"]
    head += ["worst true residual", "of the one", "says of itself"]
    lines = [
        [
            row["case"],
            f"{len(row['dampings'])} from 1 to {row['damping']:.0e}",
            f"{row['path_seconds']:.2g}",
            f"{row['one_seconds']:.2g}",
            f"{row['ratio']:.2f}",
            f"{row['path_passes']} / {row['one_passes']}",
            f"{row['path_products']} / {row['one_products']}",
            report.number(row["path_residual"]),
            report.number(row["one_residual"]),
            row["said"],
        ]
        for row in found
    ]
    return "\n\n".join([_LEGEND, report.table(head, lines)])


def sentence(found: list[dict[str, Any]]) -> str:
    """For the README: what all λ took, as a multiple of the smallest alone."""
    (many,) = {len(row["dampings"]) for row in found}
    ratios = sorted(row["ratio"] for row in found)
    span = " to ".join(dict.fromkeys(f"{ratio:.2g}" for ratio in (ratios[0], ratios[-1])))
    return f"{many} λ took {span} times as long as the smallest one alone"


_LEGEND = """\
# Many dampings from one Krylov space

`solve_path` over all λ against `BlockCG` at the smallest one; seconds are medians of those of the
processor, in turns. Passes and products are of all λ / of the one; the residual is the largest
relative one of all λ and right-hand sides, recomputed in float64."""


if __name__ == "__main__":
    sys.exit("run it as: python -m benchmarks damping-path")
