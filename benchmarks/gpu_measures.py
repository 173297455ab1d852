"""The sections of the GPU check: each yields rows, and each row that can be wrong says `ok`."""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import invhvp as ih
from invhvp import _arithmetic, _backend, _lapack

from .gpu_libraries import Library, counted_transfers, timed, unplanned_synchronisations

Row = dict[str, Any]
DAMPING = 1e-2


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the problems are: p parameters, N samples, rank of A, k right-hand sides."""

    p: int
    N: int
    rank: int
    k: int
    gemm: int
    copied: int
    factors: tuple[tuple[int, int], ...]
    repeats: int


QUICK = Size(
    p=400, N=120, rank=16, k=4, gemm=192, copied=1 << 18, factors=((2, 24), (1, 64)), repeats=3
)
CPU = Size(
    p=20_000, N=400, rank=32, k=16, gemm=1024, copied=1 << 24,
    factors=((64, 32), (16, 128), (1, 512)), repeats=5,
)  # fmt: skip
CUDA = Size(
    p=1 << 18, N=2048, rank=64, k=64, gemm=8192, copied=1 << 29,
    factors=((512, 32), (128, 128), (32, 512), (8, 1024), (1, 4096)), repeats=9,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class System:
    """(GᵀG/N + λI)X = B for a G of known singular vectors: the answer is a formula."""

    G: Any
    B: Any
    exact: np.ndarray
    harmonic: np.ndarray

    @property
    def operator(self) -> ih.RankOneMean:
        return ih.RankOneMean(ih.DenseGradients(self.G))


def system(library: Library, size: Size, dtype: str) -> System:
    """θ from 1 to 1e-3; G is multiplied out on the device in float64, then rounded."""
    rng = np.random.default_rng(7)
    U = np.linalg.qr(rng.standard_normal((size.p, size.rank)))[0]
    W = np.linalg.qr(rng.standard_normal((size.N, size.rank)))[0]
    theta = np.geomspace(1.0, 1e-3, size.rank)
    B = rng.standard_normal((size.p, size.k)).astype(dtype).astype(np.float64)
    exact = (B - U @ ((theta / (theta + DAMPING))[:, None] * (U.T @ B))) / DAMPING
    left = W * np.sqrt(theta * size.N)
    norms = np.sum(left**2, axis=1)
    weights = 1.0 / (size.N * (DAMPING + norms))
    harmonic = (B - U @ (left.T @ (weights[:, None] * (left @ (U.T @ B))))) / DAMPING
    G = library.place(left) @ library.place(U.T)
    G = library.xp.astype(G, getattr(library.xp, dtype))
    return System(G, library.place(B, dtype), exact, harmonic)


def relative_error(library: Library, X: Any, exact: np.ndarray) -> float:
    return float(np.linalg.norm(library.host(X) - exact) / np.linalg.norm(exact))


# ----------------------------------------------------------------------------------- 1 ceilings


def ceilings(library: Library, size: Size) -> Iterator[Row]:
    """What the device can do at most: bytes, multiplications, launches and answers a second."""
    xp, where = library.xp, {"section": "ceilings", "library": library.name}
    source = library.place(np.random.default_rng(0).standard_normal(size.copied), "float32")
    target = xp.empty_like(source)
    t = timed(library, partial(library.copy, target, source), size.repeats)
    rate = 2 * 4 * size.copied / t.seconds
    yield {**where, "what": "copy", "unit": "GB/s", "value": rate / 1e9, "spread": t.spread}
    del source, target
    for dtype in ("float32", "float64"):
        m = size.gemm
        M = library.place(np.random.default_rng(1).standard_normal((m, m)), dtype)
        t = timed(library, partial(_arithmetic.matmul, M, M), size.repeats, warm=3)
        rate = 2 * m**3 / t.seconds
        yield {
            **where, "what": f"GEMM {dtype}", "unit": "TFLOP/s", "value": rate / 1e12,
            "spread": t.spread,
        }  # fmt: skip
    one = library.place(np.ones(1), "float32")
    t = timed(library, lambda: [one + one for _ in range(500)], size.repeats)
    yield {
        **where, "what": "launch", "unit": "us", "value": t.seconds / 500 * 1e6, "spread": t.spread,
    }  # fmt: skip
    t = timed(library, lambda: [_backend.to_host(one) for _ in range(100)], size.repeats)
    yield {
        **where, "what": "transfer of a number", "unit": "us", "value": t.seconds / 100 * 1e6,
        "spread": t.spread,
    }  # fmt: skip


# ------------------------------------------------------------------- 2 operator, methods, peers


def methods(size: Size, dtype: str) -> dict[str, tuple[Any, float]]:
    """Every algorithm, and the relative error that it may have: rtol times the condition."""
    tight = {"float32": 1e-5, "float64": 1e-10}[dtype]
    iterated = 100 * tight
    factored = {"float32": 2e-3, "float64": 1e-9}[dtype]
    low_rank = {"float32": 2e-2, "float64": 1e-6}[dtype]
    rank = size.rank + 8
    nystroem = ih.NystroemPreconditioner(rank=rank)
    return {
        "BlockCG": (ih.BlockCG(rtol=tight), iterated),
        "BlockCG, a look every 10": (ih.BlockCG(rtol=tight, check_every=10), iterated),
        "BlockCG, never a look": (
            ih.BlockCG(rtol=tight, check_every=None, maxiter=size.rank + 10), iterated,
        ),
        "BlockCG + Nyström": (ih.BlockCG(rtol=tight, preconditioner=nystroem), iterated),
        "BlockCG + Jacobi": (ih.BlockCG(rtol=tight, preconditioner=ih.Jacobi()), iterated),
        "CG": (ih.CG(rtol=tight), iterated),
        "Minres": (ih.Minres(rtol=tight), iterated),
        "LiSSA": (ih.LiSSA(rtol=1e-2), 0.1),
        "SampleSpace": (ih.SampleSpace(), factored),
        "Arnoldi": (ih.Arnoldi(rank=size.rank, tol=0.1 * low_rank), low_rank),
        "NystroemSketch": (ih.NystroemSketch(rank=rank), low_rank),
        "InverseHarmonicMean": (ih.InverseHarmonicMean(), factored),
    }  # fmt: skip


def operator_and_methods(
    library: Library, size: Size, dtype: str, ceiling: dict[str, float]
) -> Iterator[Row]:
    """One product against its floor, then each method against the formula and the product."""
    found = system(library, size, dtype)
    A, where = found.operator, {"library": library.name, "dtype": dtype}
    product: dict[int, float] = {}
    for k in sorted({1, min(8, size.k), size.k}):
        t = timed(library, partial(A._matmat, found.B[:, :k]), size.repeats)
        product[k] = t.seconds
        moved = 2 * size.N * size.p * _backend.itemsize(A.dtype) / ceiling["copy"]
        floor = max(moved, 4 * size.N * size.p * k / ceiling[f"GEMM {dtype}"])
        yield {
            "section": "operator", **where, "k": k, "seconds": t.seconds, "floor": floor,
            "ratio": t.seconds / floor, "spread": t.spread,
        }  # fmt: skip
    for name, (method, limit) in methods(size, dtype).items():
        exact = found.harmonic if name == "InverseHarmonicMean" else found.exact
        yield {
            "section": "methods", **where, "method": name,
            **_measured(library, method, A, found.B, exact, limit, product[size.k]),
        }  # fmt: skip
    yield from peers(library, size, dtype, found)


def _measured(
    library: Library, method: Any, A: Any, B: Any, exact: np.ndarray, limit: float, product: float
) -> Row:
    library.reset_peak()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ih.InvhvpWarning)
        started = time.perf_counter()
        inverse = method.prepare(A, damping=DAMPING)
        library.wait()
        preparation = time.perf_counter() - started
        inverse.solve(B[:, :1])  # warm: kernels are compiled by dtype, not by width
        library.wait()
        with unplanned_synchronisations(library) as waited, counted_transfers() as transfers:
            started = time.perf_counter()
            solution = inverse.solve(B)
            library.wait()
            seconds = time.perf_counter() - started
    error = relative_error(library, solution.x, exact)
    kept = solution.x.dtype == B.dtype
    worst = float(np.max(library.host(solution.relative_residuals)))
    return {
        "ok": bool(error <= limit and kept and math.isfinite(worst)),
        "error": error,
        "limit": limit,
        "residual": worst,
        "prepare_seconds": preparation,
        "seconds": seconds,
        "passes": solution.passes,
        "iterations": solution.iterations,
        "overhead": seconds / max(solution.passes * product, 1e-12),
        "transfers": transfers.count,
        "transfers_per_iteration": transfers.count / max(1, solution.iterations),
        "waits_seen_by_torch": len(waited) if library.on_gpu and library.name == "torch" else None,
        "peak_bytes": library.peak_bytes(),
    }


def peers(library: Library, size: Size, dtype: str, found: System) -> Iterator[Row]:
    """The library's own CG one column at a time, and a plain loop over the block."""
    A, B, rtol = found.operator, found.B, {"float32": 1e-5, "float64": 1e-10}[dtype]
    damped = ih.Damped(A, DAMPING)
    columns = min(size.k, 4)
    where = {"section": "peers", "library": library.name, "dtype": dtype}

    def by_column() -> Any:
        if library.name == "cupy":
            from cupyx.scipy.sparse.linalg import cg  # pyright: ignore[reportMissingImports]

            exported = ih.as_cupyx(damped)
        else:
            from scipy.sparse.linalg import cg

            exported = ih.as_scipy(damped)
        word = "rtol" if "rtol" in inspect.signature(cg).parameters else "tol"  # CuPy 13
        options = {word: rtol, "maxiter": 10 * size.rank}
        return [cg(exported, B[:, j], **options)[0] for j in range(columns)]

    def loop() -> Any:
        xp = library.xp
        X, R = xp.zeros_like(B), B
        P, old = R, xp.sum(R * R, axis=0)
        stop = rtol**2 * old
        for _ in range(10 * size.rank):
            Q = damped._matmat(P)
            step = old / xp.sum(P * Q, axis=0)
            X, R = X + step * P, R - step * Q
            new = xp.sum(R * R, axis=0)
            if bool(xp.all(new <= stop)):
                break
            P, old = R + (new / old) * P, new
        return X

    runs: dict[str, tuple[Callable[[], Any], int]] = {"plain loop over the block": (loop, size.k)}
    if library.name != "torch":
        own = "cupyx cg by column" if library.name == "cupy" else "scipy cg by column"
        runs[own] = by_column, columns
    ours = ih.BlockCG(rtol=rtol).prepare(A, damping=DAMPING)
    runs["invhvp BlockCG"] = (lambda: ours.solve(B).x), size.k
    for name, (run, width) in runs.items():
        result = run()
        X = library.xp.stack(result, axis=1) if isinstance(result, list) else result
        error = relative_error(library, X, found.exact[:, :width])
        t = timed(library, run, 3, warm=0)
        yield {
            **where, "peer": name, "ok": error <= 1e3 * rtol, "error": error,
            "seconds_per_column": t.seconds / width, "spread": t.spread,
        }  # fmt: skip


# ------------------------------------------------------------------------- 3 Kronecker factors


def kronecker(library: Library, size: Size, ceiling: dict[str, float]) -> Iterator[Row]:
    """Eigenvectors of many factors, and products in their basis against the GEMM ceiling."""
    rng, where = np.random.default_rng(3), {"section": "Kronecker", "library": library.name}
    for count, m in size.factors:
        S = rng.standard_normal((count, m, 2 * m))
        S = S @ S.transpose(0, 2, 1) / (2 * m)
        placed = library.place(S)
        t = timed(library, lambda S=placed: [_lapack.eigh(M) for M in S], 1, warm=1)
        together = timed(library, partial(_lapack.eigh, placed), 1, warm=1)
        w, V = _lapack.eigh(placed[0, :, :])
        rebuilt = library.host(V) @ np.diag(library.host(w)) @ library.host(V).T
        error = float(np.max(np.abs(rebuilt - S[0])))
        yield {
            **where, "what": f"eigh {count} of {m}", "ok": error < 1e-11 * m, "error": error,
            "seconds": t.seconds / count,
            "batched_seconds": together.seconds / count,
        }  # fmt: skip
    o = i = min(1024, size.factors[-1][1])  # the formula is evaluated on the host
    U, V = (np.linalg.qr(rng.standard_normal((m, m)))[0] for m in (o, i))
    values = rng.uniform(0.0, 1.0, (o, i))
    K = ih.EigenKronecker(*(library.place(x, "float32") for x in (U, V, values)))
    B = rng.standard_normal((o * i, size.k)).astype(np.float32)
    inverse = ih.Direct().prepare(K, damping=DAMPING)
    placed = library.place(B)
    found = library.host(inverse @ placed)
    block = U.T @ B.astype(np.float64).T.reshape(size.k, o, i) @ V / (values + DAMPING)
    exact = (U @ block @ V.T).reshape(size.k, -1).T
    error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    t = timed(library, lambda: inverse @ placed, size.repeats)
    rate = size.k * 4 * o * i * (o + i) / t.seconds
    yield {
        **where, "what": f"EKFAC inverse of a {o} x {i} layer, {size.k} columns",
        "ok": error < 1e-3, "error": error, "seconds": t.seconds,
        "of_gemm_ceiling": rate / ceiling["GEMM float32"],
    }  # fmt: skip
