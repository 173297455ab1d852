"""The methods whose own time is measured, and the least that each has to move and to compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import invhvp as ih
from invhvp import _backend

from .engine_operators import Case, layer_shape

DAMPING = 1e-4
Limits = dict[str, Any]  # rtol=, maxiter= and max_seconds= of an iterative method


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """n parameters, k right-hand sides, rank of a sketch, columns multiplied, side of a layer."""

    n: int
    k: int
    rank: int
    columns: int
    side: int


@dataclass(frozen=True)
class Contender:
    """A method by name, and what of it is timed.

    Attributes:
        unit: "iteration" (between two products of k columns), "preparation" (all of it but the
            products) or "application" (no operator is called).
        run: (limits, case, operator, B) → a function of no arguments to be run once; limits are
            options of iterative methods.
        floor: words and flops that a unit needs.
    """

    name: str
    unit: str
    run: Callable[..., Callable[[], Any]]
    floor: Callable[[Sizes], tuple[float, float]]


def _solved(build: Callable[[Limits], Any]) -> Callable[..., Callable[[], Any]]:
    def run(limits: Limits, case: Case, A: Any, B: Any) -> Callable[[], Any]:
        inverse = build(limits).prepare(A, damping=DAMPING)
        return partial(inverse.solve, B)

    return run


def _path(limits: Limits, case: Case, A: Any, B: Any) -> Callable[[], Any]:
    dampings = [DAMPING, 1e-3, 1e-2]
    return partial(
        ih.solve_path, A, B, dampings=dampings, rtol=limits["rtol"], maxiter=limits["maxiter"]
    )


def _preconditioned(limits: Limits, case: Case, A: Any, B: Any) -> Callable[[], Any]:
    method = ih.BlockCG(preconditioner=ih.NystroemPreconditioner(rank=case.rank), **limits)
    return partial(method.prepare(A, damping=DAMPING).solve, B)


def _prepared(method: Callable[[Case], Any]) -> Callable[..., Callable[[], Any]]:
    def run(limits: Limits, case: Case, A: Any, B: Any) -> Callable[[], Any]:
        return partial(method(case).prepare, A, damping=DAMPING)

    return run


def _applied(prepare: Callable[[Case, Any, Any], Any]) -> Callable[..., Callable[[], Any]]:
    def run(limits: Limits, case: Case, A: Any, B: Any) -> Callable[[], Any]:
        inverse = prepare(case, A, B)
        return lambda: inverse @ B

    return run


def _eigen_kronecker(case: Case, A: Any, B: Any) -> Any:
    o, i = layer_shape(case.n)
    rng = np.random.default_rng(6)
    bases = [np.linalg.qr(rng.standard_normal((m, m)))[0] for m in (o, i)]
    values = np.geomspace(1.0, 1e-4, o * i).reshape(o, i)
    placed = [_backend.from_host(x, B) for x in (*bases, values)]
    return ih.Direct().prepare(ih.EigenKronecker(*placed), damping=DAMPING)


def _harmonic_mean(case: Case, A: Any, B: Any) -> Any:
    G = np.random.default_rng(7).standard_normal((case.rank, case.n), dtype=np.float32)
    F = ih.RankOneMean(ih.DenseGradients(_backend.from_host(G, B)))
    return ih.InverseHarmonicMean().prepare(F, damping=1.0)


# ----------------------------------------------------------------- words and flops a unit

_BLOCK = 8  # of the Arnoldi method here


def _cg(s: Sizes) -> tuple[float, float]:
    return 12 * s.n * s.k, 10 * s.n * s.k


def _block_cg(s: Sizes) -> tuple[float, float]:
    return 17 * s.n * s.k, 16 * s.n * s.k**2


def _preconditioner(s: Sizes) -> tuple[float, float]:
    return 2 * s.n * s.rank + 3 * s.n * s.k, 4 * s.n * s.rank * s.k


def _preconditioned_floor(s: Sizes) -> tuple[float, float]:
    """With two Gram matrices and four updates more: W and Z are made M⁻¹-orthonormal twice."""
    words, flops = (a + b for a, b in zip(_block_cg(s), _preconditioner(s), strict=True))
    return words + 12 * s.n * s.k, flops + 12 * s.n * s.k**2


def _path_floor(s: Sizes) -> tuple[float, float]:
    """Three λ, each with a direction of its own; the first is that of the iteration."""
    words, flops = _block_cg(s)
    return words + 3 * 5 * s.n * s.k, flops + 3 * 4 * s.n * s.k**2


def _minres(s: Sizes) -> tuple[float, float]:
    return 14 * s.n * s.k, 14 * s.n * s.k


def _lissa(s: Sizes) -> tuple[float, float]:
    return 8 * s.n * s.k, 6 * s.n * s.k


def _arnoldi(s: Sizes) -> tuple[float, float]:
    """Each block against all before it, twice; then the Ritz vectors."""
    steps = max(1, s.columns // _BLOCK)
    pairs = steps * (steps + 1) / 2
    words = 4 * s.n * _BLOCK * pairs + 2 * s.n * s.columns
    return words, 8 * s.n * _BLOCK**2 * pairs + 2 * s.n * s.columns * s.rank / 4


def _nystroem(s: Sizes) -> tuple[float, float]:
    return 12 * s.n * s.rank, 8 * s.n * s.rank**2


def _kronecker(s: Sizes) -> tuple[float, float]:
    return 8 * s.n * s.k, 8 * s.n * s.k * s.side


def _harmonic(s: Sizes) -> tuple[float, float]:
    return s.rank * s.n + 4 * s.n * s.k, 4 * s.rank * s.n * s.k


CONTENDERS = (
    Contender("CG", "iteration", _solved(lambda limits: ih.CG(**limits)), _cg),
    Contender("BlockCG", "iteration", _solved(lambda limits: ih.BlockCG(**limits)), _block_cg),
    Contender("BlockCG, Nyström", "iteration", _preconditioned, _preconditioned_floor),
    Contender("Minres", "iteration", _solved(lambda limits: ih.Minres(**limits)), _minres),
    Contender("LiSSA", "iteration", _solved(lambda limits: ih.LiSSA(check_every=100, **limits)),
              _lissa),
    Contender("solve_path, 3 λ", "iteration", _path, _path_floor),
    Contender("Arnoldi", "preparation", _prepared(lambda case: ih.Arnoldi(
        rank=case.rank // 4, block=_BLOCK, maxiter=1, tol=0.5)), _arnoldi),
    Contender("NystroemSketch", "preparation", _prepared(
        lambda case: ih.NystroemSketch(rank=case.rank)), _nystroem),
    Contender("Nyström preconditioner", "application", _applied(
        lambda case, A, B: ih.NystroemPreconditioner(rank=case.rank).prepare(A, damping=DAMPING)),
        _preconditioner),
    Contender("EigenKronecker inverse", "application", _applied(_eigen_kronecker), _kronecker),
    Contender("InverseHarmonicMean", "application", _applied(_harmonic_mean), _harmonic),
)  # fmt: skip
