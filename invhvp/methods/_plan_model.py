"""A small diagonal problem with the spectrum of a large operator, to try methods on."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..estimate import Spectrum
from ..operators import Diagonal
from ..solution import ConvergenceError, ConvergenceWarning, Status

_HEAD = 400  # largest eigenvalues that are represented one by one
_WIDEST = 32  # columns that a trial iterates; wider blocks need no more passes
_MOST_PASSES = 2000  # where a trial gives up


class Trial(NamedTuple):
    """How a method fared on the model."""

    passes: int
    finished: bool
    residual: float


@dataclass(frozen=True, kw_only=True)
class ModelSpectrum:
    """Eigenvalues of an n × n operator as quantiles of its spectral density.

    A node of the Lanczos quadrature stands for its weight times n eigenvalues. Nodes that have
    converged are atoms; between the others the quantiles are interpolated on a scale that is
    logarithmic above λ and linear below.

    Attributes:
        n: number of eigenvalues.
        damping: λ.
        positions, heights: interpolation points: how many eigenvalues are larger, asinh(θ/unit).
        unit: λ, or rounding of the largest eigenvalue for λ = 0.
        floor: the relative residual that rounding leaves, ε‖A‖‖x‖/‖b‖ up to a small factor.
    """

    n: int
    damping: float
    positions: np.ndarray
    heights: np.ndarray
    unit: float
    floor: float

    @classmethod
    def of(cls, density: Spectrum, damping: float, *, psd: bool) -> ModelSpectrum:
        """Read the quantiles off a density with one probe."""
        nodes, weights, residuals = density.nodes[0], density.weights[0], density.residuals[0]
        order = np.argsort(-nodes, kind="stable")
        order = order[weights[order] > 0]
        nodes, residuals = nodes[order], residuals[order]
        counts = density.n * weights[order] / np.sum(weights[order])
        gaps = np.full(nodes.size, np.inf)
        gaps[1:] = np.minimum(gaps[1:], -np.diff(nodes))
        gaps[:-1] = np.minimum(gaps[:-1], -np.diff(nodes))
        size = float(np.max(np.abs(nodes)))
        noise = 10 * density.eps * size
        atoms = (residuals <= 0.01 * gaps) | (residuals <= noise)
        values = np.where(np.abs(nodes) <= noise, 0.0, nodes)
        values = np.maximum(values, 0.0) if psd else values
        unit = damping or max(density.eps * size, 1e-300)
        heights = np.arcsinh(values / unit)
        ends = np.cumsum(counts)
        starts, middles = ends - counts, ends - counts / 2
        # Nothing lies between an atom and its neighbour, or in a gap between two clusters.
        empty = atoms[1:] | atoms[:-1] | _clefts(heights)
        left, right = middles.copy(), middles.copy()
        left[1:], right[:-1] = (
            np.where(empty, starts[1:], left[1:]),
            np.where(empty, ends[:-1], right[:-1]),
        )
        positions = np.stack([left, right], axis=1).reshape(-1)
        heights = np.repeat(heights, 2)
        # ‖x‖/‖b‖ of Gaussian right-hand sides; the factor is what the residuals come down to.
        distance = np.maximum(np.abs(values + damping), unit)
        stretch = math.sqrt(float(np.sum(counts / distance**2)) / density.n)
        return cls(
            n=density.n,
            damping=damping,
            positions=positions,
            heights=heights,
            unit=unit,
            floor=0.2 * density.eps * size * stretch,
        )

    def eigenvalue(self, index: Any) -> np.ndarray:
        """The eigenvalues with about `index` larger ones."""
        return self.unit * np.sinh(np.interp(index, self.positions, self.heights))

    def problem(self, columns: int) -> tuple[np.ndarray, np.ndarray]:
        """A diagonal (m,) and right-hand sides (m, columns) that behave as Gaussian ones on A.

        The largest eigenvalues come one by one. The others come in groups: the components of
        Gaussian columns in an eigenspace of dimension d are √d times an orthonormal basis.
        """
        random = np.random.default_rng(0)
        head = min(self.n, _HEAD)
        diagonal = [self.eigenvalue(np.arange(head) + 0.5)]
        rhs = [random.standard_normal((head, columns))]
        groups = 200 if columns <= 8 else 100
        edges = np.unique(np.geomspace(head, self.n, groups + 1).round())
        for low, high in pairwise(edges):
            value = self.eigenvalue(np.asarray([(low + high) / 2]))
            copies = min(columns, int(high - low))
            Q, _ = np.linalg.qr(random.standard_normal((columns, copies)))
            diagonal.append(np.repeat(value, copies))
            # Orthonormal rows: on average a column keeps the share copies/columns of its norm.
            rhs.append(math.sqrt((high - low) * columns / copies) * Q.T)
        return np.concatenate(diagonal), np.concatenate(rhs)

    def trial(self, method: Any, columns: int, dtype: str) -> Trial:
        """Solve the model problem in the precision of A, and count."""
        columns = max(1, min(columns, _WIDEST))
        diagonal, rhs = self.problem(columns)
        A = Diagonal(diagonal.astype(dtype), psd=bool(np.all(diagonal >= 0)))
        method = replace(method, maxiter=min(_MOST_PASSES, 10 * self.n))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            try:
                solution = method.prepare(A, damping=self.damping).solve(rhs.astype(dtype))
            except (ConvergenceError, ValueError):
                return Trial(_MOST_PASSES, False, math.inf)
        statuses = set(solution.status)
        finished = statuses <= {Status.CONVERGED, Status.ZERO, Status.FLOOR}
        return Trial(solution.passes, finished, float(np.max(solution.relative_residuals)))


def _clefts(heights: np.ndarray) -> np.ndarray:
    """Gaps between consecutive nodes that are far wider than those next to them."""
    gaps = np.abs(np.diff(heights))
    padded = np.pad(gaps, 1)
    return gaps > 10 * np.maximum(padded[:-2], padded[2:])
