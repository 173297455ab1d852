"""dattri's attributors, by the solutions that they make of test gradients."""

from __future__ import annotations

from typing import Any

import torch
from dattri.algorithm.influence_function import (
    IFAttributorArnoldi,
    IFAttributorCG,
    IFAttributorDataInf,
    IFAttributorEKFAC,
    IFAttributorLiSSA,
)
from dattri.task import AttributionTask


def _task(problem: Any) -> Any:
    model, loss = problem.model, problem.loss

    def objective(params: Any, data: Any) -> Any:
        x, y = data
        return loss(torch.func.functional_call(model, params, x), y)

    return AttributionTask(objective, model, dict(model.state_dict()))


def _damping(kind: Any, value: float) -> dict[str, float]:
    """λ in the words of each class; LiSSA's is in units of its scaling, 50 by default."""
    if kind is IFAttributorEKFAC:
        return {"damping": value}
    return {"damping": value / 50} if kind is IFAttributorLiSSA else {"regularization": value}


def _attributor(kind: Any, **options: Any) -> Any:
    def prepare(problem: Any) -> Any:
        attributor = kind(_task(problem), **_damping(kind, problem.damping), **options)
        # It sums inverses over batches: all the data are one batch.
        data = torch.utils.data.TensorDataset(*problem.train)
        whole = torch.utils.data.DataLoader(data, batch_size=len(data))
        attributor.cache(whole)
        G = problem.gradients()

        def solve() -> Any:
            return attributor.transform_test_rep(0, G).detach()

        if kind is IFAttributorEKFAC:
            unit = torch.eye(G.shape[1], dtype=G.dtype)
            solve.inverse = lambda: attributor.transform_test_rep(0, unit).detach()
        return solve

    return prepare


CONTENDERS = {
    "hessian: CG, defaults": _attributor(IFAttributorCG),
    "hessian: CG, 100 iterations": _attributor(IFAttributorCG, max_iter=100),
    "hessian: LiSSA, defaults": _attributor(IFAttributorLiSSA),
    "hessian: Arnoldi, defaults": _attributor(IFAttributorArnoldi),
    "hessian: DataInf": _attributor(IFAttributorDataInf),
    "hessian: EKFAC": _attributor(IFAttributorEKFAC),
    "fisher: DataInf": _attributor(IFAttributorDataInf),
    "ggn: EKFAC": _attributor(IFAttributorEKFAC),
}
