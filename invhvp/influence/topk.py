"""The training samples that matter most for each test sample."""

from __future__ import annotations

from dataclasses import dataclass

from .. import _backend
from ..protocols import Array


@dataclass(frozen=True)
class TopK:
    """Most helpful and most harmful training samples, best first; all of shape (n_test, k).

    Attributes:
        helpful: indices of the largest scores.
        helpful_scores: these scores, descending.
        harmful: indices of the smallest scores.
        harmful_scores: these scores, ascending.
    """

    helpful: Array
    helpful_scores: Array
    harmful: Array
    harmful_scores: Array


def top_k(scores: Array, k: int) -> TopK:
    """Select the k largest and the k smallest of each row of scores (n_test, n_train).

    Raises ValueError unless 1 ≤ k ≤ n_train.
    """
    if not 1 <= k <= scores.shape[1]:
        msg = f"k must lie between 1 and the {scores.shape[1]} training samples, got {k}"
        raise ValueError(msg)
    xp = _backend.namespace(scores)
    order = xp.argsort(scores, axis=1, stable=True)
    helpful = xp.flip(order, axis=1)[:, :k]
    harmful = order[:, :k]
    return TopK(
        helpful,
        xp.take_along_axis(scores, helpful, axis=1),
        harmful,
        xp.take_along_axis(scores, harmful, axis=1),
    )
