"""Problems made of samples: a Gauss-Newton matrix of low rank, and exact influence."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from ..gradients import DenseGradients, GradientMatrix
from ..operators import RankOneMean
from ..protocols import Array
from .problem import Problem, place


def rank_deficient_gauss_newton(
    n: int = 60,
    *,
    samples: int = 20,
    damping: float = 1e-3,
    n_rhs: int = 4,
    rng: int = 0,
    like: Array | None = None,
) -> Problem:
    """G = JᵀJ/m for Gaussian J (m, n), m < n: x = (b - Jᵀ(JJᵀ + mλ)⁻¹Jb)/λ exactly.

    A block Krylov method with k columns needs at most ⌈m/k⌉ + 1 passes.
    """
    generator = np.random.default_rng(rng)
    J = generator.standard_normal((samples, n))
    B = generator.standard_normal((n, n_rhs))
    inner = np.linalg.solve(J @ J.T + samples * damping * np.eye(samples), J @ B)
    spectrum = np.zeros(n)
    spectrum[n - samples :] = np.linalg.eigvalsh(J @ J.T / samples)
    return Problem(
        name=f"Gauss-Newton matrix of rank {samples}, n = {n}",
        operator=RankOneMean(DenseGradients(place(J, like))),
        rhs=place(B, like),
        damping=damping,
        solution=place((B - J.T @ inner) / damping, like),
        spectrum=spectrum,
        constants=MappingProxyType({"passes": -(-samples // n_rhs) + 1}),
        source="Woodbury's identity",
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class RegressionProblem(Problem):
    """Ridge regression at its optimum, where influence and leave-one-out have closed forms.

    The loss of a sample is (xᵀw - y)²/2 and w minimises their mean plus λ‖w‖²/2; so the operator
    is XᵀX/N, and `rhs` has the gradients of the test losses in its columns.

    Attributes:
        train: gradients of the training losses at w, N × p.
        test: gradients of the test losses at w.
        scores: test (XᵀX/N + λ)⁻¹ trainᵀ, shape (n_test, N): positive means helpful.
        leave_one_out: the exact optimum without each sample, (N, p); λ and 1/N are kept.
        loss_changes: exact change of each test loss when a sample is left out, (n_test, N).
    """

    train: GradientMatrix
    test: GradientMatrix
    scores: Array
    leave_one_out: Array
    loss_changes: Array


def linear_regression(
    p: int = 8,
    *,
    samples: int = 40,
    n_test: int = 5,
    damping: float = 1e-2,
    rng: int = 0,
    like: Array | None = None,
) -> RegressionProblem:
    """Influence functions with an exact answer.

    Leaving sample i out moves w by (XᵀX/N + λ)⁻¹g_i / (N (1 - h_i)), with the leverages
    h_i = x_iᵀ(XᵀX + Nλ)⁻¹x_i.

    Source: Cook & Weisberg (1982), Residuals and Influence in Regression, §2.2.
    """
    generator = np.random.default_rng(rng)
    X = generator.standard_normal((samples + n_test, p))
    y = X @ generator.standard_normal(p) + 0.5 * generator.standard_normal(samples + n_test)
    x, x_test, N = X[:samples], X[samples:], samples
    H = x.T @ x / N
    damped = H + damping * np.eye(p)
    w = np.linalg.solve(damped, x.T @ y[:N] / N)
    error = X @ w - y
    train, test = error[:N, None] * x, error[N:, None] * x_test
    steps = np.linalg.solve(damped, train.T).T
    leverage = np.sum(x * np.linalg.solve(damped, x.T).T, axis=1) / N
    optima = w + steps / (N * (1 - leverage))[:, None]
    changes = ((x_test @ optima.T - y[N:, None]) ** 2 - (error[N:] ** 2)[:, None]) / 2
    return RegressionProblem(
        name=f"ridge regression, {N} samples, {p} parameters",
        operator=RankOneMean(DenseGradients(place(x, like))),
        rhs=place(test.T, like),
        damping=damping,
        solution=place(np.linalg.solve(damped, test.T), like),
        spectrum=np.linalg.eigvalsh(H),
        source="closed form",
        train=DenseGradients(place(train, like)),
        test=DenseGradients(place(test, like)),
        scores=place(test @ steps.T, like),
        leave_one_out=place(optima, like),
        loss_changes=place(changes, like),
    )
