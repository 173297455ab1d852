"""What scores predict against what happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..influence import evaluate
from ._axes import BAD, GOOD, NEUTRAL, PALETTE, axes, clean, ticks


def leave_one_out(
    predicted: np.ndarray,
    actual: np.ndarray,
    *,
    wrong: np.ndarray | None = None,
    unit: str = "nats",
    ax: Any = None,
) -> Any:
    """Draw the predicted against the actual change of a loss, in equal units on both axes.

    Args:
        predicted: influence over the number of training samples, (m,).
        actual: loss after retraining without the sample minus loss before, (m,).
        wrong: samples to draw in another colour (m,), such as mislabelled ones.
        unit: of the loss.
        ax: Axes to draw on; a new figure by default.
    """
    ax = axes(ax, 5.2, 5.2)
    predicted, actual = np.asarray(predicted), np.asarray(actual)
    both = np.concatenate([predicted, actual])
    middle, half = (both.max() + both.min()) / 2, (both.max() - both.min()) / 2
    limits = (middle - 1.08 * half, middle + 1.08 * half)
    ax.plot(limits, limits, color=NEUTRAL, lw=1, zorder=1)
    ax.annotate(
        "equal",
        (middle, middle),
        xytext=(4, -4),
        textcoords="offset points",
        rotation=45,
        rotation_mode="anchor",
        ha="center",
        va="top",
        color=NEUTRAL,
    )
    groups = [(np.ones(predicted.shape, dtype=bool), GOOD, None)]
    if wrong is not None:
        wrong = np.asarray(wrong)
        groups = [(~wrong, GOOD, "label is right"), (wrong, BAD, "label was flipped")]
    for chosen, color, label in groups:
        ax.scatter(
            predicted[chosen],
            actual[chosen],
            s=30,
            color=color,
            alpha=0.8,
            lw=0,
            label=label,
            zorder=2,
        )
    r = float(np.corrcoef(predicted, actual)[0, 1])
    slope = float(np.polyfit(predicted, actual, 1)[0])
    ax.text(
        0.04,
        0.96,
        f"Pearson r = {r:.4f}\nslope = {slope:.2f}\n{len(actual)} retrainings",
        transform=ax.transAxes,
        va="top",
    )
    if wrong is not None:
        ax.legend(frameon=False, loc="lower right")
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(ticks(limits))
    ax.ticklabel_format(style="sci", scilimits=(-2, 3), useMathText=True)
    ax.set_xlabel(f"predicted change of the loss: influence / N [{unit}]")
    ax.set_ylabel(f"actual change after retraining [{unit}]")
    return clean(ax)


def detection(rankings: Mapping[str, np.ndarray], wrong: np.ndarray, *, ax: Any = None) -> Any:
    """Draw how many of the wrong labels are found when the highest scores are checked first.

    Args:
        rankings: suspicion scores (N,) by label.
        wrong: which labels are wrong, (N,) booleans.
        ax: Axes to draw on; a new figure by default.
    """
    ax = axes(ax, 6.4, 4.2)
    wrong = np.asarray(wrong)
    n, total = len(wrong), int(wrong.sum())
    checked = np.arange(n + 1)
    ax.plot(checked, np.minimum(checked, total), color=NEUTRAL, lw=1, ls=":", label="perfect")
    for i, (label, scores) in enumerate(rankings.items()):
        order = np.argsort(-np.asarray(scores), kind="stable")
        found = np.concatenate([[0], np.cumsum(wrong[order])])
        ax.plot(checked, found, color=PALETTE[i % len(PALETTE)], lw=1.8, label=label)
    ax.plot([0, n], [0, total], color=NEUTRAL, lw=1, ls="--", label="at random")
    ax.set(xlim=(0, min(n, 4 * total)), ylim=(0, 1.04 * total))  # the rest is flat
    ax.set_xlabel("labels checked, most suspicious first")
    ax.set_ylabel(f"wrong labels found (of {total})")
    ax.legend(frameon=False, loc="center right")
    return clean(ax)


def lds(found: Mapping[str, evaluate.LDS], *, ax: Any = None) -> Any:
    """Draw the linear datamodelling score of each test sample, sorted, and the mean of each label.

    Args:
        found: results of `evaluate.lds` by label.
        ax: Axes to draw on; a new figure by default.
    """
    ax = axes(ax, 6.4, 4.2)
    for i, (label, result) in enumerate(found.items()):
        color, (low, high) = PALETTE[i % len(PALETTE)], result.interval
        n = len(result.correlations)
        share = (np.arange(n) + 0.5) / n
        text = f"{label}: {result.score:.2f} ({low:.2f} to {high:.2f})"
        ax.plot(share, np.sort(result.correlations), color=color, lw=1.8, label=text)
        ax.axhspan(low, high, color=color, alpha=0.12, lw=0)
        ax.axhline(result.score, color=color, lw=1, ls="--")
    ax.axhline(0.0, color=NEUTRAL, lw=1)
    ax.set(xlim=(0, 1), ylim=(None, 1.04))
    ax.set_xlabel("share of the test samples")
    ax.set_ylabel("rank correlation with retraining on subsets")
    if found:
        ax.legend(frameon=False, loc="lower right", title="mean (95 % interval)")
    return clean(ax)


def influence_by_label(
    scores: np.ndarray,
    train_labels: Sequence[Any] | np.ndarray,
    test_labels: Sequence[Any] | np.ndarray,
    *,
    ax: Any = None,
) -> Any:
    """Draw the mean influence of the training samples of each label on the test samples of each.

    Args:
        scores: (n_test, n_train).
        train_labels: (n_train,).
        test_labels: (n_test,).
        ax: Axes to draw on; a new figure by default.

    A row without test samples or a column without training samples does not appear. Blue helps,
    red hurts, on one scale around 0.
    """
    scores = np.asarray(scores)
    across, down = np.asarray(train_labels), np.asarray(test_labels)
    if scores.shape != (len(down), len(across)):
        msg = (
            f"scores must be (n_test, n_train) = ({len(down)}, {len(across)}) for these labels, "
            f"got {scores.shape}"
        )
        raise ValueError(msg)
    columns, lines = np.unique(across), np.unique(down)
    mean = np.stack(
        [
            [np.mean(scores[np.ix_(down == line, across == column)]) for column in columns]
            for line in lines
        ]
    )
    ax = axes(ax, 1.6 + 0.5 * len(columns), 1.2 + 0.5 * len(lines))
    most = float(np.max(np.abs(mean))) or 1.0
    image = ax.imshow(mean, cmap="RdBu", vmin=-most, vmax=most)
    ax.set_xticks(range(len(columns)), [str(label) for label in columns])
    ax.set_yticks(range(len(lines)), [str(label) for label in lines])
    ax.set_xlabel("label of the training samples")
    ax.set_ylabel("label of the test samples")
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(image, ax=ax, label="mean influence (positive is helpful)")
    return ax
