"""A plan on paper for a network that does not fit here, from what was measured on one that does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from .floor import Machine
from .growth_costs import (
    Sizes,
    ekfac_fit_flops,
    ekfac_solve_flops,
    gradient_flops,
    gram_flops,
    hessian_flops,
)


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """The network and the budget of the plan; nothing here is measured.

    Attributes:
        width, depth: square layers; p = depth · width².
        N, T, k: samples, positions in each, right-hand sides.
        passes: of BlockCG over the data; it depends on spectrum, λ and tolerance.
        steps, batch: of LiSSA.
        subset: samples on which a Hessian or EKFAC is fitted instead of all.
        rank: of a Nyström sketch.
        gpu: bytes and float32 flops per second of a large GPU by its data sheet.
    """

    width: int = 4096
    depth: int = 60
    N: int = 100_000_000
    T: int = 128
    k: int = 16
    passes: int = 30
    steps: int = 1000
    batch: int = 256
    subset: int = 100_000
    rank: int = 64
    gpu: tuple[float, float] = (4.3e12, 6.0e13)

    @property
    def sizes(self) -> Sizes:
        return Sizes(N=self.N, k=self.k, T=self.T, layers=(self.width,) * (self.depth + 1))


ASSUMED = Assumed()

# Blocks of p · k numbers at the peak of a solve, as `python -m benchmarks engine` counts them.
BLOCK_CG_BLOCKS, LISSA_BLOCKS, ITEM = 12, 9, 4


def on_paper(
    limits: Machine, efficiency: dict[str, float], assumed: Assumed = ASSUMED
) -> Iterator[dict[str, Any]]:
    """Memory and time of each method at the assumed size.

    Args:
        limits: of this machine.
        efficiency: part of the floor that each quantity of `growth_costs` was measured to reach;
            a quantity that is missing counts as 1.
        assumed: the network.
    """
    s = assumed.sizes
    some = replace(s, N=assumed.subset)
    gpu = Machine(assumed.gpu[0], assumed.gpu[1], 0.0, ITEM)
    sides = s.over_layers(lambda o, i: o + i)
    factors = s.over_layers(lambda o, i: o * o + i * i)
    name = f"p = {s.p:.2g}, N = {s.N:.2g}, {s.T} positions a sample, k = {s.k}"

    def row(
        method: str, memory: float, note: str, *work: tuple[str, float, float]
    ) -> dict[str, Any]:
        """`work` is (quantity, words, flops), done one after the other."""
        here, there = (
            sum(m.floor(words, flops) / efficiency.get(q, 1.0) for q, words, flops in work)
            for m in (limits, gpu)
        )
        known = bool(work) and math.isfinite(here)
        return {
            "assumed": name,
            "method": method,
            "memory_bytes": memory,
            "seconds": here if known else None,
            "gpu_seconds": there if known else None,
            "note": note,
        }

    iteration = ("BlockCG iteration", 17.0 * s.p * s.k, 16.0 * s.p * s.k**2)
    own = (iteration[0], assumed.passes * iteration[1], assumed.passes * iteration[2])
    gradients = "per-sample gradients"
    yield row(
        "gradients of all samples, as rows",
        ITEM * s.p * s.N,
        "never formed; float32",
    )
    yield row(
        "gradients of all samples, as factors",
        ITEM * s.N * s.T * sides,
        "kept or streamed; one pass",
        (gradients, 0.0, gradient_flops(s)),
    )
    yield row(
        "SampleSpace, all samples",
        8.0 * s.N**2,
        "the Gram matrix alone; no machine holds it",
        ("Gram matrix", 0.0, gram_flops(s)),
    )
    yield row(
        "SampleSpace, subset",
        8.0 * some.N**2,
        f"{some.N:,} samples; Gram matrix and Cholesky, gradients recomputed by blocks",
        ("Gram matrix", 0.0, gram_flops(some)),
        ("SampleSpace, prepare and solve", 0.0, some.N**3 / 3),
    )
    yield row(
        "one Hessian pass, all samples",
        2.0 * ITEM * s.p * s.k,
        "k vectors together",
        ("Hessian product", 0.0, hessian_flops(s)),
    )
    for data, which in ((s, "all samples"), (some, f"{some.N:,} samples")):
        yield row(
            f"BlockCG, {which}",
            float(BLOCK_CG_BLOCKS * ITEM * s.p * s.k),
            f"{assumed.passes} passes",
            ("Hessian product", 0.0, assumed.passes * hessian_flops(data)),
            own,
        )
    yield row(
        "BlockCG, its own arithmetic",
        float(BLOCK_CG_BLOCKS * ITEM * s.p * s.k),
        f"{assumed.passes} iterations; contained in the two above",
        own,
    )
    yield row(
        "LiSSA, batches",
        float(LISSA_BLOCKS * ITEM * s.p * s.k),
        f"{assumed.steps} steps on {assumed.batch} samples, no look at all of the data",
        ("Hessian product", 0.0, assumed.steps * hessian_flops(replace(s, N=assumed.batch))),
    )
    yield row(
        "Nyström preconditioner",
        float(ITEM * s.p * assumed.rank * 3),
        f"rank {assumed.rank}, one pass over {some.N:,} samples",
        ("Hessian product", 0.0, hessian_flops(replace(some, k=assumed.rank))),
        ("BlockCG iteration", 12.0 * s.p * assumed.rank, 8.0 * s.p * assumed.rank**2),
    )
    yield row(
        "EKFAC fit, one random-sign seed",
        8.0 * factors + 2 * ITEM * s.p + ITEM * factors,
        f"{some.N:,} samples; factors in float64",
        ("EKFAC fit", 0.0, ekfac_fit_flops(some, seeds=1)),
    )
    yield row(
        "EKFAC solve",
        ITEM * (factors + s.p) + 2.0 * ITEM * s.p * s.k,
        "k vectors, each damping",
        ("EKFAC solve", 8.0 * s.p * s.k, ekfac_solve_flops(s)),
    )
    yield row(
        "scores of k vectors against all samples",
        float(ITEM * s.p * s.k),
        "gradients streamed, never kept; dᵀVa of every layer and position",
        (gradients, 0.0, gradient_flops(s)),
        ("Hessian product", 0.0, 2.0 * s.p * s.N * s.T * s.k),
    )
