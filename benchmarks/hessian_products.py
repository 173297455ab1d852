"""One product with the Hessian of a network, for 1, 16 and 64 vectors, against other libraries.

Each contender is a process of its own, all with the same model, data and vectors; they take turns
product by product, so that a busy machine is busy for all. pyDVL has an interpreter of its own,
which INVHVP_PYDVL_PYTHON names or the full run makes; otherwise its rows say why they are missing.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import report
from .hessian_workers import CONTENDERS, NETWORKS, OURS, Worker, build

BATCH_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network on the digits, as in `hessian_workers.NETWORKS`, and numbers of vectors."""

    network: str
    n_train: int = 1280
    columns: tuple[int, ...] = (1, 16, 64)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is run; `max_seconds` limits the turns of one number of vectors, beyond the first."""

    cases: tuple[Case, ...]
    max_seconds: float = 20.0
    turns: int = 10


_ALL = ("logistic", "mlp", "wide mlp", "cnn", "transformer")
PEER = "pyDVL"  # in an interpreter of its own
FULL = Grid(cases=tuple(Case(network=name) for name in _ALL))
QUICK = Grid(
    cases=(Case(network="logistic", n_train=300, columns=(1, 4)),), max_seconds=1.0, turns=3
)


def rows(grid: Grid) -> Iterator[dict[str, Any]]:
    """One row for each case, number of vectors and contender."""
    for case in grid.cases:
        with tempfile.TemporaryDirectory() as folder:
            yield from _case(case, grid, Path(folder))


def _case(case: Case, grid: Grid, folder: Path) -> Iterator[dict[str, Any]]:
    model, train = _trained(case)
    n = sum(p.numel() for p in model.parameters())
    exact = _reference(model, train, n)
    given = folder / "given.pt"
    _save(given, case, model, train)
    workers = {name: Worker(name, given) for name in CONTENDERS}
    try:
        for k in case.columns:
            times: dict[str, list[float]] = {name: [] for name in workers}
            started = time.perf_counter()
            for _ in range(grid.turns):
                for name, worker in workers.items():
                    seconds = worker.product(k)
                    if seconds is not None:
                        times[name].append(seconds)
                if time.perf_counter() - started > grid.max_seconds:
                    break
            for name, worker in workers.items():
                found = times[name]
                Y = worker.result(k) if found else None
                yield {
                    "case": f"{case.network}, p = {n}, N = {case.n_train}, float32",
                    "k": k,
                    "method": name,
                    "seconds": min(found) if found else None,
                    "turns": len(found),
                    "relative_error": None if Y is None else _error(Y, exact),
                    "said": worker.said,
                }
    finally:
        for worker in workers.values():
            worker.stop()


def markdown(found: list[dict[str, Any]]) -> str:
    """A table for each case."""
    parts = [_LEGEND]
    for (case,), group in report.grouped(found, "case"):
        lines = []
        for (k,), same in report.grouped(group, "k"):
            ours = next(row["seconds"] for row in same if row["method"] == OURS)
            for row in same:
                seconds = row["seconds"]
                lines.append(
                    [
                        str(k),
                        row["method"],
                        "–" if seconds is None else f"{1e3 * seconds:.3g}",
                        "–" if seconds is None or ours is None else f"{seconds / ours:.2g}",
                        report.number(row["relative_error"]),
                        row["said"],
                    ]
                )
        head = ["vectors", "method", "ms", "÷ invhvp", "relative error", "what ran"]
        parts += [f"## {case}", report.table(head, lines)]
    return "\n\n".join(parts)


def _trained(case: Case) -> tuple[Any, tuple[Any, Any]]:
    import torch
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    n = case.n_train
    x, y = torch.tensor(images[:n] / 16, dtype=torch.float32), torch.tensor(labels[:n])
    with torch.random.fork_rng(devices=[]):
        model = build(case.network)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(60):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x[:BATCH_SIZE]), y[:BATCH_SIZE]).backward()
        optimiser.step()
    optimiser.zero_grad()
    return model.eval(), (x, y)


def _save(given: Path, case: Case, model: Any, train: tuple[Any, Any]) -> None:
    import torch

    content = {
        "networks": NETWORKS,
        "network": case.network,
        "state": model.state_dict(),
        "train": train,
        "batch_size": BATCH_SIZE,
        "columns": max(case.columns),
        "threads": torch.get_num_threads(),
    }
    torch.save(content, given)


def _reference(model: Any, train: tuple[Any, Any], n: int) -> np.ndarray:
    """The first products in float64, by torch.func alone."""
    import copy

    import torch
    from torch.func import functional_call, grad, vjp

    model = copy.deepcopy(model).double()
    values = {name: p.detach() for name, p in model.named_parameters()}
    x, y = train[0].double(), train[1]
    rng = torch.Generator().manual_seed(0)
    V = torch.randn((64, n), generator=rng)[:_COMPARED].double()

    def loss(values: Any) -> Any:
        return torch.nn.functional.cross_entropy(functional_call(model, values, (x,)), y)

    _, pull = vjp(grad(loss), values)
    columns = []
    for v in V:
        parts = v.split([p.numel() for p in values.values()])
        named = zip(values.items(), parts, strict=True)
        direction = {name: part.reshape(p.shape) for (name, p), part in named}
        (product,) = pull(direction)
        columns.append(torch.cat([product[name].reshape(-1) for name in values]))
    return torch.stack(columns, 1).numpy()


def _error(Y: np.ndarray, exact: np.ndarray) -> float:
    """The largest relative error of the columns compared."""
    exact = exact[:, : Y.shape[1]]
    away = np.linalg.norm(Y - exact, axis=0) / np.linalg.norm(exact, axis=0)
    return float(away.max())


def sentence(found: list[dict[str, Any]]) -> str:
    """For the README: how many comparisons were lost, to whom."""
    networks, columns, lost, compared = set(), set(), [], 0
    for (case, k), group in report.grouped(found, "case", "k"):
        timed = {row["method"]: row["seconds"] for row in group if row["seconds"] is not None}
        own = timed.pop("invhvp")
        networks.add(case)
        columns.add(k)
        compared += len(timed)
        lost += [(method, case.split(",")[0], k, s / own) for method, s in timed.items() if s < own]
    *counts, last = (str(k) for k in sorted(columns))
    vectors = f"{', '.join(counts)} and {last} vectors" if counts else f"{last} vector"
    text = (
        f"Of {compared} comparisons with pyDVL and curvlinops "
        f"({len(networks)} networks; {vectors}) "
    )
    if not lost:
        return text + "none was lost"
    listed = (f"{case}, {k} at once, to {m}: {ratio:.2g} ×" for m, case, k, ratio in lost)
    return text + f"{len(lost)} {'was' if len(lost) == 1 else 'were'} lost ({'; '.join(listed)})"


_COMPARED = 2  # columns of a product that are compared with float64

_LEGEND = """\
# A product with the Hessian

Milliseconds of one product with all vectors (of several turns the best, each the median of a few
products), on the digits in batches of 256, each library as its documentation has it: a data loader
for pyDVL (`HessianOperator`, and the gradient kept over all
data, `create_hvp_function`), a list of batches for curvlinops, a data loader for invhvp, which
keeps what it can. The error is that of the first two columns, against float64 products by
`torch.func`."""

if __name__ == "__main__":
    sys.exit("run it as: python -m benchmarks hessian-products")
