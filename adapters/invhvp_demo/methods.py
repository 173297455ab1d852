"""Every method of the library on the same system: what it costs, how well it answers."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import invhvp as ih
from invhvp import _backend

from .model import Array

HESSIAN, FISHER = "Hessian", "empirical Fisher"


@dataclass(frozen=True, kw_only=True)
class System:
    """What is solved: a curvature matrix, its damping, and gradients as right-hand sides."""

    hessian: ih.LinearOperator
    train: ih.StackedGradients
    test: ih.StackedGradients
    damping: float

    @property
    def fisher(self) -> ih.RankOneMean:
        """Mean of the outer squares of the training gradients."""
        return ih.RankOneMean(self.train)


class Row(NamedTuple):
    """A line of the table: shown where `invhvp` has all the names that it needs."""

    label: str
    needs: str
    curvature: str
    build: Callable[[Any, System], Any]


# Rankings do not change below this tolerance; the error column shows what it means for x.
RTOL = 1e-3

# The first is the exact one, against which the others are measured.
ROWS = (
    Row("Direct", "Direct", HESSIAN, lambda m, _: m.Direct()),
    Row("CG", "CG", HESSIAN, lambda m, _: m.CG(rtol=RTOL)),
    Row("BlockCG", "BlockCG", HESSIAN, lambda m, _: m.BlockCG(rtol=RTOL)),
    Row("BlockCG + Nyström", "BlockCG NystroemPreconditioner", HESSIAN, lambda m, _: m.BlockCG(
        rtol=RTOL, preconditioner=m.NystroemPreconditioner(rank=64, rng=0))),
    Row("MINRES", "Minres", HESSIAN, lambda m, _: m.Minres(rtol=RTOL)),
    # Stochastic steps would need a hundred times more products; their ranking does not.
    Row("LiSSA", "LiSSA", HESSIAN, lambda m, _: m.LiSSA(max_products=4_000, rng=0)),
    Row("Arnoldi", "Arnoldi", HESSIAN, lambda m, _: m.Arnoldi(rank=100, rng=0)),
    Row("NystroemSketch", "NystroemSketch", HESSIAN, lambda m, _: m.NystroemSketch(
        rank=100, rng=0)),
    Row("SampleSpace", "SampleSpace", FISHER, lambda m, _: m.SampleSpace()),
    Row("InverseHarmonicMean", "InverseHarmonicMean", FISHER, lambda m, _: (
        m.InverseHarmonicMean())),
)  # fmt: skip

# What the picture of convergence compares: few right-hand sides, tight tolerance.
CURVE_RTOL = 1e-8
CURVES = (
    Row("CG", "CG", HESSIAN, lambda m, _: m.CG(rtol=CURVE_RTOL)),
    Row("MINRES", "Minres", HESSIAN, lambda m, _: m.Minres(rtol=CURVE_RTOL)),
    Row("BlockCG", "BlockCG", HESSIAN, lambda m, _: m.BlockCG(rtol=CURVE_RTOL)),
    Row("BlockCG + Jacobi", "BlockCG Jacobi", HESSIAN, lambda m, _: m.BlockCG(
        rtol=CURVE_RTOL, preconditioner=m.Jacobi())),
    Row("BlockCG + Nyström", "BlockCG NystroemPreconditioner", HESSIAN, lambda m, _: m.BlockCG(
        rtol=CURVE_RTOL, preconditioner=m.NystroemPreconditioner(rank=64, rng=0))),
    Row("BlockCG + empirical Fisher", "BlockCG Surrogate SampleSpace", HESSIAN,
        lambda m, s: m.BlockCG(
            rtol=CURVE_RTOL, preconditioner=m.Surrogate(s.fisher, m.SampleSpace()))),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Result:
    """One method on all training gradients.

    Attributes:
        fit_seconds, solve_seconds: time to prepare the inverse, and to apply it to all gradients.
        products: operator-vector products of both.
        residual: largest true residual ‖b − (A + λI)x‖/‖b‖ of its own system.
        error: largest distance ‖x − x*‖/‖x*‖ from the exact solution with the Hessian.
        statuses: how many right-hand sides ended how.
        self_influence: gᵢᵀ(A + λI)⁻¹gᵢ, (N,).
        test_scores: influence of each training image on the mean test loss, (N,).
    """

    label: str
    method: str
    curvature: str
    fit_seconds: float
    solve_seconds: float
    products: int
    residual: float
    error: float
    statuses: dict[str, int]
    self_influence: np.ndarray
    test_scores: np.ndarray

    @property
    def note(self) -> str | None:
        """What the table must not hide: right-hand sides that were not solved as asked."""
        bad = {name: n for name, n in self.statuses.items() if not ih.Status[name].ok}
        told = (f"{n} x {name} ({ih.Status[name].value})" for name, n in bad.items())
        return f"{self.label}: {'; '.join(told)}" if bad else None


def available(rows: tuple[Row, ...] | None = None) -> list[Row]:
    """The rows, by default those of the table, whose methods exist."""
    rows = ROWS if rows is None else rows
    return [row for row in rows if all(hasattr(ih, name) for name in row.needs.split())]


def measure_all(system: System, rows: list[Row]) -> Iterator[Result]:
    """Solve for all training gradients with each method; the first row is the reference."""
    exact = None
    for row in rows:
        result, X = measure(row, system, exact)
        exact = X if exact is None else exact
        yield result


def measure(row: Row, system: System, exact: Array | None) -> tuple[Result, Array]:
    """One method: its result, and the solutions (p, N) for all training gradients."""
    operator = system.hessian if row.curvature == HESSIAN else system.fisher
    method = row.build(ih, system)
    with warnings.catch_warnings():
        # What they say is in the statuses, and the table has a note of it.
        warnings.simplefilter("ignore", ih.InvhvpWarning)
        started = time.perf_counter()
        inverse = method.prepare(operator, damping=system.damping)
        fitted = time.perf_counter()
        prepared = inverse.products
        solution = ih.Influence(inverse, system.train).factors(system.train)
        # The status is read on the host, so that a device has finished its work by then.
        status = solution.status
        solved = time.perf_counter()
    X = solution.x
    reference = X if exact is None else exact
    xp = _backend.namespace(X)
    dense = system.train.to_dense()
    # A is symmetric: one solve with the training gradients answers for every test image.
    mean_test = xp.mean(system.test.to_dense(), axis=0)
    errors = _norms(X - reference) / _norms(reference)
    result = Result(
        label=row.label,
        method=repr(method) if row.curvature == HESSIAN else f"{method!r} on {FISHER}",
        curvature=row.curvature,
        fit_seconds=fitted - started,
        solve_seconds=solved - fitted,
        products=prepared + solution.products,
        residual=float(xp.max(solution.relative_residuals)),
        error=float(xp.max(errors)),
        statuses=dict(Counter(s.name for s in status)) if isinstance(status, tuple) else {},
        self_influence=_backend.to_host(xp.sum(dense.T * X, axis=0)),
        test_scores=_backend.to_host(mean_test @ X),
    )
    return result, X


def _norms(X: Array) -> Array:
    xp = _backend.namespace(X)
    return xp.sqrt(xp.sum(X * X, axis=0))


def histories(system: System, shown: np.ndarray) -> dict[str, ih.Solution]:
    """Solutions for a few test images by the methods that iterate, with their history."""
    solutions = {}
    for row in available(CURVES):
        inverse = row.build(ih, system).prepare(system.hessian, damping=system.damping)
        solutions[row.label] = inverse.solve(system.test[shown])
    return solutions
