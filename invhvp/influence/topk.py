"""The training samples that matter most for each test sample."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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


def top_k(blocks: Iterable[tuple[slice, slice, Array]], k: int) -> TopK:
    """Select the k largest and the k smallest scores of each test sample from blocks of them.

    Of equal scores the one with the higher index counts as the larger.

    Args:
        blocks: (test slice, train slice, scores) as `Influence.blocks` and `read_blocks` yield
            them: of the same test slice in the order of the training samples.
        k: at most the number of training samples.

    Raises ValueError for another k. Cost: one sort a block, 4·k numbers a test sample.
    """
    if k < 1:
        msg = f"k must be at least 1, got {k}"
        raise ValueError(msg)
    kept: dict[int, tuple[Array, Array, Array, Array]] = {}
    for rows, columns, scores in blocks:
        xp = _backend.namespace(scores)
        order = xp.argsort(scores, axis=1, stable=True)
        low, high = order[:, : min(k, order.shape[1])], order[:, max(0, order.shape[1] - k) :]
        found = (
            xp.take_along_axis(scores, low, axis=1),
            low + columns.start,
            xp.take_along_axis(scores, high, axis=1),
            high + columns.start,
        )
        before = kept.get(rows.start)
        if before is not None:
            found = (
                *_merged(xp, before[:2], found[:2], k, highest=False),
                *_merged(xp, before[2:], found[2:], k, highest=True),
            )
        kept[rows.start] = found
    if not kept:
        msg = "there are no scores to choose from: no block came"
        raise ValueError(msg)
    xp = _backend.namespace(next(iter(kept.values()))[0])
    ordered = [kept[start] for start in sorted(kept)]
    least, harmful, most, helpful = (
        xp.concat(list(parts), axis=0) for parts in zip(*ordered, strict=True)
    )
    if helpful.shape[1] < k:
        msg = f"k must lie between 1 and the {helpful.shape[1]} training samples, got {k}"
        raise ValueError(msg)
    return TopK(xp.flip(helpful, axis=1), xp.flip(most, axis=1), harmful, least)


def _merged(
    xp: Any, a: tuple[Array, ...], b: tuple[Array, ...], k: int, *, highest: bool
) -> tuple[Array, Array]:
    """Select k from two ascending selections; a stable sort keeps equal scores by index."""
    scores, indices = xp.concat([a[0], b[0]], axis=1), xp.concat([a[1], b[1]], axis=1)
    first = max(0, scores.shape[1] - k) if highest else 0
    order = xp.argsort(scores, axis=1, stable=True)[:, first : min(scores.shape[1], first + k)]
    return xp.take_along_axis(scores, order, axis=1), xp.take_along_axis(indices, order, axis=1)
