"""Exact inverses: the operator's own, or a dense factorisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from .. import _backend
from ..operators import Dense, LinearOperator, as_operator, pseudo_inverse
from ..operators.damping import as_shift, by_block
from ..protocols import Damping, HasInverse
from ._fixed_map import MapInverse

Singular: TypeAlias = Literal["raise", "truncate"]


@dataclass(frozen=True, kw_only=True)
class Direct:
    """Solve exactly: by the operator's own inverse if it has one, else by densifying.

    The solution is refined once with its true residual. An indefinite but regular A + λI is
    solved too.

    Args:
        rtol, atol: stopping rule ‖r_j‖ ≤ max(rtol·‖b_j‖, atol), against which the answer is
            judged: CONVERGED or FLOOR.
        max_size: refuse to densify more parameters than this (8 max_size² bytes).
        singular: what to do at λ = 0 where A is singular to working precision: "raise", or
            "truncate" to its pseudo-inverse, which is APPROXIMATE and no preconditioner; the
            inverse's `truncation` says what was kept. It costs an eigendecomposition.

    Raises SingularError where A + λI is singular to working precision; ValueError above `max_size`.
    Cost: n products and n³/3 flops to prepare if densified, n² numbers for the matrix, which
    another λ re-uses; 3 applications and 2 products a solve.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> ih.Direct().prepare(ih.Dense(np.eye(2)), damping=1.0).solve(np.ones(2)).x
        array([0.5, 0.5])
    """

    rtol: float = 1e-5
    atol: float = 0.0
    max_size: int = 20_000
    singular: Singular = "raise"

    def __post_init__(self) -> None:
        check_singular(self.singular)

    def prepare(self, A: Any, /, damping: Damping) -> MapInverse:
        A = as_operator(A)
        known: Any = A
        if isinstance(known, HasInverse):
            return self._invert(A, damping, known)
        n = A.shape[0]
        if n > self.max_size:
            msg = (
                f"Direct would need the dense {n} x {n} matrix ({8e-9 * n * n:.1f} GB), above "
                f"max_size={self.max_size}; use BlockCG, or raise max_size"
            )
            raise ValueError(msg)
        matrix = A.to_dense()
        xp = _backend.namespace(matrix)
        # The products may be symmetric to rounding only; a gross asymmetry is not rounding.
        Dense(matrix)
        dense = Dense((matrix + xp.matrix_transpose(matrix)) / 2, layout=A.layout, check=False)
        return self._invert(A, damping, dense, products=n)

    def _invert(
        self, A: LinearOperator, damping: Damping, known: Any, products: int = 0
    ) -> MapInverse:
        """Invert A through `known`: A itself, or its matrix."""
        shift = as_shift(damping, A)
        inverse_map = None
        if self.singular == "truncate" and not by_block(shift) and shift == 0:
            # Not by the inverse that fails: in float64 it takes the rounding of float32 for A.
            inverse_map = pseudo_inverse(known)
            if inverse_map.truncation.rank == inverse_map.truncation.n:
                inverse_map = None
        exact = inverse_map is None
        inverse_map = known.inverse(damping) if inverse_map is None else inverse_map
        inverse = MapInverse(self, A, damping, inverse_map, exact=exact, products=products)
        inverse.known = known
        return inverse


def check_singular(singular: str) -> None:
    """Raise ValueError for an unknown word."""
    if singular not in get_args(Singular):
        msg = f"singular must be one of {get_args(Singular)}, got {singular!r}"
        raise ValueError(msg)
