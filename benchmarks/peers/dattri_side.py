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

    dtype, kind = (t.dtype for t in problem.train)

    def objective(params: Any, data: Any) -> Any:
        # Its LiSSA casts all data to float32, labels too.
        x, y = data[0].to(dtype), data[1].to(kind)
        return loss(torch.func.functional_call(model, params, x), y)

    return AttributionTask(objective, model, dict(model.state_dict()))


def _damping(kind: Any, value: float) -> dict[str, float]:
    """λ in the words of each class; LiSSA's is in units of its scaling, 50 by default."""
    if kind is IFAttributorEKFAC:
        return {"damping": value}
    return {"damping": value / 50} if kind is IFAttributorLiSSA else {"regularization": value}


def _in_our_order(attributor: Any, rows: Any) -> Any:
    """Its EKFAC takes W, then b of a layer and gives rows of [W | b]: these are put in order, so
    that a slip of the layout is not taken for the method's error. Nothing else is mended: it turns
    by Q where eigh has given the eigenvectors as columns, so that Qᵀ would be right.
    """
    parts, start = [], 0
    for name in attributor.module_name:
        layer = attributor.name_to_module[name]
        width = layer.in_features + (layer.bias is not None)
        end = start + layer.out_features * width
        block = rows[:, start:end].reshape(len(rows), layer.out_features, width)
        weights, bias = block[..., : layer.in_features], block[..., layer.in_features :]
        parts += [weights.flatten(1), bias.flatten(1)]
        start = end
    return torch.cat(parts, dim=1)


def _attributor(kind: Any, **options: Any) -> Any:
    def prepare(problem: Any) -> Any:
        attributor = kind(_task(problem), **_damping(kind, problem.damping), **options)
        # It sums inverses over batches: all the data are one batch.
        data = torch.utils.data.TensorDataset(*problem.train)
        whole = torch.utils.data.DataLoader(data, batch_size=len(data))
        attributor.cache(whole)
        G = problem.gradients()

        def solve(rows: Any = G) -> Any:
            found = attributor.transform_test_rep(0, rows).detach()
            return _in_our_order(attributor, found) if kind is IFAttributorEKFAC else found

        if kind is IFAttributorEKFAC:
            solve.inverse = lambda: solve(torch.eye(G.shape[1], dtype=G.dtype))
        return solve

    return prepare


def _arnoldi(problem: Any) -> Any:
    """It projects gradients of both sides, for scores: there are no solutions."""
    torch.set_default_dtype(problem.train[0].dtype)  # its first vector has the default one
    attributor = IFAttributorArnoldi(_task(problem), regularization=problem.damping)
    data = torch.utils.data.TensorDataset(*problem.train)
    attributor.cache(torch.utils.data.DataLoader(data, batch_size=len(data)))

    def solve() -> Any:
        test = attributor.transform_test_rep(0, problem.gradients())
        parts = []
        for batch in problem.loader():
            rows = attributor.generate_train_rep(0, tuple(t[None] for t in batch))
            parts.append(test @ attributor.transform_train_rep(0, rows).T)
        return {"scores": torch.cat(parts, dim=1).detach()}

    return solve


CONTENDERS = {
    "hessian: CG, defaults": _attributor(IFAttributorCG),
    "hessian: CG, 100 iterations": _attributor(IFAttributorCG, max_iter=100),
    "hessian: LiSSA, defaults": _attributor(IFAttributorLiSSA),
    "hessian: Arnoldi, defaults": _arnoldi,
    "hessian: DataInf": _attributor(IFAttributorDataInf),
    "hessian: EKFAC": _attributor(IFAttributorEKFAC),
    "fisher: DataInf": _attributor(IFAttributorDataInf),
    # Its factors are those of gradients at the given labels.
    "fisher: EKFAC": _attributor(IFAttributorEKFAC),
    "ggn: EKFAC": _attributor(IFAttributorEKFAC),
}
