"""How scores, and the order they put the training samples in, depend on the damping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import _backend, _linalg
from ..gradients import GradientMatrix
from ..methods import CG, BlockCG, solve_path
from ..operators.damping import as_shift, scalar
from ..protocols import Array

if TYPE_CHECKING:
    from .model import Influence

_BLOCK = 128  # test samples solved together for all λ


@dataclass(frozen=True, kw_only=True, eq=False)
class DampingCurve:
    """Scores at several λ.

    Attributes:
        dampings: the L values of λ, in the order they were given.
        scores: (L, n_test, n_train).
        rank_correlations: (L − 1, n_test), Spearman's coefficient between the scores at
            dampings[l] and dampings[l + 1] over the training samples, for each test sample. Near
            1 the choice between the two does not matter; ties share their mean rank.
    """

    dampings: tuple[float, ...]
    scores: Array
    rank_correlations: Array


def damping_curve(
    influence: Influence, test: GradientMatrix, dampings: Sequence[float]
) -> DampingCurve:
    """Scores along the dampings; see `Influence.damping_curve`."""
    inverse = influence.inverse
    values = tuple(float(scalar(as_shift(d, inverse.operator), "damping_curve")) for d in dampings)
    if not values:
        msg = "dampings must name at least one value"
        raise ValueError(msg)
    solve = _from_one_space if _shares_a_space(inverse) else _one_by_one
    scores = solve(influence, test, values)
    xp = _backend.namespace(scores)
    return DampingCurve(
        dampings=values,
        scores=scores,
        rank_correlations=_backend.lift(_neighbours(scores), scores)
        if len(values) > 1
        else xp.zeros((0, test.shape[0]), dtype=scores.dtype, device=_backend.device(scores)),
    )


def _shares_a_space(inverse: Any) -> bool:
    """Whether `solve_path` does what this inverse would do at every λ."""
    method = inverse.method
    if not isinstance(method, CG | BlockCG):
        return False
    # What else the options of a path are: the stopping rule and maxiter.
    plain = type(method)(rtol=method.rtol, atol=method.atol, maxiter=method.maxiter)
    same = replace(method, check_every=1, max_restarts=plain.max_restarts)
    if isinstance(same, BlockCG):
        same = replace(same, block_width=None)
    return same == plain


def _from_one_space(
    influence: Influence, test: GradientMatrix, dampings: tuple[float, ...]
) -> Array:
    method, A = influence.inverse.method, influence.inverse.operator
    xp = _backend.namespace(test.like)
    blocks = []
    for first in range(0, test.shape[0], _BLOCK):
        rows = test[first : min(first + _BLOCK, test.shape[0])]
        B = xp.matrix_transpose(rows.to_dense())
        path = solve_path(
            A, B, dampings=dampings, rtol=method.rtol, atol=method.atol, maxiter=method.maxiter
        )
        X = xp.concat([solution.raise_if_meaningless().x for solution in path], axis=1)
        # One pass over the training gradients serves every λ.
        scores = xp.matrix_transpose(influence.train @ X)
        blocks.append(xp.reshape(scores, (len(dampings), rows.shape[0], -1)))
    return xp.concat(blocks, axis=1)


def _one_by_one(influence: Influence, test: GradientMatrix, dampings: tuple[float, ...]) -> Array:
    inverse, train = influence.inverse, influence.train
    each = [type(influence)(inverse.with_damping(value), train).scores(test) for value in dampings]
    return _backend.namespace(*each).stack(each, axis=0)


def _neighbours(scores: Array) -> Array:
    """Spearman's coefficient of consecutive slices, (L − 1, n_test), small."""
    xp = _backend.namespace(scores)
    ranks = [_centred_ranks(scores[i, :, :]) for i in range(scores.shape[0])]
    squares = [_linalg.column_dot(r, r) for r in ranks]
    found = []
    for left, right, a, b in zip(ranks, ranks[1:], squares, squares[1:], strict=False):
        dot = _linalg.column_dot(left, right)
        xp = _backend.namespace(dot)
        size = xp.sqrt(a * b)
        # Constant scores rank nothing: they agree with each other and with nothing else.
        trivial = xp.where((a == 0) & (b == 0), xp.ones_like(size), xp.zeros_like(size))
        found.append(xp.where(size > 0, dot / xp.where(size > 0, size, 1.0 + 0.0 * size), trivial))
    return xp.stack(found, axis=0)


def _centred_ranks(scores: Array) -> Array:
    """Mean ranks less their mean, as columns (n_train, n_test) in the dtype of the scores."""
    xp = _backend.namespace(scores)
    last = scores.shape[1] - 1
    ascending, descending = _ordinal(scores), _ordinal(-scores)
    # Stable sorts break ties one way going up and the other going down: the mean is the tie's.
    ranks = xp.astype(ascending - descending, scores.dtype) / 2
    return xp.matrix_transpose(ranks) / max(last, 1)


def _ordinal(scores: Array) -> Array:
    xp = _backend.namespace(scores)
    order = xp.argsort(scores, axis=1, stable=True)
    return xp.argsort(order, axis=1, stable=True)
