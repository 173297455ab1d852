"""Who takes part in the Gauss-Newton benchmark: this library, pyDVL, what pyDVL does at best."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import invhvp as ih

from . import against_pydvl, report

if TYPE_CHECKING:
    from .gauss_newton import Grid, Problem


@dataclass
class Run:
    """What a contender found, what is said of it, and [wall, processor] seconds of each step."""

    said: str
    x: Any = None
    scores: Any = None
    clocks: dict[str, list[float]] = field(default_factory=dict)

    def step(self, name: str, compute: Callable[[], Any]) -> Any:
        """Compute and note the time."""
        wall, processor = time.perf_counter(), time.process_time()
        found = compute()
        self.clocks[name] = [time.perf_counter() - wall, time.process_time() - processor]
        return found

    def seconds(self, step: str | None = None, clock: int = 0) -> float | None:
        """Of one step or of all, by the wall's clock (0) or the processor's (1)."""
        if not self.clocks:
            return None
        chosen = self.clocks.values() if step is None else [self.clocks.get(step, [0.0, 0.0])]
        return sum(spent[clock] for spent in chosen)


def solutions(method: Callable[[Grid], Any]) -> Callable[[Problem, Grid], Run]:
    """Gradients once, then a method of this library: solutions with certificates."""

    def contender(problem: Problem, grid: Grid) -> Run:
        run, inverse, _ = _fitted(problem, method(grid))
        solution = run.step("solve", lambda: _quietly(inverse.solve, _test(problem)))
        run.x = solution.x
        run.said = f"{report.said(solution)}, {solution.passes} passes"
        return run

    return contender


def scores(method: Callable[[Grid], Any]) -> Callable[[Problem, Grid], Run]:
    """Gradients once, then scores of all training samples for all test samples."""

    def contender(problem: Problem, grid: Grid) -> Run:
        run, inverse, G = _fitted(problem, method(grid))
        influence = ih.Influence(inverse, G)
        run.scores = run.step("solve", lambda: influence.scores(_test(problem)))
        return run

    return contender


def _fitted(problem: Problem, method: Any) -> tuple[Run, Any, Any]:
    import invhvp_torch as it

    def fit() -> tuple[Any, Any]:
        F: Any = it.empirical_fisher(problem.model, problem.loss, problem.train)
        return method.prepare(F, damping=problem.case.damping), F.gradients

    run = Run("")
    return run, *run.step("fit", fit)


def _test(problem: Problem) -> Any:
    import invhvp_torch as it

    return it.per_sample_gradients(problem.model, problem.loss, *problem.test)


def _quietly(compute: Callable[..., Any], *given: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ih.ConvergenceWarning)
        return compute(*given)


def recomputed(problem: Problem, grid: Grid) -> Run:
    """Block CG (O'Leary 1980) that computes all per-sample gradients at every product."""
    run = Run("")
    run.x, run.said = run.step("solve", lambda: _recomputed(problem, grid))
    return run


def _recomputed(problem: Problem, grid: Grid) -> tuple[Any, str]:
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
            return X, f"CONVERGED by its own residual, {iterations} iterations"
        new = (R.T @ R).double()
        P, rho = R + P @ torch.linalg.lstsq(rho, new).solution.to(B.dtype), new
    return X, f"stopped after {iterations} iterations"


def pydvl(which: str, *, scores: bool) -> Callable[[Problem, Grid], Run]:
    """pyDVL's block CG, or its inverse harmonic mean; its scores need the solutions first."""

    def contender(problem: Problem, grid: Grid) -> Run:
        given = {
            "widths": problem.case.widths,
            "state": problem.model.state_dict(),
            "train": problem.train,
            "test": problem.test,
            "damping": problem.case.damping,
            "rtol": grid.rtol,
            "maxiter": grid.maxiter,
        }
        if which not in problem.theirs:
            try:
                problem.theirs[which] = against_pydvl.solve(which, given, 20 * grid.max_seconds)
            except against_pydvl.MissingError as missing:
                problem.theirs[which] = {"missing": str(missing)}
        found = problem.theirs[which]
        if "missing" in found:
            return Run(f"skipped: {found['missing']}")
        run = Run(f"pyDVL {found['version']}")
        fit, solve, after = (found["clocks"][name] for name in ("fit", "solve", "scores_after"))
        run.clocks = {"fit": fit, "solve": solve}
        if which == "cg":
            run.said += f", at most {grid.maxiter} iterations"
        if scores:
            run.clocks["solve"] = [a + b for a, b in zip(solve, after, strict=True)]
            run.scores = found["scores"]
        else:
            run.x = found["x"]
        return run

    return contender


def _sample_space(grid: Grid) -> Any:
    return ih.SampleSpace(rtol=grid.rtol)


def _harmonic(_: Grid) -> Any:
    return ih.InverseHarmonicMean()


CONTENDERS: dict[str, Callable[[Problem, Grid], Run]] = {
    "SampleSpace, factors kept": solutions(_sample_space),
    "SampleSpace, rtol 1e-6": solutions(lambda _: ih.SampleSpace(rtol=1e-6)),
    "BlockCG, factors kept": solutions(
        lambda grid: ih.BlockCG(rtol=grid.rtol, max_seconds=grid.max_seconds)
    ),
    "block CG, gradients at every product": recomputed,
    "pyDVL block CG": pydvl("cg", scores=False),
    "InverseHarmonicMean, factors kept": solutions(_harmonic),
    "pyDVL inverse harmonic mean": pydvl("harmonic", scores=False),
    "scores, SampleSpace": scores(_sample_space),
    "scores, pyDVL block CG": pydvl("cg", scores=True),
    "scores, InverseHarmonicMean": scores(_harmonic),
    "scores, pyDVL inverse harmonic mean": pydvl("harmonic", scores=True),
}
