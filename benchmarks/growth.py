"""How costs grow: each size doubled a few times, the exponent fitted, a plan for a large network.

float32, on PyTorch where a model is needed; no accuracy is at stake here, only time.
"""

from __future__ import annotations

import importlib.util
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import invhvp as ih

from . import report
from .floor import Machine, machine
from .gpu_libraries import Library
from .growth_costs import QUANTITIES, Quantity, Sizes
from .growth_plan import on_paper


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is run: the sizes in the middle, how often each is doubled, from which factor of it."""

    N: int = 512
    width: int = 256
    k: int = 8
    T: int = 8
    doublings: int = 3
    first: float = 0.25  # of the middle
    repeats: int = 3
    gemm: int = 1536
    max_seconds: float = 4.0  # of a point, beyond the run that exceeds it


FULL = Grid()
QUICK = Grid(N=32, width=8, k=4, T=4, doublings=1, repeats=1, gemm=128)


def rows(grid: Grid) -> Iterator[dict[str, Any]]:
    """Every point that was measured, a fit for each quantity and size, and the plan."""
    limits = machine(Library(), (1 << 16, 16), "float32", gemm=grid.gemm, repeats=grid.repeats)
    efficiency: dict[str, float] = {}
    for quantity in QUANTITIES:
        if not _possible(quantity):
            continue
        for axis, expected in quantity.expected.items():
            points = []
            for value, sizes in _series(grid, quantity, axis):
                seconds = _seconds(quantity, sizes, grid)
                least = limits.floor(quantity.words(sizes), quantity.flops(sizes))
                points.append((value, seconds, least))
                yield {
                    "section": "measured", "quantity": quantity.name, "axis": axis, "value": value,
                    "N": sizes.N, "p": sizes.p, "k": sizes.k, "T": sizes.T,
                    "seconds": seconds, "floor_seconds": least, "fraction": least / seconds,
                }  # fmt: skip
            yield _fit(quantity.name, axis, expected, points)
            _, seconds, least = points[-1]
            efficiency[quantity.name] = max(efficiency.get(quantity.name, 0.0), least / seconds)
    yield from _planned(limits, efficiency)


def _possible(quantity: Quantity) -> bool:
    """All but BlockCG need a model of PyTorch."""
    return "BlockCG" in quantity.name or importlib.util.find_spec("torch") is not None


def _series(grid: Grid, quantity: Quantity, axis: str) -> list[tuple[int, Sizes]]:
    """The sizes along one axis: p is doubled by the width, for a block alone it is long."""
    found = []
    for step in range(grid.doublings + 1):
        factor = grid.first * 2**step
        sizes = {"N": grid.N, "k": grid.k, "T": grid.T, "width": grid.width}
        if axis == "p":
            sizes["width"] = max(2, round(grid.width * math.sqrt(factor)))
        else:
            sizes[axis] = max(1, round(sizes[axis] * factor))
        made = Sizes.square(**sizes)
        if "BlockCG" in quantity.name:  # one of the network's blocks is too small to say much
            side = 8 * sizes["width"]
            made = replace(made, layers=(side, side - 1))
        found.append((made.p if axis == "p" else getattr(made, axis), made))
    return found


def _seconds(quantity: Quantity, sizes: Sizes, grid: Grid) -> float:
    """The best of a few runs; the first run warms up where it is short."""
    found: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ih.InvhvpWarning)
        work = quantity.prepare(sizes)
        for _ in range(grid.repeats + 1):
            started = time.perf_counter()
            said = work()
            took = time.perf_counter() - started
            found.append(took if said is None else said)
            if sum(found) > grid.max_seconds:
                break
    return min(found)


def _fit(
    name: str, axis: str, expected: str, points: list[tuple[int, float, float]]
) -> dict[str, Any]:
    """Least squares of log t on log size, and the slope between the two largest."""
    sizes, seconds, least = (np.log(np.asarray(column)) for column in zip(*points, strict=True))
    last = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
    # What the floor and the point before say about the largest, against what was measured.
    predicted = seconds[-2] + least[-1] - least[-2]
    return {
        "section": "fit",
        "quantity": name,
        "axis": axis,
        "expected": expected,
        "exponent": float(np.polyfit(sizes, seconds, 1)[0]),
        "last": float(last),
        "floor_exponent": float(np.polyfit(sizes, least, 1)[0]),
        "predicted_over_measured": float(np.exp(predicted - seconds[-1])),
    }


def _planned(limits: Machine, efficiency: dict[str, float]) -> Iterator[dict[str, Any]]:
    for row in on_paper(limits, efficiency):
        yield {"section": "paper", **row}


# ------------------------------------------------------------------------------------ tables


def markdown(found: list[dict[str, Any]]) -> str:
    """The exponents, the points behind them, the plan."""
    fits = [row for row in found if row["section"] == "fit"]
    lines = [
        [
            row["quantity"],
            row["axis"],
            row["expected"],
            f"{row['floor_exponent']:.2f}",
            f"{row['exponent']:.2f}",
            f"{row['last']:.2f}",
            f"{row['predicted_over_measured']:.2f}",
        ]
        for row in fits
    ]
    head = ["quantity", "in", "in the limit", "of the floor here", "fitted", "last doubling",
            "largest: predicted ÷ measured"]  # fmt: skip
    parts = [_LEGEND, report.table(head, lines)]
    measured = [row for row in found if row["section"] == "measured"]
    lines = [
        [
            quantity,
            axis,
            ", ".join(f"{row['value']:,}" for row in group),
            ", ".join(f"{1e3 * row['seconds']:.3g}" for row in group),
            ", ".join(f"{100 * row['fraction']:.0f}" for row in group),
        ]
        for (quantity, axis), group in report.grouped(measured, "quantity", "axis")
    ]
    head = ["quantity", "size", "values", "ms", "% of the floor"]
    parts += ["## The points", report.table(head, lines)]
    paper = [row for row in found if row["section"] == "paper"]
    if paper:
        lines = [
            [
                row["method"],
                _bytes(row["memory_bytes"]),
                _time(row["seconds"]),
                _time(row["gpu_seconds"]),
                row["note"],
            ]
            for row in paper
        ]
        head = ["method", "memory", "here, one process", "a GPU, on paper", "assumes"]
        parts += [f"## On paper: {paper[0]['assumed']}", _PAPER, report.table(head, lines)]
    return "\n\n".join(parts)


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.0f} PB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    for unit, size in (("s", 120.0), ("min", 120.0), ("h", 72.0), ("d", 730.0)):
        if seconds < size:
            return f"{seconds:.2g} {unit}"
        seconds /= {"s": 60, "min": 60, "h": 24, "d": 365}[unit]
    return f"{seconds:,.0f} y"


_LEGEND = """\
# How costs grow

Each size doubled from a quarter of the middle on, the others fixed; the best of a few runs.
"Fitted" is the slope of log time over log size; below its limit where something that does not grow
weighs (calls, the other sizes). The floor is the flops and words that are needed, at the measured
speed of a matrix product and of a copy. The last column predicts the largest point from the one
before it and the growth of the floor alone: 1 means that the plan below extrapolates rightly."""

_PAPER = """\
Times are the flops and words of the formulas behind the tables above, at this machine's measured
rates and at the largest part of the floor that was measured for that quantity. For the GPU the
rates are those that its maker quotes, at the same part of the floor: nothing was measured on one.
Memory beyond the network itself."""
