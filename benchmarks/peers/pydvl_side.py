"""pyDVL's seven models with the options that its documentation shows, or its defaults."""

from __future__ import annotations

from typing import Any

import torch
from pydvl.influence.torch import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
    SecondOrderMode,
)
from pydvl.influence.torch.preconditioner import JacobiPreconditioner, NystroemPreconditioner

FISHER = SecondOrderMode.GAUSS_NEWTON


def _model(kind: Any, **options: Any) -> Any:
    def prepare(problem: Any) -> Any:
        influence = kind(problem.model, problem.loss, regularization=problem.damping, **options)
        influence = influence.fit(problem.loader())
        return lambda: influence.influence_factors(*problem.test).detach()

    return prepare


def _fisher(answer: Any, tolerance: dict[str, float]) -> Any:
    def prepare(problem: Any) -> Any:
        influence = CgInfluence(
            problem.model, problem.loss, regularization=problem.damping, maxiter=2000,
            solve_simultaneously=True, second_order_mode=FISHER, **tolerance,
        )  # fmt: skip
        influence = influence.fit(problem.loader())
        return lambda: answer(influence, problem)

    return prepare


def _scores(influence: Any, problem: Any) -> Any:
    return {"scores": influence.influences(*problem.test, *problem.train).detach()}


def _one_by_one(influence: Any, problem: Any) -> Any:
    """With several right-hand sides at once its product is that of another matrix."""
    points = zip(*problem.test, strict=True)
    return torch.cat([influence.influence_factors(x[None], y[None]) for x, y in points]).detach()


def _scores_one_by_one(influence: Any, problem: Any) -> Any:
    factors = _one_by_one(influence, problem)
    return {"scores": influence.influences_from_factors(factors, *problem.train).detach()}


def _ekfac(*, update: bool) -> Any:
    def prepare(problem: Any) -> Any:
        influence = EkfacInfluence(
            problem.model, update_diagonal=update, hessian_regularization=problem.damping
        )
        influence = influence.fit(problem.loader())
        return lambda: influence.influence_factors(*problem.test).detach()

    return prepare


def _block(**options: Any) -> Any:
    return _model(CgInfluence, solve_simultaneously=True, **options)


def _in_float64(contender: Any) -> Any:
    """For problems in float32: the same, all of it in the precision that reaches 1e-6."""
    return lambda problem: contender(problem.cast(torch.float64))


# Its tolerance is the square of rtol: these stop near 1e-3 and 1e-6.
TO_1E3, TO_1E6 = ({"rtol": rtol, "atol": 0.0} for rtol in (3e-2, 1e-3))

CONTENDERS = {
    "hessian: Direct": _model(DirectInfluence),
    "hessian: CG, defaults": _model(CgInfluence),
    "hessian: block CG, defaults": _block(),
    "hessian: block CG to 1e-3": _block(maxiter=10_000, **TO_1E3),
    "hessian: block CG to 1e-6": _block(maxiter=10_000, **TO_1E6),
    "hessian: block CG to 1e-6, in float64": _in_float64(_block(maxiter=10_000, **TO_1E6)),
    "hessian: block CG, Nyström 50": _block(preconditioner=NystroemPreconditioner(rank=50)),
    "hessian: block CG, Jacobi": _block(preconditioner=JacobiPreconditioner()),
    "hessian: LiSSA, defaults": _model(LissaInfluence),
    "hessian: Arnoldi 50": _model(ArnoldiInfluence, rank=50),
    "hessian: Arnoldi 50, Woodbury": _model(ArnoldiInfluence, rank=50, use_woodbury=True),
    "hessian: NystroemSketch 50": _model(NystroemSketchInfluence, rank=50),
    "hessian: InverseHarmonicMean": _model(InverseHarmonicMeanInfluence),
    "hessian: EKFAC": _ekfac(update=False),
    "hessian: EKFAC, updated diagonal": _ekfac(update=True),
    "ggn: EKFAC": _ekfac(update=False),
    "ggn: EKFAC, updated diagonal": _ekfac(update=True),
    "fisher: Direct": _model(DirectInfluence, second_order_mode=FISHER),
    "fisher: block CG, defaults": _block(second_order_mode=FISHER),
    "fisher: block CG to 1e-3": _block(maxiter=200, **TO_1E3, second_order_mode=FISHER),
    "fisher: block CG to 1e-3, one by one": _fisher(_one_by_one, TO_1E3),
    "fisher: block CG to 1e-6": _block(maxiter=200, **TO_1E6, second_order_mode=FISHER),
    "fisher: block CG to 1e-6, one by one": _fisher(_one_by_one, TO_1E6),
    "fisher: InverseHarmonicMean": _model(InverseHarmonicMeanInfluence),
    "fisher: scores, block CG to 1e-3": _fisher(_scores, TO_1E3),
    "fisher: scores, block CG to 1e-3, one by one": _fisher(_scores_one_by_one, TO_1E3),
    "fisher: scores, block CG to 1e-6, one by one": _fisher(_scores_one_by_one, TO_1E6),
}
