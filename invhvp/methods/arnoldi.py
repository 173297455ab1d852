"""An approximate inverse from the leading eigenpairs."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from .. import _backend, _linalg
from ..estimate.lanczos import Eigenpairs, eigenpairs
from ..operators import LinearOperator, LowRank, as_operator
from ..operators.damping import as_shift, scalar, shifted, smallest
from ..protocols import Array, Damping
from ..solution import ConvergenceError, ConvergenceWarning, Status
from ._columns import take_columns
from ._spectral_inverse import SpectralInverse, indefinite, truncated, woodbury
from .direct import Singular, check_singular

Complement = Literal["damping", "drop"]
Nonpositive = Literal["raise", "drop", "abs", "clip", "keep"]

_HINT = '; nonpositive="drop", "abs" or "clip" replaces A by a positive model'


@dataclass(frozen=True, kw_only=True)
class Arnoldi:
    """Invert A + λI on its leading eigenvectors, and replace A by zero outside their span.

    A ≈ U Θ Uᵀ from block Lanczos with full reorthogonalisation and thick restart; only pairs
    that have converged are kept. The solution is x = b/λ − U(θ/(λ(θ + λ)) ∘ Uᵀb), reported as
    APPROXIMATE with its true residual; an A of rank ≤ `rank` is inverted to rounding. With
    rank ≥ n the inverse is exact. `inverse.low_rank` has the pairs, `with_damping` costs no
    product, `inverse.power(-0.5)` gives the embeddings of Schioppa et al. (scaled by λ too).

    Args:
        rank: eigenpairs, of largest |θ|.
        tol: a pair has converged when ‖A u − θ u‖ ≤ tol·|θ|, or rounding allows no better.
        krylov_dimension: vectors of the Krylov basis; by default max(2·rank + 4·block, 20).
        maxiter: restarts; 30 by default.
        block: vectors multiplied at once, by default min(8, rank): eigenvalues of multiplicity
            up to `block` are found, and few passes over the data are needed; 1 needs the fewest
            products.
        complement: "damping" inverts λI outside the span; "drop" leaves it out, x = V(Θ+λ)⁻¹Vᵀb,
            which is not an inverse and cannot precondition.
        nonpositive: what to do with θ + λ ≤ 0: "raise", "drop" the pair, use |θ| + λ ("abs") or
            λ alone ("clip"), or "keep" it with its sign, which no longer is a preconditioner.
            Pairs with θ + λ > 0 are never touched. "raise" also raises for a direction met on the
            way that proves A + λI indefinite.
        singular: what to do where the model is singular at λ = 0: "raise", or "truncate" to its
            pseudo-inverse; the inverse's `truncation` says what was kept.
        rtol, atol: stopping rule against which an exact answer (rank ≥ n) is judged.
        rng: seed of the start block.

    Raises IndefiniteError with the eigenvector; SingularError for λ = 0 with a complement;
    ConvergenceError where A returns NaN or is not symmetric. Warns, naming how many, where fewer
    than `rank` pairs have converged.
    Cost: products of the Krylov space to prepare (`inverse.products`; some 2-3 times the rank on
    a network's spectrum), memory of (krylov_dimension + 2·rank)·n, then rank·n; 4·n·rank flops
    and one product for the residual a solve.

    Source: Schioppa et al. (2022), Scaling up influence functions; Wu & Simon (2000), thick
    restart; Woodbury (1950) for the complement.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.Diagonal(np.asarray([4.0, 2.0, 0.0, 0.0]))
        >>> inverse = ih.Arnoldi(rank=2).prepare(A, damping=1.0)
        >>> (inverse @ np.ones(4)).round(3), inverse.low_rank.values
        (array([0.2  , 0.333, 1.   , 1.   ]), array([4., 2.]))
    """

    rank: int = 10
    tol: float = 1e-6
    krylov_dimension: int | None = None
    maxiter: int | None = None
    block: int | None = None
    complement: Complement = "damping"
    nonpositive: Nonpositive = "raise"
    singular: Singular = "raise"
    rtol: float = 1e-5
    atol: float = 0.0
    rng: Any = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            msg = f"rank must be at least 1, got {self.rank}"
            raise ValueError(msg)
        if not (self.tol >= 0 and math.isfinite(self.tol)):
            msg = f"tol must be finite and not negative, got {self.tol}"
            raise ValueError(msg)
        for name, kinds in (("complement", Complement), ("nonpositive", Nonpositive)):
            if getattr(self, name) not in get_args(kinds):
                msg = f"{name} must be one of {get_args(kinds)}, got {getattr(self, name)!r}"
                raise ValueError(msg)
        check_singular(self.singular)

    def prepare(self, A: Any, /, damping: Damping) -> SpectralInverse:
        A = as_operator(A)
        as_shift(damping, A)  # refuse a wrong λ before anything is spent
        pairs = eigenpairs(
            A,
            self.rank,
            tol=self.tol,
            dimension=self.krylov_dimension,
            block=self.block,
            maxiter=self.maxiter,
            rng=self.rng,
        )
        if pairs.asymmetry > 1e3 * _backend.eps(A.dtype):
            raise ConvergenceError(Status.NOT_SYMMETRIC.value)
        kept, wanted = int(np.sum(pairs.converged)), pairs.values.size
        if kept < wanted:
            msg = (
                f"only {kept} of {wanted} eigenpairs converged to tol={self.tol:g} and are used; "
                "raise krylov_dimension, maxiter or tol, or ask for a smaller rank"
            )
            warnings.warn(msg, ConvergenceWarning, stacklevel=2)
        return self._invert(A, damping, pairs, products=pairs.products)

    def _invert(
        self, A: LinearOperator, damping: Damping, pairs: Eigenpairs, products: int = 0
    ) -> SpectralInverse:
        shift = as_shift(damping, A)
        if self.complement == "drop":
            shift = scalar(shift, 'Arnoldi(complement="drop")')
        least = smallest(shift)
        noise = 10 * _backend.eps(A.dtype) * pairs.size
        real = np.abs(pairs.values) > noise
        if self.complement == "damping":
            real |= pairs.complete  # all of them together are the operator, small ones included
        vectors, values = _chosen(pairs.vectors, pairs.values, pairs.converged & real)
        if A.psd:
            values = np.maximum(values, 0.0)
        low_rank = LowRank(vectors, _backend.from_host(values, vectors), layout=A.layout)
        bad = values + least <= 0
        signed = self.nonpositive == "keep"
        if self.nonpositive not in ("raise", "keep"):
            if self.nonpositive == "drop":
                vectors, values = _chosen(vectors, values, ~bad)
            else:
                values = np.where(bad, np.abs(values) * (self.nonpositive == "abs"), values)
        elif not signed and self.complement == "damping" and not A.psd and pairs.lowest < -noise:
            _check_lowest(pairs, shift)
        exact = vectors.shape[1] == A.shape[0] and not (
            self.nonpositive not in ("raise", "keep") and bool(np.any(bad))
        )
        at_zero = isinstance(shift, float) and shift == 0 and self.singular == "truncate"
        if at_zero and (signed or not np.any(values < 0)):
            inverse_map = truncated(A, vectors, values)
            exact = exact and not hasattr(inverse_map, "truncation")
        else:
            complement = self.complement == "damping"
            inverse_map = woodbury(
                A, vectors, values, shift, complement=complement, hint=_HINT, signed=signed
            )
        return SpectralInverse(
            self,
            A,
            damping,
            inverse_map,
            state=pairs,
            low_rank=low_rank,
            size=pairs.size,
            exact=exact,
            products=products,
            definite=getattr(inverse_map, "definite", inverse_map.psd),
        )


def _chosen(vectors: Array, values: np.ndarray, mask: np.ndarray) -> tuple[Array, np.ndarray]:
    index = np.flatnonzero(mask)
    return take_columns(vectors, index), values[index]


def _check_lowest(pairs: Eigenpairs, shift: float | Array) -> None:
    """Raise IndefiniteError where a direction met on the way proves A + λI indefinite."""
    p = pairs.lowest_vector
    if p is None:
        return
    damped = float(_backend.to_host(_linalg.column_dot(p, shifted(p, shift)))[0])
    if pairs.lowest + damped <= 0:
        raise indefinite(p[:, 0], pairs.lowest, damped, _HINT)
