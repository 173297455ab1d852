"""The mean of the inverses of rank-one matrices, in place of the inverse of their mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import _backend
from ..operators import LinearOperator, as_operator
from ..operators.damping import as_shift, smallest
from ..protocols import Damping, HasGradients
from ._fixed_map import MapInverse
from ._harmonic_mean import HarmonicMean, by_block, scaled_harmonic_mean


@dataclass(frozen=True, kw_only=True)
class InverseHarmonicMean:
    """R = (1/N) Σ (g_i g_iᵀ + λI)⁻¹ in place of ((1/N) Σ g_i g_iᵀ + λI)⁻¹: DataInf.

    R = (1/λ) (I − (1/N) Σ g_i g_iᵀ / (λ + ‖g_i‖²))

    It needs no iteration and no factorisation, and it is biased, not merely inexact: A is never
    formed, (A + λI)⁻¹ ⪯ R ⪯ I/λ with equality on the left only if all g_i g_iᵀ are equal, and no
    sample can remove more than 1/N of a direction. For N ≫ 1 and ‖g_i‖² ≫ λ it approaches I/λ:
    scores then are inner products of gradients (on two Gaussian problems its solutions were 7 to
    8 times too long and its scores correlated with the exact ones no better than those).
    `SampleSpace` is exact at a similar cost from the same gradients; for p beyond N too. As a
    preconditioner it is legal and of little use: R λ has its spectrum near 1.

    Args:
        block: "full" for one system over all parameters, "layer" for one per named block of the
            gradients (as DataInf was published), which ignores what couples the blocks.

    λ by block (a mapping) is allowed with both.

    Raises TypeError where A has no gradients, ValueError unless λ > 0, or for blocks without
    names.
    Cost: the row norms to prepare, N numbers (a block); two products with the gradients an
    application, in one pass over them (one for a gradient matrix as right-hand sides); one product
    a solve, for its true residual. Scores of `Influence` come from Gram matrices alone.

    Source: Kwon, Wu, Wu & Zou (2024), DataInf: efficiently estimating data influence.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.RankOneMean(ih.DenseGradients(np.ones((1, 4))))
        >>> ih.InverseHarmonicMean().prepare(A, damping=1.0) @ np.ones(4)
        array([0.2, 0.2, 0.2, 0.2])
    """

    block: str = "full"

    def __post_init__(self) -> None:
        if self.block not in ("full", "layer"):
            msg = f'block must be "full" or "layer", got {self.block!r}'
            raise ValueError(msg)

    def prepare(self, A: Any, /, damping: Damping) -> MapInverse:
        A = as_operator(A)
        if not isinstance(A, HasGradients):
            msg = (
                "InverseHarmonicMean needs an operator with gradients, such as RankOneMean(G); "
                f"{type(A).__name__} has none: use BlockCG or Direct"
            )
            raise TypeError(msg)
        return MapInverse(self, A, damping, self._map(A, damping), exact=False, definite=True)

    def _map(self, A: Any, damping: Damping) -> LinearOperator:
        shift = as_shift(damping, A)
        if (
            not (_backend.is_array(shift) and _backend.is_tracing(shift))
            and not smallest(shift) > 0
        ):
            msg = (
                "InverseHarmonicMean needs damping > 0 (in every block): each g_i g_iᵀ alone is "
                "singular; or use SampleSpace"
            )
            raise ValueError(msg)
        count = float(getattr(A, "count", A.gradients.shape[0]))
        if self.block == "layer":
            return by_block(A.gradients, damping if isinstance(damping, Mapping) else shift, count)
        if isinstance(damping, Mapping):
            return scaled_harmonic_mean(A.gradients, damping, shift, count)
        return HarmonicMean(A.gradients, shift, count)
