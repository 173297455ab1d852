"""Gradients of solves where PyTorch records them: in B, λ, and what the operator is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import invhvp as ih
import invhvp_torch as it

n, k, N = 10, 2, 25
rng = np.random.default_rng(0)
X0, Y0 = rng.standard_normal((N, n)), rng.standard_normal(N)
B0, C = rng.standard_normal((n, k)), torch.tensor(rng.standard_normal((n, k)))
LAYOUT = ih.Layout.from_shapes({"a": (4,), "b": (6,)})
METHODS = [
    ih.CG(rtol=1e-12),
    ih.BlockCG(rtol=1e-12),
    ih.Minres(rtol=1e-12),
    ih.BlockCG(rtol=1e-12, preconditioner=ih.NystroemPreconditioner(rank=3)),
    ih.Direct(),
]


def leaf(a):
    return torch.tensor(a, dtype=torch.float64, requires_grad=True)


def dense(M, B, damping):
    shifts = damping * torch.ones(n, dtype=torch.float64)
    return torch.sum(C * torch.sin(torch.linalg.solve(M + torch.diag(shifts), B)))


def solved(A, B, method, damping):
    return torch.sum(C * torch.sin(ih.solve(A, B, method, damping=damping).x))


def assert_same_gradients(found, expected, leaves):
    mine = torch.autograd.grad(found, leaves, retain_graph=True)  # both come from one matrix
    for a, b in zip(mine, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("kind", ["dense", "callback", "sum", "gradients"])
def test_gradients_are_those_of_the_exact_solution(method, kind):
    X, B, damping = leaf(X0), leaf(B0), leaf(0.05)
    M = X.mT @ X / N
    if kind == "gradients":
        A = ih.RankOneMean(ih.DenseGradients(X))
    elif kind == "callback":
        A = ih.Callback(lambda V: M @ V, n, like=M, psd=True, differentiable=True)
    elif kind == "sum":
        A = ih.Dense(M.detach(), psd=True) + ih.Dense(M, psd=True)
    else:
        A = ih.Dense(M, psd=True)
    M = M + M.detach() if kind == "sum" else M
    found = solved(A, B, method, damping)
    assert_same_gradients(found, dense(M, B, damping), (X, B, damping))


def test_the_operator_alone_and_the_damping_alone():
    X, damping = leaf(X0), leaf(0.05)
    B = torch.tensor(B0)
    M = X.mT @ X / N
    found = solved(ih.Dense(M, psd=True), B, ih.CG(rtol=1e-12), 0.05)
    assert_same_gradients(found, dense(M, B, 0.05), (X,))
    A = ih.Dense(M.detach(), psd=True)
    assert_same_gradients(
        solved(A, B, ih.CG(rtol=1e-12), damping), dense(A._M, B, damping), (damping,)
    )


def test_a_product_with_an_inverse_and_one_column():
    B, damping = leaf(B0[:, 0]), leaf(0.05)
    M = torch.tensor(X0.T @ X0 / N)
    for method in (ih.CG(rtol=1e-12), ih.Direct()):
        inverse = method.prepare(ih.Dense(M, psd=True), damping=damping)
        expected = torch.linalg.solve(M + damping * torch.eye(n, dtype=M.dtype), B)
        assert_same_gradients(C[:, 0] @ (inverse @ B) ** 2, C[:, 0] @ expected**2, (B, damping))


def test_damping_by_block():
    a, b, B = leaf(0.05), leaf(0.3), leaf(B0)
    M = torch.tensor(X0.T @ X0 / N)
    A = ih.Dense(M, psd=True, layout=LAYOUT)
    shifts = torch.cat([a.expand(4), b.expand(6)])
    found = solved(A, B, ih.BlockCG(rtol=1e-12), {"a": a, "b": b})
    assert_same_gradients(found, dense(M, B, shifts), (a, b, B))


def test_the_values_are_those_without_gradients_and_nothing_is_recorded_then():
    X, B = leaf(X0), leaf(B0)
    A = ih.Dense(X.mT @ X / N, psd=True)
    with_ = ih.solve(A, B, ih.CG(), damping=0.05)
    assert with_.x.requires_grad
    assert not with_.residual_norms.requires_grad
    with torch.no_grad():
        without = ih.solve(A, B, ih.CG(), damping=0.05)
    assert not without.x.requires_grad
    torch.testing.assert_close(with_.x, without.x, rtol=0, atol=0)
    assert not ih.solve(ih.Dense(A._M.detach()), B.detach(), ih.CG(), damping=0.05).x.requires_grad


def test_higher_derivatives_in_the_right_hand_side_and_none_elsewhere():
    M, B, damping = torch.tensor(X0.T @ X0 / N), leaf(B0), leaf(0.05)
    A = ih.Dense(M, psd=True)

    def product(value):
        return torch.autograd.functional.hvp(value, B.detach(), C)[1]

    found = product(lambda B: solved(A, B, ih.CG(rtol=1e-12), 0.05))
    torch.testing.assert_close(found, product(lambda B: dense(M, B, 0.05)), rtol=1e-8, atol=1e-9)
    value = solved(A, B, ih.CG(rtol=1e-12), damping) + damping**2
    (slope,) = torch.autograd.grad(value, damping, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives"):
        torch.autograd.grad(slope, damping)


def test_a_backward_solve_that_fails_says_so():
    B = leaf(B0)
    A = ih.Dense(torch.tensor(X0.T @ X0 / N), psd=True)
    inverse = ih.CG(rtol=1e-10, maxiter=2).prepare(A, damping=1e-3)
    with pytest.warns(ih.ConvergenceWarning, match="MAXITER"):
        sol = inverse.solve(B)
    with pytest.warns(ih.ConvergenceWarning, match="MAXITER"):
        sol.x.sum().backward()


# --------------------------------------------------------------------- what it is there for


def test_ridge_regression_learns_its_damping_and_its_data():
    """d (validation loss) / d (λ, data): a bilevel problem, against autograd of a dense solve."""
    valid_x, valid_y = (
        torch.tensor(rng.standard_normal((7, n))),
        torch.tensor(rng.standard_normal(7)),
    )
    X, Y, damping = leaf(X0), leaf(Y0), leaf(0.3)

    def validation(theta):
        return torch.mean((valid_x @ theta - valid_y) ** 2)

    A = ih.RankOneMean(ih.DenseGradients(X))
    found = validation(ih.solve(A, X.mT @ Y / N, ih.CG(rtol=1e-12), damping=damping).x)
    M = X.mT @ X / N + damping * torch.eye(n, dtype=torch.float64)
    expected = validation(torch.linalg.solve(M, X.mT @ Y / N))
    assert_same_gradients(found, expected, (X, Y, damping))


def test_hypergradient_of_a_trained_model_is_a_finite_difference():
    """dL_valid/dλ of a regularised logistic regression, through the Hessian of the model."""
    x, y = torch.tensor(X0), torch.tensor((Y0 > 0) * 1.0)[:, None]
    valid_x = torch.tensor(rng.standard_normal((7, n)))
    valid_y = torch.tensor(rng.integers(0, 2, (7, 1)) * 1.0)
    model = torch.nn.Linear(n, 1, bias=False, dtype=torch.float64)
    loss = torch.nn.functional.binary_cross_entropy_with_logits

    def fit(damping):
        theta = torch.zeros(n, 1, dtype=torch.float64)
        for _ in range(12):
            p = torch.sigmoid(x @ theta)
            g = x.mT @ (p - y) / N + damping * theta
            M = x.mT @ (p * (1 - p) * x) / N + damping * torch.eye(n, dtype=torch.float64)
            theta = theta - torch.linalg.solve(M, g)
        return theta

    theta, damping = fit(0.1), leaf(0.1)
    with torch.no_grad():
        model.weight.copy_(theta.mT)
    H = it.hessian(model, loss, (x, y))
    g = x.mT @ (torch.sigmoid(x @ theta) - y) / N + damping * theta
    newton = theta - ih.solve(H, g, ih.CG(rtol=1e-12), damping=damping).x
    loss(valid_x @ newton, valid_y).backward()
    step = 1e-5
    change = loss(valid_x @ fit(0.1 + step), valid_y) - loss(valid_x @ fit(0.1 - step), valid_y)
    torch.testing.assert_close(damping.grad, change / (2 * step), rtol=1e-6, atol=0)
