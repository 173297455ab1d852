"""python -m benchmarks.readme: write the README's tables and numbers, and the picture beside the
results that they are made from; nothing is typed.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from invhvp_demo import files

from . import damping_path, forms, gauss_newton, hessian_products, plots, preconditioners, report
from .peers.tables import GOALS, TITLES, Fastest, fastest, name, nobody

README = Path(__file__).parents[1] / "README.md"


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each problem: ours, the fastest other library, and the ratio of seconds."""
    lines = []
    for (case, matrix, damping), group in report.grouped(rows, "case", "matrix", "damping"):
        line = [f"{TITLES[matrix]}, {case}, λ = {damping:.0e}"]
        for goal in GOALS:
            line += _cells(fastest(group, goal), nobody(group))
        lines.append(line)
    head = ["problem"]
    for goal in GOALS:
        head += [f"to {goal:.0e}: `invhvp`", "fastest other library", "ratio"]
    return report.table(head, lines)


def _cells(found: Fastest, nobody: str) -> list[str]:
    own, other, borrower = found
    mine = "–" if own is None else f"{own['seconds']:.2g} s, {own['method']}"
    theirs = nobody if other is None else f"{other['seconds']:.2g} s, {name(other)}"
    ratio = "–" if own is None or other is None else _ratio(other, own)
    if own is not None and borrower is not None:
        ratio += f" ({borrower['seconds'] / own['seconds']:.2g})"
    return [re.sub(r" to 1e-\d", "", text) for text in (mine, theirs)] + [ratio]


def _ratio(other: dict[str, Any], own: dict[str, Any]) -> str:
    ratio = f"{other['seconds'] / own['seconds']:.2g} ×"
    return f"**{ratio}**" if other["seconds"] > own["seconds"] else ratio


def forms_table(rows: list[dict[str, Any]]) -> str:
    """Systems solved by each form of block CG, passes for each case, seconds for the first."""
    done = [row["form"] for row in rows if row["outcome"] != "missed"]
    solved = [str(done.count(form)) for form in FORMS]
    lines = [["solved to the tolerance or to the floor of the precision", *solved]]
    for (case,), group in report.grouped(rows, "case"):
        each = [part for _, part in report.grouped(group, "dtype")]
        ratios = [" / ".join(forms.ratio(part, form, "passes") for part in each) for form in FORMS]
        lines.append([f"passes over the data, float64 / float32: {case}", *ratios])
    _, first = next(iter(report.grouped(rows, "case", "dtype")))
    seconds = [forms.ratio(first, form, "seconds") for form in FORMS]
    lines.append(["seconds where products are tiny: the first of these, float64", *seconds])
    lines.append(["error bound, status, proof of negative curvature", "yes", "–", "–", "–"])
    systems = len(list(report.grouped(rows, "case", "dtype", "rhs", "damping")))
    return report.table([f"16 right-hand sides, {systems} systems ¹", *FORMS.values()], lines)


FORMS = {
    forms.BLOCK: "`BlockCG`",
    forms.BREAKDOWN_FREE: "Ji & Li (2017), the best of ten rank decisions for each system",
    forms.OLEARY: "O'Leary (1980)",
    forms.COLUMNS: "CG, column by column",
}


def _wrapped(sentences: Callable[[list[dict[str, Any]]], str]) -> Section:
    return lambda rows: textwrap.fill(sentences(rows) + ".", 100, break_on_hyphens=False)


Section = Callable[[list[dict[str, Any]]], str]
SECTIONS: dict[str, Section] = {
    "peers": table,
    "damping-path": _wrapped(damping_path.sentence),
    "forms": forms_table,
    "hessian-products": _wrapped(hessian_products.sentence),
    "gauss-newton": _wrapped(gauss_newton.paragraph),
    "preconditioners": preconditioners.summary,
}


def written(text: str, results: dict[str, list[dict[str, Any]]]) -> str:
    """The README's text with what these rows of suites say, each between its two marks."""
    for suite, rows in results.items():
        pattern = re.compile(rf"(<!-- {suite} -->\n).*?(<!-- /{suite} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"the README has no <!-- {suite} --> section")
        said = SECTIONS[suite](rows)
        text = pattern.sub(lambda found, said=said: found[1] + said + "\n" + found[2], text)
    return text


def main(arguments: list[str] | None = None) -> None:
    """Rewrite the README in place, and draw the picture."""
    argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__).parse_args(
        arguments
    )
    contents = {
        suite: json.loads((report.RESULTS / f"{suite}.json").read_text(encoding="utf-8"))
        for suite in SECTIONS
    }
    text = README.read_text(encoding="utf-8")
    files.write(README, written(text, {name: c["rows"] for name, c in contents.items()}))
    plots.save(contents["peers"])


if __name__ == "__main__":
    main()
