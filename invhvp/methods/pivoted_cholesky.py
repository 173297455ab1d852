"""A preconditioner from a few gradients that stand for all of them: no product is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .. import _backend, _lapack
from ..estimate.pivots import Pivots, pivots
from ..gradients import GradientMatrix
from ..operators import LinearOperator, as_operator
from ..operators.damping import as_shift, smallest
from ..protocols import Array, Damping
from ..solution import SingularError
from ._fixed_map import MapInverse
from ._options import check_ranks

_ROUNDINGS = 3.0


@dataclass(frozen=True, kw_only=True)
class PivotedCholesky:
    """Qᵀ(QAQᵀ + λ)⁻¹Q + (I − QᵀQ)/(θ + λ), Q an orthonormal basis of some rows of the gradients.

    For A = (1/c) Σ g_i g_iᵀ. The rows are those that randomly pivoted Cholesky chooses from the
    Gram matrix, so that neither A nor its rows are ever multiplied with a long vector: where a
    network's curvature has many rows and few that matter, this is `SampleSpace` at a fraction of
    its cost. With δ = tr(K − FFᵀ)/c for what the rows leave of the Gram matrix, the condition
    number of the preconditioned system is at most 4(1 + δ/λ)³; θ is the least value of QAQᵀ, or δ
    if that is less. Where rows are so dependent that rounding of their Gram matrix outweighs λ, a
    larger λ takes its place. With block-wise damping it uses the smallest λ.

    Args:
        rank: rows at most; "adaptive" takes up to `max_rank`.
        tol: rows are added until δ ≤ tol·λ, or there are as many as `rank` says.
        max_rank: limit of the adaptive rank.
        rng: seed of the choice.

    Raises TypeError where A has no gradients, SingularError for λ = 0, ValueError for gradients
    that are not finite.
    Cost: N·rank inner products of gradients and 2·N·rank² flops to prepare, N·rank numbers; two
    products with `rank` gradients an application.

    Source: Chen, Epperly, Tropp & Webber (2024), Randomly pivoted Cholesky, for the rows; Díaz,
    Epperly, Frangella, Tropp & Webber (2023), Robust, randomized preconditioning, for their use.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> G = np.random.default_rng(0).standard_normal((300, 500)) / np.arange(1, 501) ** 2
        >>> A = ih.RankOneMean(ih.DenseGradients(G))
        >>> plain = ih.solve(A, np.ones(500), ih.BlockCG(), damping=1e-6)
        >>> cg = ih.BlockCG(preconditioner=ih.PivotedCholesky())
        >>> ih.solve(A, np.ones(500), cg, damping=1e-6).passes < plain.passes / 2
        True
    """

    rank: int | Literal["adaptive"] = "adaptive"
    tol: float = 1.0
    max_rank: int = 512
    rng: Any = 0

    def __post_init__(self) -> None:
        check_ranks(self)
        if self.max_rank is None:
            raise ValueError("max_rank must be a positive integer, got None")
        if not self.tol >= 0:
            msg = f"tol must be at least 0, got {self.tol!r}"
            raise ValueError(msg)

    def prepare(self, A: Any, /, damping: Damping) -> MapInverse:
        A = as_operator(A)
        G: Any = getattr(A, "gradients", None)
        if G is None:
            msg = (
                f"PivotedCholesky needs an operator with gradients, such as RankOneMean(G); "
                f"{type(A).__name__} has none: use NystroemPreconditioner, or "
                "Surrogate(K, PivotedCholesky()) with a Gauss–Newton matrix K"
            )
            raise TypeError(msg)
        least = smallest(as_shift(damping, A))
        if not least > 0:  # before any work
            raise SingularError("PivotedCholesky needs damping > 0")
        count = float(getattr(A, "count", G.shape[0]))
        most = self.max_rank if self.rank == "adaptive" else self.rank
        found = pivots(G, rank=most, goal=self.tol * least * count, rng=self.rng)
        rows = G[found.rows] if found.rows.size else None
        return MapInverse(self, A, damping, PivotedMap(A, rows, found, count, least), exact=False)


class PivotedMap(LinearOperator):
    """X/r + QᵀV diag(1/(v + λ) − 1/r)VᵀQ X with Q = L⁻¹G[S], for the rows S of a `Pivots`.

    L stays a factor: multiplied out, its inverse would enter squared.
    """

    definite = True

    def __init__(
        self,
        A: LinearOperator,
        rows: GradientMatrix | None,
        pivots: Pivots,
        count: float,
        damping: float,
    ) -> None:
        if not damping > 0:
            raise SingularError("PivotedCholesky needs damping > 0")
        super().__init__(A.shape[0], like=A.like, psd=True, layout=A.layout)
        self._rows, self._pivots, self._count = rows, pivots, count
        values, self._V = _lapack.eigh(pivots.inner)
        host = np.maximum(_backend.to_host(values), 0.0) / count
        damping = max(damping, _ROUNDINGS * self._rounding(host))
        rest = damping + min(float(np.min(host, initial=np.inf)), pivots.rest / count)
        # 1/(v + λ) − 1/r without cancellation where the two are close.
        inner = (rest - damping - host) / (rest * (host + damping))
        self._rest, self._inner = rest, _backend.from_host(inner, self._V)[:, None]

    def _rounding(self, values: np.ndarray) -> float:
        """What rounding of G[S] leaves of ‖A‖ in the direction of the smallest pivot."""
        xp = _backend.namespace(self._pivots.factor)
        lengths = _backend.to_host(xp.linalg.diagonal(self._pivots.factor))
        if not lengths.size:
            return 0.0
        spread = float(np.max(lengths) / np.min(lengths))
        return _backend.eps(self.dtype) * float(np.max(values)) * spread

    def _matmat(self, X: Array, /) -> Array:
        if self._rows is None:  # A is nothing beside λ
            return X / self._rest
        y = _backend.to_small(self._rows @ X)
        (L, y), (V, _), (inner, _) = (
            _backend.together(M, y) for M in (self._pivots.factor, self._V, self._inner)
        )
        y = _backend.namespace(V).matrix_transpose(V) @ _lapack.solve_lower(L, y)
        y = _lapack.solve_lower(L, V @ (inner * y), transpose=True)
        return X / self._rest + self._rows.T @ _backend.lift(y, X)

    def with_shift(self, shift: Any) -> PivotedMap:
        """The map at another λ: the rows are kept."""
        return PivotedMap(self, self._rows, self._pivots, self._count, smallest(shift))
