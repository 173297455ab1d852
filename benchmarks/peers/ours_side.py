"""invhvp's methods, and SciPy's CG on the same operator."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch

import invhvp as ih
import invhvp_torch as it


def _curvature(problem: Any, kind: str, **options: Any) -> Any:
    build = {"hessian": it.hessian, "ggn": it.gauss_newton, "fisher": it.empirical_fisher}[kind]
    return build(problem.model, problem.loss, problem.train, **options)


def _solved(inverse: Any, problem: Any) -> Any:
    def solve() -> Any:
        G = it.per_sample_gradients(problem.model, problem.loss, *problem.test)
        solution = inverse.solve(G)
        names = Counter(status.name for status in solution.status)
        said = f"{', '.join(names)}, {solution.passes} passes"
        return solution.x.T, said

    return solve


def _method(kind: str, method: Any) -> Any:
    """`method` is a Method, or a function of the problem that gives one."""

    def prepare(problem: Any) -> Any:
        A = _curvature(problem, kind)
        chosen = method(problem) if callable(method) else method
        return _solved(chosen.prepare(A, damping=problem.damping), problem)

    return prepare


def _on_gauss_newton(inner: Any, **options: Any) -> Any:
    def method(problem: Any) -> Any:
        K = _curvature(problem, "ggn")
        return ih.BlockCG(preconditioner=ih.Surrogate(K, inner), **options)

    return method


def _on_ekfac(**options: Any) -> Any:
    def method(problem: Any) -> Any:
        K = it.ekfac(problem.model, problem.loss, problem.train)
        return ih.BlockCG(preconditioner=ih.Surrogate(K), **options)

    return method


def _kronecker(build: Any, **options: Any) -> Any:
    def prepare(problem: Any) -> Any:
        K = build(problem.model, problem.loss, problem.train, **options)
        inverse = ih.Direct().prepare(K, damping=problem.damping)

        def solve() -> Any:
            G = it.per_sample_gradients(problem.model, problem.loss, *problem.test)
            return (inverse @ G.to_dense().T).T

        solve.inverse = inverse.to_dense  # pyright: ignore[reportFunctionMemberAccess]
        return solve

    return prepare


def _scipy(kind: str, rtol: float) -> Any:
    def prepare(problem: Any) -> Any:
        M = _curvature(problem, kind, array_namespace=np)
        n = M.shape[0]

        def product(v: Any) -> Any:
            return M @ v + problem.damping * v

        A = scipy.sparse.linalg.LinearOperator((n, n), matvec=product, dtype=M.dtype)

        def solve() -> Any:
            G = problem.gradients().numpy()
            found = [scipy.sparse.linalg.cg(A, g, rtol=rtol)[0] for g in G]
            return torch.from_numpy(np.stack(found))

        return solve

    return prepare


def _scores(method: Any) -> Any:
    def prepare(problem: Any) -> Any:
        F = it.empirical_fisher(problem.model, problem.loss, problem.train)
        influence = ih.Influence(method.prepare(F, damping=problem.damping), F.gradients)

        def solve() -> Any:
            G = it.per_sample_gradients(problem.model, problem.loss, *problem.test)
            return {"scores": influence.scores(G)}

        return solve

    return prepare


def _block(rtol: float, preconditioner: Any = None) -> Any:
    return ih.BlockCG(rtol=rtol, preconditioner=preconditioner)


def _refined(inner: Any = None) -> Any:
    """Iterations in float32 and residuals in float64, whatever the problem's dtype."""

    def prepare(problem: Any) -> Any:
        narrow, wide = problem.cast(torch.float32), problem.cast(torch.float64)
        cheap = None
        if inner is not None:
            cheap = ih.Surrogate(_curvature(narrow, "ggn"), inner)
        method = ih.BlockCG(
            rtol=1e-6, residual_operator=_curvature(wide, "hessian"), preconditioner=cheap
        )
        H = _curvature(narrow, "hessian")
        return _solved(method.prepare(H, damping=problem.damping), wide)

    return prepare


PIVOTS = ih.PivotedCholesky(rank=256)
NYSTROEM = ih.NystroemPreconditioner(rank=50, rng=0)

CONTENDERS = {
    "hessian: Direct": _method("hessian", ih.Direct()),
    "hessian: CG to 1e-3": _method("hessian", ih.CG(rtol=1e-3)),
    "hessian: Minres to 1e-3": _method("hessian", ih.Minres(rtol=1e-3)),
    "hessian: Minres to 1e-6": _method("hessian", ih.Minres(rtol=1e-6)),
    "hessian: BlockCG to 1e-3": _method("hessian", _block(1e-3)),
    "hessian: BlockCG to 1e-6": _method("hessian", _block(1e-6)),
    "hessian: BlockCG to 1e-3, Nyström 50": _method("hessian", _block(1e-3, NYSTROEM)),
    "hessian: BlockCG to 1e-3, Gauss–Newton exact": _method(
        "hessian", _on_gauss_newton(ih.SampleSpace(), rtol=1e-3)
    ),
    "hessian: BlockCG to 1e-3, Gauss–Newton pivots 256": _method(
        "hessian", _on_gauss_newton(PIVOTS, rtol=1e-3)
    ),
    "hessian: BlockCG to 1e-6, Gauss–Newton pivots 256": _method(
        "hessian", _on_gauss_newton(PIVOTS, rtol=1e-6)
    ),
    "hessian: BlockCG to 1e-6, products in float32, residuals in float64": _refined(),
    "hessian: BlockCG to 1e-6, float32 and float64, Gauss–Newton pivots 256": _refined(PIVOTS),
    "hessian: BlockCG to 1e-3, EKFAC": _method("hessian", _on_ekfac(rtol=1e-3)),
    "hessian: LiSSA, defaults": _method("hessian", ih.LiSSA()),
    "hessian: Arnoldi 50": _method("hessian", ih.Arnoldi(rank=50)),
    "hessian: NystroemSketch 50": _method("hessian", ih.NystroemSketch(rank=50)),
    "hessian: InverseHarmonicMean": _method("fisher", ih.InverseHarmonicMean()),
    "hessian: K-FAC": _kronecker(it.kfac),
    "hessian: EKFAC": _kronecker(it.ekfac),
    "hessian: SciPy CG to 1e-3": _scipy("hessian", 1e-3),
    "hessian: SciPy CG to 1e-6": _scipy("hessian", 1e-6),
    "ggn: SampleSpace": _method("ggn", ih.SampleSpace()),
    "ggn: BlockCG to 1e-3": _method("ggn", _block(1e-3)),
    "ggn: BlockCG to 1e-6": _method("ggn", _block(1e-6)),
    "ggn: SciPy CG to 1e-3": _scipy("ggn", 1e-3),
    "ggn: SciPy CG to 1e-6": _scipy("ggn", 1e-6),
    "ggn: K-FAC": _kronecker(it.kfac),
    "ggn: EKFAC": _kronecker(it.ekfac),
    "ggn: EKFAC, signs": _kronecker(it.ekfac, fisher="sign"),
    "fisher: SampleSpace": _method("fisher", ih.SampleSpace()),
    "fisher: BlockCG to 1e-3": _method("fisher", _block(1e-3)),
    "fisher: BlockCG to 1e-6": _method("fisher", _block(1e-6)),
    "fisher: SciPy CG to 1e-3": _scipy("fisher", 1e-3),
    "fisher: SciPy CG to 1e-6": _scipy("fisher", 1e-6),
    "fisher: InverseHarmonicMean": _method("fisher", ih.InverseHarmonicMean()),
    "fisher: InverseHarmonicMean by parameter": _method(
        "fisher", ih.InverseHarmonicMean(block="layer")
    ),
    "fisher: scores, SampleSpace": _scores(ih.SampleSpace()),
    "fisher: EKFAC": _kronecker(it.ekfac, fisher="empirical"),
}
