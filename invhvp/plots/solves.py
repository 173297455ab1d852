"""How iterative solves converge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import _backend
from ..solution import Solution
from ._axes import NEUTRAL, PALETTE, axes, clean


def convergence(
    solutions: Mapping[str, Solution], *, rtol: float | None = None, ax: Any = None
) -> Any:
    """Draw the largest relative residual of iterative solves over the products they spent.

    Args:
        solutions: by label; those without a history are left out.
        rtol: the tolerance, drawn as a line.
        ax: Axes to draw on; a new figure by default.

    The last point of a curve is the true residual, recomputed from the solution.
    """
    ax = axes(ax, 6.4, 4.2)
    drawn = [(label, sol) for label, sol in solutions.items() if len(sol.history) > 1]
    for i, (label, solution) in enumerate(drawn):
        products = [record.products for record in solution.history]
        residuals = [float(np.max(r.relative_residuals)) for r in solution.history]
        last = float(np.max(_backend.to_host(solution.relative_residuals)))
        color = PALETTE[i % len(PALETTE)]
        ax.semilogy(products, residuals, color=color, lw=1.8, label=label)
        ax.semilogy([solution.products], [last], "o", color=color, ms=6)
    if rtol is not None:
        ax.axhline(rtol, color=NEUTRAL, lw=1, ls="--")
        ax.annotate(
            f"tolerance {rtol:g}",
            (0, rtol),
            xycoords=("axes fraction", "data"),
            xytext=(6, 4),
            textcoords="offset points",
            color=NEUTRAL,
        )
    ax.set_xlabel("operator-vector products")
    ax.set_ylabel("largest relative residual ‖b − (A + λI)x‖ / ‖b‖")
    if drawn:
        ax.legend(frameon=False)
    return clean(ax)
