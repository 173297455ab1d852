"""What a solve returns, and the words for how it ended."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import _backend, _tracing
from .protocols import Array


class Status(enum.Enum):
    """How one column ended; the value is the message and, where there is one, the remedy."""

    CONVERGED = "the true residual meets the tolerance"
    ZERO = "the right-hand side is zero, and so is the solution"
    FLOOR = (
        "as accurate as this precision allows, but above the tolerance asked; loosen rtol, raise "
        "the damping, or pass a float64 residual_operator"
    )
    MAXITER = "the limit on iterations, products or seconds was reached; raise it, or precondition"
    STAGNATED = (
        "the residual stopped falling; the system may be singular (raise the damping) or the "
        "operator noisy"
    )
    NEGATIVE_CURVATURE = (
        "A + λI is not positive definite; raise the damping, use a Gauss-Newton operator, or a "
        "method for indefinite operators"
    )
    NOT_SYMMETRIC = (
        "the operator is not symmetric, not deterministic, or less precise than its dtype claims"
    )
    NONFINITE = "the operator returned NaN or Inf"
    DIVERGED = "the iteration diverged; use a smaller step or another method"
    APPROXIMATE = "a one-shot approximation: not iterated towards a tolerance"

    @property
    def code(self) -> int:
        """The small integer that stands for this status in `Solution.status_codes`."""
        return _STATUSES.index(self)

    @property
    def ok(self) -> bool:
        """Whether the answer is what was asked for."""
        return self in (Status.CONVERGED, Status.ZERO, Status.APPROXIMATE)

    @property
    def meaningless(self) -> bool:
        """Whether the vector next to this status must not be used."""
        return self in (
            Status.NEGATIVE_CURVATURE,
            Status.NOT_SYMMETRIC,
            Status.NONFINITE,
            Status.DIVERGED,
        )


_STATUSES = list(Status)


class InvhvpWarning(UserWarning):
    """Something the user must know; the base of this library's warnings."""


class ConvergenceWarning(InvhvpWarning):
    """An iterative solve did not do what was asked."""


class ConvergenceError(RuntimeError):
    """Raised by `Solution.raise_if_failed`; carries the `solution`."""

    def __init__(self, message: str, solution: Any = None) -> None:
        super().__init__(message)
        self.solution = solution


class SingularError(ValueError):
    """A + λI is singular to working precision."""


class IndefiniteError(ValueError):
    """A + λI is not positive definite: carries the proof.

    Attributes:
        vector: unit vector p (n,) with pᵀ(A + λI)p ≤ 0.
        curvature: the Rayleigh quotient pᵀA p.
        minimum_damping: the damping must exceed this value (a lower bound on what is needed).
    """

    def __init__(self, message: str, vector: Array = None, curvature: float = float("nan")) -> None:
        super().__init__(message)
        self.vector = vector
        self.curvature = curvature
        self.minimum_damping = -curvature


@dataclass(frozen=True)
class Curvature:
    """Proof of a direction of non-positive curvature: unit `vector` (n,) and pᵀA p."""

    vector: Array
    value: float


@dataclass(frozen=True)
class Record:
    """One look at a running iteration.

    `residual_norms` are relative to ‖b_j‖, on the host, shape (k,) of the columns at work.
    """

    iteration: int
    products: int
    seconds: float
    relative_residuals: np.ndarray
    error_bounds: np.ndarray | None = None


@dataclass(frozen=True)
class Solution:
    """X ≈ (A + λI)⁻¹B with what is known about its accuracy, per column.

    For `b` of shape (n,) the per-column fields are 0-d, for (n, k) they have shape (k,). To JAX it
    is a pytree: `jit` takes and returns it. From inside of `jit` the counts are 0-d arrays, there
    is no history and no proof, and what is `meaningless` is NaN.

    Attributes:
        x: the solution, shape of the right-hand side.
        status_codes: int8; `.status` decodes.
        residual_norms: true residuals ‖b − (A + λI)x‖₂, recomputed with the operator.
        relative_residuals: the same over ‖b‖₂ (0 for a zero right-hand side).
        error_bounds: upper bounds on the error in the norm `error_norm`; inf where none is known.
        error_norm: "A" for sqrt(eᵀ(A + λI)e), "2" for the Euclidean norm.
        iterations: block iterations of this solve.
        products: operator-vector products of this solve (columns).
        passes: calls of the operator (sweeps over the data) of this solve.
        seconds: wall time of this solve.
        history: `Record`s, one per look.
        curvature: proof of non-positive curvature where it was met.
    """

    x: Array
    status_codes: Array
    residual_norms: Array
    relative_residuals: Array
    error_bounds: Array
    error_norm: str
    iterations: int
    products: int
    passes: int
    seconds: float = 0.0
    history: tuple[Record, ...] = field(default=(), repr=False)
    curvature: Curvature | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for cls, static in ((Solution, ("error_norm",)), (Record, ()), (Curvature, ())):
            _tracing.register_pytree(cls, static)

    @property
    def status(self) -> Status | tuple[Status, ...]:
        """The decoded status (one transfer to the host); a tuple for several columns."""
        codes = _backend.to_host(self.status_codes)
        if codes.ndim == 0:
            return _STATUSES[int(codes)]
        return tuple(_STATUSES[int(code)] for code in codes)

    @property
    def converged(self) -> Array:
        """Booleans on the device: CONVERGED or ZERO."""
        return self.status_codes <= Status.ZERO.code

    def raise_if_failed(self) -> Solution:
        """Return self, or raise `IndefiniteError` or `ConvergenceError` naming what failed."""
        return self._raise_unless(lambda status: status.ok)

    def raise_if_meaningless(self) -> Solution:
        """Return self, or raise where a column must not be used at all."""
        return self._raise_unless(lambda status: not status.meaningless)

    def _raise_unless(self, accept: Any) -> Solution:
        message = self.describe(accept)
        if message is None:
            return self
        if self.curvature is not None:
            value = self.curvature.value
            text = f"{message} Met curvature {value:.3g}: the damping must exceed {-value:.3g}."
            raise IndefiniteError(text, self.curvature.vector, value)
        raise ConvergenceError(message, self)

    def describe(self, accept: Any = lambda status: status.ok) -> str | None:
        """One sentence about the columns that are not acceptable; None if all are."""
        status = self.status
        statuses = status if isinstance(status, tuple) else (status,)
        bad = [s for s in statuses if not accept(s)]
        if not bad:
            return None
        parts = []
        for kind in dict.fromkeys(bad):
            columns = [j for j, s in enumerate(statuses) if s is kind]
            shown = ", ".join(map(str, columns[:5])) + (", ..." if len(columns) > 5 else "")
            parts.append(
                f"{kind.name} in column{'s' if len(columns) > 1 else ''} {shown}: {kind.value}"
            )
        worst = float(np.max(_backend.to_host(self.relative_residuals), initial=0.0))
        return f"{'; '.join(parts)}. Largest relative residual {worst:.2e}."

    def to_dict(self) -> dict[str, Any]:
        """Everything but `x` and the proof vector as plain JSON values; None for inf and NaN."""

        def plain(value: Any) -> Any:
            if isinstance(value, list):
                return [plain(item) for item in value]
            return value if np.isfinite(value) else None

        def listed(values: Any) -> Any:
            return plain(np.asarray(_backend.to_host(values), dtype=float).tolist())

        status = self.status
        names = [s.name for s in status] if isinstance(status, tuple) else status.name
        return {
            "status": names,
            "residual_norms": listed(self.residual_norms),
            "relative_residuals": listed(self.relative_residuals),
            "error_bounds": listed(self.error_bounds),
            "error_norm": self.error_norm,
            "iterations": int(self.iterations),
            "products": int(self.products),
            "passes": int(self.passes),
            "seconds": float(self.seconds),
            "history": [
                {
                    "iteration": record.iteration,
                    "products": record.products,
                    "seconds": record.seconds,
                    "relative_residuals": plain(record.relative_residuals.tolist()),
                }
                for record in self.history
            ],
        }

    def first_column(self) -> Solution:
        """The same solution with the column axis removed: what a 1-D right-hand side gets."""
        return replace(
            self,
            x=self.x[:, 0],
            status_codes=self.status_codes[0],
            residual_norms=self.residual_norms[0],
            relative_residuals=self.relative_residuals[0],
            error_bounds=self.error_bounds[0],
        )
