"""Derivatives of solves: in the right-hand side, λ, the operator's parameters, and the data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import invhvp as ih
import invhvp_jax as ij

pytestmark = pytest.mark.jax
n, k, N = 10, 2, 25
rng = np.random.default_rng(0)
X, Y = rng.standard_normal((N, n)), rng.standard_normal(N)
H = X.T @ X / N
B, C = rng.standard_normal((n, k)), rng.standard_normal((n, k))
METHODS = [ih.CG(rtol=1e-12), ih.BlockCG(rtol=1e-12), ih.Minres(rtol=1e-12), ih.Direct()]


def readout(x):
    return jnp.sum(C * jnp.sin(x))


def dense(H, B, damping):
    return readout(jnp.linalg.solve(H + damping * jnp.eye(n), B))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_gradients_are_those_of_the_exact_solution(method):
    def value(H, B, damping):
        A = ih.Dense(H, psd=True)
        return readout(ih.solve(A, B, method, damping=damping).x)

    found = jax.jit(jax.grad(value, (0, 1, 2)))(H, B, 0.05)
    expected = jax.jit(jax.grad(dense, (0, 1, 2)))(H, B, 0.05)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


def test_forward_mode_second_derivatives_and_batches_of_problems():
    method = ih.CG(rtol=1e-13)

    def value(damping, B):
        return readout(ih.solve(ih.Dense(H_, psd=True), B, method, damping=damping).x)

    H_ = jnp.asarray(H)

    @jax.jit
    def found(damping, B):
        _, tangent = jax.jvp(value, (damping, B), (1.0, 2 * B))
        second = jax.grad(jax.grad(value))(damping, B)
        return tangent, second, jax.vmap(value, in_axes=(0, None))(jnp.stack([damping, 1.0]), B)

    @jax.jit
    def expected(damping, B):
        def exact(damping, B):
            return dense(H_, B, damping)

        _, tangent = jax.jvp(exact, (damping, B), (1.0, 2 * B))
        second = jax.grad(jax.grad(exact))(damping, B)
        return tangent, second, jnp.stack([exact(damping, B), exact(1.0, B)])

    for a, b in zip(found(0.05, B), expected(0.05, B), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7)


def test_damping_by_block_and_a_preconditioner():
    layout = ih.Layout.from_shapes({"a": (4,), "b": (6,)})
    H_ = jnp.asarray(H)
    A = ih.Dense(H_, psd=True, layout=layout)
    size = np.array([4, 6])

    def value(damping):
        return readout(ih.solve(A, jnp.asarray(B), ih.CG(rtol=1e-12), damping=damping).x)

    def exact(damping):
        shifts = jnp.repeat(jnp.stack([damping["a"], damping["b"]]), size, total_repeat_length=n)
        return readout(jnp.linalg.solve(H_ + jnp.diag(shifts), jnp.asarray(B)))

    found, expected = (jax.jit(jax.grad(f))({"a": 0.1, "b": 0.4}) for f in (value, exact))
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-8)

    guarded = ih.CG(rtol=1e-12, preconditioner=ih.Surrogate(ih.Diagonal(jnp.diagonal(H_))))
    b = jax.jit(jax.grad(lambda B: readout(ih.solve(A, B, guarded, damping=0.05).x)))(B)
    c = jax.jit(jax.grad(lambda B: dense(H_, B, 0.05)))(B)
    np.testing.assert_allclose(b, c, rtol=1e-8, atol=1e-10)


# --------------------------------------------------------------------- what it is there for


def linear(theta, x):
    return x @ theta


def squares(z, y):
    return jnp.mean((z - y) ** 2) / 2


def test_ridge_regression_learns_its_damping_and_its_data():
    """d (validation loss) / d (λ, data): a bilevel problem, against autodiff of a dense solve."""
    valid_x, valid_y = rng.standard_normal((7, n)), rng.standard_normal(7)

    def validation(theta):
        return squares(valid_x @ theta, valid_y)

    def value(damping, X, Y):
        A = ij.gauss_newton(linear, squares, jnp.zeros(n), (X, Y))
        return validation(ih.solve(A, X.T @ Y / N, ih.CG(rtol=1e-12), damping=damping).x)

    def exact(damping, X, Y):
        return validation(jnp.linalg.solve(X.T @ X / N + damping * jnp.eye(n), X.T @ Y / N))

    found = jax.jit(jax.grad(value, (0, 1, 2)))(0.3, X, Y)
    expected = jax.jit(jax.grad(exact, (0, 1, 2)))(0.3, X, Y)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10)


def test_hypergradients_of_logistic_regression_are_finite_differences():
    """θ(λ, w) of a regularised fit with sample weights; its derivatives by one Newton step."""
    labels, weights = (Y > 0) * 1.0, jnp.asarray(rng.random(N) + 0.5)
    valid_x, valid_y = rng.standard_normal((7, n)), rng.integers(0, 2, 7) * 1.0

    def losses(z, y):
        return jnp.mean(jnp.logaddexp(0.0, z) - y * z)

    def objective(theta, log_damping, weights):
        every = jax.vmap(lambda x, y: losses(linear(theta, x[None]), y[None]))(X, labels)
        return (
            jnp.sum(weights * every) / jnp.sum(weights) + jnp.exp(log_damping) / 2 * theta @ theta
        )

    @jax.jit
    def fit(log_damping, weights):
        def newton(_, theta):
            gradient = jax.grad(objective)(theta, log_damping, weights)
            curvature = jax.hessian(objective)(theta, log_damping, weights)
            return theta - jnp.linalg.solve(curvature, gradient)

        return jax.lax.fori_loop(0, 12, newton, jnp.zeros(n))

    def validation(theta):
        return losses(valid_x @ theta, valid_y)

    @jax.jit
    def hypergradient(theta, log_damping, weights):
        def value(log_damping, weights):
            H = ij.hessian(linear, losses, theta, (X, labels, weights))
            g = jax.grad(objective)(theta, log_damping, weights)
            step = ih.solve(H, g, ih.CG(rtol=1e-12), damping=jnp.exp(log_damping)).x
            return validation(theta - step)

        return jax.grad(value, (0, 1))(log_damping, weights)

    a = -2.0
    by_damping, by_weight = hypergradient(fit(a, weights), a, weights)
    step = 1e-5
    change = validation(fit(a + step, weights)) - validation(fit(a - step, weights))
    np.testing.assert_allclose(by_damping, change / (2 * step), rtol=1e-6)
    for i in (0, 7):
        e = step * np.eye(N)[i]
        change = validation(fit(a, weights + e)) - validation(fit(a, weights - e))
        np.testing.assert_allclose(by_weight[i], change / (2 * step), rtol=1e-5, atol=1e-10)


def test_hyperparameters_that_a_loss_closes_over():
    """Nothing but a number inside of the loss is traced: its derivative must not get lost."""
    theta, b = jnp.asarray(rng.standard_normal(n) / 3), jnp.asarray(B[:, 0])

    def value(sharpness):
        def loss(z, y):
            return jnp.mean(jnp.cosh(sharpness * (z - y)))

        H = ij.hessian(linear, loss, theta, (X, Y))
        return jnp.sum(ih.solve(H, b, ih.CG(rtol=1e-12), damping=0.1).x ** 2)

    def exact(sharpness):
        def mean(theta):
            return jnp.mean(jnp.cosh(sharpness * (X @ theta - Y)))

        return jnp.sum(jnp.linalg.solve(jax.hessian(mean)(theta) + 0.1 * jnp.eye(n), b) ** 2)

    expected = jax.jit(jax.grad(exact))(0.5)
    np.testing.assert_allclose(jax.grad(value)(0.5), expected, rtol=1e-7)


def test_lineax_gives_the_same():
    lx = pytest.importorskip("lineax")
    theta = jnp.asarray(rng.standard_normal(n) / 3)

    def loss(z, y):
        return jnp.mean(jnp.logaddexp(0.0, z) - y * z)

    labels, b = (Y > 0) * 1.0, jnp.asarray(B[:, 0])

    def ours(theta, damping):
        H = ij.hessian(linear, loss, theta, (X, labels))
        return ih.solve(H, b, ih.CG(rtol=1e-12), damping=damping).x

    def theirs(theta, damping):
        def product(v):
            gradient = jax.grad(lambda t: loss(linear(t, X), labels))
            return jax.jvp(gradient, (theta,), (v,))[1] + damping * v

        like = jax.ShapeDtypeStruct((n,), jnp.float64)
        A = lx.FunctionLinearOperator(product, like, lx.positive_semidefinite_tag)
        return lx.linear_solve(A, b, lx.CG(rtol=1e-13, atol=1e-13)).value

    def both(solve):
        def value(theta, damping):
            return jnp.sum(C[:, 0] * solve(theta, damping) ** 2)

        return jax.jit(lambda t, d: (solve(t, d), *jax.grad(value, (0, 1))(t, d)))(theta, 0.1)

    for a, b_ in zip(both(ours), both(theirs), strict=True):
        np.testing.assert_allclose(a, b_, rtol=1e-8, atol=1e-10)


def test_what_hides_from_the_engine_is_named():
    def value(scale):
        A = ih.Callback(lambda V: scale * V, n, like=jnp.asarray(H))
        return ih.solve(A, jnp.asarray(B), ih.CG(), damping=0.1).x.sum()

    with pytest.raises(TypeError, match="like= one of them"):
        jax.grad(value)(1.0)
