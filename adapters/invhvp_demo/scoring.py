"""How well a ranking finds what it should, and how well predictions meet what happened."""

from __future__ import annotations

import numpy as np


def auc(scores: np.ndarray, wrong: np.ndarray) -> float:
    """Probability that a wrong label has a higher score than a right one; ties count half."""
    bad, good = scores[wrong][:, None], scores[~wrong][None, :]
    return float(np.mean(bad > good) + 0.5 * np.mean(bad == good))


def precision(scores: np.ndarray, wrong: np.ndarray, k: int) -> float:
    """Share of wrong labels among the k highest scores."""
    return float(np.mean(wrong[ranked(scores)[:k]]))


def ranked(scores: np.ndarray) -> np.ndarray:
    """Indices from the highest score to the lowest."""
    return np.argsort(-scores, kind="stable")


def pearson(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Linear correlation; NaN where one of both is constant."""
    if np.ptp(predicted) == 0 or np.ptp(actual) == 0:
        return float("nan")
    return float(np.corrcoef(predicted, actual)[0, 1])


def slope(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Slope of the least-squares line of what happened over what was predicted."""
    return float(np.polyfit(predicted, actual, 1)[0])
