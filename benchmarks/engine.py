"""What each method adds to the time of its operator, against the floor of this machine.

An operator notes when each product begins and ends; what lies between two products is the
method's own. Memory and transfers are counted in runs of their own.
"""

from __future__ import annotations

import resource
import statistics
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import invhvp as ih
from invhvp import _backend

from . import report
from .engine_methods import CONTENDERS, Contender, Sizes
from .engine_operators import Case, Clocked, operator
from .floor import Machine, block, libraries, machine
from .gpu_libraries import Library, counted_transfers, timed


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is run; `max_seconds` is the budget of one solve."""

    cases: tuple[Case, ...]
    iterations: int = 6
    repeats: int = 2
    gemm: int = 1536
    libraries: tuple[str, ...] = ("numpy", "torch")
    max_seconds: float = 60.0

    @property
    def limits(self) -> dict[str, Any]:
        """Of an iterative method: it is ended by its iterations, not by its accuracy."""
        return {"rtol": 1e-12, "maxiter": self.iterations, "max_seconds": self.max_seconds}


FULL = Grid(
    cases=(
        Case(kind="dense", n=10_000),
        Case(kind="synthetic", n=1_000_000, rank=32),
        Case(kind="network", n=1_000_000, terms=512, methods=("CG", "BlockCG")),
    ),
)
QUICK = Grid(
    cases=(
        Case(kind="dense", n=400, k=4, rank=16),
        Case(kind="synthetic", n=4096, k=4, terms=8, rank=16),
        Case(kind="network", n=4096, k=4, terms=64, methods=("CG", "BlockCG")),
    ),
    iterations=4,
    repeats=1,
    gemm=128,
)


# ------------------------------------------------------------------------------------- measured


def rows(grid: Grid) -> Iterator[dict[str, Any]]:
    """One row for each case, library and method."""
    for case in grid.cases:
        for library in libraries(grid.libraries):
            A = Clocked(operator(library, case))
            B = block(library, case.n, case.k, "float32", 9)
            limits = machine(
                library, (case.n, case.k), "float32", gemm=grid.gemm, repeats=grid.repeats + 2
            )
            product = timed(library, partial(A.operator._matmat, B), grid.repeats).seconds
            where = {
                "case": f"{case.kind}, n = {case.n:,}, k = {case.k}" + _terms(case),
                "library": library.name,
                "terms": case.terms if case.kind == "network" else None,
                "product_seconds": product,
            }
            for contender in CONTENDERS:
                if not case.methods or contender.name in case.methods:
                    yield {
                        **where,
                        "method": contender.name,
                        "unit": contender.unit,
                        **measure(contender, grid, case, library, A, B, limits),
                    }


def _terms(case: Case) -> str:
    words = {"network": "samples × positions", "synthetic": "rank"}
    return f", {words[case.kind]} = {case.terms}" if case.kind in words else ""


def measure(
    contender: Contender,
    grid: Grid,
    case: Case,
    library: Library,
    A: Clocked,
    B: Any,
    limits: Machine,
) -> dict[str, Any]:
    """Its own seconds a unit, those of the products beside them, memory and transfers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ih.InvhvpWarning)
        work = contender.run(grid.limits, case, A, B)
        own, operators, columns = [], [], 0
        for _ in range(grid.repeats):
            A.marks.clear()
            started = time.perf_counter()
            work()
            seconds = time.perf_counter() - started
            columns = sum(mark.columns for mark in A.marks)
            if contender.unit == "iteration":
                pairs = A.iterations(case.k, grid.iterations - 1)
                own += [after.began - before.ended for before, after in pairs]
                operators += [before.ended - before.began for before, _ in pairs]
            else:
                own.append(seconds - A.seconds)
                operators.append(A.seconds)
            if seconds > 0.05 * grid.max_seconds:
                break
        per_unit = statistics.median(own)
        sizes = Sizes(
            n=case.n, k=case.k, rank=case.rank, columns=columns, side=int(np.sqrt(case.n))
        )
        least = limits.floor(*contender.floor(sizes))
        found = {
            "own_seconds": per_unit,
            "spread": (max(own) - min(own)) / per_unit,
            "operator_seconds": statistics.median(operators),
            "floor_seconds": least,
            "fraction": least / per_unit,
            "overhead": None,
            "columns": columns,
        }
        if found["operator_seconds"] > 0:
            found["overhead"] = per_unit / found["operator_seconds"]
        few = replace(grid, iterations=min(4, grid.iterations))
        # Blocks and transfers do not depend on n: large ones would only take longer.
        less, least_n = replace(case, n=min(case.n, 250_000)), min(case.n, 2500)
        b = block(library, less.n, case.k, "float32", 9)
        small = replace(case, n=least_n, rank=min(case.rank, least_n // 8))
        return found | {
            "temporaries": temporaries(contender, few, less, library, b),
            "transfers": transfers(contender, few, small, library),
        }


def temporaries(
    contender: Contender, grid: Grid, case: Case, library: Library, B: Any
) -> float | None:
    """Memory at the peak beyond what was there before, in blocks (n, k).

    With a diagonal operator, whose product is one block. NumPy reports every allocation; of
    PyTorch only the memory of the process is known, which tells something for large blocks.
    """
    bytes_ = case.n * case.k * _backend.itemsize(B.dtype)
    spread = _backend.from_host(np.geomspace(1.0, 1e-4, case.n), B)
    work = contender.run(grid.limits, case, Clocked(ih.Diagonal(spread, psd=True)), B)
    if library.name == "numpy":
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            work()
            return (tracemalloc.get_traced_memory()[1] - before) / bytes_
        finally:
            tracemalloc.stop()
    if bytes_ < 1 << 23:
        return None
    work()
    before = _resident()
    if before is None:
        return None
    work()
    return max(0, _peak() - before) / bytes_


def _resident() -> int | None:
    """Bytes in memory now, which become the peak so far; None where that cannot be asked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed
        return None
    return _peak()


def _peak() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def transfers(contender: Contender, grid: Grid, case: Case, library: Library) -> float:
    """Planned copies to the host a unit, where the engine is told that it is on a device."""
    A, B = Clocked(operator(library, case)), block(library, case.n, case.k, "float32", 9)
    work = contender.run(grid.limits, case, A, B)
    A.marks.clear()
    with mock.patch.object(_backend, "on_host", _backend.is_numpy), counted_transfers() as counted:
        A.counted = counted
        try:
            work()
        finally:
            A.counted = None
    if contender.unit != "iteration":
        return float(counted.count)
    pairs = A.iterations(case.k, grid.iterations)
    return statistics.median(after.transfers - before.transfers for before, after in pairs)


# ------------------------------------------------------------------------------------ tables


def markdown(found: list[dict[str, Any]]) -> str:
    """A table for each case and library."""
    parts = [_LEGEND]
    for (case, library), group in report.grouped(found, "case", "library"):
        product = group[0]["product_seconds"]
        parts.append(f"## {case}: {library}\n\nOne product of k columns: {_ms(product)} ms.")
        lines = [
            [
                row["method"],
                row["unit"],
                _ms(row["own_seconds"]),
                _ms(row["floor_seconds"]),
                f"{100 * row['fraction']:.0f} %",
                "–" if row["overhead"] is None else f"{100 * row['overhead']:.3g} %",
                "–" if row["temporaries"] is None else f"{row['temporaries']:.1f}",
                f"{row['transfers']:g}",
            ]
            for row in group
        ]
        head = [
            "method", "unit", "own, ms", "floor, ms", "of the floor", "overhead",
            "memory, n·k", "transfers",
        ]  # fmt: skip
        parts.append(report.table(head, lines))
    enough = _enough(found)
    return "\n\n".join([*parts, *enough])


def _enough(found: list[dict[str, Any]]) -> list[str]:
    """From how many samples × positions on a network hides the method."""
    lines = []
    for (library,), group in report.grouped(found, "library"):
        networks = [row for row in group if row["terms"]]
        if not networks:
            continue
        a_term = networks[0]["product_seconds"] / networks[0]["terms"]
        others = [row for row in group if "synthetic" in row["case"] and row["unit"] == "iteration"]
        for row in others:
            least = row["own_seconds"] / (0.05 * a_term)
            lines.append([library, row["method"], f"{least:,.0f}"])
    if not lines:
        return []
    head = ["library", "method", "samples × positions for an overhead of 5 %"]
    return [_ENOUGH, report.table(head, lines)]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


_ENOUGH = """\
## How much work hides a method

A product with a network costs in proportion to samples × positions; here is from how many on an
iteration's own time is at most 5 % of a product, by the measured rate of the network operator."""

_LEGEND = """\
# What the methods add to their operator

float32. "Own" is the median time of a unit without the operator's products: of an iteration,
the preparation, or one application to k columns. The floor counts the words and flops that the
algorithm needs, at the measured speed of a copy between blocks of this size and of a square matrix
product. The overhead is own time over the operator's in the same runs. Memory is the peak during a
solve, preparation or application beyond operator and right-hand sides, in blocks of n·k numbers,
with the solution, with an operator whose product is one block. Transfers are copies to the host a
unit, as a device would see them."""
