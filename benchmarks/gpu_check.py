"""python -m benchmarks.gpu_check [--device cuda|cpu] [--quick] [--budget SECONDS] [--out DIR].

One machine in ten minutes, without network: whether every algorithm is right on NumPy, CuPy and
PyTorch, what it costs over the operator and over the device's own ceilings, how often it waits
for the device, whether arrays change hands without copies, and what other solvers take. Libraries
and devices that are missing are named. Ends with 1 where an answer is wrong, 2 without a device.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import gpu_exchange as exchange
from . import gpu_measures as measures
from . import report
from .gpu_libraries import Library, Torch, libraries

Row = dict[str, Any]
_RESERVE = 30.0  # seconds of the budget for what comes after the sections


def rows(device: str, size: measures.Size, budget: float) -> Iterator[Row]:
    """All sections, as far as the budget goes."""
    started = time.monotonic()
    found, missing = libraries(device)
    for name, why in missing:
        yield {"section": "skipped", "what": name, "why": why}
    # On a GPU NumPy is the reference for correctness and speed, on a problem that it can do.
    for library in found:
        small = measures.CPU if device == "cuda" and not library.on_gpu else size
        yield from _of_library(library, small, started + budget)
    if out_of_time(started + budget):
        yield {"section": "skipped", "what": "exchange, memory", "why": "out of time"}
        return
    yield from exchange.every_pair(found, size)
    yield from _with_a_torch_model(found, size)
    yield from exchange.memory(device, found)


def out_of_time(deadline: float) -> bool:
    return time.monotonic() > deadline - _RESERVE


def _of_library(library: Library, size: measures.Size, deadline: float) -> Iterator[Row]:
    ceiling: dict[str, float] = {}
    for row in measures.ceilings(library, size):
        scale = {"GB/s": 1e9, "TFLOP/s": 1e12}.get(row["unit"], 1.0)
        ceiling[row["what"]] = row["value"] * scale
        yield row
    for dtype in ("float32", "float64"):
        if out_of_time(deadline):
            what = f"methods of {library.name} in {dtype}"
            yield {"section": "skipped", "what": what, "why": "out of time"}
        else:
            yield from measures.operator_and_methods(library, size, dtype, ceiling)
    if out_of_time(deadline):
        why = "out of time"
        yield {"section": "skipped", "what": f"Kronecker factors of {library.name}", "why": why}
    else:
        yield from measures.kronecker(library, size, ceiling)


def _with_a_torch_model(found: list[Library], size: measures.Size) -> Iterator[Row]:
    torch = next((x for x in found if isinstance(x, Torch)), None)
    if torch is None:
        yield {"section": "skipped", "what": "a torch model's Hessian", "why": "no torch here"}
        return
    for library in found:
        if library.on_gpu == torch.on_gpu and library is not torch:
            yield from exchange.torch_model(torch, library, size)


# ------------------------------------------------------------------------------------ tables

_COLUMNS = {
    "ceilings": ("library", "what", "value", "unit", "spread"),
    "operator": ("library", "dtype", "k", "seconds", "floor", "ratio", "spread"),
    "methods": (
        "library", "dtype", "method", "error", "limit", "residual", "prepare_seconds", "seconds",
        "passes", "overhead", "transfers_per_iteration", "waits_seen_by_torch", "peak_bytes",
    ),
    "peers": ("library", "dtype", "peer", "error", "seconds_per_column", "spread"),
    "Kronecker": (
        "library", "what", "error", "seconds", "batched_seconds", "of_gemm_ceiling",
    ),
    "exchange": ("what", "same_memory", "write_seen", "error", "seconds", "over_torch"),
    "memory": ("what", "GiB_held", "error"),
    "skipped": ("what", "why"),
}  # fmt: skip

_LEGEND = """\
# GPU check

A = GᵀG/N with known singular vectors, condition 101 with its damping: `error` is ‖X − X*‖/‖X*‖
against the formula, `limit` what it may be, `overhead` the time of a solve over that of its
passes, `floor` the larger of bytes over the copy rate and flops over the GEMM rate, a transfer a
planned copy from the device to the host, which waits for it. Random data, no TF32, medians."""


def markdown(found: list[Row]) -> str:
    """A table for each section; wrong answers first."""
    parts = [_LEGEND]
    wrong = [row for row in found if row.get("ok") is False]
    judged = sum("ok" in row for row in found)
    parts.append(f"**{len(wrong)} wrong of {judged} answers.**")
    for section, columns in _COLUMNS.items():
        chosen = [row for row in found if row["section"] == section]
        if not chosen:
            continue
        lines = [[_cell(row, column) for column in columns] for row in chosen]
        parts.append(f"## {section}")
        parts.append(report.table([c.replace("_", " ") for c in columns], lines))
    return "\n\n".join(parts)


def _cell(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return "–"
    text = report.number(value) if isinstance(value, float) else str(value)
    wrong = row.get("ok") is False and column in ("error", "same_memory", "GiB_held")
    return f"**{text} WRONG**" if wrong else text


def main(arguments: list[str] | None = None) -> int:
    """Measure, print each row as it comes, then the tables; write JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny problems, some seconds")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results (default: benchmarks/results; with --quick, none)",
    )
    options = parser.parse_args(arguments)
    found, missing = libraries(options.device)
    if options.device == "cuda" and not any(library.on_gpu for library in found):
        for name, why in missing:
            print(f"{name}: {why}", file=sys.stderr)
        print("no CUDA device; --device cpu runs the same code without one", file=sys.stderr)
        return 2
    size = measures.QUICK if options.quick else getattr(measures, options.device.upper())
    collected = []
    for row in rows(options.device, size, options.budget):
        collected.append(row)
        print(_line(row), file=sys.stderr, flush=True)
    settings = {"device": options.device, "quick": options.quick, "budget": options.budget}
    settings["libraries"] = [library.describe() for library in found]
    settings["gpu"] = _gpu_name(found)
    kind = f"gpu-check-{options.device}"
    content = report.document(kind, collected, settings)
    text = f"{markdown(collected)}\n\n{_where(settings)} {report.circumstances(content)}"
    print(text)
    out = options.out or (None if options.quick else report.RESULTS)
    if out is not None:
        report.write(out, kind, content, text)
    return int(any(row.get("ok") is False for row in collected))


def _line(row: Row) -> str:
    said = (f"{k}={report.number(v) if isinstance(v, float) else v}" for k, v in row.items())
    return " ".join(said)


def _gpu_name(found: list[Library]) -> str | None:
    for library in found:
        if library.on_gpu and library.name == "torch":
            return str(library.module.cuda.get_device_name())
        if library.on_gpu:
            properties = library.module.cuda.runtime.getDeviceProperties(0)
            return properties["name"].decode()
    return None


def _where(settings: dict[str, Any]) -> str:
    on = settings["gpu"] or "no GPU: nothing here was run on one"
    return f"{on}; {', '.join(settings['libraries'])}."


if __name__ == "__main__":
    sys.exit(main())
