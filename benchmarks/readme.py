"""python -m benchmarks.readme: write the README's table, and the picture beside the results that
it is made from; nothing is typed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from . import plots, report
from .peers.tables import GOALS, TITLES, Fastest, fastest, name

README = Path(__file__).parents[1] / "README.md"
SECTION = re.compile(r"(<!-- peers -->\n).*?(<!-- /peers -->)", re.DOTALL)


def table(content: dict[str, Any]) -> str:
    """A line for each problem: ours, the fastest other library, and the ratio of seconds."""
    lines = []
    for (case, matrix, damping), group in report.grouped(
        content["rows"], "case", "matrix", "damping"
    ):
        line = [f"{TITLES[matrix]}, {case}, λ = {damping:.0e}"]
        for goal in GOALS:
            line += _cells(fastest(group, goal))
        lines.append(line)
    head = ["problem"]
    for goal in GOALS:
        head += [f"to {goal:.0e}: `invhvp`", "fastest other library", "ratio"]
    return report.table(head, lines)


def _cells(found: Fastest) -> list[str]:
    own, other, borrower = found
    mine = "–" if own is None else f"{own['seconds']:.2g} s, {own['method']}"
    theirs = "none" if other is None else f"{other['seconds']:.2g} s, {name(other)}"
    ratio = "–" if own is None or other is None else _ratio(other, own)
    if own is not None and borrower is not None:
        ratio += f" ({borrower['seconds'] / own['seconds']:.2g})"
    return [re.sub(r" to 1e-\d", "", text) for text in (mine, theirs)] + [ratio]


def _ratio(other: dict[str, Any], own: dict[str, Any]) -> str:
    ratio = f"{other['seconds'] / own['seconds']:.2g} ×"
    return f"**{ratio}**" if other["seconds"] > own["seconds"] else ratio


def written(text: str, content: dict[str, Any]) -> str:
    """The README's text with the table of these results."""
    if not SECTION.search(text):
        raise ValueError("the README has no <!-- peers --> section")
    return SECTION.sub(lambda found: found[1] + table(content) + "\n" + found[2], text)


def main() -> None:
    """Rewrite the README in place, and draw the picture."""
    content = json.loads((report.RESULTS / "peers.json").read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8")
    README.write_text(written(text, content), encoding="utf-8")
    plots.save(content)


if __name__ == "__main__":
    main()
