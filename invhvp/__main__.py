"""`python -m invhvp demo` runs the main job; `python -m invhvp doctor` says what works here."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

_COMMANDS = {
    "demo": "find wrong labels in real data, and the images that help or hurt a prediction",
    "doctor": "show versions, backends, devices and precision settings, and what is missing",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command of the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m invhvp",
        description="Inverse-Hessian-vector products on any array, with certificates.",
    )
    commands = parser.add_subparsers(dest="command", metavar="{demo,doctor}")
    modules = {}
    for name, what in _COMMANDS.items():
        command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        modules[name] = _module(name)
        modules[name].add_arguments(command)
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    return modules[options.command].main(options)


def _module(name: str) -> Any:
    """The module behind a command, by name: the library itself does not know the demo."""
    try:
        return importlib.import_module(f"invhvp_demo.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("invhvp_demo"):
            raise
        print(
            "the package invhvp_demo, which comes with invhvp, cannot be found: install the "
            "checkout with  pip install -e '.[demo]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from error


if __name__ == "__main__":
    sys.exit(main())
