"""python -m benchmarks [SUITE] [--case TEXT] [--quick] [--cap SECONDS] [--out DIR]: peers without
SUITE. What is measured is saved after every case.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REMEDY = 'the benchmarks need more packages than the library: pip install -e ".[bench]"'

try:
    from . import (
        collection,
        damping_path,
        engine,
        floor,
        forms,
        gauss_newton,
        gpu_check,
        growth,
        hessian_products,
        keeping,
        methods,
        peers,
        plots,
        preconditioners,
        report,
        spectrum,
    )
    from .peers import environments
except ModuleNotFoundError as error:
    sys.exit(f"{error}; {REMEDY}")

SUITES = {
    "forms": forms,
    "methods": methods,
    "gauss-newton": gauss_newton,
    "hessian-products": hessian_products,
    "preconditioners": preconditioners,
    "peers": peers,
    "damping-path": damping_path,
    "collection": collection,
    "engine": engine,
    "floor": floor,
    "growth": growth,
    "spectrum": spectrum,
}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print Markdown, write it and JSON."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["gpu"]:  # checks answers too, and has options of its own
        return gpu_check.main(arguments[1:])
    suite, grid, settings, out, kind = _asked(arguments)
    if hasattr(suite, "PEER") and not settings["quick"]:
        _provide(suite.PEER)
    finished: list[dict[str, Any]] = []
    unfinished: list[dict[str, Any]] = []  # of cases that failed or were interrupted
    code = 0
    with _ended_by_sigterm() as ended:
        try:
            for part in _parts(grid):
                before = len(unfinished)
                try:
                    for row in suite.rows(part):
                        unfinished.append(row)
                        _tell(len(finished) + len(unfinished))
                except ModuleNotFoundError as error:
                    _say(f"{error}; {REMEDY}")
                    code = 1
                    break
                except Exception as error:  # the next case may do better
                    _say(f"{_named(part)} failed: {type(error).__name__}: {error}")
                    code = 1
                else:
                    finished += unfinished[before:]
                    del unfinished[before:]
                    if out is not None:
                        _save(suite, kind, out, finished, settings)
        except KeyboardInterrupt:
            code = 128 + (ended or [signal.SIGINT])[0]
            n = len(finished) + len(unfinished)
            saved = f", saved in {out}" if n and out else ""
            _say(f"interrupted; measured: {f'{n} rows' if n else 'nothing'}{saved}")
        if not finished and not unfinished:
            return code
        print(_save(suite, kind, out, finished, settings, unfinished))
        if out is not None and kind == "peers":
            _draw(out)
    return code


def _asked(arguments: list[str]) -> tuple[Any, Any, dict[str, Any], Path | None, str]:
    """The suite, what it is to run, the settings to be written, the folder, and its name."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["peers", *arguments]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parsers = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    parsers.add_parser("gpu", help="answers and times on a GPU; see benchmarks.gpu_check")
    for name, suite in SUITES.items():
        _options(parsers.add_parser(name, help=(suite.__doc__ or "").splitlines()[0]), suite)
    options = parser.parse_args(arguments)
    suite = SUITES[options.suite]
    grid = suite.QUICK if options.quick else suite.FULL
    if options.cap is not None:
        grid = dataclasses.replace(grid, max_seconds=options.cap)
    if options.case is not None:
        there = getattr(grid, "cases", ())
        chosen = tuple(case for case in there if options.case in repr(case))
        if not there:
            parser.error(f"the suite {options.suite} has no cases to choose from")
        if not chosen:
            listed = "".join(f"\n  {case!r}" for case in there)
            parser.error(f"no case contains {options.case!r}; there are{listed}")
        grid = dataclasses.replace(grid, cases=chosen)
    if hasattr(suite, "varied"):
        grid = dataclasses.replace(grid, cases=suite.varied(grid.cases, options))
    out = options.out or (None if options.quick else report.RESULTS)
    if out is not None:
        try:
            keeping.check(out, options.suite)
        except keeping.UnusableError as error:
            parser.error(str(error))
    limits = {f.name: getattr(grid, f.name) for f in dataclasses.fields(grid) if f.name != "cases"}
    return suite, grid, {"quick": options.quick, **limits}, out, options.suite


def _provide(name: str) -> None:
    """The interpreter of a peer by its environment variable, for suites that ask for it there."""
    variable = f"INVHVP_{name.upper()}_PYTHON"
    if os.environ.get(variable):
        return
    (peer,) = (peer for peer in environments.PEERS if peer.name == name)
    try:
        os.environ[variable] = environments.interpreter(peer)
    except environments.UnavailableError as error:
        _say(str(error))  # its rows say that it is missing


def _parts(grid: Any) -> list[Any]:
    """The grid by cases, which do not depend on each other: one is saved before the next."""
    if not hasattr(grid, "cases"):
        return [grid]
    return [dataclasses.replace(grid, cases=(case,)) for case in grid.cases]


def _named(grid: Any) -> str:
    return repr(grid.cases[0]) if hasattr(grid, "cases") else "the suite"


def _save(
    suite: Any,
    kind: str,
    out: Path | None,
    rows: list[dict[str, Any]],
    settings: dict[str, Any],
    unfinished: list[dict[str, Any]] | None = None,
) -> str:
    """Write what there is, and return its Markdown."""
    content = keeping.merged(out, kind, rows, settings, unfinished or ())
    try:
        tables = suite.markdown(content["rows"])
    except Exception as error:
        if not unfinished:
            raise
        tables = f"No tables of a case that was not finished ({type(error).__name__}: {error})."
    text = f"{tables}\n\n{keeping.notes(content)}"
    if out is not None:
        report.write(out, kind, content, text)
    return text


def _draw(out: Path) -> None:
    """The picture of the comparison, where matplotlib is there and has something to show."""
    content = keeping.earlier(out, "peers")
    try:
        if content is not None and plots.shown(content):
            plots.save(content, out / "peers.png")
    except ModuleNotFoundError as error:
        _say(f"no picture: {error}; pip install 'invhvp[plot]'")


@contextmanager
def _ended_by_sigterm() -> Iterator[list[int]]:
    """SIGTERM as an interrupt, so that what was measured is saved and children are ended."""
    ended: list[int] = []

    def stop(number: int, _: Any) -> None:
        ended.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone may have handlers
        yield ended
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield ended
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(number: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{number} rows", end="", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    start = "\r" if sys.stderr.isatty() else ""
    print(f"{start}benchmarks: {text}", file=sys.stderr, flush=True)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        msg = f"{text!r} is given; a finite number of seconds above 0 is allowed"
        raise argparse.ArgumentTypeError(msg)
    return value


def _options(parser: argparse.ArgumentParser, suite: Any) -> None:
    parser.add_argument("--quick", action="store_true", help="a small case in a few seconds")
    parser.add_argument("--case", metavar="TEXT", help="only cases whose description contains TEXT")
    parser.add_argument("--cap", type=_seconds, metavar="SECONDS", help="limit of a row")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results (default: benchmarks/results; with --quick, none); rows that "
        "are there of cases that are not run are kept",
    )
    if hasattr(suite, "options"):
        suite.options(parser)


if __name__ == "__main__":
    sys.exit(main())
