"""The pictures of the report, as PNG bytes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from invhvp import plots

from .data import SIDE, Digits, require
from .methods import CURVE_RTOL, HESSIAN
from .study import Study, TestImage

_SUSPECTS = 40


def draw_all(study: Study, *, dpi: int = 110) -> dict[str, bytes]:
    """All pictures by file name."""
    matplotlib = require("matplotlib")
    style = {"font.size": 10, "axes.edgecolor": "#9a9a9a", "axes.labelcolor": "#333333"}
    with matplotlib.rc_context(style):
        return {
            "suspects.png": _png(_suspects(study), dpi),
            "detection.png": _png(_detection(study), dpi),
            **{
                f"prediction-{i + 1}.png": _png(_prediction(image, study.digits), dpi)
                for i, image in enumerate(study.test_images)
            },
            "by-label.png": _png(_by_label(study), dpi),
            "leave-one-out.png": _png(_leave_one_out(study), dpi),
            "lds.png": _png(_lds(study), dpi),
            "convergence.png": _png(_convergence(study), dpi),
        }


def _suspects(study: Study) -> Any:
    digits, first = study.digits, study.suspects[:_SUSPECTS]
    figure, ax = _figure(9.6, 5.35)
    plots.suspects(
        _pictures(digits.images[first]),
        digits.given[first].tolist(),
        study.predicted[first].tolist(),
        wrong=digits.wrong[first],
        ax=ax,
    )
    return figure


def _detection(study: Study) -> Any:
    figure, ax = _figure(6.4, 4.2)
    rankings = {
        f"{study.exact.label}, {study.parameters} parameters": study.exact.self_influence,
        **{
            f"{result.label}, {result.curvature}": result.self_influence
            for result in study.results
            if result.curvature != HESSIAN
        },
    }
    if study.network is not None:
        rankings[f"network, {study.network.parameters} parameters"] = study.network.self_influence
    plots.detection(rankings, study.digits.wrong, ax=ax)
    return figure


def _prediction(image: TestImage, digits: Digits) -> Any:
    """The test image on the left, what helped above, what hurt below."""
    figure = require("matplotlib.figure").Figure(figsize=(9.6, 3.35), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 3.6])
    ax = left.subplots()
    ax.imshow(_pictures(digits.test_images[image.index]), cmap="gray_r", interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ok = image.predicted == image.label
    verdict = "rightly" if ok else "wrongly"
    ax.set_title(f"a {image.label}, {verdict} read as {image.predicted}", fontsize=11,
                 color=plots.GOOD if ok else plots.BAD)  # fmt: skip
    ax.set_xlabel(f"p({image.label}) = {image.probability:.2f}, loss {image.loss:.2f} nats")
    for ax, indices, scores, title in zip(
        right.subplots(2, 1),
        (image.helpful, image.harmful),
        (image.helpful_scores, image.harmful_scores),
        ("most helpful: label, influence [nats]", "most harmful"),
        strict=True,
    ):
        labels = [f"{digits.given[i]}" + ("✗" if digits.wrong[i] else "") for i in indices]
        plots.influence_gallery(_pictures(digits.images[indices]), scores, labels, ax=ax)
        ax.set_title(title, loc="left", fontsize=10, color="#555555")
    return figure


def _leave_one_out(study: Study) -> Any:
    figure, ax = _figure(5.2, 5.2)
    loo = study.leave_one_out
    plots.leave_one_out(loo.predicted, loo.actual, wrong=loo.wrong, ax=ax)
    return figure


def _by_label(study: Study) -> Any:
    figure, ax = _figure(6.4, 5.2)
    plots.influence_by_label(study.scores, study.digits.given, study.digits.test_labels, ax=ax)
    return figure


def _lds(study: Study) -> Any:
    figure, ax = _figure(6.4, 4.2)
    plots.lds({study.exact.label: study.lds}, ax=ax)
    return figure


def _convergence(study: Study) -> Any:
    figure, ax = _figure(6.4, 4.2)
    plots.convergence(study.histories, rtol=CURVE_RTOL, ax=ax)
    return figure


def _pictures(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(*rows.shape[:-1], SIDE, SIDE)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # Without pyplot there is no window system to ask for and no global state to clean up.
    figure = require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _png(figure: Any, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
