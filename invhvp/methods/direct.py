"""Exact inverses: the operator's own, or a dense factorisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import _backend
from ..operators import Dense, as_operator
from ..protocols import Damping, HasInverse
from ._fixed_map import MapInverse


@dataclass(frozen=True, kw_only=True)
class Direct:
    """Solve exactly: by the operator's own inverse if it has one, else by densifying.

    The solution is refined once with its true residual. An indefinite but regular A + λI is
    solved too.

    Args:
        rtol, atol: stopping rule ‖r_j‖ ≤ max(rtol·‖b_j‖, atol), against which the answer is
            judged: CONVERGED or FLOOR.
        max_size: refuse to densify more parameters than this (8 max_size² bytes).

    Raises SingularError where A + λI is singular to working precision; ValueError above `max_size`.
    Cost: n products and n³/3 flops to prepare if densified; 3 applications and 2 products a solve.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> ih.Direct().prepare(ih.Dense(np.eye(2)), damping=1.0).solve(np.ones(2)).x
        array([0.5, 0.5])
    """

    rtol: float = 1e-5
    atol: float = 0.0
    max_size: int = 20_000

    def prepare(self, A: Any, /, damping: Damping) -> MapInverse:
        A = as_operator(A)
        if isinstance(A, HasInverse):
            return MapInverse(self, A, damping, A.inverse(damping), exact=True)
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
        return MapInverse(self, A, damping, dense.inverse(damping), exact=True, products=n)
