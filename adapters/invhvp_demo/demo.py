"""`python -m invhvp demo`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import data

_QUICK = {"n_train": 500, "retrainings": 20, "with_network": False}
_FULL = {"n_train": 1000, "retrainings": 50, "with_network": True}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of the command."""
    parser.add_argument(
        "--out", type=Path, default=Path("invhvp-demo"), metavar="DIR",
        help="folder for index.html, pictures, JSON and CSV (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="fewer images and retrainings, no neural network"
    )
    parser.add_argument(
        "--backend", choices=("numpy", "cupy", "torch"), default="numpy",
        help="array library to compute with (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--device", help="device of that library, such as cuda:0 (default: its own)"
    )


def main(options: argparse.Namespace) -> int:
    """Run the main job; 0, or 1 if retraining contradicts it, or 2 if it cannot run here."""
    started = time.perf_counter()
    try:
        for name in ("sklearn.datasets", "matplotlib", "tqdm"):
            data.require(name)
        data.place_on(options.backend, options.device)
    except (ModuleNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from . import report, study  # after the check of what they need

    chosen: dict[str, Any] = dict(_QUICK if options.quick else _FULL)
    digits = data.load(chosen.pop("n_train"))
    print(
        f"{len(digits.given)} handwritten digits, {int(digits.wrong.sum())} with a wrong label; "
        f"logistic regression on {options.backend}."
    )
    # The matrices are small: where others use the processor too, more threads only wait for
    # each other. scikit-learn brings threadpoolctl.
    with data.require("threadpoolctl").threadpool_limits(1):
        found = study.run(
            digits, backend=options.backend, device=options.device, progress=_bar, **chosen
        )
        page = report.save(found, options.out)
    print(f"\n{report.printed(found)}\n")
    print(f"Report: {page}   ({time.perf_counter() - started:.1f} s)")
    if report.passed(found):
        return 0
    print(
        f"error: the exact method's correlation with retraining is "
        f"{found.leave_one_out.pearson:.4f}, below {report.PASSING_R}",
        file=sys.stderr,
    )
    return 1


def _bar(items: Iterable[Any], label: str, total: int) -> Iterable[Any]:
    # A log file gets no bar: tqdm shows it on terminals only with disable=None.
    return data.require("tqdm").tqdm(items, desc=label, total=total, disable=None, leave=False)
