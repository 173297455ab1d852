"""Time to accuracy as pictures: what each library reaches, and how long it takes."""

from __future__ import annotations

import argparse
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from invhvp.plots._axes import PALETTE, clean
from invhvp_demo import files

from . import report
from .peers import environments
from .peers.tables import TITLES

PICTURE = report.RESULTS / "peers.png"
COLUMNS = 3
WORST, BEST = 1.0, 1e-9  # no better than x = 0, and exact to most: both are drawn at the edge
COLOURS = {peer.name: PALETTE[i] for i, peer in enumerate(environments.PEERS)}


def points(group: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(seconds, residual) of all that returned a solution, for each library, fastest first."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in group:
        if row.get("residual") and math.isfinite(row["residual"]):
            point = (row["seconds"], row["residual"])
            found.setdefault(row["library"], []).append(point)
    return {name: sorted(found[name]) for name in COLOURS if name in found}


def front(sorted_points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that are better than all that is as fast and than x = 0, which all start from."""
    best: list[tuple[float, float]] = []
    for seconds, residual in sorted_points:
        if residual < (best[-1][1] if best else WORST):
            best.append((seconds, residual))
    return [(best[0][0], WORST), *best] if best else []


def draw(ax: Any, group: list[dict[str, Any]]) -> None:
    """One case: a mark for each method, a staircase for each library, ours on top."""
    found = points(group)
    end = 2 * max(seconds for marks in found.values() for seconds, _ in marks)
    for name in reversed(found):
        own = name == environments.OURS.name
        style = {"color": COLOURS[name], "zorder": 3 if own else 2}
        best = front(found[name])
        if best:
            x, y = zip(*best, (end, best[-1][1]), strict=True)
            ax.step(x, [max(r, BEST) for r in y], where="post", lw=2.0 if own else 1.1, **style)
        for seconds, residual in found[name]:
            mark = "^" if residual >= WORST else "v" if residual <= BEST else "o"
            seen = min(max(residual, BEST), WORST)
            size, alpha = 26 if own else 18, 0.6 if residual >= WORST else 1.0
            shown = {"s": size, "marker": mark, "alpha": alpha, "lw": 0, "clip_on": False}
            ax.scatter(seconds, seen, **shown, **style)
    ax.set(xscale="log", yscale="log", ylim=(BEST, WORST), yticks=[1, 1e-3, 1e-6, 1e-9])
    ax.minorticks_off()
    clean(ax)


def figure(content: dict[str, Any]) -> Any:
    """All cases of these results, a panel each, with one legend."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    cases = list(_cases(content["rows"]))
    lines = math.ceil(len(cases) / COLUMNS)
    made = Figure(figsize=(10.0, 2.6 * lines + 0.9), layout="constrained")
    panels = made.subplots(lines, COLUMNS, sharey=True, squeeze=False)
    for ax, (title, group) in zip(panels.flat, cases, strict=False):
        draw(ax, group)
        ax.set_title(title, fontsize=9, loc="left")
        ax.tick_params(labelsize=8)
    for ax in panels.flat[len(cases) :]:
        ax.set_axis_off()
    made.supxlabel(
        "seconds of the processor, fit and solve; ▲ no better than x = 0, ▼ 1e-9 or less",
        fontsize=9,
    )
    made.supylabel("true relative residual", fontsize=9)
    there = {row["library"] for row in content["rows"] if row.get("residual")}
    handles = [
        Line2D([], [], color=colour, marker="o", lw=1.5, ms=5, label=name)
        for name, colour in COLOURS.items()
        if name in there
    ]
    made.legend(
        handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9
    )
    return made


def _cases(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Of each case that has something to show, its title and its rows."""
    for (case, matrix, damping), group in report.grouped(rows, "case", "matrix", "damping"):
        if points(group):
            name, *rest = case.split(", ")
            size = ", ".join(part for part in rest if not part.startswith("N = "))
            size = re.sub(r"(\d+) right-hand sides?", r"k = \1", size)
            yield f"{TITLES[matrix]}, {name}, λ = {damping:.0e}\n{size}", group


def shown(content: dict[str, Any]) -> bool:
    """Whether there is anything to draw."""
    return any(True for _ in _cases(content["rows"]))


def save(content: dict[str, Any], path: Path = PICTURE) -> None:
    """The same bytes for the same results, complete or not at all."""
    drawn = io.BytesIO()
    figure(content).savefig(drawn, format="png", dpi=150, metadata={"Software": None})
    files.write(path, drawn.getvalue())


def main(arguments: list[str] | None = None) -> None:
    """Draw the published results again."""
    about = "python -m benchmarks.plots: draw benchmarks/results/peers.png again"
    argparse.ArgumentParser(description=about).parse_args(arguments)
    save(json.loads((report.RESULTS / "peers.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
