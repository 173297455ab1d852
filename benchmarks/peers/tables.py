"""The comparison as Markdown, and who is first."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import report
from .environments import PEERS


def markdown(found: list[dict[str, Any]]) -> str:
    """A table for each case, what reaches 1e-6 first, then 1e-3, each by its seconds."""
    pinned = [item for peer in PEERS for item in peer.requires or () if "==" in item]
    parts = [f"{_LEGEND} The others are {', '.join(pinned)}, with the PyTorch named below."]
    for (case, matrix, damping), group in report.grouped(found, "case", "matrix", "damping"):
        parts.append(f"## {TITLES[matrix]}: {case}, λ = {damping:.0e}")
        parts.append(report.table(_HEAD, [_line(row) for row in sorted(group, key=_order)]))
        summary = best(group)
        if summary:
            parts.append(summary)
    return "\n\n".join(parts)


def best(group: list[dict[str, Any]]) -> str:
    """Our fastest against the fastest peer, at each accuracy that ours reaches."""
    said = []
    for goal in GOALS:
        found = fastest(group, goal)
        own = found.own
        if own is None:
            continue
        text = f"to a true residual of {goal:.0e}, {own['method']} takes {own['seconds']:.2g} s"
        if found.other is None:
            text += f", and {absent(group)}"
        for row, start in (
            (found.other, "the fastest of other libraries"),
            (found.borrower, "the fastest that borrows our operator"),
        ):
            if row is not None:
                ratio = row["seconds"] / own["seconds"]
                text += f"; {start}, {name(row)}, {row['seconds']:.2g} s: {ratio:.2g} ×"
        said.append(text)
    alone = [row for row in group if row.get("residual") is None]
    said += _against_the_nearest(alone, "score_error", "scores alone")
    said += _against_the_nearest(group, "formula_error", "the mean of inverses")
    text = "; ".join(said)
    return text[:1].upper() + text[1:] + "." if text else ""


def _against_the_nearest(group: list[dict[str, Any]], key: str, title: str) -> list[str]:
    """Our fastest row that has an error of this kind, and the fastest peer of those with little,
    or else with the least of it.
    """
    rows = [row for row in group if row.get(key) is not None]
    own = [row for row in rows if row["library"] == "invhvp"]
    if not own:
        return []
    mine = min(own, key=lambda row: row["seconds"])
    said = f"{title}: {mine['method']} {mine['seconds']:.2g} s, {report.number(mine[key])} off"
    peers = [row for row in rows if row not in own]
    if peers:
        first = min(peers, key=lambda row: (max(row[key], SLACK * GOALS[0]), row["seconds"]))
        said += f"; the nearest peer, {first['library']}'s {first['method']}, "
        said += f"{first['seconds']:.2g} s, {report.number(first[key])} off"
        said += f": {first['seconds'] / mine['seconds']:.2g} ×"
    return [said]


GOALS = (1e-3, 1e-6)
# Residuals up to so many times a goal reach it. A library that stops on the mean residual of all
# right-hand sides leaves twice the goal in the worst of them, and is not to lose by that alone.
SLACK, SLACK_OF_OTHERS = 2, 3


# What says in `failed` that a library was not installed, or could not be started.
_NOT_RUN = ("pip could not install", "did not start", "cannot be started")


def absent(group: list[dict[str, Any]]) -> str:
    """Why no other library has reached an accuracy: it did not, or none was there to try."""
    ran, missing = _tried(group)
    if not ran:
        return f"no other library could be run ({', '.join(missing) or 'none was asked for'})"
    text = "no other library gets there within the cap"
    return f"{text} ({', '.join(missing)} could not be run)" if missing else text


def nobody(group: list[dict[str, Any]]) -> str:
    """The same in a word or two."""
    ran, missing = _tried(group)
    if not ran:
        return "not run"
    return f"none ({', '.join(missing)} not run)" if missing else "none"


def _tried(group: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Other libraries of which something was run, and those of which nothing could be."""
    tried: dict[str, bool] = {}
    for row in group:
        if row["library"] not in ("invhvp", "lineax"):
            failed = row.get("failed", "")
            run = not any(text in failed for text in _NOT_RUN)
            tried[row["library"]] = tried.get(row["library"], False) or run
    return [name for name, run in tried.items() if run], [n for n, run in tried.items() if not run]


class Fastest(NamedTuple):
    """Rows that reach an accuracy: ours, another library's, and CG of another on our operator."""

    own: dict[str, Any] | None
    other: dict[str, Any] | None
    borrower: dict[str, Any] | None


def fastest(group: list[dict[str, Any]], goal: float) -> Fastest:
    """The fastest of each kind of those that reach a goal."""
    kinds: list[list[dict[str, Any]]] = [[], [], []]
    for row in group:
        if row.get("residual") and _reaches(row, goal):
            kinds[_kind(row)].append(row)
    return Fastest(*(min(rows, key=lambda r: r["seconds"], default=None) for rows in kinds))


def _kind(row: dict[str, Any]) -> int:
    """Where in `Fastest` a row belongs."""
    if "SciPy" in row["method"] or row["library"] == "lineax":
        return 2
    return int(row["library"] != "invhvp")


def _reaches(row: dict[str, Any], goal: float) -> bool:
    slack = SLACK if _kind(row) == 0 else SLACK_OF_OTHERS
    return bool(row["residual"] <= slack * goal)


def name(row: dict[str, Any]) -> str:
    """The library and the method of a row that is not ours."""
    return row["method"] if row["library"] == "invhvp" else f"{row['library']} {row['method']}"


def _said(row: dict[str, Any]) -> str:
    said = [row["said"], f"{row['peak_mib']:.0f} MiB"]
    if row.get("block_error") is not None:
        said.insert(0, f"blocks {row['block_error']:.2g} off")
    if row.get("formula_error") is not None:
        said.insert(0, f"its formula {row['formula_error']:.2g} off")
    return "; ".join(part for part in said if part)


def _order(row: dict[str, Any]) -> tuple[int, float]:
    residual = row.get("residual")
    if residual is None:
        return (3 if "failed" in row else 2, row.get("seconds", 0.0))
    for rank, goal in enumerate(sorted(GOALS)):
        if _reaches(row, goal):
            return (rank, row["seconds"])
    return (2, residual)


def _line(row: dict[str, Any]) -> list[str]:
    name = f"{row['library']} {row['method']}"
    name = f"**{name}**" if row["library"] == "invhvp" else name
    if "failed" in row:
        return [name, *["–"] * (len(_HEAD) - 2), row["failed"]]
    low, high = row["spread"]
    spearman = row.get("spearman")
    return [
        name,
        f"{row['fit']:.2g}",
        f"{row['solve']:.2g}",
        f"{row['seconds']:.2g} ({low:.2g}–{high:.2g})",
        report.number(row.get("residual")),
        report.number(row.get("error")),
        report.number(row.get("score_error")),
        "–" if spearman is None else f"{spearman:.3f}",
        _said(row),
    ]


_HEAD = [
    "library, method", "fit, s", "solve, s", "both, s", "true residual", "error",
    "error of scores", "Spearman", "says of itself; peak memory",
]  # fmt: skip
TITLES = {"hessian": "Hessian", "ggn": "Gauss–Newton", "fisher": "Empirical Fisher"}
_LEGEND = """\
# Against the peers

Seconds are those of the processor, medians (least–most) of interleaved rounds on one thread,
without imports; what takes more than a sixth of the cap runs once. The residual is the largest
relative one of all right-hand sides, the error the median of ‖x − x*‖/‖x*‖, both against the exact
matrix of the title in float64. Scores are those of all training samples for a test point: their
error is the median of ‖s − s*‖/‖s*‖, Spearman the mean rank correlation with exact ones. What gives
scores alone has no residual. Methods that approximate another matrix are judged by the same one:
that is what they are used for; "blocks … off" is the relative Frobenius error of their blocks
[W | b], "its formula … off" the error of a mean of inverses against that mean.

A residual of up to twice the goal counts as reaching it, for other libraries up to three times.
Loaders have batches of 256, or one of all the data where those would not be equal: pyDVL counts a
short last batch as much as a whole one. Of problems in float32 ours may compute residuals in
float64; what is called "in float64" computes everything so. CG of SciPy and of lineax borrows our
operator; lineax compiles at its first call, which counts as "fit", and is not asked for 1e-6 of a
Hessian nor for networks of more than 50,000 parameters."""
