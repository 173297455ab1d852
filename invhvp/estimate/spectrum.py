"""The spectral density of an operator, and what follows from it, by Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .. import _backend, _linalg
from .._random import generator
from ..operators import as_operator
from ..protocols import Array
from ..solution import ConvergenceError, IndefiniteError, Status


class Estimate(NamedTuple):
    """A stochastic estimate: the mean over the probes, and its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """Quadrature of the spectral density: each probe gives nodes with weights that sum to 1.

    Attributes:
        n: number of parameters.
        nodes: Ritz values (probes, steps), float64 on the host, ascending.
        weights: their weights (probes, steps).
        residuals: ‖A v − θ v‖ of each Ritz pair.
        eps: unit spacing of the products; what is below eps·‖A‖ is rounding.
        products, passes: what it cost.
    """

    n: int
    nodes: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray
    eps: float
    products: int
    passes: int

    @property
    def largest(self) -> float:
        """A lower bound on λ_max, up to rounding; usually within a few digits."""
        return float(np.max(self.nodes))

    @property
    def smallest(self) -> float:
        """An upper bound on λ_min, up to rounding."""
        return float(np.min(self.nodes))

    def integrate(self, f: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """The trace of f(A) with its standard error (inf for a single probe)."""
        each = self.n * np.sum(self.weights * f(self.nodes), axis=1)
        m = each.size
        error = float(np.std(each, ddof=1)) / math.sqrt(m) if m > 1 else math.inf
        return Estimate(float(np.mean(each)), error)

    @property
    def trace(self) -> Estimate:
        """Trace of A: Hutchinson's estimator with these probes."""
        return self.integrate(lambda theta: theta)

    def effective_dimension(self, damping: float) -> Estimate:
        """Σ θ/(θ + λ) over the non-negative eigenvalues."""
        _check_positive(damping)

        def share(theta: np.ndarray) -> np.ndarray:
            positive = np.maximum(theta, 0.0)
            return positive / (positive + damping)

        return self.integrate(share)

    def logdet(self, damping: float) -> Estimate:
        """The log-determinant of A + λI. Raises IndefiniteError where it is not positive."""
        _check_positive(damping)
        if self.smallest + damping <= 0 and self.smallest < -10 * self.eps * self.largest:
            msg = (
                f"A has the curvature {self.smallest:.3g}; the determinant of A + λI is positive "
                f"for a damping above {-self.smallest:.3g}"
            )
            raise IndefiniteError(msg, curvature=self.smallest)
        # Nodes a rounding below 0 belong to null directions.
        return self.integrate(lambda theta: np.log(np.maximum(theta, -0.5 * damping) + damping))

    def density(self, x: np.ndarray, *, width: float) -> np.ndarray:
        """The density at `x`, smoothed by a Gaussian of standard deviation `width`."""
        gap = (np.asarray(x, dtype=np.float64)[:, None] - self.nodes.reshape(1, -1)) / width
        kernel = np.exp(-0.5 * gap**2) / (width * math.sqrt(2 * math.pi))
        return kernel @ self.weights.reshape(-1) / self.nodes.shape[0]


def spectrum(A: Any, *, steps: int = 20, probes: int = 4, rng: Any = 0) -> Spectrum:
    """Stochastic Lanczos quadrature of the spectral density of A.

    Every probe runs its own Lanczos recurrence, fully reorthogonalised, so that no eigenvalue is
    counted twice; all of them share the passes. The quadrature is exact for polynomials of
    degree 2·steps − 1, and outliers converge first.

    Args:
        A: a symmetric operator.
        steps: Lanczos steps, at most n.
        probes: random sign vectors; standard errors need two.
        rng: seed.

    Raises ConvergenceError where A returns NaN; ValueError for options below 1.
    Cost: steps·probes products in `steps` passes; steps·probes vectors of memory and
    8·n·steps²·probes flops.

    Source: Ubaru, Chen & Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos
    quadrature; Ghorbani, Krishnan & Xiao (2019) for networks.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> from invhvp.estimate import spectrum
        >>> density = spectrum(ih.Diagonal(np.arange(1.0, 101.0)), steps=10)
        >>> round(density.trace.value), density.largest > 98
        (5050, True)
    """
    A = as_operator(A)
    for name, value in (("steps", steps), ("probes", probes)):
        if value < 1:
            msg = f"{name} must be at least 1, got {value}"
            raise ValueError(msg)
    n = A.shape[0]
    steps = min(steps, n)
    eps = _backend.eps(A.dtype)
    V = generator(rng, A.like).rademacher((n, probes)) / math.sqrt(n)
    basis: list[Array] = []
    alphas, betas = [], []
    alive, size = np.ones(probes), 0.0
    for _ in range(steps):
        basis.append(V)
        Y = A._matmat(V)
        alpha = _linalg.column_dot(V, Y)
        for _ in range(2):
            for old in basis:
                Y = _linalg.add_scaled(Y, old, -_linalg.column_dot(old, Y))
        beta = _linalg.column_norms(Y)
        xp = _backend.namespace(beta)
        look = np.asarray(_backend.to_host(xp.stack([alpha, beta])))
        if not np.all(np.isfinite(look)):
            raise ConvergenceError(Status.NONFINITE.value)
        size = max(size, float(np.max(np.abs(look))))
        # A probe whose Krylov space is exhausted goes on as zeros, which weigh nothing.
        alive = alive * (look[1] > 30 * eps * size)
        alphas.append(look[0])
        betas.append(look[1] * alive)
        V = _linalg.scale_columns(Y, np.where(alive > 0, 1 / np.where(alive > 0, look[1], 1), 0.0))
    nodes, weights, residuals = (
        np.stack(parts)
        for parts in zip(*map(_quadrature, np.stack(alphas).T, np.stack(betas).T), strict=True)
    )
    return Spectrum(
        n=n,
        nodes=nodes,
        weights=weights,
        residuals=residuals,
        eps=eps,
        products=steps * probes,
        passes=steps,
    )


def _quadrature(alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes, weights and residuals of one recurrence; after its end the last node is repeated."""
    m = int(np.argmin(beta > 0)) + 1 if np.any(beta == 0) else alpha.size
    T = np.diag(alpha[:m]) + np.diag(beta[: m - 1], 1) + np.diag(beta[: m - 1], -1)
    theta, S = np.linalg.eigh(T)
    pad = alpha.size - m
    return (
        np.pad(theta, (0, pad), mode="edge"),
        np.pad(S[0, :] ** 2, (0, pad)),
        np.pad(np.abs(S[-1, :]) * beta[m - 1], (0, pad)),
    )


def _check_positive(damping: float) -> None:
    if not (damping > 0 and math.isfinite(damping)):
        msg = f"damping must be positive and finite, got {damping}"
        raise ValueError(msg)
