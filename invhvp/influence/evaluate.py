"""Whether to believe influence scores: what they predict against what retraining does.

Everything here takes scores as arrays and a function `retrain(indices)` that trains on those
training samples alone and returns the losses that the scores are about, (n_test,) or a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _backend
from .._random import generator
from ..protocols import Array

Retrain = Callable[[np.ndarray], Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class LeaveOneOut:
    """Predicted and actual change of the loss when one training sample is left out.

    Attributes:
        index: which samples were left out, (m,).
        predicted: influence over the number of training samples, (m,) or (m, n_test).
        actual: loss without the sample minus loss with it, same shape.
    """

    index: np.ndarray
    predicted: np.ndarray
    actual: np.ndarray

    @property
    def pearson(self) -> float:
        """Linear correlation over all pairs; NaN where one of both is constant."""
        return correlation(self.predicted, self.actual)

    @property
    def slope(self) -> float:
        """Actual over predicted change, by least squares: 1 where the size is right too."""
        return slope(self.predicted, self.actual)


@dataclass(frozen=True, kw_only=True, eq=False)
class LDS:
    """Predicted and actual losses after training on random subsets.

    Attributes:
        predicted: of each subset and test sample, (m, n_test), up to a constant.
        actual: loss after training on the subset, (m, n_test).
        correlations: Spearman's coefficient over the subsets for each test sample, (n_test,).
        interval: 95 % interval of the mean coefficient over the choice of subsets (jackknife).
    """

    predicted: np.ndarray
    actual: np.ndarray
    correlations: np.ndarray
    interval: tuple[float, float]

    @property
    def score(self) -> float:
        """The linear datamodelling score: the mean coefficient."""
        return float(np.mean(self.correlations))


@dataclass(frozen=True, kw_only=True, eq=False)
class Mislabelled:
    """How well suspicion finds wrong labels.

    Attributes:
        order: samples from the most suspicious to the least, (N,).
        found: wrong labels among the first 0, 1, …, N of them, (N + 1,).
        auc: probability that a wrong label is more suspicious than a right one; ties count half.
        k: how many labels are checked; by default as many as there are wrong ones.
        precision: share of wrong labels among the first k.
    """

    order: np.ndarray
    found: np.ndarray
    auc: float
    k: int
    precision: float


def leave_one_out(
    scores: Array, retrain: Retrain, indices: Iterable[int], *, baseline: Any = None
) -> LeaveOneOut:
    """Leave single training samples out, retrain, and compare with the prediction score / N.

    Args:
        scores: influence on one loss (n_train,), or on several (n_test, n_train).
        retrain: see the module.
        indices: which samples to leave out, one after the other.
        baseline: losses after training on everything; by default one more training.

    Raises ValueError for an index out of range, and where losses and scores differ in number.
    Cost: one training for each index. Source: Koh & Liang (2017), §4.1.

    Example:
        >>> import numpy as np
        >>> from invhvp.influence import evaluate
        >>> values = np.array([1.0, 2.0, -3.0])
        >>> result = evaluate.leave_one_out(3 * values, lambda kept: -values[kept].sum(), range(3))
        >>> result.actual, round(result.slope, 6)
        (array([ 1.,  2., -3.]), 1.0)
    """
    table = _table(scores)
    n = table.shape[-1]
    everything = np.arange(n)
    before = _losses(retrain(everything) if baseline is None else baseline, table)
    chosen, predicted, actual = [], [], []
    for raw in indices:
        index = int(raw)
        if not 0 <= index < n:
            msg = f"indices must lie between 0 and {n - 1}, got {index}"
            raise ValueError(msg)
        chosen.append(index)
        predicted.append(table[..., index] / n)
        actual.append(_losses(retrain(np.delete(everything, index)), table) - before)
    if not chosen:
        msg = "leave_one_out needs at least one index"
        raise ValueError(msg)
    return LeaveOneOut(
        index=np.asarray(chosen), predicted=np.asarray(predicted), actual=np.asarray(actual)
    )


def lds(
    scores: Array,
    retrain: Retrain,
    *,
    subsets: int = 50,
    fraction: float = 0.5,
    rng: Any = 0,
) -> LDS:
    """The linear datamodelling score: do summed scores rank models trained on random subsets?

    The loss after training on S is predicted as −Σ_{i∈S} score_i / N: helpful samples lower it.

    Args:
        scores: (n_test, n_train), or (n_train,) for one loss.
        retrain: see the module; to average over seeds, do so within.
        subsets: how many, at least 3.
        fraction: of the training samples in a subset, between 0 and 1.
        rng: of the subsets.

    Raises ValueError for options out of range, and where losses and scores differ in number.
    Cost: `subsets` trainings. Source: Park et al. (2023), definition 2.3; Ilyas et al. (2022).

    Example:
        >>> import numpy as np
        >>> from invhvp.influence import evaluate
        >>> values = np.arange(8.0) ** 2
        >>> round(evaluate.lds(values, lambda kept: -values[kept].sum(), subsets=9).score, 6)
        1.0
    """
    table = np.atleast_2d(_table(scores))
    n = table.shape[1]
    size = round(fraction * n)
    if subsets < 3 or not 0 < size < n:
        msg = (
            f"lds needs at least 3 subsets of 1 to {n - 1} samples, got {subsets} of {size} "
            f"(fraction {fraction} of {n})"
        )
        raise ValueError(msg)
    draws = generator(rng, table)
    chosen = [np.sort(draws.indices(n, size)) for _ in range(subsets)]
    predicted = np.stack([-np.sum(table[:, kept], axis=1) / n for kept in chosen])
    actual = np.stack([np.atleast_1d(_losses(retrain(kept), table)) for kept in chosen])
    correlations = _spearman(predicted, actual)
    score = float(np.mean(correlations))
    # Without one subset at a time: drawing them again would give ties, which lower every rank.
    keep = ~np.eye(subsets, dtype=bool)
    means = [np.mean(_spearman(predicted[row], actual[row])) for row in keep]
    spread = 1.96 * float(np.sqrt((subsets - 1) * np.var(means)))
    return LDS(
        predicted=predicted,
        actual=actual,
        correlations=correlations,
        interval=(max(score - spread, -1.0), min(score + spread, 1.0)),
    )


def mislabelled(suspicion: Array, wrong: Array, *, k: int | None = None) -> Mislabelled:
    """Check the most suspicious labels first: how many of the wrong ones are found?

    Args:
        suspicion: (N,), such as self-influence; the higher, the sooner it is checked.
        wrong: which labels are wrong, (N,) booleans.
        k: for the precision; by default the number of wrong labels.

    Raises ValueError unless scores are finite, there are right and wrong labels, and 1 ≤ k ≤ N.

    Example:
        >>> from invhvp.influence import evaluate
        >>> import numpy as np
        >>> result = evaluate.mislabelled(np.array([3.0, 1.0, 2.0]), np.array([True, False, True]))
        >>> result.auc, result.precision
        (1.0, 1.0)
    """
    values = np.asarray(_backend.to_host(suspicion), dtype=np.float64)
    flags = np.asarray(_backend.to_host(wrong)).astype(bool)
    if values.ndim != 1 or values.shape != flags.shape:
        msg = f"suspicion and wrong must both be (N,), got {values.shape} and {flags.shape}"
        raise ValueError(msg)
    lost = int(np.sum(~np.isfinite(values)))
    if lost:
        msg = f"{lost} of the {len(values)} suspicion scores are not finite"
        raise ValueError(msg)
    total = int(np.sum(flags))
    if not 0 < total < len(flags):
        msg = f"there must be right and wrong labels, got {total} wrong ones of {len(flags)}"
        raise ValueError(msg)
    k = total if k is None else k
    if not 1 <= k <= len(flags):
        msg = f"k must lie between 1 and the {len(flags)} samples, got {k}"
        raise ValueError(msg)
    order = np.argsort(-values, kind="stable")
    # The rank-sum form of the AUC: a table of all pairs would have N² entries.
    ranks = _ranks(values[:, None])[:, 0] + 1.0
    above = np.sum(ranks[flags]) - total * (total + 1) / 2
    found = np.concatenate([[0], np.cumsum(flags[order])])
    return Mislabelled(
        order=order,
        found=found,
        auc=float(above / (total * (len(flags) - total))),
        k=k,
        precision=float(found[k] / k),
    )


def correlation(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Linear correlation of two arrays of one shape; NaN where one of both is constant."""
    a, b = np.ravel(predicted), np.ravel(actual)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def slope(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Slope of the least-squares line of what happened over what was predicted."""
    a, b = np.ravel(predicted), np.ravel(actual)
    return float(np.polyfit(a, b, 1)[0]) if np.ptp(a) > 0 else float("nan")


def _table(scores: Array) -> np.ndarray:
    table = np.asarray(_backend.to_host(scores), dtype=np.float64)
    if table.ndim not in (1, 2):
        msg = f"scores must be (n_train,) or (n_test, n_train), got shape {table.shape}"
        raise ValueError(msg)
    return table


def _losses(losses: Any, table: np.ndarray) -> np.ndarray:
    """What `retrain` returned, on the host and of the shape that the scores ask for."""
    host = _backend.to_host(losses) if _backend.is_array(losses) else losses
    found = np.asarray(host, dtype=np.float64)
    if table.ndim == 2 and table.shape[0] == 1:
        found = np.reshape(found, (-1,))
    if found.shape != table.shape[:-1]:
        msg = (
            f"retrain must return losses of shape {table.shape[:-1]} for scores of shape "
            f"{table.shape}, got {found.shape}"
        )
        raise ValueError(msg)
    return found


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the columns; 0 where one of both is constant: it ranks nothing."""
    x, y = (r - np.mean(r, axis=0) for r in (_ranks(a), _ranks(b)))
    size = np.linalg.norm(x, axis=0) * np.linalg.norm(y, axis=0)
    return np.sum(x * y, axis=0) / np.where(size > 0, size, 1.0)


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks of the entries of each column, from 0; equal ones share their mean rank."""
    up = np.argsort(np.argsort(x, axis=0, kind="stable"), axis=0, kind="stable")
    down = np.argsort(np.argsort(-x, axis=0, kind="stable"), axis=0, kind="stable")
    return (up - down + len(x) - 1) / 2
