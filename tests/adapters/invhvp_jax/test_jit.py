"""Solves inside of `jax.jit`: the same answers, iterations and verdicts as outside."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import invhvp as ih

pytestmark = pytest.mark.jax
n, k = 24, 3
rng = np.random.default_rng(0)
Q, _ = np.linalg.qr(rng.standard_normal((n, n)))
SPECTRUM = np.geomspace(1e-3, 10, n)
H = (Q * SPECTRUM) @ Q.T
H = (H + H.T) / 2
B = rng.standard_normal((n, k))
EXACT = np.linalg.solve(H + 0.01 * np.eye(n), B)
METHODS = [ih.CG(rtol=1e-10), ih.BlockCG(rtol=1e-10), ih.Minres(rtol=1e-10)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_a_solve_in_jit_is_the_solve_outside(method):
    A, rhs = ih.Dense(jnp.asarray(H), psd=True), jnp.asarray(B)
    outside = ih.solve(ih.Dense(H, psd=True), B, method, damping=0.01)
    inside = jax.jit(lambda B: ih.solve(A, B, method, damping=0.01))(rhs)
    assert inside.status == (ih.Status.CONVERGED,) * k
    np.testing.assert_allclose(inside.x, EXACT, atol=1e-7)
    assert abs(int(inside.iterations) - outside.iterations) <= 1  # it stops where the other stops
    assert int(inside.passes) == int(inside.iterations) + 1
    assert int(inside.products) == k * int(inside.passes)
    true = np.linalg.norm(B - (H + 0.01 * np.eye(n)) @ np.asarray(inside.x), axis=0)
    np.testing.assert_allclose(inside.residual_norms, true, rtol=1e-3, atol=1e-12)
    E = np.asarray(inside.x) - EXACT
    error = np.sqrt(np.sum(E * ((H + 0.01 * np.eye(n)) @ E), axis=0))
    assert np.all(error <= np.asarray(inside.error_bounds))
    assert np.all(np.asarray(inside.error_bounds) < 1e-6)
    assert inside.to_dict()["status"] == ["CONVERGED"] * k


def test_everything_may_be_traced():
    @jax.jit
    def solve(H, b, damping, x0):
        return ih.solve(H, b, ih.BlockCG(rtol=1e-9), damping=damping, x0=x0)

    b = B[:, 0]
    sol = solve(H, b, 0.01, np.zeros(n))
    assert sol.status is ih.Status.CONVERGED
    assert sol.x.shape == (n,)
    np.testing.assert_allclose(sol.x, EXACT[:, 0], atol=1e-6)
    warm = solve(H, b, 0.01, sol.x)
    assert int(warm.iterations) == 0
    bad = solve(H, b, 0.01, 1e3 * np.ones(n))  # a start that is none is not used
    assert int(bad.iterations) == int(sol.iterations)


def test_verdicts_and_no_number_where_there_is_no_answer():
    @jax.jit
    def solve(d, B):
        return ih.solve(ih.Diagonal(d), B, ih.CG(maxiter=30), damping=0.0)

    d, rhs = np.linspace(1.0, 2.0, n), B.copy()
    rhs[:, 1] = 0.0
    sol = solve(d, rhs)
    assert [s.name for s in sol.status] == ["CONVERGED", "ZERO", "CONVERGED"]
    assert np.all(np.asarray(sol.x)[:, 1] == 0.0)

    sol = solve(np.where(np.arange(n) < 5, -1.0, d), rhs)
    assert [s.name for s in sol.status] == ["NEGATIVE_CURVATURE", "ZERO", "NEGATIVE_CURVATURE"]
    assert np.all(np.isnan(np.asarray(sol.x)[:, [0, 2]]))
    with pytest.raises(ih.ConvergenceError, match="NEGATIVE_CURVATURE"):
        sol.raise_if_meaningless()

    rhs[3, 0] = np.inf
    sol = solve(d, rhs)
    assert [s.name for s in sol.status] == ["NONFINITE", "ZERO", "CONVERGED"]

    sol = solve(np.geomspace(1e-9, 1.0, n), B)
    assert {s.name for s in sol.status} == {"MAXITER"}
    assert int(sol.iterations) == 30
    true = np.linalg.norm(B - np.geomspace(1e-9, 1.0, n)[:, None] * np.asarray(sol.x), axis=0)
    np.testing.assert_allclose(sol.residual_norms, true, rtol=1e-8)


def test_block_cg_meets_negative_curvature_and_dependent_columns():
    method = ih.BlockCG(rtol=1e-8)

    @jax.jit
    def solve(d, B):
        return ih.solve(ih.Diagonal(d), B, method, damping=0.0)

    d = np.linspace(1.0, 2.0, n)
    dependent = np.stack([B[:, 0], 2 * B[:, 0], B[:, 0] + B[:, 1]], axis=1)
    sol = solve(d, dependent)
    assert {s.name for s in sol.status} == {"CONVERGED"}
    np.testing.assert_allclose(sol.x, dependent / d[:, None], atol=1e-7)
    sol = solve(-d, B)
    assert {s.name for s in sol.status} == {"NEGATIVE_CURVATURE"}


def test_exactly_maxiter_iterations_where_nothing_is_looked_at():
    A = ih.Dense(jnp.asarray(H), psd=True)
    fixed = ih.CG(rtol=1e-3, check_every=None, maxiter=9)
    sol = jax.jit(lambda b: ih.solve(A, b, fixed, damping=0.1))(jnp.asarray(B[:, 0]))
    assert int(sol.iterations) == 9


def test_restarts_find_what_rounding_hid():
    """In float32 the recurrence is optimistic; a float64 residual says so, and refines."""
    A = ih.Dense(jnp.asarray(H, jnp.float32), psd=True)
    accurate = ih.Dense(jnp.asarray(H, jnp.float32).astype(jnp.float64), psd=True)
    method = ih.CG(rtol=1e-11, residual_operator=accurate)
    sol = jax.jit(lambda b: ih.solve(A, b, method, damping=0.01))(jnp.asarray(B))
    M = np.asarray(H, np.float32).astype(np.float64) + 0.01 * np.eye(n)
    assert {s.name for s in sol.status} == {"CONVERGED"}
    true = np.linalg.norm(B - M @ np.asarray(sol.x), axis=0)
    assert np.all(true <= 1.1e-11 * np.linalg.norm(B, axis=0))


def test_single_precision_ends_at_its_floor():
    with jax.enable_x64(False):
        A = ih.Dense(jnp.asarray(H, jnp.float32), psd=True)
        solve = jax.jit(lambda b: ih.solve(A, b, ih.BlockCG(rtol=1e-12), damping=0.01))
        sol = solve(jnp.asarray(B, jnp.float32))
        assert {s.name for s in sol.status} == {"FLOOR"}
        np.testing.assert_allclose(sol.x, EXACT, atol=1e-2)


def test_what_is_concrete_is_prepared_while_tracing():
    """A matrix checked for symmetry, a preconditioner that looks at values: both inside of jit."""

    matrix, crooked = jnp.asarray(H), jnp.asarray(np.triu(H))

    @jax.jit
    def solve(b):
        A = ih.as_operator(matrix)
        return ih.solve(A, b, ih.CG(rtol=1e-10, preconditioner=ih.Jacobi()), damping=0.01).x

    np.testing.assert_allclose(solve(jnp.asarray(B)), EXACT, atol=1e-7)

    with pytest.raises(ValueError, match="not symmetric"):
        jax.jit(lambda b: ih.as_operator(crooked) @ b)(jnp.asarray(B))
    with pytest.raises(TypeError, match="prepare the inverse outside"):
        jax.jit(lambda H: ih.NystroemSketch(rank=3).prepare(H, damping=0.1) @ B[:, 0])(H)
    method, A = ih.CG(etol=1e-3, max_seconds=1.0), ih.Dense(matrix, psd=True)
    with pytest.raises(ValueError, match="etol, max_seconds cannot act"):
        jax.jit(lambda b: ih.solve(A, b, method, damping=0.1).x)(jnp.asarray(B))


def test_solutions_are_pytrees():
    sol = ih.solve(H, B[:, 0], damping=0.1)
    leaves, structure = jax.tree_util.tree_flatten(sol)
    again = jax.tree_util.tree_unflatten(structure, leaves)
    assert again.status is ih.Status.CONVERGED
    assert again.error_norm == "A"
    assert len(again.history) == len(sol.history)
    norm = jax.jit(lambda sol: jnp.sum(sol.x**2))(sol)
    np.testing.assert_allclose(norm, np.sum(sol.x**2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ih.ConvergenceWarning)
        bad = ih.solve(-H, B[:, 0], damping=0.1)
    copied = jax.tree_util.tree_map(lambda leaf: leaf, bad)
    with pytest.raises(ih.IndefiniteError):
        copied.raise_if_failed()


def test_outside_of_jit_loops_are_plain():
    from invhvp import _tracing

    assert _tracing.while_loop(lambda s: s[0] < 5, lambda s: (s[0] + 1, s[1]), (0, None)) == (
        5,
        None,
    )
    with pytest.raises(TypeError, match="keep its structure"):
        jax.jit(lambda x: _tracing.while_loop(lambda s: s[0] < 5, lambda s: (s[0] + 1,), (x, x)))(
            0.0
        )
