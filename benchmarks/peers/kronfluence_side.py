"""kronfluence's EKFAC: it gives scores, not solutions."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task


class _Task(Task):
    """The loss of a batch, summed, with sampled labels for the Fisher matrix."""

    def __init__(self, problem: Any) -> None:
        super().__init__()
        self.problem = problem

    def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
        x, y = batch
        out = model(x)
        if self.problem.loss_name == "mse":
            if sample:
                y = torch.normal(out.detach(), std=0.5**0.5)
            return torch.nn.functional.mse_loss(out, y, reduction="sum")
        if sample:
            y = torch.multinomial(torch.softmax(out.detach(), -1), 1).flatten()
        return torch.nn.functional.cross_entropy(out, y, reduction="sum")

    def compute_measurement(self, batch: Any, model: Any) -> Any:
        return self.compute_train_loss(batch, model)


def _ekfac(strategy: str) -> Any:
    def prepare(problem: Any) -> Any:
        task = _Task(problem)
        model = prepare_model(problem.model, task)
        folder = tempfile.mkdtemp()
        analyzer = Analyzer("bench", model, task, cpu=True, output_dir=folder, disable_tqdm=True)
        train = torch.utils.data.TensorDataset(*problem.train)
        test = torch.utils.data.TensorDataset(*problem.test)
        analyzer.fit_all_factors(
            "factors",
            train,
            per_device_batch_size=problem.batch,
            factor_args=FactorArguments(strategy=strategy),
            overwrite_output_dir=True,
        )

        def solve() -> Any:
            analyzer.compute_pairwise_scores(
                "scores",
                "factors",
                query_dataset=test,
                train_dataset=train,
                per_device_query_batch_size=len(test),
                per_device_train_batch_size=problem.batch,
                score_args=ScoreArguments(damping_factor=problem.damping),
                overwrite_output_dir=True,
            )
            return {"scores": analyzer.load_pairwise_scores("scores")["all_modules"]}

        return solve

    return prepare


CONTENDERS = {"hessian: EKFAC": _ekfac("ekfac"), "ggn: EKFAC": _ekfac("ekfac")}
