"""An approximate inverse from one block of products."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from .. import _backend, _linalg
from ..estimate.nystroem import Kind, Model, Sketch, adaptive_sketch
from ..operators import LinearOperator, LowRank, as_operator
from ..operators.damping import as_shift, shifted, smallest
from ..protocols import Array, Damping
from ..solution import ConvergenceError, ConvergenceWarning, Status
from ._options import check_ranks
from ._spectral_inverse import SpectralInverse, indefinite, truncated, woodbury
from .direct import Singular, check_singular

Rank = int | Literal["adaptive"]


@dataclass(frozen=True, kw_only=True)
class NystroemSketch:
    """Invert A + λI with A replaced by its Nyström model, one pass of `rank` products.

    For a positive semidefinite A the model Â lies between 0 and A, and the error of the inverse
    is at most ε/(λ(ε + λ)) with ε = ‖A − Â‖: useful where the spectrum falls below λ within
    `rank` values. The solution is reported as APPROXIMATE with its true residual; with
    rank ≥ n it is exact.

    An indefinite A is modelled by the signed core Y(ΩᵀAΩ)⁺Yᵀ where every value θ of the model
    has θ + λ > 0 and |θ| ≤ ‖A‖. Elsewhere A + μI is sketched, with μ just above −λ_min from a
    few Lanczos steps, and solved with λ − μ: the products are the same ones. `with_damping`
    re-uses the sketch.

    Args:
        rank: columns of the sketch; "adaptive" doubles it from 16 until ‖A − Â‖ ≤ tol·λ.
        sketch: "gaussian", or "columns" of A at random (Hataya & Yamada), which is inferior
            unless A is nearly diagonal.
        tol: see `rank`; used only there.
        max_rank: limit of the adaptive rank; n/4 by default.
        singular: what to do at λ = 0 with a model of rank < n, or of an indefinite A: "raise", or
            "truncate" to the pseudo-inverse of its positive part; the inverse's `truncation`
            says what was kept.
        rtol, atol: stopping rule against which an exact answer (rank ≥ n) is judged.
        rng: seed of the sketch.

    Raises IndefiniteError, with the vector, where A + λI is proved not to be positive definite;
    SingularError for λ = 0 with rank < n; ConvergenceError where A returns NaN or is not
    symmetric. Warns where the adaptive rank ends at its limit.
    Cost: `rank` products in one pass to prepare; for an A not declared psd 3 more, and the
    Lanczos steps where they are needed; 6 for each doubling of an adaptive rank. Memory 3·n·rank,
    then n·rank (3·n·rank for an A not declared psd); 8·n·rank² flops to prepare, 4·n·rank flops
    and one product for the residual a solve.

    Source: Frangella, Tropp & Udell (2023), algorithm 2.1; Hataya & Yamada (2023), Nyström
    method for accurate and scalable implicit differentiation.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.Diagonal(np.where(np.arange(40) < 3, 3.0, 0.0), psd=True)
        >>> inverse = ih.NystroemSketch(rank=5).prepare(A, damping=1.0)
        >>> (inverse @ np.ones(40))[:4].round(6), inverse.products
        (array([0.25, 0.25, 0.25, 1.  ]), 5)
    """

    rank: Rank = 10
    sketch: Kind = "gaussian"
    tol: float = 0.1
    max_rank: int | None = None
    singular: Singular = "raise"
    rtol: float = 1e-5
    atol: float = 0.0
    rng: Any = 0

    def __post_init__(self) -> None:
        check_options(self)
        check_singular(self.singular)

    def prepare(self, A: Any, /, damping: Damping) -> SpectralInverse:
        A = as_operator(A)
        target = self.tol * smallest(as_shift(damping, A))
        sketch, error = make_sketch(self, A, target)
        if sketch.asymmetry > 1e3 * _backend.eps(A.dtype):
            raise ConvergenceError(Status.NOT_SYMMETRIC.value)
        if error > target:
            msg = (
                f"the adaptive rank ended at its limit of {sketch.rank} with ‖A − Â‖ ≈ "
                f"{error:.2g}, above tol·λ = {target:.2g}; raise max_rank or the damping, or "
                "solve with BlockCG"
            )
            warnings.warn(msg, ConvergenceWarning, stacklevel=2)
        return self._invert(A, damping, sketch, products=sketch.products)

    def _invert(
        self, A: LinearOperator, damping: Damping, sketch: Sketch, products: int = 0
    ) -> SpectralInverse:
        shift = as_shift(damping, A)
        before = sketch.products
        truncate = self.singular == "truncate" and isinstance(shift, float) and shift == 0
        model = sketch.clipped() if truncate else _model(sketch, shift)
        values = np.maximum(model.values, 0.0) if A.psd else model.values
        if truncate:
            inverse_map = truncated(A, model.vectors, values)
        else:
            inverse_map = woodbury(A, model.vectors, values, shift - model.shift)
        own = _backend.from_host(values - model.shift, model.vectors)
        if A.psd:
            sketch.release()
        return SpectralInverse(
            self,
            A,
            damping,
            inverse_map,
            state=sketch,
            low_rank=LowRank(model.vectors, own, layout=A.layout),
            size=float(np.max(np.abs(values - model.shift), initial=0.0)),
            exact=model.vectors.shape[1] == A.shape[0] and not hasattr(inverse_map, "truncation"),
            products=products + sketch.products - before,
            definite=getattr(inverse_map, "definite", inverse_map.psd),
        )


def _model(sketch: Sketch, shift: float | Array) -> Model:
    """The model of A with which A + λI is positive definite, if it is."""
    A = sketch.operator
    if A.psd:
        return sketch.positive()
    _refuse_if_proved(sketch, *sketch.lowest_direction(), shift)
    least = smallest(shift)
    model = sketch.positive() if sketch.looks_positive else sketch.signed()
    if model.vectors.shape[1] == A.shape[0]:
        return model
    largest = float(np.max(np.abs(model.values), initial=0.0))
    # A core that is nearly singular gives eigenvalues that A does not have.
    if np.all(model.values + least > 0) and largest <= 1.05 * sketch.norm():
        return model
    bottom = sketch.lowest()
    theta = bottom.lowest
    if bottom.lowest_vector is not None:
        _refuse_if_proved(sketch, bottom.lowest_vector[:, 0], theta, shift)
    mu = min(max(0.0, -theta + float(bottom.residuals[0])), (least - theta) / 2)
    if not mu < least:
        msg = (
            f"A has curvature down to {theta:.3g}: the sketch is solved with λ − {-theta:.3g} "
            "and needs more damping than that in every block"
        )
        raise ValueError(msg)
    return sketch.positive(mu)


def _refuse_if_proved(sketch: Sketch, p: Array, curvature: float, shift: float | Array) -> None:
    if curvature >= -10 * _backend.eps(p.dtype) * sketch.size:
        return  # rounding proves nothing
    block = p[:, None]
    damped = float(_backend.to_host(_linalg.column_dot(block, shifted(block, shift)))[0])
    if curvature + damped <= 0:
        raise indefinite(p, curvature, damped)


def make_sketch(method: Any, A: LinearOperator, target: float) -> tuple[Sketch, float]:
    """The sketch that the options ask for, and its error (0 where it was not estimated)."""
    if method.rank == "adaptive":
        return adaptive_sketch(
            A, target=target, max_rank=method.max_rank, kind=method.sketch, rng=method.rng
        )
    return Sketch(A, method.rank, kind=method.sketch, rng=method.rng), 0.0


def check_options(method: Any) -> None:
    """Raise ValueError for options that mean nothing."""
    if method.sketch not in get_args(Kind):
        msg = f"sketch must be one of {get_args(Kind)}, got {method.sketch!r}"
        raise ValueError(msg)
    check_ranks(method)
    if not (method.tol > 0 and math.isfinite(method.tol)):
        msg = f"tol must be finite and positive, got {method.tol}"
        raise ValueError(msg)
