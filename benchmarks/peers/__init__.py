"""Against the other libraries: seconds to a given accuracy, which the harness measures itself.

Every library runs in an interpreter of its own, on the same trained networks, data, dtype and one
thread; seconds are those of the processor, which other work on the machine disturbs least. Rounds
are interleaved: all libraries once, then all again. What fails, diverges or runs over the cap is a
row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import environments
from .tables import markdown as markdown


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network (see `networks.NETWORKS`), a matrix of it, samples, λ, and right-hand sides."""

    network: str
    matrix: str = "hessian"
    n_train: int = 1280
    damping: float = 1e-2
    dtype: str = "float32"
    k: int = 16


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is run."""

    cases: tuple[Case, ...]
    batch: int = 256
    rounds: int = 3
    max_seconds: float = 60.0
    peers: tuple[str, ...] = tuple(peer.name for peer in environments.PEERS)


_HESSIANS = (
    Case(network="logreg", damping=1e-3, dtype="float64"),
    Case(network="mlp", dtype="float64"),
    Case(network="cancer", dtype="float64"),
    Case(network="diabetes", dtype="float64"),
    Case(network="cnn", n_train=400),
    Case(network="mlp_wide"),
    Case(network="mlp_1m"),
    Case(network="transformer", n_train=400, damping=1e-1),
    Case(network="mnist1d_mlp", dtype="float64"),
    Case(network="mnist1d_cnn", n_train=400),
)
_OTHERS = (
    Case(network="mlp_small", matrix="ggn", dtype="float64"),  # where blocks are compared too
    Case(network="mlp", matrix="ggn", dtype="float64"),
    Case(network="cnn", matrix="ggn", n_train=400),
    Case(network="mlp", matrix="fisher", dtype="float64"),
    Case(network="mlp_wide", matrix="fisher"),
)
FULL = Grid(cases=_HESSIANS + _OTHERS)
QUICK = Grid(
    cases=(Case(network="logreg", n_train=200, damping=1e-1, k=2),),
    rounds=1,
    max_seconds=10.0,
    peers=("invhvp", "torch"),
)


def options(parser: argparse.ArgumentParser) -> None:
    """What may be asked of every case, beside what is published."""
    add = parser.add_argument
    add("--k", type=_count, nargs="+", metavar="K", help="numbers of right-hand sides")
    add(
        "--damping",
        type=_damping,
        nargs="+",
        metavar="λ",
        help="dampings, in place of a case's own",
    )
    add("--dtype", nargs="+", choices=("float32", "float64"), help="in place of a case's own")


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        msg = f"{text!r} is given; an integer of at least 1 is allowed"
        raise argparse.ArgumentTypeError(msg)
    return value


def _damping(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        msg = f"{text!r} is given; a finite number of at least 0 is allowed"
        raise argparse.ArgumentTypeError(msg)
    return value


def varied(cases: tuple[Case, ...], asked: argparse.Namespace) -> tuple[Case, ...]:
    """The cases with all that is asked in place of their own; each once."""
    own = {name: getattr(asked, name) for name in ("k", "damping", "dtype")}
    values = [[(name, value) for value in given] for name, given in own.items() if given]
    made = (replace(case, **dict(way)) for case in cases for way in itertools.product(*values))
    return tuple(dict.fromkeys(made))


_ACCURACY = ("residual", "error", "score_error", "spearman", "block_error", "formula_error")


def rows(grid: Grid) -> Iterator[dict[str, Any]]:
    """One row for each case and contender."""
    for case in grid.cases:
        yield from _case(case, grid)


def _case(case: Case, grid: Grid) -> Iterator[dict[str, Any]]:
    import torch

    from . import judge

    name = f"{case.network}, {case.k} right-hand sides, {case.dtype}"
    where = {"case": name, "matrix": case.matrix, "damping": case.damping}
    try:
        given = judge.problem(case, grid.batch)
        samples = len(given["test"][0])
        if samples < case.k:
            failed = f"{case.k} right-hand sides are asked of {samples} test samples"
            yield {**where, "library": "all", "method": "methods", "failed": failed}
            return
        where["case"] = judge.described(given)
        judged = judge.Judge(given, case.matrix)
    except Exception as error:
        said = str(error).strip().splitlines()[:1] or [type(error).__name__]
        if isinstance(error, ModuleNotFoundError):  # of its data
            said.append("pip install 'invhvp[bench]'")
        failed = ": ".join(said)
        yield {**where, "library": "all", "method": "methods", "failed": failed}
        return
    seen: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.pt"
        torch.save(given, path)
        for round_ in range(grid.rounds):
            for peer in environments.PEERS:
                if peer.name not in grid.peers:
                    continue
                again = None
                if round_:  # once is enough for what fails or takes long
                    again = [
                        name
                        for (owner, name), found in seen.items()
                        if owner == peer.name and _total(found[-1]) < grid.max_seconds / 6
                    ]
                    if not again:
                        continue
                for row in _run(peer, case, path, Path(folder), grid, again):
                    answer = row.pop("where", None)
                    if answer is not None:
                        row.update(_judged(judged, Path(answer), row["name"].split(": ", 1)[-1]))
                    seen.setdefault((peer.name, row["name"]), []).append(row)
    for (owner, name), found in seen.items():
        yield {**where, "library": owner, "method": name.split(": ", 1)[-1], **_merged(found)}


def _judged(judge: Any, answer: Path, name: str) -> dict[str, Any]:
    """What is true of an answer in a file, which is removed."""
    import torch

    try:
        return judge.metrics(torch.load(answer, weights_only=False), name)
    except Exception as error:
        return {"failed": f"cannot be judged: {type(error).__name__}: {error}"[:160]}
    finally:
        answer.unlink()


def _total(row: dict[str, Any]) -> float:
    return float("inf") if "failed" in row else row["fit"] + row["solve"]


def _run(
    peer: environments.Peer,
    case: Case,
    problem: Path,
    folder: Path,
    grid: Grid,
    again: list[str] | None,
) -> list[dict[str, Any]]:
    """The rows of one library, in its own interpreter."""
    here = Path(__file__).parent
    try:
        python = environments.interpreter(peer)
    except environments.UnavailableError as error:
        return [{"name": f"{case.matrix}: everything", "failed": str(error)}]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    if peer.requires is None:
        environment["PYTHONPATH"] = os.pathsep.join(_our_folders())
    names = asked_of(peer, case) if again is None else again
    if not names:
        return []
    command = [python, here / "worker.py", peer.side, problem, folder, str(grid.max_seconds)]
    try:
        out, errors = _output([*map(str, command), *names], environment, folder)
    except OSError as error:
        failed = f"{python} cannot be started: {error.strerror or error}"
        if peer.requires is not None:
            failed += f"; see INVHVP_{peer.name.upper()}_PYTHON"
        return [{"name": f"{case.matrix}: everything", "failed": failed}]
    found = [json.loads(line[4:]) for line in out.splitlines() if line.startswith("ROW ")]
    missing = [name for name in names if name not in {row["name"] for row in found}]
    last = (errors.strip().splitlines() or ["no output"])[-1]
    return found + [{"name": name, "failed": f"did not start: {last[:160]}"} for name in missing]


def _output(command: list[str], environment: dict[str, str], folder: Path) -> tuple[str, str]:
    """What a worker prints; it and the contender that it has forked end with us."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=folder,
        start_new_session=True,  # a process group of its own
    ) as worker:
        try:
            return worker.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()  # which Popen does not at an interrupt


def asked_of(peer: environments.Peer, case: Case) -> list[str]:
    """Names of what a library runs for a case."""
    names = [name for name in contenders(peer) if name.startswith(f"{case.matrix}: ")]
    wide = case.dtype == "float64"  # then all of them are
    return [name for name in names if not (wide and name.endswith(", in float64"))]


def contenders(peer: environments.Peer) -> list[str]:
    """Names of what a library runs, read without importing it."""
    import ast

    tree = ast.parse((Path(__file__).parent / f"{peer.side}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            target = node.targets[0]
            if isinstance(target, ast.Name) and target.id == "CONTENDERS":
                return [str(k.value) for k in node.value.keys if isinstance(k, ast.Constant)]
    msg = f"{peer.side} has no table CONTENDERS"
    raise ValueError(msg)


def _our_folders() -> list[str]:
    import invhvp
    import invhvp_torch

    found = [Path(str(m.__file__)).parents[1] for m in (invhvp, invhvp_torch)]
    return [str(path) for path in dict.fromkeys(found)]


def _merged(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and the spread over the rounds; accuracy of the last."""
    good = [row for row in found if "failed" not in row]
    having = {"with": found[-1]["with"]} if "with" in found[-1] else {}
    if not good:
        return {"failed": found[-1]["failed"], **having}
    totals = sorted(_total(row) for row in good)
    return {
        "fit": statistics.median(row["fit"] for row in good),
        "solve": statistics.median(row["solve"] for row in good),
        "seconds": statistics.median(totals),
        "spread": [totals[0], totals[-1]],
        "wall": statistics.median(row["wall"] for row in good),
        "rounds": len(good),
        "peak_mib": max(row["peak_mib"] for row in good),
        **{name: good[-1].get(name) for name in _ACCURACY},
        "said": good[-1].get("said", ""),
        **having,
    }
