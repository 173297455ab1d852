"""LiSSA: the Neumann series, the stability of a step, what stops it, and what it reports."""

from __future__ import annotations

import math
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import invhvp as ih
from invhvp.gradients import DenseGradients
from invhvp.methods import BlockCG, Fixed, Jacobi, LiSSA, Surrogate
from invhvp.operators import Callback, Dense, RankOneMean
from invhvp.solution import ConvergenceWarning, IndefiniteError, InvhvpWarning
from tests.backends import Backend
from tests.cases import LAYOUT, N, matrix, rows

seeds = st.integers(0, 2**16)
quiet = pytest.mark.filterwarnings("ignore::invhvp.solution.InvhvpWarning")


def rounded(backend: Backend, a: np.ndarray) -> np.ndarray:
    return a.astype(backend.np_dtype).astype(np.float64)


def features(samples: int = 400, n: int = N, *, decay: float = 0.1, seed: int = 0) -> np.ndarray:
    """Gaussian features with variances from 1 to `decay`."""
    return rows(samples, n, seed=seed) * np.sqrt(np.geomspace(1.0, decay, n))


def case(backend: Backend, damping: float, **options):
    """An operator with terms, right-hand sides, the damped matrix and the solution."""
    G, b = rounded(backend, features(**options)), rounded(backend, rows(3, seed=11).T)
    A = RankOneMean(DenseGradients(backend.asarray(G), layout=LAYOUT))
    M = G.T @ G / len(G) + damping * np.eye(N)
    return A, backend.asarray(b), M, np.linalg.solve(M, b)


# ------------------------------------------------------------------------- full batches: Neumann


@quiet
@given(seed=seeds, steps=st.integers(1, 40), share=st.floats(0.05, 1.9))
@pytest.mark.backends("numpy", "strict", "torch-cpu")
def test_full_batches_are_the_neumann_series(backend: Backend, seed: int, steps: int, share: float):
    M = rounded(backend, matrix(*np.geomspace(1.0, 0.01, N), seed=seed))
    b = rounded(backend, rows(2, seed=seed).T)
    damping, eta = 0.05, share / 1.05
    method = LiSSA(scale=1 / eta, maxiter=steps, rtol=0.0, check_every=1)
    solution = method.prepare(Dense(backend.asarray(M), psd=True), damping=damping).solve(
        backend.asarray(b)
    )
    term, expected = eta * b, np.zeros_like(b)
    for _ in range(solution.iterations):
        expected = expected + term
        term = term - eta * (M @ term + damping * term)
    allowed = 20 * (1 + steps) * backend.eps * np.linalg.norm(expected)
    assert np.linalg.norm(backend.to_numpy(solution.x) - expected) <= allowed
    assert solution.iterations == solution.passes == steps
    assert solution.products == 2 * steps


@quiet
@given(share=st.floats(0.1, 3.9))
@pytest.mark.backends("numpy-f64")
def test_full_batches_are_stable_up_to_two_over_lambda_max(backend: Backend, share: float):
    A = Callback(lambda X: np.linspace(1.0, 0.5, N)[:, None] * X, N, like=np.zeros(0), psd=True)
    method = LiSSA(scale=1 / share, maxiter=2000, rtol=1e-8, force=True)
    status = method.prepare(A, damping=0.0).solve(np.ones(N)).status.name
    if share < 1.95:
        assert status == "CONVERGED"
    if share > 2.05:
        assert status == "DIVERGED"


def test_converges_without_terms_everywhere(backend: Backend):
    M = rounded(backend, matrix(*np.geomspace(1.0, 0.05, N)))
    b = rounded(backend, rows(3, seed=2).T)
    solution = ih.solve(
        Dense(backend.asarray(M), psd=True), backend.asarray(b), LiSSA(rtol=1e-3), damping=0.1
    )
    assert {s.name for s in solution.status} == {"CONVERGED"}
    damped = M + 0.1 * np.eye(N)
    x = backend.to_numpy(solution.x)
    assert np.all(np.linalg.norm(b - damped @ x, axis=0) <= 1.01e-3 * np.linalg.norm(b, axis=0))
    error = x - np.linalg.solve(damped, b)
    energy = np.sqrt(np.sum(error * (damped @ error), axis=0))
    assert np.all(energy <= backend.to_numpy(solution.error_bounds))


# --------------------------------------------------------------------------------- mini-batches


def test_stochastic_everywhere(backend: Backend):
    A, b, M, _ = case(backend, 0.1)
    inverse = LiSSA(rtol=2e-2, batch=64, rng=3).prepare(A, damping=0.1)
    assert inverse.stochastic
    assert not inverse.fixed_spd
    solution = inverse.solve(b)
    assert {s.name for s in solution.status} == {"CONVERGED"}
    residual = backend.to_numpy(b) - M @ backend.to_numpy(solution.x)
    b_norms = np.linalg.norm(backend.to_numpy(b), axis=0)
    assert np.all(np.linalg.norm(residual, axis=0) <= 2.01e-2 * b_norms)
    again = inverse.solve(b)
    assert np.array_equal(backend.to_numpy(solution.x), backend.to_numpy(again.x))


def test_anchors_reach_any_tolerance(backend: Backend):
    A, b, _, x = case(backend, 0.1)
    rtol = 1e-6 if backend.eps < 1e-10 else 1e-5
    method = LiSSA(rtol=rtol, batch=32, variance_reduction="svrg")
    solution = ih.solve(A, b, method, damping=0.1)
    assert {s.name for s in solution.status} == {"CONVERGED"}
    found = backend.to_numpy(solution.x)
    assert np.linalg.norm(found - x) <= 20 * rtol * np.linalg.norm(x)


@quiet
@pytest.mark.backends("numpy-f64")
@pytest.mark.parametrize("batch", [1, 2, 4, 16, 64])
def test_the_measured_step_is_tight(backend: Backend, batch: int):
    """0.9 of the critical step stays bounded, four times as much diverges."""
    A, b, _, x = case(backend, 0.01, samples=2000)
    critical = LiSSA(batch=batch).prepare(A, damping=0.01).critical_scale
    options = {"batch": batch, "maxiter": 4000, "rtol": 1e-9, "force": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        calm = LiSSA(scale=critical / 0.9, **options).prepare(A, damping=0.01).solve(b)
        wild = LiSSA(scale=critical / 4, **options).prepare(A, damping=0.01).solve(b)
    assert {s.name for s in calm.status} == {"MAXITER"}
    assert np.linalg.norm(calm.x - x) < np.linalg.norm(x)
    assert {s.name for s in wild.status} == {"DIVERGED"}
    assert np.all(np.isfinite(wild.x))


@pytest.mark.backends("numpy-f64")
def test_the_kurtosis_is_measured(backend: Backend):
    """One sample in a hundred with ten times the gradient: assuming C ≤ 3 diverges."""
    G = features(400)
    G[::100] *= 10
    A = RankOneMean(DenseGradients(G))
    inverse = LiSSA(batch=4).prepare(A, damping=0.05)
    second = np.sum(G * G, axis=1)
    F = (G * second[:, None]).T @ G / 400
    half = np.linalg.inv(np.linalg.cholesky(G.T @ G / 400 + 0.05 * np.eye(N)))
    c = np.linalg.eigvalsh(half @ F @ half.T)[-1]
    assert inverse.kurtosis > 5
    assert math.isclose(inverse.kurtosis * second.mean(), c, rel_tol=0.05)
    assert c <= second.max()


@quiet
@pytest.mark.backends("numpy-f64")
def test_averages_beat_the_last_iterate_and_noise_falls_with_the_batch(backend: Backend):
    A, b, _, x = case(backend, 0.05, samples=2000)
    scale = LiSSA(batch=4).prepare(A, damping=0.05).scale

    def error(batch: int, seed: int, averaged: bool) -> float:
        method = LiSSA(scale=scale, batch=batch, maxiter=800, rtol=0.0, rng=seed, check_every=800)
        inverse = method.prepare(A, damping=0.05)
        if averaged:
            return float(np.linalg.norm(inverse.solve(b[:, 0]).x - x[:, 0]))
        return float(np.linalg.norm(last_iterate(inverse, b[:, 0], 800, seed) - x[:, 0]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        tail = [error(4, seed, True) for seed in range(10)]
        last = [error(4, seed, False) for seed in range(10)]
        large = [error(64, seed, False) for seed in range(10)]
    assert np.mean(np.asarray(tail) < np.asarray(last)) >= 0.9
    # Sixteen times the batch, a sixteenth of the variance.
    assert 0.15 < np.mean(large) / np.mean(last) < 0.4


def last_iterate(inverse, b: np.ndarray, steps: int, seed: int) -> np.ndarray:
    rng, u = np.random.default_rng(seed), np.zeros_like(b)
    for _ in range(steps):
        part = inverse.operator.subset(rng.choice(inverse.n_terms, inverse.batch, replace=False))
        u = u - (part @ u + inverse.shift * u - b) / inverse.scale
    return u


@quiet
@pytest.mark.backends("numpy-f64")
def test_terms_without_gradients(backend: Backend):
    """Hessians of single samples, known through products alone: the spread is sampled."""
    G = features(300)

    class Terms(ih.LinearOperator):
        def __init__(self, chosen: np.ndarray):
            super().__init__(N, like=np.zeros(0))
            self.chosen = chosen

        @property
        def n_terms(self) -> int:
            return len(self.chosen)

        def subset(self, indices: np.ndarray) -> Terms:
            return Terms(self.chosen[indices])

        def _matmat(self, X: np.ndarray) -> np.ndarray:
            rows_ = G[self.chosen]
            return rows_.T @ (rows_ @ X) / len(rows_)

    A, b = Terms(np.arange(300)), rows(1, seed=4)[0]
    inverse = LiSSA(rtol=3e-2, batch=8).prepare(A, damping=0.1)
    exact = LiSSA(batch=8).prepare(RankOneMean(DenseGradients(G)), damping=0.1)
    assert 0.5 * exact.critical_scale < inverse.critical_scale < 3 * exact.critical_scale
    assert inverse.kurtosis is None
    assert inverse.solve(b).status.name == "CONVERGED"


# ------------------------------------------------------------------- fixed points and structure


@pytest.mark.backends("numpy", "torch-cpu")
@pytest.mark.parametrize("dampen", [0.05, 0.3])
def test_dampen_is_a_second_ridge(backend: Backend, dampen: float):
    A, b, M, _ = case(backend, 0.1)
    inverse = LiSSA(rtol=1e-4, dampen=dampen, batch=400).prepare(A, damping=0.1)
    assert math.isclose(inverse.ridge, dampen * inverse.scale)
    solution = inverse.solve(b)
    expected = np.linalg.solve(M + inverse.ridge * np.eye(N), backend.to_numpy(b))
    assert {s.name for s in solution.status} == {"CONVERGED"}
    assert np.linalg.norm(backend.to_numpy(solution.x) - expected) <= 1e-3 * np.linalg.norm(
        expected
    )


@pytest.mark.backends("numpy", "strict", "torch-cpu")
@pytest.mark.parametrize("options", [{"batch": 400}, {"batch": 64, "variance_reduction": "svrg"}])
def test_damping_by_block(backend: Backend, options: dict):
    A, b, M, _ = case(backend, 0.0)
    shift = {"weight": 0.2, "bias": 1.5}
    solution = LiSSA(rtol=1e-4, **options).prepare(A, damping=shift).solve(b)
    expected = np.linalg.solve(M + np.diag(LAYOUT.shifts(shift)), backend.to_numpy(b))
    assert {s.name for s in solution.status} == {"CONVERGED"}
    assert np.linalg.norm(backend.to_numpy(solution.x) - expected) <= 1e-3 * np.linalg.norm(
        expected
    )


@pytest.mark.parametrize("svrg", [None, "svrg"])
@pytest.mark.backends("numpy", "torch-cpu")
def test_preconditioned(backend: Backend, svrg: str | None):
    """The ASTRA form: with a good P, tens of steps where thousands were needed."""
    A, b, M, _ = case(backend, 0.003, decay=1e-4)
    near = M - 0.003 * np.eye(N) + 0.001 * np.diag(np.arange(N) / N)
    P = Surrogate(Dense(backend.asarray((near + near.T) / 2), psd=True))
    rtol = 1e-4 if svrg else 1e-1  # noise in the directions of small curvature is what is left
    method = LiSSA(rtol=rtol, batch=64, preconditioner=P, variance_reduction=svrg)
    inverse = method.prepare(A, damping=0.003)
    plain = LiSSA(rtol=1e-2, batch=64).prepare(A, damping=0.003)
    assert inverse.size < 1.1
    solution = inverse.solve(b)
    assert {s.name for s in solution.status} == {"CONVERGED"}
    assert solution.iterations < plain.predicted_steps(1 / plain.scale)
    by_jacobi = LiSSA(rtol=1e-3, batch=400, preconditioner=Jacobi()).prepare(A, damping=0.003)
    assert {s.name for s in by_jacobi.solve(b).status} == {"CONVERGED"}


@quiet
@pytest.mark.backends("numpy", "torch-cpu")
def test_columns_share_batches(backend: Backend):
    A, b, _, _ = case(backend, 0.1)
    method = LiSSA(rtol=0.0, batch=16, maxiter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        block = method.prepare(A, damping=0.1).solve(b)
        one = method.prepare(A, damping=0.1).solve(b[:, 1])
    x, y = backend.to_numpy(block.x)[:, 1], backend.to_numpy(one.x)
    assert np.linalg.norm(x - y) <= 1e3 * backend.eps * np.linalg.norm(y)
    # A column on 16 of 400 terms is 1/25 of a product; each look has two candidates.
    looks = 2 * len(block.history) * 3
    assert block.products == math.ceil(200 * 3 * 16 / 400) + looks
    assert block.passes == math.ceil(200 * 16 / 400) + len(block.history)


def test_start_and_zero_and_copies(backend: Backend):
    A, b, _, x = case(backend, 0.1)
    inverse = LiSSA(rtol=1e-3, batch=400).prepare(A, damping=0.1)
    warm = inverse.solve(b, x0=backend.asarray(x))
    assert warm.iterations == 0
    xp = backend.xp
    B = xp.concat([b[:, :1], xp.zeros_like(b[:, :1]), 2.0 * b[:, :1]], axis=1)
    solution = inverse.solve(B)
    assert [s.name for s in solution.status] == ["CONVERGED", "ZERO", "CONVERGED"]
    found = backend.to_numpy(solution.x)
    assert not np.any(found[:, 1])
    assert np.allclose(found[:, 2], 2 * found[:, 0], rtol=1e-6)


def test_with_damping_measures_once(backend: Backend):
    A, b, M, _ = case(backend, 0.1)
    first = LiSSA(rtol=1e-2, batch=400).prepare(A, damping=0.1)
    moved = first.with_damping(1.0)
    assert moved.products == 0
    expected = np.linalg.solve(M + 0.9 * np.eye(N), backend.to_numpy(b))
    found = backend.to_numpy(moved.solve(b).x)
    assert np.linalg.norm(found - expected) <= 0.05 * np.linalg.norm(expected)


# ------------------------------------------------------------------------------ limits and lies


@pytest.mark.backends("numpy-f64")
def test_a_scale_that_must_diverge_is_refused(backend: Backend):
    A, b, M, _ = case(backend, 0.1)
    top = np.linalg.eigvalsh(M)[-1]
    with pytest.raises(ValueError, match=r"λmax is .* smallest stable scale is") as caught:
        LiSSA(scale=top / 3).prepare(A, damping=0.1)
    smallest = float(str(caught.value).split("stable scale is ")[1].split(";")[0])
    assert top / 2 <= smallest <= 1.1 * top
    forced = LiSSA(scale=top / 3, force=True, batch=400).prepare(A, damping=0.1)
    with pytest.warns(ConvergenceWarning, match="DIVERGED"):
        solution = forced.solve(b)
    assert {s.name for s in solution.status} == {"DIVERGED"}
    with pytest.raises(ih.ConvergenceError, match="DIVERGED"):
        forced @ b


@quiet
@pytest.mark.backends("numpy-f64")
def test_auto_step_recovers_by_halving(backend: Backend):
    """An operator whose size the measurement missed: three halvings, then DIVERGED."""
    A, b, _, _ = case(backend, 0.1)
    inverse = LiSSA(rtol=1e-2, batch=400).prepare(A, damping=0.1)
    inverse.scale /= 5
    assert {s.name for s in inverse.solve(b).status} == {"CONVERGED"}
    inverse.scale /= 20
    with pytest.warns(ConvergenceWarning, match="DIVERGED"):
        inverse.solve(b)


@quiet
def test_negative_curvature_comes_with_its_vector(backend: Backend):
    M = rounded(backend, matrix(*np.linspace(-0.5, 2.0, N)))
    A = Dense(backend.asarray(M))
    inverse = LiSSA(maxiter=5000).prepare(A, damping=0.1)
    with pytest.raises(IndefiniteError) as caught:
        inverse @ backend.asarray(np.ones(N))
    p = backend.to_numpy(caught.value.vector)
    assert math.isclose(float(np.linalg.norm(p)), 1.0, rel_tol=1e-3)
    assert p @ M @ p + 0.1 < 0


@quiet
@pytest.mark.backends("numpy")
def test_nan_in_the_operator(backend: Backend):
    M = matrix(*np.linspace(1.0, 2.0, N))
    M[0, 1] = M[1, 0] = np.nan
    A = Callback(lambda X: M.astype(X.dtype) @ X, N, like=backend.asarray([]))
    with pytest.warns(ConvergenceWarning, match="NONFINITE"):
        LiSSA().prepare(A, damping=0.1).solve(backend.asarray(np.ones(N)))


@pytest.mark.backends("numpy-f64")
def test_limits_on_products_and_seconds(backend: Backend):
    A, b, _, _ = case(backend, 0.001)
    for options in ({"batch": 16}, {"batch": 16, "variance_reduction": "svrg"}, {"batch": 400}):
        inverse = LiSSA(rtol=1e-9, max_products=40, **options).prepare(A, damping=0.001)
        with pytest.warns(ConvergenceWarning, match="MAXITER"):
            solution = inverse.solve(b)
        assert 20 < solution.products <= 40
        assert np.all(solution.relative_residuals < 1)
    quick = LiSSA(rtol=1e-9, max_seconds=0.0, maxiter=10).prepare(A, damping=0.001)
    with pytest.warns(ConvergenceWarning, match="MAXITER"):
        assert quick.solve(b).iterations == 0


@pytest.mark.backends("numpy-f64")
def test_predicted_cost_is_a_warning_not_a_refusal(backend: Backend):
    A, b, _, _ = case(backend, 1e-6, decay=1e-8)
    inverse = LiSSA(rtol=1e-1, batch=400, max_seconds=0.1).prepare(A, damping=1e-6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inverse.solve(b[:, 0])
    costs = [w for w in caught if w.category is InvhvpWarning]
    assert len(costs) == 1
    assert "passes" in str(costs[0].message)


@pytest.mark.backends("numpy-f32", "torch-cpu-f32")
def test_single_precision_ends_at_its_floor(backend: Backend):
    A, b, _, _ = case(backend, 0.1)
    inverse = LiSSA(rtol=1e-9, batch=400).prepare(A, damping=0.1)
    with pytest.warns(ConvergenceWarning, match="FLOOR"):
        solution = inverse.solve(b)
    assert np.max(backend.to_numpy(solution.relative_residuals)) < 3e-6


def test_callback_sees_every_look(backend: Backend):
    A, b, _, _ = case(backend, 0.1)
    seen = []
    solution = LiSSA(rtol=1e-3, batch=400).prepare(A, damping=0.1).solve(b, callback=seen.append)
    assert tuple(seen) == solution.history
    assert seen[-1].iteration == solution.iterations


@pytest.mark.backends("numpy-f64")
def test_door(backend: Backend):
    for wrong in (
        {"scale": 0.0}, {"scale": "best"}, {"scale": float("nan")}, {"dampen": 1.0},
        {"dampen": -0.1}, {"maxiter": 0}, {"batch": 0}, {"rtol": -1.0}, {"check_every": 0},
        {"variance_reduction": "saga"}, {"max_products": 0},
        {"dampen": 0.1, "preconditioner": Jacobi()},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LiSSA(**wrong)
    A = Dense(backend.asarray(np.eye(N)), psd=True)
    with pytest.raises(TypeError, match="Method"):
        LiSSA(preconditioner=Jacobi().prepare(A, damping=1.0))
    with pytest.raises(ValueError, match="terms"):
        LiSSA(batch=4).prepare(A, damping=1.0)
    for outer in (BlockCG, LiSSA):
        with pytest.raises(ValueError, match="cannot precondition"):
            outer(preconditioner=LiSSA()).prepare(A, damping=1.0)
    with pytest.raises(ValueError, match="cannot precondition"):
        BlockCG(preconditioner=Fixed(LiSSA().prepare(A, damping=1.0))).prepare(A, damping=1.0)


@pytest.mark.backends("jax")
def test_tracing_is_refused_with_the_remedy(backend: Backend):
    jax = pytest.importorskip("jax")
    inverse = LiSSA().prepare(Dense(backend.asarray(np.eye(N)), psd=True), damping=1.0)
    with pytest.raises(TypeError, match="jit"):
        jax.jit(lambda b: inverse @ b)(backend.asarray(np.ones(N)))
