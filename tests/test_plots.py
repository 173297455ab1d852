"""Pictures: every function draws on the Axes it is given and returns it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import invhvp as ih
from invhvp import plots
from invhvp.influence import evaluate

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure


@pytest.fixture
def ax() -> Any:
    return Figure().subplots()


def test_convergence_ends_at_the_true_residual(ax: Any):
    A, b = ih.Diagonal(np.arange(1.0, 30.0)), np.ones(29)
    solutions = {"CG": ih.solve(A, b, ih.CG(), damping=0.1), "exact": ih.solve(
        A, b, ih.Direct(), damping=0.1)}  # fmt: skip
    assert plots.convergence(solutions, rtol=1e-5, ax=ax) is ax
    assert ax.get_yscale() == "log"
    dot = ax.get_lines()[1]
    assert dot.get_ydata()[0] == float(solutions["CG"].relative_residuals)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["CG"]


def test_leave_one_out_has_equal_axes(ax: Any):
    predicted = np.asarray([-1e-3, 0.0, 5e-4])
    assert plots.leave_one_out(predicted, 2 * predicted, wrong=predicted < 0, ax=ax) is ax
    assert ax.get_xlim() == ax.get_ylim()
    assert ax.get_aspect() == 1.0
    assert list(ax.get_xticks()) == list(ax.get_yticks())
    assert any("r = 1.0000" in text.get_text() for text in ax.texts)
    assert "nats" in ax.get_xlabel()


def test_detection_counts_what_is_found(ax: Any):
    wrong = np.asarray([True, False, True, False])
    assert plots.detection({"s": np.asarray([4.0, 3.0, 2.0, 1.0])}, wrong, ax=ax) is ax
    assert ax.get_lines()[1].get_ydata().tolist() == [0, 1, 1, 2, 2]


def test_lds_names_score_and_interval(ax: Any):
    values = np.random.default_rng(0).standard_normal((4, 12))
    found = evaluate.lds(values, lambda kept: -values[:, kept].sum(axis=1), subsets=6)
    assert plots.lds({"exact": found}, ax=ax) is ax
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["exact: 1.00 (1.00 to 1.00)"]
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), np.ones(4))


def test_influence_by_label_is_a_table_of_means(ax: Any):
    scores = np.asarray([[1.0, 3.0, -1.0], [0.0, 2.0, -5.0]])
    assert plots.influence_by_label(scores, ["a", "a", "b"], [1, 0], ax=ax) is ax
    image = ax.get_images()[0]
    np.testing.assert_allclose(image.get_array(), [[1.0, -5.0], [2.0, -1.0]])
    assert image.get_clim() == (-5.0, 5.0)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1"]
    with pytest.raises(ValueError, match="n_test, n_train"):
        plots.influence_by_label(scores.T, ["a", "a", "b"], [1, 0], ax=ax)


def test_galleries_say_what_they_show(ax: Any):
    images = np.random.default_rng(0).random((3, 8, 8))
    assert plots.influence_gallery(images, np.asarray([1.5, -2.0, 0.25]), "abc", ax=ax) is ax
    assert [t.get_text() for t in ax.texts] == ["a   +1.5", "b   −2", "c   +0.25"]
    other = Figure().subplots()
    assert plots.suspects(images, [1, 2, 3], [1, 7, 3], columns=2, ax=other) is other
    assert len(other.get_images()) == 3
    assert other.texts[1].get_text() == "2 → 7"


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'invhvp\[plot\]'"):
        plots.detection({}, np.asarray([True]))
