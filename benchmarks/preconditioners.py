"""How many passes block CG needs with each preconditioner, on curvature of networks on digits."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import invhvp as ih

from . import report
from .methods import Meter

RTOLS = (1e-3, 1e-6)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network ("mlp", "cnn" or "transformer"), its training set and right-hand sides.

    Training is gradient descent by Adam with the ridge `l2`: far enough that predictions are
    right, and the Hessian is close to the Gauss–Newton matrix.
    """

    network: str
    n_train: int = 1000
    k: int = 16
    steps: int = 300
    l2: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is run: cases, dampings, tolerances, the limit on the seconds of a row."""

    cases: tuple[Case, ...]
    dampings: tuple[float, ...] = (1e-1, 1e-2, 1e-3)
    rtols: tuple[float, ...] = RTOLS
    max_seconds: float = 120.0


FULL = Grid(cases=tuple(Case(network=name) for name in ("mlp", "cnn", "transformer")))
QUICK = Grid(
    cases=(Case(network="mlp", n_train=100, k=4, steps=50),), dampings=(1e-1,), max_seconds=10.0
)


class Contender(NamedTuple):
    """A line of the tables: what is fitted, once for all dampings, and the preconditioner."""

    label: str
    fit: Callable[[Problem], Any]
    preconditioner: Callable[[Any], Any]
    curvatures: tuple[str, ...] = ("Hessian", "Gauss–Newton")


def _fitted(name: str, **options: Any) -> Callable[[Problem], Any]:
    def fit(problem: Problem) -> Any:
        import invhvp_torch as it

        return getattr(it, name)(problem.model, problem.loss, problem.train, **options)

    return fit


CONTENDERS = (
    Contender("none", lambda _: None, lambda _: None),
    Contender("Nyström 50", lambda _: None, lambda _: ih.NystroemPreconditioner(rank=50, rng=0)),
    Contender("Nyström 200", lambda _: None, lambda _: ih.NystroemPreconditioner(rank=200, rng=0)),
    Contender("K-FAC", _fitted("kfac"), ih.Surrogate),
    Contender("EKFAC", _fitted("ekfac"), ih.Surrogate),
    Contender("EKFAC, signs", _fitted("ekfac", fisher="sign"), ih.Surrogate),
    Contender(
        "Gauss–Newton", _fitted("gauss_newton"),
        lambda K: ih.Surrogate(K, ih.SampleSpace()), ("Hessian",),
    ),
    Contender(
        "Gauss–Newton, 256 pivots", _fitted("gauss_newton"),
        lambda K: ih.Surrogate(K, ih.PivotedCholesky(rank=256)),
    ),
)  # fmt: skip


class Problem:
    """A trained float64 network and gradients of its test losses."""

    def __init__(self, case: Case) -> None:
        import torch
        from sklearn.datasets import load_digits

        import invhvp_torch as it

        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        x = torch.tensor(images[order] / 16.0)
        y = torch.tensor(labels[order])
        n, k = case.n_train, case.k
        self.case, self.train = case, (x[:n], y[:n])
        self.loss = torch.nn.functional.cross_entropy
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = _NETWORKS[case.network]().double()
        optimiser = torch.optim.Adam(self.model.parameters(), lr=5e-3)
        for _ in range(case.steps):
            optimiser.zero_grad()
            ridge = sum(p.square().sum() for p in self.model.parameters())
            (self.loss(self.model(x[:n]), y[:n]) + 0.5 * case.l2 * ridge).backward()
            optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            losses = self.loss(self.model(x[n:]), y[n:], reduction="none")
        hard = n + torch.argsort(losses, descending=True)[:k]
        test = it.per_sample_gradients(self.model, self.loss, x[hard], y[hard])
        self.rhs = test.to_dense().T.contiguous()
        self.name = f"digits {case.network}, p = {self.rhs.shape[0]}"

    def operator(self, curvature: str) -> Any:
        """The Hessian or the Gauss–Newton matrix of the mean loss."""
        import invhvp_torch as it

        build = it.hessian if curvature == "Hessian" else it.gauss_newton
        return build(self.model, self.loss, self.train)


def rows(grid: Grid) -> Iterator[dict[str, Any]]:
    """One row for each case, curvature, damping, preconditioner and tolerance."""
    for case in grid.cases:
        problem = Problem(case)
        fits: dict[str, tuple[Any, float]] = {}
        for curvature in ("Hessian", "Gauss–Newton"):
            A = problem.operator(curvature)
            for damping in grid.dampings:
                for contender in CONTENDERS:
                    if curvature not in contender.curvatures:
                        continue
                    if contender.label not in fits:
                        started = time.perf_counter()
                        fitted = contender.fit(problem)
                        fits[contender.label] = fitted, time.perf_counter() - started
                    K, fit_seconds = fits[contender.label]
                    where = {"case": problem.name, "curvature": curvature, "damping": damping}
                    for rtol in grid.rtols:
                        method = ih.BlockCG(
                            rtol=rtol,
                            preconditioner=contender.preconditioner(K),
                            max_seconds=grid.max_seconds,
                        )
                        row = measure(method, A, problem.rhs, damping, rtol)
                        yield {
                            **where,
                            "preconditioner": contender.label,
                            "rtol": rtol,
                            **row,
                            "fit_seconds": fit_seconds,
                        }


def measure(method: Any, A: Any, B: Any, damping: float, rtol: float) -> dict[str, Any]:
    """Prepare and solve; the true residual is computed here, by a product of its own."""
    with Meter(A) as meter, warnings.catch_warnings():
        warnings.simplefilter("ignore", ih.InvhvpWarning)
        started = time.perf_counter()
        inverse = method.prepare(A, damping=damping)
        prepared = meter.passes
        solution = inverse.solve(B)
        done = time.perf_counter()
        passes, products = meter.passes, meter.columns
    R = B - A @ solution.x - damping * solution.x
    residual = float((R.norm(dim=0) / B.norm(dim=0)).max())
    return {
        "prepare_passes": prepared,
        "passes": passes,
        "products": products,
        "true_residual": residual,
        "reached": residual <= 1.01 * rtol,
        "said": report.said(solution),
        "seconds": done - started,
    }


# ---------------------------------------------------------------------------------- networks


def _mlp() -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def _cnn() -> Any:
    from torch import nn

    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(192, 10),
    )


@functools.cache
def _transformer_class() -> Any:
    import torch
    from torch import nn

    class Transformer(nn.Module):
        """Rows of pixels as tokens; one pre-norm block, mean pooling."""

        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Linear(8, 16)
            self.places = nn.Parameter(0.1 * torch.randn(8, 16))
            self.norms = nn.ModuleList([nn.LayerNorm(16), nn.LayerNorm(16)])
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
            self.head = nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.tokens(x.unflatten(1, (8, 8))) + self.places
            z = self.norms[0](h)
            h = h + self.attention(z, z, z, need_weights=False)[0]
            h = h + self.down(torch.nn.functional.gelu(self.up(self.norms[1](h))))
            return self.head(h.mean(1))

    return Transformer


_NETWORKS: dict[str, Callable[[], Any]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "transformer": lambda: _transformer_class()(),
}


# ------------------------------------------------------------------------------------ tables


def markdown(found: list[dict[str, Any]]) -> str:
    """A table for each case and curvature."""
    parts = [_LEGEND]
    for (case, curvature), group in report.grouped(found, "case", "curvature"):
        parts.append(f"## {case}, {curvature}")
        columns = list(dict.fromkeys((row["damping"], row["rtol"]) for row in group))
        head = ["", *(f"λ {d:.0e}, rtol {r:.0e}" for d, r in columns), "fit seconds"]
        lines = []
        for (label,), mine in report.grouped(group, "preconditioner"):
            cells = {(row["damping"], row["rtol"]): row for row in mine}
            fit = mine[0]["fit_seconds"]
            texts = (_cell(cells[c]) if c in cells else "–" for c in columns)  # "–": ended before
            lines.append([label, *texts, f"{fit:.2g}" if fit else ""])
        parts.append(report.table(head, lines))
    return "\n\n".join(parts)


def summary(found: list[dict[str, Any]], damping: float = 1e-2) -> str:
    """For the README: passes to all tolerances at one damping, the fewest in bold."""
    chosen = [row for row in found if math.isclose(row["damping"], damping)]
    labels = list(dict.fromkeys(row["preconditioner"] for row in chosen))
    lines = []
    for (case, curvature), group in report.grouped(chosen, "case", "curvature"):
        cells = {label: [] for label in labels}
        for row in sorted(group, key=lambda row: -row["rtol"]):
            cells[row["preconditioner"]].append(row["passes"] if row["reached"] else None)
        counts = [list(passes) for passes in cells.values() if passes and None not in passes]
        best = min(counts, key=sum)
        lines.append([f"{curvature}, {case}", *(_passes(cells[label], best) for label in labels)])
    return report.table(["", *labels], lines)


def _passes(passes: list[int | None], best: list[int]) -> str:
    if not passes:
        return "–"
    text = " / ".join("–" if n is None else str(n) for n in passes)
    return f"**{text}**" if passes == best else text


_LEGEND = """\
# Preconditioners of block CG

Curvature of small networks on scikit-learn's digits, 1,000 training samples, 16 test gradients as
right-hand sides, float64. Each cell: passes over the data until the true relative residual of every
column is below the tolerance, those of a preconditioner that is made of products included, and
seconds of preparing and solving. K-FAC, EKFAC and Gauss–Newton are fitted once for all dampings,
in the seconds of the last column, to the exact Fisher matrix; "signs" takes one backward pass."""


def _cell(row: dict[str, Any]) -> str:
    text = f"{row['passes']} ({row['seconds']:.2g} s)"
    return text if row["reached"] else f"not reached ({row['said']})"
