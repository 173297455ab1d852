"""Images with what is known about each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ._axes import BAD, GOOD, axes

_CELL, _TEXT = 1.16, 0.34  # a picture has side 1; the rest is its frame and a line of text


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
    ax = axes(ax, 1.05 * columns, 1.05 * rows * line / _CELL)
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
