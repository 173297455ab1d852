"""curvlinops: CG, Neumann and Kronecker inverses of its own operators."""

from __future__ import annotations

from typing import Any

import torch
from curvlinops import (
    CGInverseLinearOperator,
    EFLinearOperator,
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACInverseLinearOperator,
    KFACLinearOperator,
    NeumannInverseLinearOperator,
)
from curvlinops.examples import IdentityLinearOperator

MODULES = {"cross_entropy": torch.nn.CrossEntropyLoss, "mse": torch.nn.MSELoss}


def _operator(problem: Any, kind: Any, **options: Any) -> Any:
    loss = MODULES[problem.loss_name]()
    return kind(problem.model, loss, problem.parameters(), list(problem.loader()), **options)


def _damped(problem: Any, kind: Any) -> Any:
    A = _operator(problem, kind)
    return A + problem.damping * IdentityLinearOperator(
        [q.shape for q in problem.parameters()], *_where(problem)
    )


def _where(problem: Any) -> tuple[Any, Any]:
    first = problem.parameters()[0]
    return first.device, first.dtype


def _cg(kind: Any, **options: Any) -> Any:
    def prepare(problem: Any) -> Any:
        inverse = CGInverseLinearOperator(_damped(problem, kind), **options)
        return lambda: (inverse @ problem.gradients().T).T.detach()

    return prepare


def _neumann(problem: Any) -> Any:
    A = _damped(problem, HessianLinearOperator)
    # The largest step that its documentation allows needs the largest eigenvalue.
    v = torch.ones(A.shape[0], dtype=_where(problem)[1])
    for _ in range(15):
        v = A @ (v / v.norm())
    inverse = NeumannInverseLinearOperator(A, num_terms=100, scale=float(1 / v.norm()))
    return lambda: (inverse @ problem.gradients().T).T.detach()


def _kronecker(kind: Any, **options: Any) -> Any:
    def prepare(problem: Any) -> Any:
        K = _operator(problem, kind, separate_weight_and_bias=False, **options)
        inverse = KFACInverseLinearOperator(K, damping=problem.damping, use_exact_damping=True)
        # Factors are computed at the first product.
        G = problem.gradients().T
        inverse @ G[:, :1]

        def solve() -> Any:
            return (inverse @ G).T.detach()

        solve.inverse = lambda: (inverse @ torch.eye(len(G), dtype=G.dtype)).detach()
        return solve

    return prepare


def _to(tolerance: float) -> dict[str, Any]:
    """Its linear_cg leaves a column, or takes a step of zero, where squares fall below 1e-10: by
    default it stalls near a residual of 1e-5, so that a goal needs these too.
    """
    tiny = 1e-30
    return {"tolerance": tolerance, "max_iter": 10_000, "eps": tiny, "stop_updating_after": tiny}


def _in_float64(contender: Any) -> Any:
    """For problems in float32: the same, all of it in the precision that reaches 1e-6."""
    return lambda problem: contender(problem.cast(torch.float64))


CONTENDERS = {
    "hessian: CGInverse, defaults": _cg(HessianLinearOperator),
    "hessian: CGInverse to 1e-3": _cg(HessianLinearOperator, **_to(1e-3)),
    "hessian: CGInverse to 1e-6": _cg(HessianLinearOperator, **_to(1e-6)),
    "hessian: CGInverse to 1e-6, in float64": _in_float64(_cg(HessianLinearOperator, **_to(1e-6))),
    "hessian: Neumann 100": _neumann,
    "hessian: K-FAC": _kronecker(KFACLinearOperator, fisher_type="type-2"),
    "hessian: EKFAC": _kronecker(EKFACLinearOperator, fisher_type="type-2"),
    "ggn: CGInverse to 1e-3": _cg(GGNLinearOperator, **_to(1e-3)),
    "ggn: CGInverse to 1e-6": _cg(GGNLinearOperator, **_to(1e-6)),
    "ggn: K-FAC": _kronecker(KFACLinearOperator, fisher_type="type-2"),
    "ggn: EKFAC": _kronecker(EKFACLinearOperator, fisher_type="type-2"),
    "fisher: CGInverse to 1e-3": _cg(EFLinearOperator, **_to(1e-3)),
    "fisher: CGInverse to 1e-6": _cg(EFLinearOperator, **_to(1e-6)),
    "fisher: EKFAC": _kronecker(EKFACLinearOperator, fisher_type="empirical"),
}
