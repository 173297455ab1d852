"""The checks of one solution against the matrix in float64."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from .. import _backend
from ..protocols import Array
from ..solution import Solution, Status
from ._measure import attempt, host, like, norm, require


def statuses(solution: Solution) -> tuple[Status, ...]:
    """The status of each column, also for one vector."""
    status = solution.status
    return status if isinstance(status, tuple) else (status,)


def check_fields(solution: Solution, B: Array) -> None:
    """Fail unless every field has its shape, dtype and range."""
    columns = tuple(B.shape[1:])
    like(solution.x, B, tuple(B.shape), "Solution.x")
    for name in ("residual_norms", "relative_residuals", "error_bounds"):
        values = getattr(solution, name)
        like(values, B, columns, f"Solution.{name}")
    require(
        not np.any(np.isnan(host(solution.error_bounds))),
        "error_bounds has NaN",
        "inf says that nothing is known.",
    )
    codes = solution.status_codes
    require(_backend.dtype_name(codes.dtype) == "int8", f"status_codes: {codes.dtype}", "int8.")
    require(tuple(codes.shape) == columns, f"status_codes: {tuple(codes.shape)}", "Per column.")
    require(solution.error_norm in ("A", "2"), f"error_norm {solution.error_norm!r}", "A or 2.")
    for name in ("iterations", "products", "passes"):
        value = getattr(solution, name)
        require(isinstance(value, int) and value >= 0, f"{name} is {value!r}", "A count.")
    require(solution.seconds >= 0, f"seconds is {solution.seconds}", "Wall time.")
    attempt(lambda: json.dumps(solution.to_dict()), "json.dumps(solution.to_dict())")


def check_honesty(solution: Solution, B: Array, M: np.ndarray, method: Any, unit: float) -> None:
    """Compare residuals, statuses and error bounds with A + λI = M in float64.

    Columns whose status calls them meaningless are not looked at.
    """
    b, x = _columns(host(B)), _columns(host(solution.x))
    reported = np.atleast_1d(host(solution.residual_norms))
    bounds = np.atleast_1d(host(solution.error_bounds))
    b_norms = np.linalg.norm(b, axis=0)
    relative = np.atleast_1d(host(solution.relative_residuals)) * b_norms
    true = np.linalg.norm(b - M @ x, axis=0)
    rounding = unit * (np.linalg.norm(M, 2) * np.linalg.norm(x, axis=0) + b_norms)
    allowed = _tolerance(method, b_norms) + rounding
    error = x - np.linalg.solve(M, b)
    for j, status in enumerate(statuses(solution)):
        if status.meaningless:
            continue
        require(
            abs(reported[j] - true[j]) <= rounding[j],
            f"column {j} reports the residual {reported[j]:.3e}, true is {true[j]:.3e} "
            f"(allowed difference {rounding[j]:.1e})",
            "Report the recomputed residual, not that of a recurrence.",
        )
        require(
            abs(relative[j] - reported[j]) <= unit * reported[j],
            f"relative_residuals[{j}] is not residual_norms[{j}]/‖b‖",
            "Each column has its own scale.",
        )
        require(
            status is not Status.CONVERGED or true[j] <= allowed[j],
            f"column {j} is CONVERGED with the residual {true[j]:.3e} (allowed {allowed[j]:.3e})",
            "Only ‖r‖ ≤ max(rtol‖b‖, atol) is CONVERGED, per column.",
        )
        e = error[:, j]
        size = norm(e) if solution.error_norm == "2" else np.sqrt(max(e @ M @ e, 0.0))
        require(
            size <= bounds[j] * (1 + 1e-3),
            f"column {j} has the error {size:.3e} in the norm {solution.error_norm!r}, bounded "
            f"by {bounds[j]:.3e}",
            "A bound must hold; where none is known it is inf.",
        )


def _tolerance(method: Any, b_norms: np.ndarray) -> np.ndarray:
    """max(rtol·‖b‖, atol); inf where the method stops by another rule."""
    if not hasattr(method, "rtol") or getattr(method, "etol", None) is not None:
        return np.full(b_norms.shape, np.inf)
    return np.maximum(method.rtol * b_norms, getattr(method, "atol", 0.0))


def _columns(x: np.ndarray) -> np.ndarray:
    return x[:, None] if x.ndim == 1 else x
