"""What stands for an inverse where there is none: the same map on the range of the operator."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .. import _backend, _lapack, _linalg
from ..protocols import Array
from ..solution import SingularError
from .base import LinearOperator


class Truncation(NamedTuple):
    """What a truncated pseudo-inverse keeps: `rank` of `n` directions, those above `cut`."""

    rank: int
    n: int
    cut: float

    def __str__(self) -> str:
        return f"pseudo-inverse of rank {self.rank} of {self.n}, cut at |eigenvalue| {self.cut:.3g}"


class PseudoInverse(LinearOperator):
    """A map that is zero outside the directions that it inverts; it cannot precondition.

    Attributes:
        truncation: what was kept.
    """

    definite = False

    def __init__(self, inner: LinearOperator, truncation: Truncation) -> None:
        super().__init__(inner.shape[0], like=inner.like, psd=inner.psd, layout=inner.layout)
        self.inner = inner
        self.truncation = truncation

    def _matmat(self, X: Array, /) -> Array:
        return self.inner._matmat(X)

    def _describe(self) -> str:
        return str(self.truncation)


def kept_eigenvalues(values: np.ndarray, n: int, eps: float) -> tuple[np.ndarray, Truncation]:
    """Which eigenvalues rise above rounding, |w| > n·eps·max|w|, and what that leaves out."""
    if not np.all(np.isfinite(values)):
        raise SingularError("the operator contains NaN or Inf")
    size = np.abs(values)
    cut = n * eps * float(np.max(size, initial=0.0))
    kept = size > cut
    return kept, Truncation(int(np.sum(kept)), n, cut)


def pseudo_inverse(A: LinearOperator) -> PseudoInverse:
    """A⁺, with eigenvalues below n·eps·‖A‖ taken for zero.

    An operator that knows a better way has a method `pseudo_inverse()`; any other is densified.
    Cost: n products and some 10 n³ flops.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> from invhvp.operators import pseudo_inverse
        >>> pseudo_inverse(ih.Diagonal(np.array([4.0, 0.0]))) @ np.ones(2)
        array([0.25, 0.  ])
    """
    own = getattr(A, "pseudo_inverse", None)
    if own is not None:
        return own()
    from .low_rank import LowRank  # which imports diagonals, which import this module

    matrix = _backend.to_small(A.to_dense())
    w, V = _lapack.eigh(_linalg.symmetric(matrix))
    host = np.asarray(_backend.to_host(w), dtype=np.float64)
    kept, truncation = kept_eigenvalues(host, A.shape[0], _backend.eps(A.dtype))
    xp = _backend.namespace(V)
    index = xp.asarray(np.flatnonzero(kept), device=_backend.device(V))
    vectors = _backend.lift(xp.take(V, index, axis=1), A.like)
    values = _backend.from_host(1.0 / host[kept], A.like)
    return PseudoInverse(LowRank(vectors, values, layout=A.layout), truncation)
