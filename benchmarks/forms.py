"""Four forms of conjugate gradients on the same systems: which breaks, which is fast.

BlockCG of this library (Dubrulle's R-form) against the breakdown-free block CG of Ji & Li (2017),
the block CG of O'Leary (1980) and CG column by column, in both precisions.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import invhvp as ih

from . import cases, published, report

BLOCK, BREAKDOWN_FREE, OLEARY, COLUMNS = "BlockCG", "Ji & Li (best)", "O'Leary", "CG"
FORMS = (BLOCK, BREAKDOWN_FREE, OLEARY, COLUMNS)
OUTCOMES = ("reached", "floor", "missed")
_POWERS = {"float64": (-14, -12, -10, -8, -6), "float32": (-7, -6, -5, -4, -3)}
BASES = {
    dtype: [published.Basis(kind, 10.0**power) for power in powers for kind in ("svd", "qr")]
    for dtype, powers in _POWERS.items()
}
RTOL = {"float64": 1e-8, "float32": 1e-4}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is run: cases, right-hand sides, dampings, limits."""

    cases: tuple[cases.Case, ...]
    rhs: tuple[str, ...] = cases.RHS
    dampings: tuple[float, ...] = (1e-1, 1e-2, 1e-3)
    max_passes: int = 1000
    published_passes: int = 500
    max_seconds: float = 60.0
    repeats: int = 3


FULL = Grid(
    cases=(
        partial(cases.logistic_hessian, 1000),
        partial(cases.network_hessian, 1000, 16),
        partial(cases.network_spectrum, 800),
    )
)
QUICK = Grid(
    cases=(partial(cases.network_hessian, 200, 2), partial(cases.network_spectrum, 100)),
    rhs=("gradients", "dependent"),
    dampings=(1e-2,),
    max_passes=200,
    published_passes=60,
    repeats=1,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class System:
    """(A + λI)X = B in one precision, with what the harness knows about it."""

    A: np.ndarray
    B: np.ndarray
    damping: float
    psd: bool
    rtol: float
    size: float
    exact: np.ndarray

    def outcome(self, X: np.ndarray) -> tuple[str, float]:
        """ "reached", "floor" or "missed", and the largest true residual; from X alone."""
        residuals = cases.true_residuals(self.A, self.B, X, self.damping)
        # A residual of this size is rounding: a few units of ‖A + λI‖‖x‖ + ‖b‖.
        b, x = np.linalg.norm(self.B, axis=0), np.linalg.norm(self.exact, axis=0)
        unit = 16 * np.finfo(self.A.dtype).eps
        floors = unit * (1 + self.size * x / np.where(b > 0, b, 1.0))
        met = residuals <= 1.01 * self.rtol  # the methods see it in their own precision
        worst = float(np.max(residuals))
        if np.all(met):
            return "reached", worst
        return ("floor" if np.all(met | (residuals <= floors)) else "missed"), worst


def rows(grid: Grid) -> Iterator[dict[str, Any]]:
    """One row for each case, precision, right-hand sides, damping and form."""
    for case in grid.cases:
        curvature = case()
        largest = float(np.linalg.eigvalsh(curvature.matrix)[-1])
        for dtype in ("float64", "float32"):
            A = curvature.matrix.astype(dtype)
            for kind in grid.rhs:
                B = cases.right_hand_sides(curvature.gradients, kind).astype(dtype)
                for damping in grid.dampings:
                    system = System(
                        A=A,
                        B=B,
                        damping=damping,
                        psd=curvature.operator.psd,
                        rtol=RTOL[dtype],
                        size=largest + damping,
                        exact=cases.exact_solution(A, B, damping),
                    )
                    where = {"case": curvature.name, "dtype": dtype, "rhs": kind}
                    for row in compare(system, grid):
                        yield {**where, "damping": damping, "rtol": system.rtol, **row}


def compare(system: System, grid: Grid) -> list[dict[str, Any]]:
    """All forms on one system; times are medians of interleaved repetitions."""
    limits = {"max_passes": grid.max_passes, "max_seconds": grid.max_seconds}
    fewer = limits | {"max_passes": grid.published_passes}
    basis, tried = _best_basis(system, grid)
    oleary, free = published.oleary, partial(published.breakdown_free, basis=basis)
    runs: dict[str, Callable[[], published.Outcome]] = {
        BLOCK: partial(_engine, ih.BlockCG, system, **limits),
        BREAKDOWN_FREE: partial(_drive, free, system, **fewer),
        OLEARY: partial(_drive, oleary, system, **fewer),
        COLUMNS: partial(_engine, ih.CG, system, **limits),
    }
    first = {form: run() for form, run in runs.items()}
    seconds = {form: [outcome.seconds] for form, outcome in first.items()}
    for _ in range(grid.repeats - 1):
        for form, run in runs.items():
            if first[form].seconds < 1.0:
                seconds[form].append(run().seconds)
    result = []
    for form, outcome in first.items():
        verdict, worst = system.outcome(outcome.X)
        row = {
            "form": form,
            "outcome": verdict,
            "true_residual": worst,
            "relative_error": float(np.max(cases.relative_errors(outcome.X, system.exact))),
            "said": outcome.status,
            "passes": outcome.passes,
            "products": outcome.products,
            "seconds": statistics.median(seconds[form]),
        }
        if form == BREAKDOWN_FREE:
            row |= {"basis": str(basis), "tried": tried}
        result.append(row)
    return result


def _best_basis(system: System, grid: Grid) -> tuple[published.Basis, list[dict[str, Any]]]:
    """The rank decision under which Ji & Li's form does best here, and what all of them did."""
    best: tuple[Any, published.Basis] | None = None
    tried: list[dict[str, Any]] = []
    limits = {"max_passes": grid.published_passes, "max_seconds": grid.max_seconds}
    for basis in BASES[str(system.A.dtype)]:
        form = partial(published.breakdown_free, basis=basis)
        outcome = _drive(form, system, **limits)
        verdict, worst = system.outcome(outcome.X)
        order = OUTCOMES.index(verdict)
        cost = (outcome.passes, outcome.products) if verdict != "missed" else (0, 0)
        rank = (order, *cost, worst)
        if best is None or rank < best[0]:
            best = rank, basis
        tried.append({"basis": str(basis), "outcome": verdict, "passes": outcome.passes})
    assert best is not None
    return best[1], tried


def _drive(form: published.Recurrence, system: System, **limits: Any) -> published.Outcome:
    with np.errstate(all="ignore"):
        return published.drive(
            form, system.A, system.B, system.damping, rtol=system.rtol, size=system.size, **limits
        )


def _engine(
    method: Any, system: System, *, max_passes: int, max_seconds: float
) -> published.Outcome:
    A = ih.Dense(system.A, psd=system.psd)
    options = {"rtol": system.rtol, "maxiter": max_passes, "max_seconds": max_seconds}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ih.InvhvpWarning)
        solution = ih.solve(A, system.B, method(**options), damping=system.damping)
    return published.Outcome(
        X=solution.x,
        status=report.said(solution),
        passes=solution.passes,
        products=solution.products,
        seconds=solution.seconds,
    )


# ------------------------------------------------------------------------------------ tables


def markdown(found: list[dict[str, Any]]) -> str:
    """The summary, then a table for each case and precision."""
    parts = [_LEGEND, report.table(_SUMMARY_HEAD, _summary(found)), _FIXED, *_fixed(found)]
    for (case, dtype), group in report.grouped(found, "case", "dtype"):
        parts.append(f"## {case}, {dtype}, rtol {RTOL[dtype]:.0e}")
        lines = []
        for (rhs, damping), cell in report.grouped(group, "rhs", "damping"):
            each = {row["form"]: row for row in cell}
            lines.append([rhs, f"{damping:.0e}", *(_cell(each[form]) for form in FORMS)])
        parts.append(report.table(["right-hand sides", "λ", *FORMS], lines))
    return "\n\n".join(parts)


def _cell(row: dict[str, Any]) -> str:
    residual = report.number(row["true_residual"])
    text = f"{row['passes']} / {row['products']} / {residual}"
    if row["outcome"] == "reached":
        return text
    return f"{text} {row['outcome']} ({row['said']})"


_LEGEND = """\
# Forms of block conjugate gradients

Each cell: passes over the operator / products (columns) / largest true relative residual,
recomputed in float64 with the dense matrix. A cell that does not meet rtol says so, with what the
method itself said: "floor" is a residual that rounding in this precision explains (16 units of
‖A + λI‖‖x‖), "missed" is not. 16 right-hand sides. Ji & Li's form is run with ten rank decisions
(SVD and pivoted QR, five tolerances) for each cell and shown with the best one; the search is
counted neither in passes nor in time. The published forms run inside this library's own driver:
unit columns, float64 k x k algebra, the same stopping rule, restarts on the true residual."""

_SUMMARY_HEAD = [
    "case", "form", "reached / floor / missed", "passes ÷ BlockCG", "products ÷ BlockCG",
    "seconds ÷ BlockCG", "fewer passes than BlockCG", "missed, but said CONVERGED",
]  # fmt: skip


def _summary(found: list[dict[str, Any]]) -> list[list[str]]:
    lines = []
    for (case, dtype), group in report.grouped(found, "case", "dtype"):
        for (form,), theirs in report.grouped(group, "form"):
            both = _both_solve(group, form)
            counts = [sum(r["outcome"] == w for r in theirs) for w in OUTCOMES]
            ratios = [ratio(group, form, key) for key in ("passes", "products", "seconds")]
            fewer = sum(r["passes"] < o["passes"] for r, o in both)
            lied = sum(r["outcome"] == "missed" and r["said"] == "CONVERGED" for r in theirs)
            lines.append(
                [f"{case}, {dtype}", form, " / ".join(map(str, counts)), *ratios, str(fewer),
                 str(lied)]
            )  # fmt: skip
    return lines


def ratio(group: list[dict[str, Any]], form: str, key: str) -> str:
    """The mean of a form's passes, products or seconds over BlockCG's, for one case and dtype."""
    return report.mean_ratio([(r[key], o[key]) for r, o in _both_solve(group, form)])


def _both_solve(group: list[dict[str, Any]], form: str) -> list[tuple[Any, Any]]:
    """Rows of a form and of BlockCG, for the systems that neither misses."""
    ours = {(r["rhs"], r["damping"]): r for r in group if r["form"] == BLOCK}
    pairs = [(r, ours[r["rhs"], r["damping"]]) for r in group if r["form"] == form]
    return [(r, o) for r, o in pairs if "missed" not in (r["outcome"], o["outcome"])]


_FIXED = """\
## One rank decision for all systems

Nobody has an oracle that chooses for each system. With one decision of the ten for everything:
systems solved (to rtol or to the floor), and passes over those of BlockCG where both solve."""


def _fixed(found: list[dict[str, Any]]) -> list[str]:
    tables = []
    for (dtype,), group in report.grouped(found, "dtype"):
        cells = [
            {row["form"]: row for row in cell}
            for _, cell in report.grouped(group, "case", "rhs", "damping")
        ]
        lines = []
        for basis in map(str, BASES[dtype]):
            pairs = []
            for cell in cells:
                done = [t for t in cell[BREAKDOWN_FREE]["tried"] if t["basis"] == basis]
                pairs += [(t["passes"], cell[BLOCK]) for t in done if t["outcome"] != "missed"]
            both = [
                (passes, ours["passes"]) for passes, ours in pairs if ours["outcome"] != "missed"
            ]
            lines.append([basis, f"{len(pairs)} of {len(cells)}", report.mean_ratio(both)])
        ours = sum(cell[BLOCK]["outcome"] != "missed" for cell in cells)
        lines.append(["BlockCG, which has none", f"{ours} of {len(cells)}", "1"])
        tables.append(report.table([f"Ji & Li, {dtype}", "solved", "passes ÷ BlockCG"], lines))
    return tables
