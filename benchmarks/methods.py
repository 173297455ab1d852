"""Every method on real curvature: products, passes and seconds to a given true residual."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import invhvp as ih

from . import cases, report


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is run: cases, dampings, tolerances, the limit on the seconds of a row."""

    cases: tuple[cases.Case, ...]
    dampings: tuple[float, ...] = (1e-1, 1e-2, 1e-3)
    rtols: tuple[float, ...] = (1e-3, 1e-6)
    max_seconds: float = 60.0


FULL = Grid(
    cases=(
        partial(cases.logistic_hessian, 1000),
        partial(cases.network_hessian, 1000, 16),
        partial(cases.network_gauss_newton, 1000, 16),
        partial(cases.network_fisher, 1000, 16),
    )
)
QUICK = Grid(
    cases=(
        partial(cases.network_hessian, 200, 2, k=4),
        partial(cases.network_fisher, 200, 2, k=4),
    ),
    dampings=(1e-1,),
    max_seconds=1.0,
)


class Contender(NamedTuple):
    """A line of the tables: run where `invhvp` has all the names that it needs."""

    label: str
    needs: str
    build: Callable[..., Any]  # (invhvp, limits) -> Method; limits are rtol= and max_seconds=


ONE_SHOT = (
    Contender("Direct", "Direct", lambda m: m.Direct()),
    Contender("SampleSpace", "SampleSpace", lambda m: m.SampleSpace()),
    Contender("Arnoldi 50", "Arnoldi", lambda m: m.Arnoldi(rank=50, rng=0)),
    Contender("Arnoldi 200", "Arnoldi", lambda m: m.Arnoldi(rank=200, rng=0)),
    Contender("NystroemSketch 50", "NystroemSketch", lambda m: m.NystroemSketch(rank=50, rng=0)),
    Contender("NystroemSketch 200", "NystroemSketch", lambda m: m.NystroemSketch(rank=200, rng=0)),
    Contender("InverseHarmonicMean", "InverseHarmonicMean", lambda m: m.InverseHarmonicMean()),
)

ITERATIVE = (
    Contender("CG", "CG", lambda m, **o: m.CG(**o)),
    Contender("BlockCG", "BlockCG", lambda m, **o: m.BlockCG(**o)),
    Contender("BlockCG, Jacobi", "BlockCG Jacobi", lambda m, **o: m.BlockCG(
        preconditioner=m.Jacobi(), **o)),
    Contender("BlockCG, Nyström 10", "BlockCG NystroemPreconditioner", lambda m, **o: m.BlockCG(
        preconditioner=m.NystroemPreconditioner(rank=10, rng=0), **o)),
    Contender("BlockCG, Nyström 50", "BlockCG NystroemPreconditioner", lambda m, **o: m.BlockCG(
        preconditioner=m.NystroemPreconditioner(rank=50, rng=0), **o)),
    Contender("CG, Nyström 50", "CG NystroemPreconditioner", lambda m, **o: m.CG(
        preconditioner=m.NystroemPreconditioner(rank=50, rng=0), **o)),
    Contender("Minres", "Minres", lambda m, **o: m.Minres(**o)),
    Contender("LiSSA", "LiSSA", lambda m, **o: m.LiSSA(rng=0, **o)),
    Contender("LiSSA, SVRG", "LiSSA", lambda m, **o: m.LiSSA(
        rng=0, variance_reduction="svrg", **o)),
)  # fmt: skip

NEED_GRADIENTS = ("SampleSpace", "InverseHarmonicMean")


class Meter:
    """Counts the calls of an operator and their columns while it is entered."""

    def __init__(self, A: Any) -> None:
        self.A, self.passes, self.columns = A, 0, 0

    def __enter__(self) -> Meter:
        inner = self.A._matmat

        def counted(V: Any, /) -> Any:
            self.passes += 1
            self.columns += V.shape[1]
            return inner(V)

        self.A._matmat = counted
        return self

    def __exit__(self, *error: object) -> None:
        del self.A._matmat


def rows(grid: Grid) -> Iterator[dict[str, Any]]:
    """One row for each case, damping, method and tolerance."""
    for case in grid.cases:
        curvature = case()
        structured = hasattr(curvature.operator, "gradients")
        for damping in grid.dampings:
            exact = cases.exact_solution(curvature.matrix, curvature.gradients, damping)
            system = System(curvature, damping, exact)
            where = {"case": curvature.name, "damping": damping}
            for contender in filter(_exists, ONE_SHOT):
                if contender.label in NEED_GRADIENTS and not structured:
                    continue
                row = measure(contender.build(ih), system)
                for rtol in grid.rtols:
                    start = {**where, "method": contender.label, "rtol": rtol}
                    yield {**start, **_judged(row, rtol, grid.max_seconds), **row}
            for contender in filter(_exists, [*ITERATIVE, *_surrogates(curvature)]):
                row: dict[str, Any] = {}
                for rtol in grid.rtols:  # from loose to tight
                    start = {**where, "method": contender.label, "rtol": rtol}
                    if row and _outcome(row, grid.rtols[0]) != "reached":
                        yield {**start, "outcome": "not run", "capped": False, **dict.fromkeys(row)}
                        continue
                    limits = {"rtol": rtol, "max_seconds": grid.max_seconds}
                    row = measure(contender.build(ih, **limits), system)
                    yield {**start, **_judged(row, rtol, grid.max_seconds), **row}


class System(NamedTuple):
    """(A + λI)X = gradients, with its dense float64 solution."""

    curvature: cases.Curvature
    damping: float
    exact: np.ndarray


def measure(method: Any, system: System) -> dict[str, Any]:
    """Prepare and solve; accuracy is computed here from X, with the dense matrix in float64."""
    curvature, damping, B = system.curvature, system.damping, system.curvature.gradients
    row = dict.fromkeys(FIELDS)
    with Meter(curvature.operator) as meter, warnings.catch_warnings():
        warnings.simplefilter("ignore", ih.InvhvpWarning)
        started = time.perf_counter()
        try:
            inverse = method.prepare(curvature.operator, damping=damping)
            prepared, prepare_passes = time.perf_counter(), meter.passes
            solution = inverse.solve(B)
        except (ValueError, RuntimeError, ArithmeticError) as error:
            message = str(error).split(";")[0]
            return {**row, "said": f"{type(error).__name__}: {message}"}
        done = time.perf_counter()
    residuals = cases.true_residuals(curvature.matrix, B, solution.x, damping)
    errors = cases.relative_errors(solution.x, system.exact)
    return {
        # Batches are operators of their own, which only the method itself can count.
        "products": max(meter.columns, inverse.products + solution.products),
        "passes": max(meter.passes, prepare_passes + solution.passes),
        "counted_products": meter.columns,
        "true_residual": float(np.max(residuals)),
        "relative_error": float(np.max(errors)),
        "said": report.said(solution),
        "prepare_seconds": prepared - started,
        "seconds": done - started,
    }


FIELDS = (
    "products", "passes", "counted_products", "true_residual", "relative_error", "said",
    "prepare_seconds", "seconds",
)  # fmt: skip


def _surrogates(curvature: cases.Curvature) -> list[Contender]:
    if curvature.surrogate is None:
        return []
    name, K = curvature.surrogate
    return [
        Contender(f"BlockCG, Surrogate({name})", "BlockCG Surrogate", lambda m, **o: m.BlockCG(
            preconditioner=m.Surrogate(K), **o)),
    ]  # fmt: skip


def _exists(contender: Contender) -> bool:
    return all(getattr(ih, name, None) is not None for name in contender.needs.split())


def _judged(row: dict[str, Any], rtol: float, cap: float) -> dict[str, Any]:
    seconds = row["seconds"]
    return {"outcome": _outcome(row, rtol), "capped": seconds is not None and seconds >= cap}


def _outcome(row: dict[str, Any], rtol: float) -> str:
    if row["true_residual"] is None:
        return "failed"
    # The method sees its residual with its own operator, which rounds differently.
    return "reached" if row["true_residual"] <= 1.01 * rtol else "missed"


# ------------------------------------------------------------------------------------ tables


def markdown(found: list[dict[str, Any]]) -> str:
    """Products at a glance, then a table for each case and damping."""
    parts = [_LEGEND]
    for (rtol,), group in report.grouped(found, "rtol"):
        parts += [f"## Products to a true residual of {rtol:.0e}", _glance(group)]
    for (case,), group in report.grouped(found, "case"):
        parts.append(f"## {case}")
        for (damping,), rows_ in report.grouped(group, "damping"):
            head = [f"λ = {damping:.0e}", *(f"rtol {r:.0e}" for r in _values(rows_, "rtol"))]
            lines = [
                [method, *(_cell(row) for row in cells)]
                for (method,), cells in report.grouped(rows_, "method")
            ]
            parts.append(report.table(head, lines))
    return "\n\n".join(parts)


_LEGEND = """\
# What the methods cost

Test gradients as right-hand sides, float64. Products (columns) and passes (calls) are counted at
the operator, preparation included; a batch of a stochastic method counts as its share of the data.
Each cell of the lower tables: passes / products / largest true relative residual / largest relative
error against a dense solve / seconds with preparation; residual and error are recomputed with the
dense matrix, whatever the method says. Where a method does not reach the tolerance, the cell says
so, with what the method itself said. Methods without a tolerance are run once. Direct and
SampleSpace factorise what the operator gives them: their few products are checks."""


def _glance(group: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys((row["case"], row["damping"]) for row in group))
    found = {(row["method"], row["case"], row["damping"]): row for row in group}
    head = ["method", *(f"{_short(case)}, {damping:.0e}" for case, damping in columns)]
    lines = []
    for method in _values(group, "method"):
        cells = [found.get((method, *column)) for column in columns]
        lines.append([method, *(_products(row) for row in cells)])
    return report.table(head, lines)


def _short(case: str) -> str:
    return case.removeprefix("digits ").rpartition(", p =")[0]


def _products(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["outcome"] == "reached":
        return f"{row['products']} ({row['passes']})"
    if row["outcome"] == "failed":
        return "failed"
    return "over the cap" if row["capped"] else "not reached"


def _cell(row: dict[str, Any]) -> str:
    if row["outcome"] == "not run":
        return "not run: missed the looser one"
    if row["outcome"] == "failed":
        return f"failed: {row['said']}"
    residual, error = report.number(row["true_residual"]), report.number(row["relative_error"])
    seconds = f"{row['seconds']:.2g} s"
    text = f"{row['passes']} / {row['products']} / {residual} / {error} / {seconds}"
    if row["capped"]:
        text += ", over the cap"
    return text if row["outcome"] == "reached" else f"{text}; not reached ({row['said']})"


def _values(rows_: list[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows_))
