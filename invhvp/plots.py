"""Pictures of what this library computes; each takes `ax=` and returns the Axes (matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import _backend
from .solution import Solution

GOOD, BAD, NEUTRAL = "#1f6fb4", "#c8402f", "#767676"
PALETTE = ("#1f6fb4", "#e08214", "#2f8f5b", "#8a4fa3", "#c8402f", "#767676", "#b59b00", "#0f9aa8")

_CELL, _TEXT = 1.16, 0.34  # a picture has side 1; the rest is its frame and a line of text


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
    ax = _axes(ax, 6.4, 4.2)
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
    return _clean(ax)


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
    ax = _axes(ax, 5.2, 5.2)
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
        axis.set_major_locator(_ticks(limits))
    ax.ticklabel_format(style="sci", scilimits=(-2, 3), useMathText=True)
    ax.set_xlabel(f"predicted change of the loss: influence / N [{unit}]")
    ax.set_ylabel(f"actual change after retraining [{unit}]")
    return _clean(ax)


def detection(rankings: Mapping[str, np.ndarray], wrong: np.ndarray, *, ax: Any = None) -> Any:
    """Draw how many of the wrong labels are found when the highest scores are checked first.

    Args:
        rankings: suspicion scores (N,) by label.
        wrong: which labels are wrong, (N,) booleans.
        ax: Axes to draw on; a new figure by default.
    """
    ax = _axes(ax, 6.4, 4.2)
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
    return _clean(ax)


def influence_gallery(
    images: np.ndarray,
    scores: np.ndarray,
    labels: Sequence[Any],
    *,
    columns: int | None = None,
    ax: Any = None,
) -> Any:
    """Draw images with their influence: blue frames help the prediction, red ones hurt it.

    Args:
        images: (m, height, width), or (m, height, width, 3).
        scores: influence of each, (m,); positive is helpful.
        labels: a word for each.
        columns: images in a line; all by default.
        ax: Axes to draw on; a new figure by default.
    """
    scores = np.asarray(scores)
    captions = [
        f"{label}   {score:+.3g}".replace("-", "−")
        for label, score in zip(labels, scores, strict=True)
    ]
    return _mosaic(images, captions, [GOOD if s > 0 else BAD for s in scores], columns, ax)


def suspects(
    images: np.ndarray,
    given: Sequence[Any],
    predicted: Sequence[Any],
    *,
    wrong: np.ndarray | None = None,
    columns: int = 10,
    ax: Any = None,
) -> Any:
    """Draw images in the order of suspicion, each with its given and its predicted label.

    Args:
        images: (m, height, width), the most suspicious first.
        given: labels in the data.
        predicted: labels that the model predicts.
        wrong: where the truth is known, which labels are wrong: red frames, the others grey.
        columns: images in a line.
        ax: Axes to draw on; a new figure by default.
    """
    captions = [f"{a} → {b}" for a, b in zip(given, predicted, strict=True)]
    flags = np.zeros(len(captions), dtype=bool) if wrong is None else np.asarray(wrong)
    return _mosaic(images, captions, [BAD if flag else "#b5b5b5" for flag in flags], columns, ax)


def _mosaic(
    images: np.ndarray, captions: list[str], colors: list[str], columns: int | None, ax: Any
) -> Any:
    """Images in a grid on one Axes, framed, with a caption above each."""
    images = np.asarray(images)
    columns = max(1, min(columns or len(images), len(images)))
    rows = -(-len(images) // columns)
    line = _CELL + _TEXT
    ax = _axes(ax, 1.05 * columns, 1.05 * rows * line / _CELL)
    for i, (image, caption, color) in enumerate(zip(images, captions, colors, strict=True)):
        x, y = (i % columns) * _CELL, (i // columns) * line
        gray = {} if image.ndim == 3 else {"cmap": "gray_r"}
        ax.imshow(image, extent=(x, x + 1, y + 1, y), interpolation="nearest", **gray)
        ax.plot(
            [x, x + 1, x + 1, x, x],
            [y, y, y + 1, y + 1, y],
            color=color,
            lw=2.2,
            solid_joinstyle="miter",
            clip_on=False,
        )
        ax.text(
            x + 0.5,
            y - 0.07,
            caption,
            ha="center",
            va="bottom",
            fontsize=9,
            color=color if color in (GOOD, BAD) else "#404040",
        )
    ax.set(xlim=(-0.06, columns * _CELL - 0.1), ylim=(rows * line - _TEXT, -_TEXT))
    ax.set_aspect("equal")
    ax.axis("off")
    return ax


def _ticks(limits: tuple[float, float]) -> Any:
    """The same ticks on both axes, whatever matplotlib would choose for each."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    inside = [t for t in MaxNLocator(5).tick_values(*limits) if limits[0] <= t <= limits[1]]
    return FixedLocator(inside)


def _axes(ax: Any, width: float, height: float) -> Any:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        msg = "plots need matplotlib, which is not installed: pip install 'invhvp[plot]'"
        raise ModuleNotFoundError(msg, name=error.name) from error
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _clean(ax: Any) -> Any:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(visible=True, color="#e6e6e6", lw=0.7)
    ax.set_axisbelow(True)
    return ax
