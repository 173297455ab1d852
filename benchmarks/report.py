"""Results as JSON with a versioned schema, and as Markdown."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import math
import os
import platform
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from invhvp_demo import files

SCHEMA = "invhvp-benchmarks/1"
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("invhvp", "numpy", "scipy", "torch", "jax", "lineax", "array-api-compat")


def document(kind: str, rows: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """What is written: rows, and under which circumstances they were measured."""
    return {
        "schema": f"{SCHEMA}/{kind}",
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        "rows": rows,
    }


def write(folder: Path, kind: str, content: dict[str, Any], text: str) -> list[Path]:
    """Write `kind`.json and `kind`.md, each complete or not at all; NaN becomes null."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{kind}.json", folder / f"{kind}.md"]
    files.write_json(paths[0], content)
    files.write(paths[1], text + "\n")
    return paths


def machine() -> dict[str, Any]:
    """What times depend on; nothing that tells which machine it was."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    threads = {name: os.environ[name] for name in _THREADS if name in os.environ}
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": processor(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "blas": f"{blas['name']} {blas['version']}",
        "threads": threads,
    }


def processor() -> str:
    """What the system calls the processor; nothing where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def circumstances(content: dict[str, Any]) -> str:
    """One line under the tables."""
    m = content["machine"]
    several = "several"  # null where the rows of a file differ; see `keeping`
    threads = m["threads"]
    if threads is not None:
        threads = ", ".join(f"{k}={v}" for k, v in threads.items()) or "threads not limited"
    libraries = ", ".join(f"{k} {v}" for k, v in content["versions"].items() if v is not None)
    plain = {k: v for k, v in content["settings"].items() if isinstance(v, (int, float))}
    settings = ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in plain.items() if k != "quick")
    dates = sorted({row["circumstances"]["date"] for row in content["rows"] if _dated(row)})
    date = f"{dates[0]} to {dates[-1]}" if len(dates) > 1 else content["date"]
    name = m.get("processor", "")
    return (
        f"{date}, {m['system'] or several} {m['architecture'] or ''}, "
        f"{m['processors'] or several} processors "
        f"({several if name is None else name or 'unnamed'}), "
        f"{threads or 'several settings of threads'}, Python {m['python'] or several}, "
        f"{m['blas'] or 'several BLAS'}, {libraries or 'several versions'}. "
        f"Settings: {settings or several}. "
        "Times are of a shared machine: trust ratios within a row, not seconds."
    )


def _dated(row: dict[str, Any]) -> bool:
    return bool(row.get("circumstances", {}).get("date"))


def said(solution: Any) -> str:
    """The statuses of a `Solution`, without those of zero columns."""
    status = solution.status if isinstance(solution.status, tuple) else (solution.status,)
    names = Counter(s.name for s in status)
    if len(names) > 1:
        names.pop("ZERO", None)
    return ", ".join(name for name, _ in names.most_common())


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def grouped(
    rows: list[dict[str, Any]], *keys: str
) -> Iterable[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    """Rows by the values of `keys`, in order of appearance."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups.items()


def number(value: float | None) -> str:
    """Two digits; a dash for nothing."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def mean_ratio(pairs: Sequence[tuple[float, float]]) -> str:
    """Geometric mean of first over second."""
    if not pairs:
        return "–"
    return f"{statistics.geometric_mean([a / b for a, b in pairs]):.2g}"
