"""Nyström as a solver and as a preconditioner, from one sketch."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import invhvp as ih
from invhvp import problems
from invhvp.estimate import Sketch
from tests.cases import counted, matrix, placed, rows

seeds = st.integers(0, 2**16)
U64 = 2.0**-53


def decaying(seed, n=40):
    """A spectrum of random decay, at times with a gap or a rank below n."""
    rng = np.random.default_rng(seed)
    w = np.arange(1, n + 1) ** -rng.uniform(0.5, 3)
    w[rng.integers(1, n) :] *= rng.choice([1.0, 1e-4, 0.0])
    return matrix(*w, seed=seed)


def sketched(M, rank, seed, kind="gaussian"):
    model = Sketch(ih.Dense(M, psd=True), rank, kind=kind, rng=seed).positive()
    return model, (model.vectors * model.values) @ model.vectors.T


# ------------------------------------------------------------------------------ the sketch


@given(seed=seeds, rank=st.integers(1, 40), kind=st.sampled_from(["gaussian", "columns"]))
def test_the_model_lies_between_zero_and_the_operator(seed, rank, kind):
    M = decaying(seed)
    model, H = sketched(M, rank, seed, kind)
    r = model.values.size
    slack = 100 if kind == "gaussian" else 1000  # columns see less of A than a random block does
    assert np.linalg.eigvalsh(M - H)[0] >= -slack * U64 * np.linalg.norm(M, 2)
    assert np.all(model.values >= 0)
    assert np.max(np.abs(model.vectors.T @ model.vectors - np.eye(r)), initial=0.0) <= 100 * U64


@given(seed=seeds, rank=st.integers(1, 30), log_damping=st.floats(-5, 0))
def test_the_error_of_the_inverse_is_bounded_by_that_of_the_model(seed, rank, log_damping):
    damping, M = 10.0**log_damping, decaying(seed)
    _, H = sketched(M, rank, seed)
    error = np.linalg.norm(M - H, 2)
    A = ih.Dense(M, psd=True)
    inverse = ih.NystroemSketch(rank=rank, rng=seed).prepare(A, damping=damping).to_dense()
    gap = np.linalg.norm(inverse - np.linalg.inv(M + damping * np.eye(40)), 2)
    rounding = 1e3 * U64 / damping**2
    assert gap <= error / (damping * (error + damping)) * (1 + 1e-6) + rounding


@given(seed=seeds, rank=st.integers(1, 30), log_damping=st.floats(-5, 0))
def test_the_preconditioned_condition_number_is_bounded(seed, rank, log_damping):
    damping, M = 10.0**log_damping, decaying(seed)
    inverse = ih.NystroemPreconditioner(rank=rank, rng=seed).prepare(
        ih.Dense(M, psd=True), damping=damping
    )
    model = inverse.state
    error = np.linalg.norm(M - (model.vectors * model.values) @ model.vectors.T, 2)
    root = inverse.power(-0.5).to_dense()
    w = np.linalg.eigvalsh(root @ (M + damping * np.eye(40)) @ root)
    assert w[-1] / w[0] <= (model.tail + damping + error) / damping * (1 + 1e-6)
    assert w[0] >= inverse.relative_floor * (1 - 1e-6)
    dense = inverse.to_dense()
    assert inverse.fixed_spd
    assert np.linalg.eigvalsh(dense)[0] > 0
    assert np.max(np.abs(root @ root - dense)) <= 100 * U64 / damping


@pytest.mark.parametrize("kind", ["gaussian", "columns"])
def test_an_operator_of_low_rank_is_found_exactly(backend, kind):
    A, M = placed(backend, matrix(*np.concatenate([[1.0, 0.7, 0.2, 0.1], np.zeros(36)])), psd=True)
    inverse = ih.NystroemSketch(rank=8, sketch=kind).prepare(A, damping=1e-2)
    U, w = (backend.to_numpy(x) for x in (inverse.low_rank.vectors, inverse.low_rank.values))
    slack = 40 if kind == "gaussian" else 400
    assert np.linalg.norm((U * w) @ U.T - M, 2) <= slack * backend.eps
    B = rows(2, 40).T
    X = np.linalg.solve(M + 1e-2 * np.eye(40), B)
    gap = np.linalg.norm(backend.to_numpy(inverse @ backend.asarray(B)) - X)
    assert gap <= 5 * slack * backend.eps / 1e-2 * np.linalg.norm(X)
    backend.assert_like(inverse.low_rank.vectors)


@given(seed=seeds, first=st.integers(1, 10), more=st.integers(1, 35))
def test_a_sketch_grows_without_multiplying_again(seed, first, more):
    M = decaying(seed)
    A, seen = counted(ih.Dense(M, psd=True))
    sketch = Sketch(A, first, rng=seed)
    small = sketch.positive()
    sketch.grow(more)
    model = sketch.positive()
    assert sketch.products == sum(seen)
    if first + more < 40:
        assert sum(seen) == sketch.rank == first + more
    H, H_small = ((m.vectors * m.values) @ m.vectors.T for m in (model, small))
    assert np.linalg.eigvalsh(M - H)[0] >= -100 * U64 * np.linalg.norm(M, 2)
    assert np.linalg.eigvalsh(H - H_small)[0] >= -1e3 * U64 * np.linalg.norm(M, 2)
    error = np.linalg.norm(M - H, 2)
    estimate = sketch.error(model, steps=10)
    assert estimate <= error * (1 + 1e-6) + 100 * U64
    assert estimate >= 0.5 * error or error <= 1e3 * U64


@pytest.mark.parametrize(
    ("spectrum", "expected", "bound"),
    [
        (np.arange(1, 301) ** -2.0, 4.5e-3, 7.4e-2),
        (0.7 ** np.arange(300.0), 1.9e-5, 6.4e-3),
    ],
)
def test_known_errors_of_the_sketch(spectrum, expected, bound):
    M = matrix(*spectrum)
    # The known values belong to these streams of random numbers.
    streams = [np.random.default_rng(seed) for seed in range(5)]
    errors = [np.linalg.norm(M - sketched(M, 40, rng)[1], 2) for rng in streams]
    assert np.mean(errors) <= min(3 * expected, bound)


@pytest.mark.parametrize("seed", range(5))
def test_a_matrix_of_low_rank_is_known_but_for_the_shift(seed):
    q, n = 20, 300
    M = matrix(*np.concatenate([np.ones(q), np.zeros(n - q)]))
    sketch = Sketch(ih.Dense(M, psd=True), 2 * q, rng=np.random.default_rng(seed))
    model = sketch.positive()
    H = (model.vectors * model.values) @ model.vectors.T
    _, Q = np.linalg.eigh(M)
    inside, outside = Q[:, -q:].T @ sketch.test, Q[:, :-q].T @ sketch.test
    # Of M + νI no sketch sees more than ν (1 + ‖Ω₂Ω₁⁺‖²) (Frangella, Tropp & Udell, prop. 2.2);
    # ν is 2 ε‖M‖, or ten times that where rounding makes the core indefinite.
    seen = 1 + np.linalg.norm(outside @ np.linalg.pinv(inside), 2) ** 2
    assert seen < 1000
    assert np.linalg.norm(M - H, 2) <= 40 * U64 * seen
    assert np.sum(model.values > 0.5) == q


# ------------------------------------------------------------------------------ the solver


@pytest.mark.parametrize("n", [1, 2, 17])
def test_a_sketch_of_everything_is_an_exact_inverse(backend, n):
    M = matrix(*np.geomspace(1e-2, 1.0, n)) if n > 1 else np.array([[0.5]])
    B = rows(2, n).T
    for psd in (True, False):
        for kind in ("gaussian", "columns"):
            A, M_ = placed(backend, M, psd=psd)
            A, seen = counted(A)
            inverse = ih.NystroemSketch(rank=30, sketch=kind).prepare(A, damping=1e-3)
            assert inverse.products == sum(seen) == n
            sol = inverse.solve(backend.asarray(B))
            assert set(sol.status) == {ih.Status.CONVERGED}
            X = np.linalg.solve(M_ + 1e-3 * np.eye(n), B)
            gap = np.linalg.norm(backend.to_numpy(sol.x) - X)
            assert gap <= 1e4 * backend.eps * np.linalg.norm(X)


def test_another_damping_costs_no_product(backend):
    A, seen = counted(placed(backend, matrix(*np.arange(1, 61) ** -2.0), psd=True)[0])
    b = backend.asarray(rows(1, 60)[0])
    for method in (ih.NystroemSketch(rank=7), ih.NystroemPreconditioner(rank=7)):
        seen.clear()
        inverse = method.prepare(A, damping=0.1)
        assert inverse.products == sum(seen) == 7
        moved = inverse.with_damping(0.01)
        assert sum(seen) == 7
        assert moved.products == 0
        np.testing.assert_array_equal(
            backend.to_numpy(moved @ b), backend.to_numpy(method.prepare(A, damping=0.01) @ b)
        )
        spent = sum(seen)
        assert moved.solve(b).products == sum(seen) - spent == 1


def test_counts_of_an_indefinite_operator_are_exact():
    spectrum = problems.spectrum_indefinite(200, negative=10, smallest=-0.05)
    A, seen = counted(ih.Dense(matrix(*spectrum)))
    for rank in (5, 60):
        for damping in (0.06, 0.2):
            seen.clear()
            inverse = ih.NystroemSketch(rank=rank).prepare(A, damping=damping)
            moved = inverse.with_damping(0.08)
            assert inverse.products + moved.products == sum(seen)


@given(seed=seeds, rank=st.integers(2, 60), log_margin=st.floats(-2, 1))
def test_an_indefinite_operator_that_damping_makes_definite_never_raises(seed, rank, log_margin):
    spectrum = problems.spectrum_indefinite(60, negative=6, smallest=-0.05)
    damping = 0.05 * (1 + 10.0**log_margin)
    A = ih.Dense(matrix(*spectrum, seed=seed))
    inverse = ih.NystroemSketch(rank=rank, rng=seed).prepare(A, damping=damping)
    assert inverse.fixed_spd
    assert np.linalg.eigvalsh(inverse.to_dense())[0] > 0
    # Both the signed core and the shifted sketch keep the values within those of A.
    values = inverse.low_rank.values
    assert np.max(np.abs(values)) <= 1.06 * np.max(np.abs(spectrum))
    assert np.all(values + damping > 0)


@pytest.mark.parametrize("rank", [30, 100])
def test_indefiniteness_raises_with_the_vector(backend, rank):
    spectrum = problems.spectrum_indefinite(100, negative=20, smallest=-0.5)
    A, M = placed(backend, matrix(*spectrum))
    with pytest.raises(ih.IndefiniteError, match="not positive definite") as caught:
        ih.NystroemSketch(rank=rank).prepare(A, damping=0.1)
    p = backend.to_numpy(caught.value.vector)
    assert abs(p @ p - 1) <= 1e-5
    assert p @ M @ p + 0.1 <= 0
    assert caught.value.minimum_damping <= 0.5 + 1e-5


def test_the_signed_core_is_the_better_model_where_it_holds():
    spectrum = problems.spectrum_indefinite(300, negative=3, smallest=-1e-2)
    M = matrix(*spectrum)
    b = np.random.default_rng(0).standard_normal(300)
    x = np.linalg.solve(M + 0.02 * np.eye(300), b)
    for rank, allowed in ((50, 0.05), (100, 0.02)):
        inverse = ih.NystroemSketch(rank=rank).prepare(ih.Dense(M), damping=0.02)
        assert np.linalg.norm(inverse @ b - x) <= allowed * np.linalg.norm(x)


@given(seed=seeds, log_damping=st.floats(-2.5, -1))
def test_adaptive_rank_reaches_its_target(seed, log_damping):
    damping = 10.0**log_damping
    M = matrix(*np.arange(1, 121) ** -2.0, seed=seed)
    A, seen = counted(ih.Dense(M, psd=True))
    method = ih.NystroemSketch(rank="adaptive", tol=0.3, max_rank=100, rng=seed)
    inverse = method.prepare(A, damping=damping)
    assert inverse.products == sum(seen)
    x = inverse.to_dense()
    gap = np.linalg.norm(x @ (M + damping * np.eye(120)) - np.eye(120), 2)
    assert gap <= 0.6  # the estimate of ‖A − Â‖ is a lower bound


def test_an_adaptive_rank_that_ends_early_says_so():
    A = problems.poisson_2d(16).operator
    with pytest.warns(ih.ConvergenceWarning, match="limit of 32"):
        ih.NystroemSketch(rank="adaptive", max_rank=32).prepare(A, damping=0.1)


LAYOUT = ih.Layout.from_shapes({"a": (15,), "b": (25,)})


def test_damping_by_block(backend):
    M = matrix(*np.concatenate([[2.0, 1.0, 0.5], np.zeros(37)]))
    A, M = placed(backend, M, psd=True, layout=LAYOUT)
    D = np.diag(np.repeat([0.1, 2.0], [15, 25]))
    b, X = backend.asarray(rows(1, 40)[0]), rows(2, 40).T
    damping = {"a": 0.1, "b": 2.0}
    solver = ih.NystroemSketch(rank=6).prepare(A, damping=damping)
    x = np.linalg.solve(M + D, rows(1, 40)[0])
    assert np.linalg.norm(backend.to_numpy(solver @ b) - x) <= 1e3 * backend.eps * np.linalg.norm(x)
    preconditioner = ih.NystroemPreconditioner(rank=6).prepare(A, damping=damping)
    expected = np.linalg.solve(M + 0.1 * np.eye(40), X)
    gap = np.linalg.norm(backend.to_numpy(preconditioner @ backend.asarray(X)) - expected)
    assert gap <= 1e3 * backend.eps * np.linalg.norm(expected)
    assert preconditioner.fixed_spd
    cg = ih.CG(preconditioner=preconditioner.method)
    assert ih.solve(A, b, cg, damping=damping).status is ih.Status.CONVERGED


# ------------------------------------------------------------------------ the preconditioner


@pytest.mark.parametrize(
    ("rank", "single", "block"),
    [(None, 230, 16), (8, 138, 13), (16, 43, 13), (32, 19, 11), (64, 11, 8), (128, 8, 6)],
)
def test_passes_on_a_network_spectrum(rank, single, block):
    """Measured with these seeds; the table of the design has 208/15 down to 8/6."""
    problem = problems.nn_spectrum()
    M = rank and ih.NystroemPreconditioner(rank=rank)
    for method, passes in ((ih.CG, single), (ih.BlockCG, block)):
        solver = method(rtol=1e-8, preconditioner=M)
        sol = ih.solve(problem.operator, problem.rhs, solver, damping=1e-3)
        assert set(sol.status) == {ih.Status.CONVERGED}
        assert sol.iterations <= 1.1 * passes + 1
        gap = sol.x - problem.solution
        A = problem.operator
        error = np.sqrt(np.sum(gap * (A @ gap + 1e-3 * gap), axis=0))
        assert np.all(error <= sol.error_bounds * (1 + 1e-6))
        energy = np.sqrt(np.sum(problem.solution * problem.rhs, axis=0))
        assert np.all(sol.error_bounds <= 1e-4 * energy)


def test_the_default_test_of_symmetry_allows_preconditioning():
    problem = problems.nn_spectrum()
    cg = ih.BlockCG(rtol=1e-8, preconditioner=ih.NystroemPreconditioner(rank=64))
    sol = ih.solve(problem.operator, problem.rhs, cg, damping=1e-3)
    assert set(sol.status) == {ih.Status.CONVERGED}


@pytest.mark.parametrize(
    ("rank", "condition", "passes"),
    [(16, 439.62, 67), (64, 434.52, 76), (128, 426.58, 75), (256, 407.46, 82)],
)
def test_the_laplacian_is_not_helped(rank, condition, passes):
    """Without decay a sketch finds nothing: the known answers say so to five digits."""
    problem = problems.poisson_2d()

    def sketch():  # the known answers belong to this stream of random numbers
        return ih.NystroemPreconditioner(rank=rank, rng=np.random.default_rng(0))

    cg = ih.CG(rtol=1e-8, preconditioner=sketch())
    sol = ih.solve(problem.operator, problem.rhs, cg, damping=0.0)
    assert abs(sol.iterations - passes) <= 2
    if rank > 64:
        return
    root = sketch().prepare(problem.operator, damping=0.0).power(-0.5)
    w = np.linalg.eigvalsh(root @ (problem.operator @ root.to_dense()))
    assert abs(w[-1] / w[0] - condition) <= 0.01


def test_preconditions_on_every_backend(backend):
    A, M = placed(backend, matrix(*np.arange(1, 101) ** -2.0), psd=True)
    B = backend.asarray(rows(2, 100).T)
    method = ih.NystroemPreconditioner(rank=30)
    inverse = method.prepare(A, damping=1e-2)
    assert inverse.fixed_spd
    assert inverse.operator_size == pytest.approx(1.01, rel=1e-2)
    sol = ih.solve(A, B, ih.BlockCG(preconditioner=method), damping=1e-2)
    assert set(sol.status) == {ih.Status.CONVERGED}
    assert sol.iterations <= 5
    X = np.linalg.solve(M + 1e-2 * np.eye(100), backend.to_numpy(B))
    assert np.linalg.norm(backend.to_numpy(sol.x) - X) <= 1e-3 * np.linalg.norm(X)
    backend.assert_like(sol.x)


@given(seed=seeds, rank=st.integers(1, 70), log_damping=st.floats(-6, 0))
def test_an_indefinite_operator_never_stops_the_preconditioner(seed, rank, log_damping):
    rng = np.random.default_rng(seed)
    M = matrix(*rng.standard_normal(60) ** 3, seed=seed)
    inverse = ih.NystroemPreconditioner(rank=rank, rng=seed).prepare(
        ih.Dense(M), damping=10.0**log_damping
    )
    dense = inverse.to_dense()
    assert inverse.fixed_spd
    assert np.linalg.eigvalsh((dense + dense.T) / 2)[0] > 0
    assert inverse.relative_floor is None
    assert inverse.operator_size <= 1.06 * (np.linalg.norm(M, 2) + 10.0**log_damping)


def test_nothing_and_zero_damping(backend):
    zero = ih.Dense(backend.asarray(np.zeros((9, 9))), psd=True)
    b = backend.asarray(np.ones(9))
    for rank in (4, 20):
        inverse = ih.NystroemPreconditioner(rank=rank).prepare(zero, damping=0.5)
        np.testing.assert_allclose(backend.to_numpy(inverse @ b), 2.0)
        assert ih.NystroemPreconditioner(rank=rank).prepare(zero, damping=0.0).fixed_spd
        x = ih.NystroemSketch(rank=rank).prepare(zero, damping=0.5) @ b
        np.testing.assert_allclose(backend.to_numpy(x), 2.0)
        with pytest.raises(ih.SingularError):
            ih.NystroemSketch(rank=rank).prepare(zero, damping=0.0)


def test_refuses_nonsense():
    for options in (
        {"rank": 0},
        {"rank": "auto"},
        {"sketch": "rows"},
        {"tol": 0.0},
        {"max_rank": 0},
    ):
        for method in (ih.NystroemSketch, ih.NystroemPreconditioner):
            with pytest.raises(ValueError):
                method(**options)
    broken = ih.Callback(lambda X: X * np.nan, 50, like=np.zeros(0))
    for method in (ih.NystroemSketch(rank=3), ih.NystroemPreconditioner(rank=3)):
        with pytest.raises(ih.ConvergenceError, match="NaN"):
            method.prepare(broken, damping=1.0)
    M = rows(50, 50)
    with pytest.raises(ih.ConvergenceError, match="not symmetric"):
        ih.NystroemSketch(rank=5).prepare(ih.Callback(lambda X: M @ X, 50, like=M), damping=100.0)
