"""What this machine can do at most, and how near the kernels on tall blocks come to it.

Bandwidth is that of a copy between two blocks of the same size, arithmetic that of a square matrix
product, a call that of the smallest operation; one thread count, one library each.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from invhvp import _arithmetic, _backend, _linalg

from . import report
from .gpu_libraries import Library, Torch, timed


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is run: shapes (n, k) of the blocks, the size of the matrix product, repetitions."""

    shapes: tuple[tuple[int, int], ...]
    gemm: int = 1536
    repeats: int = 7
    libraries: tuple[str, ...] = ("numpy", "torch")
    dtypes: tuple[str, ...] = ("float32", "float64")
    max_seconds: float = 60.0


FULL = Grid(shapes=((650, 2), (650, 16), (10_000, 16), (1_000_000, 16), (200_000, 64)))
QUICK = Grid(shapes=((500, 4), (20_000, 4)), gemm=128, repeats=3, dtypes=("float32",))


@dataclass(frozen=True)
class Machine:
    """Measured limits of one library in one precision, for blocks of one shape.

    Attributes:
        copy: bytes per second, read and written.
        gemm: flops per second.
        call: seconds of the smallest operation.
    """

    copy: float
    gemm: float
    call: float
    itemsize: int

    def floor(self, words: float, flops: float, calls: int = 0) -> float:
        """Seconds below which so many words and flops cannot be done."""
        return max(words * self.itemsize / self.copy, flops / self.gemm) + calls * self.call


def libraries(names: tuple[str, ...]) -> list[Library]:
    """Those of the names that are installed, on the CPU."""
    found: list[Library] = []
    for name in names:
        if name == "numpy":
            found.append(Library())
            continue
        try:
            found.append(Torch(importlib.import_module(name), "cpu"))
        except ImportError:
            continue
    return found


def block(library: Library, n: int, k: int, dtype: str, seed: int = 0) -> Any:
    """Standard normal entries (n, k)."""
    drawn = np.random.default_rng(seed).standard_normal((n, k), dtype=np.float32)
    return library.place(drawn, dtype)


def machine(
    library: Library, shape: tuple[int, int], dtype: str, *, gemm: int, repeats: int
) -> Machine:
    """Measure the limits; the best of the repetitions, since a limit is what is never exceeded."""
    n, k = shape
    source, target = block(library, n, k, dtype), block(library, n, k, dtype, 1)
    inner = max(1, 100_000 // (n * k))
    copied = _best(library, lambda: [library.copy(target, source) for _ in range(inner)], repeats)
    M = block(library, gemm, gemm, dtype)
    multiplied = _best(library, partial(_arithmetic.matmul, M, M), min(repeats, 4))
    one = block(library, 1, 1, dtype)
    called = _best(library, lambda: [one + one for _ in range(200)], repeats)
    item = _backend.itemsize(source.dtype)
    return Machine(
        copy=2 * item * n * k * inner / copied,
        gemm=2 * gemm**3 / multiplied,
        call=called / 200,
        itemsize=item,
    )


def _best(library: Library, work: Callable[[], Any], repeats: int) -> float:
    work()
    return min(timed(library, work, 1, warm=0).seconds for _ in range(repeats))


@dataclass(frozen=True)
class Kernel:
    """One operation on tall blocks, with the least that it has to move and to compute."""

    name: str
    run: Callable[..., Any]  # (X, Y, M, alpha)
    words: Callable[[int, int], float]
    flops: Callable[[int, int], float]


KERNELS = (
    Kernel(
        "X + Y diag(α)",
        lambda X, Y, M, alpha: X + _linalg.scale_columns(Y, alpha),
        lambda n, k: 3 * n * k,
        lambda n, k: 2 * n * k,
    ),
    Kernel(
        "column_dot(X, Y)",
        lambda X, Y, M, alpha: _linalg.column_dot(X, Y),
        lambda n, k: 2 * n * k,
        lambda n, k: 2 * n * k,
    ),
    Kernel(
        "column_norms(X)",
        lambda X, Y, M, alpha: _linalg.column_norms(X),
        lambda n, k: n * k,
        lambda n, k: 2 * n * k,
    ),
    Kernel(
        "gram(X, Y)",
        lambda X, Y, M, alpha: _linalg.gram(X, Y),
        lambda n, k: 2 * n * k,
        lambda n, k: 2 * n * k * k,
    ),
    Kernel(
        "combine(X, M)",
        lambda X, Y, M, alpha: _linalg.combine(X, M),
        lambda n, k: 2 * n * k,
        lambda n, k: 2 * n * k * k,
    ),
    Kernel(  # norms, scaling, a Gram matrix and an update, and the Gram matrix that ends it
        "cholqr(X)",
        lambda X, Y, M, alpha: _linalg.cholqr(X),
        lambda n, k: 7 * n * k,
        lambda n, k: 6 * n * k * k,
    ),
)


def rows(grid: Grid) -> Iterator[dict[str, Any]]:
    """The limits of each library, precision and shape, and each kernel against them."""
    for library in libraries(grid.libraries):
        for dtype in grid.dtypes:
            for n, k in grid.shapes:
                where = {"library": library.name, "dtype": dtype, "n": n, "k": k}
                limits = machine(library, (n, k), dtype, gemm=grid.gemm, repeats=grid.repeats)
                yield {
                    **where,
                    "kernel": "limits",
                    "copy": limits.copy,
                    "gemm": limits.gemm,
                    "call": limits.call,
                }
                X, Y = (block(library, n, k, dtype, seed) for seed in (2, 3))
                M = _backend.to_small(block(library, k, k, dtype, 4))
                for kernel in KERNELS:
                    t = timed(library, partial(kernel.run, X, Y, M, M[0, :]), grid.repeats)
                    least = limits.floor(kernel.words(n, k), kernel.flops(n, k))
                    yield {
                        **where,
                        "kernel": kernel.name,
                        "seconds": t.seconds,
                        "spread": t.spread,
                        "floor_seconds": least,
                        "fraction": least / t.seconds,
                    }


# ------------------------------------------------------------------------------------ tables


def markdown(found: list[dict[str, Any]]) -> str:
    """The limits, then for each library and precision the kernels on each shape."""
    limits = [row for row in found if row["kernel"] == "limits"]
    lines = [
        [
            row["library"],
            row["dtype"],
            f"{row['n']:,} × {row['k']}",
            f"{row['copy'] / 1e9:.3g}",
            f"{row['gemm'] / 1e9:.3g}",
            f"{1e6 * row['call']:.2g}",
        ]
        for row in limits
    ]
    head = ["library", "precision", "block", "copy, GB/s", "GEMM, GFLOP/s", "a call, µs"]
    parts = [_LEGEND, report.table(head, lines)]
    kernels = [row for row in found if row["kernel"] != "limits"]
    for (library, dtype), group in report.grouped(kernels, "library", "dtype"):
        shapes = list(dict.fromkeys((row["n"], row["k"]) for row in group))
        each = {(row["kernel"], row["n"], row["k"]): row for row in group}
        lines = []
        for name in dict.fromkeys(row["kernel"] for row in group):
            cells = [each[name, n, k] for n, k in shapes]
            lines.append([name, *(_cell(row) for row in cells)])
        head = ["kernel", *(f"{n:,} × {k}" for n, k in shapes)]
        parts += [f"## {library}, {dtype}", report.table(head, lines)]
    return "\n\n".join(parts)


def _cell(row: dict[str, Any]) -> str:
    return f"{1e3 * row['seconds']:.3g} ms ({100 * row['fraction']:.0f} %)"


_LEGEND = """\
# The floor of this machine, and the kernels on it

Median milliseconds of each kernel, and in brackets the part of the floor that it reaches: the
larger of the bytes that have to move, at the speed of a copy, and of the flops, at that of a square
matrix product. Small blocks fit into the caches and are bound by calls instead, which the floor
leaves out. Every kernel returns a new array; a large one costs NumPy fresh pages of memory, which
the copy does not pay."""
