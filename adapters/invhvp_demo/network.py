"""The same questions for a neural network, through the PyTorch adapter."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

import invhvp as ih
from invhvp.influence import evaluate

from .data import Digits

HIDDEN, L2 = 16, 1e-2


@dataclass(frozen=True, kw_only=True)
class NetworkResult:
    """What influence says about a trained network.

    Attributes:
        seconds: of training, gradients and Fisher inverse, Hessian solve.
        status: how the solve with the Hessian ended, for its worst column.
        products, residual: of that solve.
        agreement: correlation of Hessian and Fisher scores on the mean test loss.
        auc, precision: of the self-influence with the empirical Fisher matrix.
        test_auc: of the influence on the mean test loss with the Hessian.
        self_influence, test_scores: of the training images, (N,).
    """

    parameters: int
    test_accuracy: float
    damping: float
    seconds: dict[str, float]
    status: str
    products: int
    residual: float
    agreement: float
    auc: float
    precision: float
    test_auc: float
    self_influence: np.ndarray
    test_scores: np.ndarray
    predicted: np.ndarray


def missing() -> str | None:
    """Why the section cannot be shown, with the remedy; None where it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install 'invhvp[torch]'"
    return None


def study(digits: Digits) -> NetworkResult:
    """Train a small network on the flipped labels, and ask which of them are wrong.

    One thread computes all of it: the layers are small.

    The Hessian of a network may have negative eigenvalues; the damping is the L2 term of the
    training objective, at whose minimum the damped Hessian is positive semidefinite, and it is
    raised where the solve finds that it is not.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _study(digits)
    finally:
        torch.set_num_threads(threads)


def _study(digits: Digits) -> NetworkResult:
    import torch

    import invhvp_torch as it

    x, y = torch.from_numpy(digits.images), torch.from_numpy(digits.given)
    x_test, y_test = torch.from_numpy(digits.test_images), torch.from_numpy(digits.test_labels)
    loss = torch.nn.functional.cross_entropy
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(x.shape[1], HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, 10)
        ).double()
    _fit(model, loss, x, y)
    trained = time.perf_counter()
    rows = it.per_sample_gradients(model, loss, x, y)
    test_rows = it.per_sample_gradients(model, loss, x_test, y_test)
    mean_test = test_rows.T @ torch.full((len(y_test),), 1.0 / len(y_test), dtype=x.dtype)
    inverse = ih.SampleSpace().prepare(ih.RankOneMean(rows), damping=L2)
    self_influence = ih.Influence(inverse, rows).self_influence().numpy()
    fisher_scores = (rows @ (inverse @ mean_test)).numpy()
    fisher_done = time.perf_counter()
    solution, damping = _definite(it.hessian(model, loss, (x, y)), mean_test)
    test_scores = (rows @ solution.x).numpy()
    done = time.perf_counter()
    with torch.no_grad():
        right = (model(x_test).argmax(dim=1) == y_test).double().mean()
        predicted = model(x).argmax(dim=1).numpy()
    wrong = digits.wrong
    found = evaluate.mislabelled(self_influence, wrong)
    status: Any = solution.status
    return NetworkResult(
        parameters=rows.shape[1],
        test_accuracy=float(right),
        damping=damping,
        seconds={
            "training": trained - started,
            "gradients and Fisher inverse": fisher_done - trained,
            "Hessian solve": done - fisher_done,
        },
        status=status.name,
        products=solution.products,
        residual=float(solution.relative_residuals),
        agreement=evaluate.correlation(fisher_scores, test_scores),
        auc=found.auc,
        precision=found.precision,
        test_auc=evaluate.mislabelled(-test_scores, wrong).auc,
        self_influence=self_influence,
        test_scores=test_scores,
        predicted=predicted,
    )


def _fit(model: Any, loss: Any, x: Any, y: Any) -> None:
    import torch

    parameters = list(model.parameters())
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=120,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Any:
        optimizer.zero_grad()
        value = loss(model(x), y) + 0.5 * L2 * sum((p * p).sum() for p in parameters)
        value.backward()
        return value

    optimizer.step(closure)
    optimizer.zero_grad()


def _definite(hessian: Any, b: Any) -> tuple[ih.Solution, float]:
    """Solve with the smallest damping, from L2 upwards by factors of 2, that is large enough."""
    import warnings

    damping = L2
    while True:
        with warnings.catch_warnings():
            # Negative curvature is what this loop is for.
            warnings.simplefilter("ignore", ih.ConvergenceWarning)
            solution = ih.solve(hessian, b, ih.BlockCG(rtol=1e-4), damping=damping)
        if solution.status is not ih.Status.NEGATIVE_CURVATURE:
            return solution, damping
        damping = 2 * damping
