"""The comparison as Markdown, and who is first."""

from __future__ import annotations

from typing import Any

from .. import report


def markdown(found: list[dict[str, Any]]) -> str:
    """A table for each case, fastest to a true residual of 1e-3 first."""
    parts = [_LEGEND]
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
        own, other = fastest(group, goal)
        if own is None:
            continue
        start = f"to a true residual of {goal:.0e}, {own['method']} takes {own['seconds']:.2g} s"
        if other is None:
            said.append(f"{start}, and no peer gets there within the cap")
        else:
            peer = f"{other['library']}'s {other['method']}"
            ratio = other["seconds"] / own["seconds"]
            said.append(
                f"{start}, the fastest peer, {peer}, {other['seconds']:.2g} s: {ratio:.2g} ×"
            )
    text = "; ".join(said)
    return text[:1].upper() + text[1:] + "." if text else ""


GOALS = (1e-3, 1e-6)


def fastest(
    group: list[dict[str, Any]], goal: float
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Our fastest row, and the fastest of all others, with a true residual of at most 2 × goal."""
    reached = [row for row in group if row.get("residual") and row["residual"] <= 2 * goal]
    own = [row for row in reached if row["library"] == "invhvp" and "SciPy" not in row["method"]]
    other = [row for row in reached if row not in own]

    def first(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        return min(rows, key=lambda row: row["seconds"]) if rows else None

    return first(own), first(other)


def _said(row: dict[str, Any]) -> str:
    said = [row["said"], f"{row['peak_mib']:.0f} MiB"]
    if row.get("block_error") is not None:
        said.insert(0, f"blocks {row['block_error']:.2g} off")
    return "; ".join(part for part in said if part)


def _order(row: dict[str, Any]) -> tuple[int, float]:
    residual = row.get("residual")
    if residual is None:
        return (3 if "failed" in row else 2, row.get("seconds", 0.0))
    for rank, goal in enumerate((2e-6, 2e-3)):
        if residual <= goal:
            return (rank, row["seconds"])
    return (2, residual)


def _line(row: dict[str, Any]) -> list[str]:
    name = f"{row['library']} {row['method']}"
    name = f"**{name}**" if row["library"] == "invhvp" else name
    if "failed" in row:
        return [name, "–", "–", "–", "–", "–", "–", row["failed"]]
    low, high = row["spread"]
    spearman = row.get("spearman")
    return [
        name,
        f"{row['fit']:.2g}",
        f"{row['solve']:.2g}",
        f"{row['seconds']:.2g} ({low:.2g}–{high:.2g})",
        report.number(row.get("residual")),
        report.number(row.get("error")),
        "–" if spearman is None else f"{spearman:.3f}",
        _said(row),
    ]


_HEAD = [
    "library, method", "fit, s", "solve, s", "both, s", "true residual", "error", "Spearman",
    "says of itself; peak memory",
]  # fmt: skip
TITLES = {"hessian": "Hessian", "ggn": "Gauss–Newton", "fisher": "Empirical Fisher"}
_LEGEND = """\
# Against the peers

Seconds are those of the processor, medians (least–most) of interleaved rounds on one thread,
without imports; what takes more than a sixth of the cap runs once. The residual is the largest
relative one of all right-hand sides, the error the median of ‖x − x*‖/‖x*‖, both against the exact
matrix of the title in float64; Spearman is the mean rank correlation of a test point's scores with
exact ones. Methods that approximate another matrix are judged by the same one: that is what they
are used for; "blocks … off" is the relative Frobenius error of their blocks [W | b]. SciPy's CG
runs on our operator and counts as a peer."""
