"""A preconditioner from a few gradients that stand for all of them: no product is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .. import _backend
from ..estimate.pivots import Pivots, pivots
from ..gradients import GradientMatrix
from ..operators import LinearOperator, as_operator
from ..operators.damping import as_shift, smallest
from ..protocols import Array, Damping
from ..solution import SingularError
from ._fixed_map import MapInverse


@dataclass(frozen=True, kw_only=True)
class PivotedCholesky:
    """Qᵀ(QAQᵀ + λ)⁻¹Q + (I − QᵀQ)/(θ + λ), Q an orthonormal basis of some rows of the gradients.

    For A = (1/c) Σ g_i g_iᵀ. The rows are those that randomly pivoted Cholesky chooses from the
    Gram matrix, so that neither A nor its rows are ever multiplied with a long vector: where a
    network's curvature has many rows and few that matter, this is `SampleSpace` at a fraction of
    its cost. With δ = tr(K − FFᵀ)/c for what the rows leave of the Gram matrix, the condition
    number of the preconditioned system is at most 4(1 + δ/λ); θ is the least value of QAQᵀ, or δ
    if that is less. With block-wise damping it uses the smallest λ.

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
        if self.rank != "adaptive" and (
            isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1
        ):
            msg = f'rank must be a positive integer or "adaptive", got {self.rank!r}'
            raise ValueError(msg)
        if isinstance(self.max_rank, bool) or self.max_rank < 1:
            msg = f"max_rank must be a positive integer, got {self.max_rank!r}"
            raise ValueError(msg)
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
        if not least > 0:
            raise SingularError("PivotedCholesky needs damping > 0")
        count = float(getattr(A, "count", G.shape[0]))
        most = self.max_rank if self.rank == "adaptive" else self.rank
        found = pivots(G, rank=most, goal=self.tol * least * count, rng=self.rng)
        rows = G[found.rows] if found.rows.size else None
        return MapInverse(self, A, damping, PivotedMap(A, rows, found, count, least), exact=False)


class PivotedMap(LinearOperator):
    """X/r + G[S]ᵀ C G[S] X for the rows S of a `Pivots`."""

    definite = True

    def __init__(
        self,
        A: LinearOperator,
        rows: GradientMatrix | None,
        pivots: Pivots,
        count: float,
        damping: float,
    ) -> None:
        super().__init__(A.shape[0], like=A.like, psd=True, layout=A.layout)
        self._rows, self._pivots, self._count = rows, pivots, count
        values, V = _backend.eigh(pivots.inner)
        host = np.maximum(_backend.to_host(values), 0.0) / count
        self._rest = damping + min(float(np.min(host, initial=np.inf)), pivots.rest / count)
        # 1/(θ + λ) − 1/r without cancellation where the two are close.
        inner = (self._rest - damping - host) / (self._rest * (host + damping))
        xp = _backend.namespace(V)
        half = xp.matrix_transpose(V) @ _backend.inv_lower(pivots.factor)
        self._C = xp.matrix_transpose(half) @ (_backend.from_host(inner, V)[:, None] * half)

    def _matmat(self, X: Array, /) -> Array:
        if self._rows is None:  # A is nothing beside λ
            return X / self._rest
        inside = self._C @ _backend.to_small(self._rows @ X)
        return X / self._rest + self._rows.T @ _backend.lift(inside, X)

    def with_shift(self, shift: Any) -> PivotedMap:
        """The map at another λ: the rows are kept."""
        return PivotedMap(self, self._rows, self._pivots, self._count, smallest(shift))
