"""What is true: exact solutions and scores in float64, and how far an answer is from them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import scipy.linalg
import scipy.stats
import torch

import invhvp as ih
import invhvp_torch as it

from . import torch_side
from .networks import LOSSES, NETWORKS, Problem

_DENSE = 6000  # parameters up to which the matrix is formed
# What approximates another matrix than that of the title, by a formula that can be checked.
HARMONIC = {
    "InverseHarmonicMean": "full",
    "InverseHarmonicMean by parameter": "parameter",
    "DataInf": "layer",
}


def problem(case: Any, batch: int = 256) -> dict[str, Any]:
    """A trained network on real data, and the k test points on which it is worst, for a `Case`."""
    x, y, loss = _data(case.network)
    n = min(case.n_train, int(0.8 * len(x)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NETWORKS[case.network]().double()
        _train(model, LOSSES[loss], x[:n], y[:n])
    with torch.no_grad():
        losses = torch.stack(
            [LOSSES[loss](model(a[None]), b[None]) for a, b in zip(x[n:], y[n:], strict=True)]
        )
    hard = n + torch.argsort(losses, descending=True)[: case.k]
    kind = getattr(torch, case.dtype)

    def cast(t: Any) -> Any:
        return t.to(kind) if t.dtype.is_floating_point else t

    return {
        "network": case.network,
        "loss": loss,
        "state": {name: cast(t) for name, t in model.state_dict().items()},
        "train": (cast(x[:n]), cast(y[:n])),
        "test": (cast(x[hard]), cast(y[hard])),
        "damping": case.damping,
        # pyDVL counts a short last batch as much as a whole one: with batches of 256 and 144 it
        # solves with another matrix.
        "batch": batch if n % batch == 0 else n,
    }


def described(given: dict[str, Any]) -> str:
    """In words, with all that a case of the same name may differ in, but for the matrix and λ."""
    p = sum(t.numel() for t in given["state"].values())
    N, k = len(given["train"][0]), len(given["test"][0])
    dtype = str(next(iter(given["state"].values())).dtype).removeprefix("torch.")
    sides = "right-hand sides" if k > 1 else "right-hand side"
    return f"{given['network']}, p = {p}, N = {N}, {k} {sides}, {dtype}"


def wide(given: dict[str, Any]) -> Problem:
    """The same in float64: float32 weights and data exactly, their matrix in more digits."""
    copied = copy.copy(given)
    for name in ("train", "test"):
        copied[name] = tuple(t.double() if t.dtype.is_floating_point else t for t in given[name])
    copied["state"] = {name: t.double() for name, t in given["state"].items()}
    return Problem(copied)


def curvature(p: Problem, kind: str) -> Any:
    """The matrix of that name, over all training samples."""
    build = {"hessian": it.hessian, "ggn": it.gauss_newton, "fisher": it.empirical_fisher}[kind]
    return build(p.model, p.loss, p.train)


def check_operator(A: Any, p: Problem, kind: str) -> None:
    """Raise unless a product of ours is that of plain PyTorch: all are judged by ours."""
    v = torch.randn(p.n_parameters, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.zeros_like(v)
    for x, y in p.loader():
        if kind == "fisher":
            rows = torch_side.gradient_rows(p, x, y)
            expected += rows.T @ (rows @ v) / len(p.train[0])
        else:
            by = {"hessian": torch_side.hessian_product, "ggn": torch_side.gauss_newton_product}
            with warnings.catch_warnings():  # torch.func.jvp still scripts at its first call
                warnings.simplefilter("ignore", DeprecationWarning)
                expected += by[kind](p, x, y, v) * (len(x) / len(p.train[0]))
    off = float((A @ v - expected).norm() / expected.norm())
    if not off <= 1e-8:
        name, given = type(A).__name__, p.given["network"]
        msg = f"{name} v of {given} is not the product by plain PyTorch ({kind}): {off:.1e} off"
        raise ValueError(msg)


def residual(A: Any, B: Any, X: Any, damping: float) -> float:
    """The largest ‖b − (A + λI)x‖/‖b‖ of all columns."""
    X = X.double()
    R = B - A @ X - damping * X
    return float((R.norm(dim=0) / B.norm(dim=0)).max())


class Judge:
    """Residuals, errors and rank correlations against one matrix, in float64."""

    def __init__(self, given: dict[str, Any], kind: str) -> None:
        p = wide(given)
        self.A = curvature(p, kind)
        check_operator(self.A, p, kind)
        self.n = self.A.shape[0]
        self.damping = given["damping"]
        self.B = p.gradients().T
        self.model = p.model
        self.exact = self._solve()
        self.train = it.per_sample_gradients(p.model, p.loss, *p.train)
        self.scores = self.train @ self.exact  # (N, k)

    def _solve(self) -> Any:
        if self.n <= _DENSE:
            M = self.A.to_dense().numpy()
            M = (M + M.T) / 2 + self.damping * np.eye(self.n)
            return torch.from_numpy(scipy.linalg.solve(M, self.B.numpy(), assume_a="sym"))
        method = ih.SampleSpace(rtol=1e-11) if hasattr(self.A, "gradients") else None
        method = method or ih.BlockCG(rtol=1e-9)
        return ih.solve(self.A, self.B, method, damping=self.damping).raise_if_failed().x

    def metrics(self, answer: Any, name: str = "") -> dict[str, Any]:
        """The largest relative residual; the median relative errors, of solutions and of scores;
        the mean rank correlation; or why there are none. `name` tells which formula the method
        promises.
        """
        if isinstance(answer, dict) and "scores" in answer:
            return self._of_scores(answer["scores"].double().T)
        if isinstance(answer, dict):
            found = self.metrics(answer["solutions"])
            return {**found, "block_error": self._block_error(answer["inverse"])}
        X = answer.double().T
        if X.shape != self.B.shape:
            return {"failed": f"answers for {len(X)} of {self.n} parameters"}
        if not bool(torch.isfinite(X).all()):
            return {"residual": float("inf"), "error": float("inf"), "spearman": float("nan")}
        found = {
            "residual": residual(self.A, self.B, X, self.damping),
            "error": _error(X, self.exact),
            **self._of_scores(self.train @ X),
        }
        if name in HARMONIC:
            found["formula_error"] = _error(X, self.harmonic_mean(HARMONIC[name]))
        return found

    def harmonic_mean(self, by: str) -> Any:
        """(1/N) Σ (g_i g_iᵀ + λI)⁻¹B for blocks of parameters, as Kwon et al. (2024) have it."""
        blocks = _blocks(self.model, by)
        total = torch.zeros_like(self.B)
        for start in range(0, len(self.train), 64):
            rows = self.train[start : start + 64].to_dense()
            for block in blocks:
                G = rows[:, block]
                W = (G @ self.B[block]) / (self.damping + (G * G).sum(dim=1, keepdim=True))
                total[block] += G.T @ W
        return (self.B - total / len(self.train)) / self.damping

    def _block_error(self, inverse: Any) -> float:
        """‖K − F‖/‖F‖ over the blocks [W | b] of the layers, in the Frobenius norm."""
        damping = self.damping * np.eye(self.n)
        K = np.linalg.inv(inverse.double().numpy()) - damping
        F = self.A.to_dense().numpy()
        wrong = right = 0.0
        for block in _blocks(self.model, "layer"):
            mine, exact = K[np.ix_(block, block)], F[np.ix_(block, block)]
            wrong += float(np.sum((mine - exact) ** 2))
            right += float(np.sum(exact**2))
        return float(np.sqrt(wrong / right))

    def _of_scores(self, scores: Any) -> dict[str, float]:
        if not bool(torch.isfinite(scores).all()):
            return {"score_error": float("inf"), "spearman": float("nan")}
        pairs = zip(scores.numpy().T, self.scores.numpy().T, strict=True)
        ranks = [scipy.stats.spearmanr(a, b).statistic for a, b in pairs]
        return {"score_error": _error(scores, self.scores), "spearman": float(np.mean(ranks))}


def _error(found: Any, exact: Any) -> float:
    """The median over columns of ‖x − x*‖/‖x*‖."""
    return float(((found - exact).norm(dim=0) / exact.norm(dim=0)).median())


def _blocks(model: Any, by: str) -> list[np.ndarray]:
    """Positions of the parameters of each "layer", of each "parameter" array, or in "full"."""
    found: dict[str, list[np.ndarray]] = {}
    start = 0
    for name, q in model.named_parameters():
        positions = np.arange(start, start + q.numel())
        key = {"full": "", "layer": name.rpartition(".")[0], "parameter": name}[by]
        found.setdefault(key, []).append(positions)
        start += q.numel()
    return [np.concatenate(parts) for parts in found.values()]


def _data(network: str) -> tuple[Any, Any, str]:
    from sklearn import datasets

    if network == "diabetes":
        x, y = datasets.load_diabetes(return_X_y=True, scaled=False)
        y = ((y - y.mean()) / y.std())[:, None]
    elif network == "cancer":
        x, y = datasets.load_breast_cancer(return_X_y=True)
    elif network.startswith("mnist1d"):
        x, y = _mnist1d()
    else:
        x, y = datasets.load_digits(return_X_y=True)
        x = x / 16.0
    if network in ("diabetes", "cancer"):
        x = (x - x.mean(0)) / x.std(0)
        order = np.random.default_rng(0).permutation(len(x))
        x, y = x[order], y[order]
    loss = "mse" if network == "diabetes" else "cross_entropy"
    return torch.from_numpy(np.asarray(x)), torch.from_numpy(np.asarray(y)), loss


def _mnist1d() -> tuple[np.ndarray, np.ndarray]:
    """The signals of Greydanus & Kobak (2024), made by their seed and not downloaded."""
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())
    x, y = (np.concatenate([made[name], made[f"{name}_test"]]) for name in "xy")
    return x, y


def _train(model: Any, loss: Any, x: Any, y: Any) -> None:
    """Adam with weight decay on whole batches."""
    size = sum(q.numel() for q in model.parameters())
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-3)
    for _ in range(300 if size < 50_000 else 150):
        optimiser.zero_grad()
        loss(model(x), y).backward()
        optimiser.step()
    model.zero_grad()
