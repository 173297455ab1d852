"""What a run keeps of the results in its folder, and when and how each row was measured.

Rows of several runs lie in one file, so each has its own "circumstances"; what the file says of
itself is what is common to all of them, and null where they differ.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import report

_SETTINGS = ("max_seconds", "rounds")
_LIBRARIES = ("invhvp", "torch", "numpy")


class UnusableError(Exception):
    """A folder or a file in it that results cannot be written to, with what to do."""


def check(folder: Path, kind: str) -> None:
    """Before anything is measured: can the results be written, beside those that are there?"""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = error.strerror or error
        msg = f"--out {folder} is not a folder that can be written to ({why}): name another"
        raise UnusableError(msg) from None
    earlier(folder, kind)


def earlier(folder: Path, kind: str) -> dict[str, Any] | None:
    """The results that are there, with the circumstances of each row; None without any."""
    path, wanted = folder / f"{kind}.json", f"{report.SCHEMA}/{kind}"
    if not path.exists():
        return None
    remedy = "move it away, or name another folder with --out"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{path} is there and cannot be read as JSON ({error}): {remedy}"
        raise UnusableError(msg) from None
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != wanted or not isinstance(found.get("rows"), list):
        msg = f"{path} has the schema {schema!r}, and rows of {wanted!r} would be added: {remedy}"
        raise UnusableError(msg)
    for row in found["rows"]:
        row.setdefault("circumstances", of(found))
    return found


def of(content: dict[str, Any]) -> dict[str, Any]:
    """The circumstances of all rows of a file, or of a run, from what is said at its head."""
    settings, versions = content.get("settings", {}), content.get("versions", {})
    return {
        "date": content.get("date"),
        **{name: settings[name] for name in _SETTINGS if name in settings},
        "processor": content.get("machine", {}).get("processor"),
        "versions": {name: versions[name] for name in _LIBRARIES if name in versions},
    }


def merged(
    folder: Path | None,
    kind: str,
    rows: list[dict[str, Any]],
    settings: dict[str, Any],
    unfinished: Iterable[dict[str, Any]] = (),
) -> dict[str, Any]:
    """What is to be written: these rows, and those in the folder of cases that are not among them.

    Rows of a case that was not finished count only where the folder has none of it: half a case
    does not replace a whole one.
    """
    content = report.document(kind, [], json.loads(json.dumps(settings)))
    found = earlier(folder, kind) if folder is not None else None
    there = found["rows"] if found else []
    known = {_case(row) for row in there}
    fresh = rows + [row for row in unfinished if _case(row) not in known]
    for row in fresh:
        row.setdefault("circumstances", of(content))
    again = {_case(row) for row in fresh}
    kept = [row for row in there if _case(row) not in again and not _empty(row)]
    if found and kept:
        for part in ("machine", "versions", "settings"):
            old = found.get(part, {})
            content[part] = {
                key: value if key in old and old[key] == value else None
                for key, value in content[part].items()
            }
    content["rows"] = kept + fresh
    return content


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("case", "matrix", "damping"))


def _empty(row: dict[str, Any]) -> bool:
    """Of a case of which nothing could be measured: another run of it may have another name."""
    return "failed" in row and row.get("library") == "all"


def notes(content: dict[str, Any]) -> str:
    """Under the tables: the common circumstances, the libraries, and what differs by case."""
    rows = content["rows"]
    parts = [report.circumstances(content), _libraries(rows), _differences(rows)]
    return "\n\n".join(part for part in parts if part)


def _libraries(rows: list[dict[str, Any]]) -> str:
    """The versions that the interpreters of the libraries had, as they said with each row."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if isinstance(row.get("with"), dict):
            own = [text for name, text in row["with"].items() if name != "torch"]
            torch = row["with"].get("torch")
            words = [*own, *(["with torch"] if own and torch else []), *([torch] if torch else [])]
            said = found.setdefault(row["library"], [])
            if " ".join(words) not in said:
                said.append(" ".join(words))
    if not found:
        return ""
    return "Ran: " + "; ".join(f"{name} {' or '.join(s)}" for name, s in found.items()) + "."


def _differences(rows: list[dict[str, Any]]) -> str:
    """Date, cap, rounds, processor and versions of each case, as far as they are not common."""
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        flat = dict(row.get("circumstances", {}))
        flat |= flat.pop("versions", {})
        if flat not in cases.setdefault(_case(row), []):
            cases[_case(row)].append(flat)
    every = [flat for group in cases.values() for flat in group]
    keys = [
        key
        for key in dict.fromkeys(key for flat in every for key in flat)
        if any(flat.get(key) != every[0].get(key) for flat in every)
    ]
    if not keys:
        return ""
    lines = ["Not all cases were measured in one run:", ""]
    for (case, matrix, damping), group in cases.items():
        name = ", ".join(str(part) for part in (matrix, case) if part is not None) or "all rows"
        name += "" if damping is None else f", λ = {damping:g}"
        ways = [", ".join(_said(key, flat[key]) for key in keys if key in flat) for flat in group]
        lines.append(f"- {name}: {'; '.join(dict.fromkeys(ways))}")
    return "\n".join(lines)


def _said(key: str, value: Any) -> str:
    if key == "date":
        return str(value)
    if key == "max_seconds":
        return f"cap {value:g} s" if value is not None else "cap unknown"
    return f"{key} {value if value is not None else 'unknown'}"
