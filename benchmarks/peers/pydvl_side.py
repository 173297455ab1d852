"""pyDVL's seven models with the options that its documentation shows, or its defaults."""

from __future__ import annotations

from typing import Any

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

FISHER = {"second_order_mode": SecondOrderMode.GAUSS_NEWTON}


def _model(kind: Any, **options: Any) -> Any:
    def prepare(problem: Any) -> Any:
        influence = kind(problem.model, problem.loss, regularization=problem.damping, **options)
        influence = influence.fit(problem.loader())
        return lambda: influence.influence_factors(*problem.test).detach()

    return prepare


def _scores(kind: Any, **options: Any) -> Any:
    def prepare(problem: Any) -> Any:
        influence = kind(problem.model, problem.loss, regularization=problem.damping, **options)
        influence = influence.fit(problem.loader())
        return lambda: {"scores": influence.influences(*problem.test, *problem.train).detach()}

    return prepare


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


CONTENDERS = {
    "hessian: Direct": _model(DirectInfluence),
    "hessian: CG, defaults": _model(CgInfluence),
    "hessian: block CG, defaults": _block(),
    # Its tolerance is the square of rtol: these stop near 1e-3 and 1e-6.
    "hessian: block CG to 1e-3": _block(rtol=3e-2, atol=0.0, maxiter=10_000),
    "hessian: block CG to 1e-6": _block(rtol=1e-3, atol=0.0, maxiter=10_000),
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
    "fisher: Direct": _model(DirectInfluence, **FISHER),
    "fisher: block CG, defaults": _block(**FISHER),
    "fisher: block CG to 1e-3": _block(rtol=3e-2, atol=0.0, maxiter=200, **FISHER),
    "fisher: InverseHarmonicMean": _model(InverseHarmonicMeanInfluence),
    "fisher: scores, Direct": _scores(DirectInfluence, **FISHER),
    "fisher: scores, block CG to 1e-3": _scores(
        CgInfluence, solve_simultaneously=True, rtol=3e-2, atol=0.0, maxiter=200, **FISHER
    ),
}
