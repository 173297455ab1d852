"""The main job from data to answers; nothing here prints or writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

import invhvp as ih
from invhvp import _backend
from invhvp.influence import evaluate

from . import data, methods, model, network, retrain

L2 = 1e-2
TOP = 7  # images shown on each side of a prediction

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class LeaveOneOut(evaluate.LeaveOneOut):
    """What influence predicted, and what retraining without the image did to the mean test loss.

    All arrays have shape (m,), one entry for each retraining; changes are in nats.

    Attributes:
        wrong: whether the label of the image is wrong.
    """

    wrong: np.ndarray


@dataclass(frozen=True, kw_only=True)
class TestImage:
    """A held-out image and the training images that matter most for its loss."""

    __test__ = False  # not a test, whatever pytest thinks of the name

    index: int
    label: int
    predicted: int
    probability: float
    loss: float
    helpful: np.ndarray
    helpful_scores: np.ndarray
    harmful: np.ndarray
    harmful_scores: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything that the report shows, on the host."""

    digits: data.Digits
    backend: str
    device: str
    parameters: int
    gradient_norm: float
    test_accuracy: float
    predicted: np.ndarray
    results: list[methods.Result]
    histories: dict[str, ih.Solution]
    leave_one_out: LeaveOneOut
    lds: evaluate.LDS
    scores: np.ndarray
    test_images: list[TestImage]
    network: network.NetworkResult | None
    network_missing: str | None
    seconds: dict[str, float]

    @property
    def exact(self) -> methods.Result:
        """The method that the others are measured against."""
        return self.results[0]

    @property
    def suspects(self) -> np.ndarray:
        """Training images from the most suspicious to the least."""
        return ranked(self.exact.self_influence)

    @property
    def n_flipped(self) -> int:
        """Number of labels that were flipped."""
        return int(self.digits.wrong.sum())

    @property
    def notes(self) -> list[str]:
        """What the table of methods must not hide."""
        return [result.note for result in self.results if result.note is not None]

    def retraining_r(self, result: methods.Result) -> float:
        """Correlation of a method's predictions with the retrainings."""
        loo = self.leave_one_out
        return evaluate.correlation(result.test_scores[loo.index], loo.actual)


def run(
    digits: data.Digits,
    *,
    backend: str = "numpy",
    device: str | None = None,
    retrainings: int = 50,
    with_network: bool = True,
    progress: Progress = lambda items, *_: items,
) -> Study:
    """Train, solve with every method, retrain without single images, explain predictions.

    Args:
        digits: the data.
        backend: as for `data.place_on`.
        device: likewise.
        retrainings: leave-one-out retrainings.
        with_network: also study a small network where PyTorch is installed.
        progress: progress(items, label, total) → items, for a bar over long passes.
    """
    seconds: dict[str, float] = {}
    clock = _Clock(seconds)
    place = data.place_on(backend, device)
    train = _samples(digits.images, digits.given, place)
    test = _samples(digits.test_images, digits.test_labels, place)
    w = retrain.train(train, L2)
    slope = _backend.to_host(model.gradient(w, train, L2))
    clock("training")
    system = methods.System(
        hessian=model.Hessian(w, train),
        train=model.gradients(w, train),
        test=model.gradients(w, test),
        damping=L2,
    )
    rows = methods.available()
    results = list(progress(methods.measure_all(system, rows), "methods", len(rows)))
    clock("all methods")
    exact = rows[0].build(ih, system).prepare(system.hessian, damping=L2)
    base = model.losses(w, test)
    chosen = choose(results[0].test_scores, retrainings)
    again = retrain.on_subsets(w, train, L2, exact)
    left_out = evaluate.leave_one_out(
        results[0].test_scores,
        lambda kept: _mean(model.losses(again(kept), test)),
        progress(chosen, "leave-one-out", len(chosen)),
        baseline=_mean(base),
    )
    clock("leave-one-out retrainings")
    influence = ih.Influence(exact, system.train)
    scores = _backend.to_host(influence.scores(system.test))
    halves = iter(progress(range(retrainings), "random halves", retrainings))
    lds = evaluate.lds(
        scores,
        lambda kept: (next(halves, None), model.losses(again(kept), test))[1],
        subsets=retrainings,
    )
    clock("retrainings on random halves")
    chances = _backend.to_host(model.probabilities(w, test))
    shown = interesting(chances, digits.test_labels)
    histories = methods.histories(system, np.arange(16))
    top = influence.top_k(system.test[shown], k=TOP)
    losses = _backend.to_host(base)
    test_images = [
        TestImage(
            index=int(i),
            label=int(digits.test_labels[i]),
            predicted=int(chances[i].argmax()),
            probability=float(chances[i, digits.test_labels[i]]),
            loss=float(losses[i]),
            helpful=_backend.to_host(top.helpful[row, :]),
            helpful_scores=_backend.to_host(top.helpful_scores[row, :]),
            harmful=_backend.to_host(top.harmful[row, :]),
            harmful_scores=_backend.to_host(top.harmful_scores[row, :]),
        )
        for row, i in enumerate(shown)
    ]
    clock("explanations and convergence")
    missing = network.missing() if with_network else "left out by --quick"
    net = network.study(digits) if missing is None else None
    clock("network")
    return Study(
        digits=digits,
        backend=backend,
        device=str(_backend.device(w)),
        parameters=system.hessian.shape[0],
        gradient_norm=float(np.linalg.norm(slope)),
        test_accuracy=float(np.mean(chances.argmax(axis=1) == digits.test_labels)),
        predicted=_backend.to_host(model.probabilities(w, train)).argmax(axis=1),
        results=results,
        histories=histories,
        leave_one_out=LeaveOneOut(
            index=left_out.index,
            predicted=left_out.predicted,
            actual=left_out.actual,
            wrong=digits.wrong[chosen],
        ),
        lds=lds,
        scores=scores,
        test_images=test_images,
        network=net,
        network_missing=missing,
        seconds=seconds,
    )


def ranked(scores: np.ndarray) -> np.ndarray:
    """Indices from the highest score to the lowest."""
    return np.argsort(-scores, kind="stable")


def choose(scores: np.ndarray, count: int, *, seed: int = 1) -> np.ndarray:
    """Images to leave out: two fifths most helpful, two fifths most harmful, the rest random."""
    each = 2 * count // 5
    order = ranked(scores)
    middle = np.random.default_rng(seed).permutation(order[each : len(order) - each])
    return np.concatenate([order[:each], order[len(order) - each :], middle[: count - 2 * each]])


def interesting(chances: np.ndarray, labels: np.ndarray, *, count: int = 4) -> np.ndarray:
    """Test images of different classes: half of them clearly misread, half read with doubt."""
    own = chances[np.arange(len(labels)), labels]
    right = chances.argmax(axis=1) == labels
    worst = np.argsort(own, kind="stable")
    found: list[int] = []
    for want_right, enough in ((False, count // 2), (True, count)):
        for i in worst:
            new_class = labels[i] not in labels[found]
            if len(found) < enough and right[i] == want_right and new_class:
                found.append(int(i))
    return np.asarray(found)


def _mean(losses: model.Array) -> float:
    return float(_backend.namespace(losses).mean(losses))


def _samples(images: np.ndarray, labels: np.ndarray, place: data.Place) -> model.Samples:
    return model.Samples(place(images), place(data.one_hot(labels)))


class _Clock:
    """Seconds since the last call, by name."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name] = now - self._last
        self._last = now
