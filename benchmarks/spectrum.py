"""Estimates of spectra against dense eigenvalues, and `plan` against what the methods then cost.

Every exact value comes from the eigenvalues of the dense matrix, in float64.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import invhvp as ih
from invhvp import estimate
from invhvp.estimate.spectrum import Estimate

from . import cases, report
from .methods import Meter


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is run: cases, (steps, probes) of the Lanczos quadrature, dampings, seeds."""

    cases: tuple[cases.Case, ...]
    quadratures: tuple[tuple[int, int], ...] = ((10, 4), (20, 4), (40, 4), (20, 16))
    samples: tuple[int, ...] = (16, 64)
    dampings: tuple[float, ...] = (1e-1, 1e-3)
    seeds: int = 5
    rtol: float = 1e-5
    max_seconds: float = 60.0


FULL = Grid(
    cases=(
        partial(cases.logistic_hessian, 1000),
        partial(cases.network_hessian, 1000, 16),
        partial(cases.network_gauss_newton, 1000, 16),
        partial(cases.network_fisher, 1000, 16),
        partial(cases.network_spectrum, 800),
    )
)
QUICK = Grid(
    cases=(partial(cases.network_gauss_newton, 200, 2, k=4),),
    quadratures=((10, 2),),
    samples=(8,),
    dampings=(1e-1,),
    seeds=2,
    max_seconds=5.0,
)


class Exact(NamedTuple):
    """Eigenvalues, ascending, and how long they took."""

    values: np.ndarray
    diagonal: np.ndarray
    seconds: float

    @classmethod
    def of(cls, curvature: cases.Curvature) -> Exact:
        started = time.perf_counter()
        values = np.linalg.eigvalsh(curvature.matrix)
        return cls(values, np.diag(curvature.matrix), time.perf_counter() - started)

    def quantities(self, dampings: tuple[float, ...]) -> dict[str, float]:
        w = self.values
        found = {"λmax": w[-1], "λmin": w[0], "trace": np.sum(w)}
        for damping in dampings:
            positive = np.maximum(w, 0.0)
            share = np.sum(positive / (positive + damping))
            found[f"effective dimension, λ = {damping:.0e}"] = share
            if w[0] + damping > 0:
                found[f"log det, λ = {damping:.0e}"] = np.sum(np.log(w + damping))
        return {name: float(value) for name, value in found.items()}


def rows(grid: Grid) -> Iterator[dict[str, Any]]:
    """The estimates of each case, then what was planned and what it cost."""
    for case in grid.cases:
        curvature = case()
        exact = Exact.of(curvature)
        where = {"case": curvature.name, "eigenvalues_seconds": exact.seconds}
        for row in _estimates(curvature, exact, grid):
            yield {**where, "section": "estimate", **row}
        for damping in grid.dampings:
            if exact.values[0] + damping > 0:
                yield {**where, "section": "plan", **_planned(curvature, damping, grid)}


def _estimates(curvature: cases.Curvature, exact: Exact, grid: Grid) -> Iterator[dict[str, Any]]:
    # Products alone: what an operator knows of its own diagonal is not estimated.
    hidden = curvature.operator
    A = ih.Callback(hidden._matmat, hidden.shape[0], like=hidden.like, psd=hidden.psd)
    known = exact.quantities(grid.dampings)
    for steps, probes in grid.quadratures:
        name = f"spectrum({steps} steps, {probes} probes)"
        made = [
            _timed(A, partial(estimate.spectrum, A, steps=steps, probes=probes, rng=seed))
            for seed in range(grid.seeds)
        ]
        for quantity, value in known.items():
            found = [_of(spectrum, quantity, grid.dampings) for spectrum, _, _ in made]
            unit = abs(known["λmax"] if quantity == "λmin" else value)
            yield _row(name, quantity, value, found, made, unit)
    for samples in grid.samples:
        made = [
            _timed(A, partial(estimate.trace, A, samples=samples, rng=seed))
            for seed in range(grid.seeds)
        ]
        found = [Estimate(t.value, t.standard_error) for t, _, _ in made]
        yield _row(f"trace({samples} samples)", "trace", known["trace"], found, made)
        made = [
            _timed(A, partial(estimate.diagonal, A, samples=samples, rng=seed))
            for seed in range(grid.seeds)
        ]
        errors = [np.linalg.norm(d.values - exact.diagonal) for d, _, _ in made]
        size = float(np.linalg.norm(exact.diagonal))
        found = [Estimate(size + float(e), float("nan")) for e in errors]
        yield _row(f"diagonal({samples} samples)", "diagonal, ‖error‖", size, found, made)
    made = [_timed(A, lambda: estimate.operator_norm(A._matmat, A.like, A.shape[0]))]
    largest = float(np.max(np.abs(exact.values)))
    found = [Estimate(made[0][0], float("nan"))]
    yield _row("operator_norm", "largest |λ|", largest, found, made)


def _of(spectrum: estimate.Spectrum, quantity: str, dampings: tuple[float, ...]) -> Estimate | None:
    """What a `Spectrum` says of a quantity; None where it proves that there is no such thing."""
    if quantity == "λmax":
        return Estimate(spectrum.largest, float("nan"))
    if quantity == "λmin":
        return Estimate(spectrum.smallest, float("nan"))
    if quantity == "trace":
        return spectrum.trace
    damping = next(d for d in dampings if quantity.endswith(f"λ = {d:.0e}"))
    if quantity.startswith("effective"):
        return spectrum.effective_dimension(damping)
    try:
        return spectrum.logdet(damping)
    except ih.IndefiniteError:
        return None


def _timed(A: Any, work: Callable[[], Any]) -> tuple[Any, float, int]:
    """The result, seconds, and columns counted at the operator."""
    with Meter(A) as meter:
        started = time.perf_counter()
        result = work()
        return result, time.perf_counter() - started, meter.columns


def _row(
    method: str,
    quantity: str,
    exact: float,
    found: Sequence[Estimate | None],
    made: list[tuple[Any, float, int]],
    unit: float | None = None,
) -> dict[str, Any]:
    """Errors over the seeds, in units of the exact value, beside the method's own error bar."""
    known = [e for e in found if e is not None]
    errors = [abs(e.value - exact) for e in known]
    bars = [error / e.stderr for error, e in zip(errors, known, strict=True) if e.stderr > 0]
    scale = unit or abs(exact) or 1.0
    return {
        "method": method,
        "quantity": quantity,
        "exact": exact,
        "estimate": float(np.median([e.value for e in known])) if known else None,
        "relative_error": float(np.median(errors)) / scale if errors else None,
        "worst_error": max(errors) / scale if errors else None,
        "error_over_bar": float(np.median(bars)) if bars else None,
        "products": made[0][2],
        "seconds": float(np.median([seconds for _, seconds, _ in made])),
    }


def _planned(curvature: cases.Curvature, damping: float, grid: Grid) -> dict[str, Any]:
    """`plan`, and what BlockCG and the chosen method then took, with recomputed residuals."""
    A, B = curvature.operator, curvature.gradients
    plan, seconds, products = _timed(
        A, partial(ih.plan, A, n_rhs=B.shape[1], damping=damping, rtol=grid.rtol)
    )
    predicted = next(o.passes for o in plan.options if o.label == "BlockCG")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ih.InvhvpWarning)
        method = ih.BlockCG(rtol=grid.rtol, max_seconds=grid.max_seconds)
        block = ih.solve(A, B, method, damping=damping)
        started = time.perf_counter()
        chosen = ih.solve(A, B, plan.method, damping=damping)
        took = time.perf_counter() - started
    residuals = cases.true_residuals(curvature.matrix, B, chosen.x, damping)
    return {
        "damping": damping,
        "chosen": type(plan.method).__name__,
        "products": products,
        "seconds": seconds,
        "predicted_passes": int(predicted),
        "passes": block.passes,
        "true_residual": float(np.max(residuals)),
        "block_cg_seconds": block.seconds,
        "chosen_seconds": took,
    }


# ------------------------------------------------------------------------------------ tables


def markdown(found: list[dict[str, Any]]) -> str:
    """A table of estimates and one of plans for each case."""
    parts = [_LEGEND]
    for (case,), group in report.grouped(found, "case"):
        parts.append(
            f"## {case}\n\nDense eigenvalues took {group[0]['eigenvalues_seconds']:.2g} s."
        )
        lines = [
            [
                row["method"],
                row["quantity"],
                f"{row['exact']:.4g}",
                "–" if row["estimate"] is None else f"{row['estimate']:.4g}",
                report.number(row["relative_error"]),
                report.number(row["worst_error"]),
                "–" if row["error_over_bar"] is None else f"{row['error_over_bar']:.2g}",
                str(row["products"]),
                f"{1e3 * row['seconds']:.3g}",
            ]
            for row in group
            if row["section"] == "estimate"
        ]
        head = [
            "estimator", "quantity", "exact", "estimate", "relative error", "worst seed",
            "error ÷ its error bar", "products", "ms",
        ]  # fmt: skip
        parts.append(report.table(head, lines))
        lines = [
            [
                f"{row['damping']:.0e}",
                str(row["predicted_passes"]),
                str(row["passes"]),
                row["chosen"],
                report.number(row["true_residual"]),
                f"{1e3 * row['seconds']:.3g}",
                f"{1e3 * row['chosen_seconds']:.3g}",
                f"{1e3 * row['block_cg_seconds']:.3g}",
            ]
            for row in group
            if row["section"] == "plan"
        ]
        head = [
            "λ", "BlockCG passes planned", "needed", "chosen", "its true residual", "plan, ms",
            "chosen, ms", "BlockCG, ms",
        ]  # fmt: skip
        if lines:
            parts.append(report.table(head, lines))
    return "\n\n".join(parts)


_LEGEND = """\
# Spectra from a few products

float64, against the eigenvalues of the dense matrix. Errors are medians over the seeds, and the
worst one; an estimate that gives an error bar is off by so many of them in the median (0.67 for
normal errors). λmax and λmin of a Lanczos recurrence are bounds from inside; the error of λmin is
in units of λmax. The estimators see products alone, and these are counted at the operator. The plan
is compared with what BlockCG needed, and with the method that it chose."""
