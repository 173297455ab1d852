"""The diagonal as a preconditioner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import _backend
from ..estimate import DiagonalEstimate
from ..estimate import diagonal as estimate_diagonal
from ..operators import Diagonal, as_operator
from ..operators.damping import as_shift
from ..protocols import Array, Damping
from ._fixed_map import MapInverse


@dataclass(frozen=True, kw_only=True)
class Jacobi:
    """M = diag(A) + λ, exact where the operator knows its diagonal, else estimated.

    M is positive whatever the estimate: entries are max(d̂_i, its standard error), with fewer
    than four samples the root mean square of the samples. Worth it where the diagonal varies
    over orders of magnitude and its basis is that of the parameters (a diagonally scaled system
    needed 20 passes in place of 214); on spectra without such a basis it makes matters 2 to 5
    times worse.

    Args:
        samples: products to spend on an estimate, at least 1.
        rng: an int or a generator.
        kind: "auto", "hutchinson" or "xdiag"; see `estimate.diagonal`.

    Raises ValueError for samples < 1 or an unknown kind.
    Cost: no product where the diagonal is known, else `samples`; n numbers. An application is
    one multiplication of each entry. A solve adds one product, for its true residual.

    Source: Bekas, Kokiopoulou & Saad (2007), An estimator for the diagonal of a matrix.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.Dense(np.array([[3.0, 0.1], [0.1, 1.0]]))
        >>> ih.Jacobi().prepare(A, damping=1.0) @ np.ones(2)
        array([0.25, 0.5 ])
        >>> cg = ih.BlockCG(preconditioner=ih.Jacobi())
        >>> ih.solve(A, np.ones(2), cg, damping=1.0).status.name
        'CONVERGED'
    """

    samples: int = 16
    rng: Any = 0
    kind: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            msg = f"samples must be an int of at least 1, got {self.samples!r}"
            raise ValueError(msg)

    def prepare(self, A: Any, /, damping: Damping) -> JacobiInverse:
        A = as_operator(A)
        as_shift(damping, A)  # a wrong λ costs no products
        estimate = estimate_diagonal(A, samples=self.samples, rng=self.rng, kind=self.kind)
        return JacobiInverse(self, A, damping, estimate, products=estimate.products)


class JacobiInverse(MapInverse):
    """(diag(A) + λ)⁻¹, positive definite.

    Attributes:
        estimate: the `DiagonalEstimate` behind it.
        standard_error: (n,), of the estimated diagonal; zero where it is exact.
    """

    def __init__(
        self, method: Jacobi, A: Any, damping: Damping, estimate: DiagonalEstimate, *, products: int
    ) -> None:
        entries = _positive(estimate.positive() + as_shift(damping, A))
        inverse_map = Diagonal(1.0 / entries, psd=True, layout=A.layout)
        super().__init__(
            method, A, damping, inverse_map, exact=False, products=products, definite=True
        )
        self.estimate = estimate

    @property
    def standard_error(self) -> Array:
        """The standard error of each entry of the diagonal, (n,)."""
        return self.estimate.standard_error

    def with_damping(self, damping: Damping, /) -> JacobiInverse:
        """The inverse at another λ, from the same diagonal: no product."""
        return JacobiInverse(self.method, self.operator, damping, self.estimate, products=0)


def _positive(d: Array) -> Array:
    """Entries that vanish (an empty row at λ = 0) take the largest: they are not to blow up."""
    xp = _backend.namespace(d)
    largest = xp.max(d)
    spare = xp.where(largest > 0, largest, xp.ones_like(largest))
    usable = (d > 0) & xp.isfinite(1.0 / xp.where(d > 0, d, xp.ones_like(d)))
    return xp.where(usable, d, spare)
