"""python -m benchmarks SUITE [--case TEXT] [--quick] [--cap SECONDS] [--out DIR]."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

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
    methods,
    peers,
    preconditioners,
    report,
    spectrum,
)

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
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parsers = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    parsers.add_parser("gpu", help="answers and times on a GPU; see benchmarks.gpu_check")
    for name, suite in SUITES.items():
        _options(parsers.add_parser(name, help=(suite.__doc__ or "").splitlines()[0]), suite)
    options = parser.parse_args(arguments)
    suite = SUITES[options.suite]
    grid = published = suite.QUICK if options.quick else suite.FULL
    if options.cap is not None:
        grid = dataclasses.replace(grid, max_seconds=options.cap)
    if options.case is not None:
        there = getattr(grid, "cases", ())
        chosen = tuple(case for case in there if options.case in repr(case))
        if not chosen:
            parser.error(f"no case contains {options.case!r}; there are {list(there)}")
        grid = dataclasses.replace(grid, cases=chosen)
    if hasattr(suite, "varied"):
        grid = dataclasses.replace(grid, cases=suite.varied(grid.cases, options))
    rows = []
    for row in suite.rows(grid):
        rows.append(row)
        if sys.stderr.isatty():
            print(f"\r{len(rows)} rows", end="", file=sys.stderr, flush=True)
    limits = {f.name: getattr(grid, f.name) for f in dataclasses.fields(grid) if f.name != "cases"}
    out = options.out or (None if options.quick else report.RESULTS)
    if out is not None and getattr(grid, "cases", ()) != getattr(published, "cases", ()):
        rows = report.kept(out, options.suite, rows) + rows
    content = report.document(options.suite, rows, {"quick": options.quick, **limits})
    text = f"{suite.markdown(content['rows'])}\n\n{report.circumstances(content)}"
    print(text)
    if out is not None:
        report.write(out, options.suite, content, text)
    return 0


def _options(parser: argparse.ArgumentParser, suite: Any) -> None:
    parser.add_argument("--quick", action="store_true", help="a small case in a few seconds")
    parser.add_argument(
        "--case",
        metavar="TEXT",
        help="only cases whose description contains TEXT; results of others are kept",
    )
    parser.add_argument("--cap", type=float, metavar="SECONDS", help="limit of a row")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results (default: benchmarks/results; with --quick, none)",
    )
    if hasattr(suite, "options"):
        suite.options(parser)


if __name__ == "__main__":
    sys.exit(main())
