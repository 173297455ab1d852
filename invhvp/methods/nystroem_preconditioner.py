"""A preconditioner from one block of products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _backend
from ..estimate.nystroem import Kind, Model
from ..operators import LinearOperator, LowRank, as_operator
from ..operators.damping import as_shift, smallest
from ..protocols import Damping
from ._spectral_inverse import SpectralInverse, SpectralMap
from .nystroem_sketch import Rank, check_options, make_sketch


@dataclass(frozen=True, kw_only=True)
class NystroemPreconditioner:
    """U(Ŝ + λ)⁻¹Uᵀ + (I − UUᵀ)/(ŝ_r + λ) from a Nyström sketch: an approximate inverse of A + λI.

    For a positive semidefinite A the preconditioned system has a condition number of at most
    (ŝ_r + λ + ‖A − Â‖)/λ, and Gauss–Radau error bounds stay available. It pays where few
    right-hand sides are solved, or many batches of them, and in float32; a block of many columns
    finds the same space by itself. Of an indefinite A the non-negative part is kept: it never
    raises for that. With block-wise damping it uses the smallest λ, and stays positive definite.

    Args:
        rank: columns of the sketch; "adaptive" doubles it from 16 until ‖A − Â‖ ≤ tol·λ.
            About half the effective dimension Σ θ/(θ + λ) brings the condition number near 10.
        sketch: "gaussian", or "columns" of A at random.
        tol: see `rank`; used only there.
        max_rank: limit of the adaptive rank; n/4 by default.
        rng: seed of the sketch.

    Raises ConvergenceError where A returns NaN.
    Cost: `rank` products in one pass to prepare, 3 more for an A not declared psd, 6 for each
    doubling of an adaptive rank; 8·n·rank² flops, memory 3·n·rank, then n·rank; 4·n·rank flops a
    column.

    Source: Frangella, Tropp & Udell (2023), Randomized Nyström preconditioning, equation 1.3,
    scaled to be an inverse.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.Diagonal(1.0 / np.arange(1.0, 201.0) ** 2, psd=True)
        >>> b = np.ones(200)
        >>> plain = ih.solve(A, b, ih.BlockCG(), damping=1e-5)
        >>> cg = ih.BlockCG(preconditioner=ih.NystroemPreconditioner(rank=60))
        >>> ih.solve(A, b, cg, damping=1e-5).passes < plain.passes / 4
        True
    """

    rank: Rank = 64
    sketch: Kind = "gaussian"
    tol: float = 10.0
    max_rank: int | None = None
    rng: Any = 0

    def __post_init__(self) -> None:
        check_options(self)

    def prepare(self, A: Any, /, damping: Damping) -> SpectralInverse:
        A = as_operator(A)
        least = smallest(as_shift(damping, A))
        sketch, _ = make_sketch(self, A, self.tol * least)
        model = sketch.clipped()
        return self._invert(A, damping, model, products=sketch.products)

    def _invert(
        self, A: LinearOperator, damping: Damping, model: Model, products: int = 0
    ) -> SpectralInverse:
        least = smallest(as_shift(damping, A))
        values = np.maximum(model.values, 0.0)
        size = float(np.max(values, initial=0.0))
        # λ = 0 on a space that the sketch has not seen: any positive number will do.
        smallest_seen = float(np.min(values[values > 0], initial=size)) or 1.0
        rest = model.tail + least or smallest_seen
        damped = np.where(values + least > 0, values + least, smallest_seen)
        inverse_map = SpectralMap(model.vectors, damped, rest, layout=A.layout)
        own = _backend.from_host(values, model.vectors)
        return SpectralInverse(
            self,
            A,
            damping,
            inverse_map,
            state=model,
            low_rank=LowRank(model.vectors, own, layout=A.layout),
            size=size,
            products=products,
            relative_floor=least / rest if A.psd and least > 0 else None,
        )
