"""One call for one solve."""

from __future__ import annotations

from typing import Any

from ..protocols import Array, Damping, Method
from ..solution import Solution
from .block_cg import BlockCG


def solve(
    A: Any, B: Array, /, method: Method | None = None, *, damping: Damping, **options: Any
) -> Solution:
    """Solve (A + λI)X = B: `method.prepare(A, damping=λ).solve(B)`, by default with BlockCG().

    Args:
        A: an operator, a symmetric matrix (n, n), or anything `as_operator` takes.
        B: right-hand sides (n,), (n, k), or a gradient matrix whose rows they are.
        method: how; nothing is chosen behind your back.
        damping: λ ≥ 0, or one per block of A's layout.
        options: of one solve: x0, callback, progress.

    Solutions have derivatives in B, λ and what A is made of: in JAX, also inside of `jit`, of any
    order; in PyTorch first ones where gradients are recorded. The backward pass is another solve
    with the same method.

    Raises TypeError or ValueError at the door. Cost: that of the method.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> ih.solve(np.diag([1.0, 2.0]), np.ones(2), damping=1.0).x.round(6)
        array([0.5     , 0.333333])
    """
    method = BlockCG() if method is None else method
    return method.prepare(A, damping=damping).solve(B, **options)
