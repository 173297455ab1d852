"""How far the blocks of a curvature model are from those of the exact matrix."""

from __future__ import annotations

import math
from typing import Any

from .. import _backend, _linalg
from ..operators import BlockDiagonal
from ..protocols import Array, HasGradients


def block_errors(K: BlockDiagonal, F: Any) -> dict[str, float]:
    """‖F_b − K_b‖ / ‖F_b‖ in the Frobenius norm, for every block b of `K`.

    `F` is the exact matrix as the mean of rank-one matrices, `RankOneMean` or the Gauss–Newton and
    Fisher operators of an adapter, with the parameters of `K` in the same order. Nothing of size
    p × p is formed: ‖F − K‖² = ‖F‖² − 2 tr(FK) + ‖K‖².

    Raises TypeError for an operator without gradients, ValueError for other shapes.
    Cost: the dense rows (N, p), N² p flops, a product of K with N columns.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> from invhvp.estimate import block_errors
        >>> F = ih.RankOneMean(ih.DenseGradients(np.array([[1.0, 1.0]])))
        >>> K = ih.BlockDiagonal({"w": ih.Diagonal(np.ones(2))})
        >>> round(block_errors(K, F)["w"], 4)  # the off-diagonal is lost
        0.7071
    """
    if not isinstance(F, HasGradients):
        msg = f"F must have gradients, as RankOneMean(G) has, got {type(F).__name__}"
        raise TypeError(msg)
    rows = F.gradients.to_dense()
    if rows.shape[1] != K.shape[0]:
        msg = f"F has {rows.shape[1]} parameters, K has {K.shape[0]}"
        raise ValueError(msg)
    count = float(getattr(F, "count", rows.shape[0]))
    xp = _backend.namespace(rows)
    columns, layout = xp.matrix_transpose(rows), K.layout
    assert layout is not None, "a BlockDiagonal has one"
    found = {}
    for name, A in K.blocks.items():
        G = layout.take(columns, name)
        exact = _square(_linalg.gram(G)) / count**2
        mixed = _sum(_linalg.column_dot(G, A @ G)) / count
        own = getattr(A, "frobenius_norm", None)
        mine = own() ** 2 if own is not None else _square(_backend.to_small(A.to_dense()))
        error = math.sqrt(max(exact - 2.0 * mixed + mine, 0.0))
        found[name] = error / math.sqrt(exact) if exact > 0 else error
    return found


def _square(M: Array) -> float:
    return _sum(_backend.namespace(M).reshape(M * M, (-1,)))


def _sum(x: Array) -> float:
    return float(_backend.to_host(_backend.namespace(x).sum(x)))
