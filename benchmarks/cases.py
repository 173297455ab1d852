"""Real curvature to solve with, and right-hand sides that are hard in known ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import scipy.linalg

import invhvp as ih
from invhvp import problems
from invhvp_demo import data, model, retrain

from . import network

L2 = 1e-3  # of training: at a minimum the Hessian is positive definite for every damping ≥ L2
RHS = ("gradients", "gaussian", "dependent", "near duplicates", "scaled")


@dataclass(frozen=True, kw_only=True, eq=False)
class Curvature:
    """A matrix on the host, in float64, with gradients for right-hand sides.

    Attributes:
        name: what it is, with its size.
        matrix: dense, symmetric, (p, p).
        gradients: of test losses, (p, k).
        operator: what the methods are given; products may be cheaper than with `matrix`.
        surrogate: a cheaper relative of it, with its name; None where there is none.
    """

    name: str
    matrix: np.ndarray
    gradients: np.ndarray
    operator: ih.LinearOperator
    surrogate: tuple[str, ih.LinearOperator] | None = None


def logistic_hessian(n_train: int, *, k: int = 16) -> Curvature:
    """The Hessian of logistic regression on the digits, p = 650."""
    digits, samples, w = _logistic(n_train)
    test = model.Samples(digits.test_images[:k], data.one_hot(digits.test_labels[:k]))
    A = model.Hessian(w, samples)
    fisher = ih.RankOneMean(model.gradients(w, samples))
    return Curvature(
        name=f"digits logistic regression, Hessian, p = {len(w)}",
        matrix=_symmetric(A.to_dense()),
        gradients=model.gradients(w, test).to_dense().T,
        operator=A,
        surrogate=("empirical Fisher", fisher),
    )


def network_hessian(n_train: int, width: int, *, k: int = 16) -> Curvature:
    """The exact Hessian of a tanh network on the digits."""
    net, test = _network(n_train, width, k)
    H = net.curvature()
    return Curvature(
        name=f"digits tanh network, Hessian, p = {len(H)}",
        matrix=H,
        gradients=test,
        operator=ih.Dense(H),
        surrogate=("Gauss–Newton", ih.Dense(net.curvature(gauss_newton=True), psd=True)),
    )


def network_gauss_newton(n_train: int, width: int, *, k: int = 16) -> Curvature:
    """The Gauss–Newton matrix of the same network, as the mean of rank-one matrices."""
    net, test = _network(n_train, width, k)
    G = net.curvature(gauss_newton=True)
    return Curvature(
        name=f"digits tanh network, Gauss–Newton, p = {len(G)}",
        matrix=G,
        gradients=test,
        operator=net.gauss_newton(),
        surrogate=("empirical Fisher", ih.RankOneMean(net.gradients())),
    )


def network_fisher(n_train: int, width: int, *, k: int = 16) -> Curvature:
    """The empirical Fisher matrix of the same network."""
    net, test = _network(n_train, width, k)
    F = ih.RankOneMean(net.gradients())
    rows = net.gradients().to_dense()
    return Curvature(
        name=f"digits tanh network, empirical Fisher, p = {rows.shape[1]}",
        matrix=_symmetric(rows.T @ rows / len(rows)),
        gradients=test,
        operator=F,
        surrogate=("Gauss–Newton", ih.Dense(net.curvature(gauss_newton=True), psd=True)),
    )


def network_spectrum(n: int, *, k: int = 16) -> Curvature:
    """A made-up matrix with a network's spectrum: 10 outliers up to 1e3 above a bulk i⁻²."""
    A = problems.nn_spectrum(n).operator
    matrix = A.to_dense()
    drawn = problems.right_hand_sides(n, k, kind="gradient", matrix=matrix, rng=1)
    return Curvature(
        name=f"synthetic network spectrum, p = {n}", matrix=matrix, gradients=drawn, operator=A
    )


def right_hand_sides(gradients: np.ndarray, kind: str) -> np.ndarray:
    """Columns of one of the kinds in `RHS`, made of the gradients (p, k) of test losses."""
    p, k = gradients.shape
    rng = np.random.default_rng(2)
    B = gradients.copy()
    if kind == "gaussian":
        return rng.standard_normal((p, k))
    if kind == "dependent":  # a multiple, a sum, an exact copy, a column of zeros
        B[:, k // 2] = 2.0 * B[:, 0]
        B[:, -1] = B[:, 0] + B[:, k // 3]
        B[:, -2] = B[:, 1]
        B[:, k // 2 + 1] = 0.0
    elif kind == "near duplicates":
        b = B[:, :1] / np.linalg.norm(B[:, 0])
        B = b + 1e-5 / np.sqrt(p) * rng.standard_normal((p, k))
    elif kind == "scaled":
        B = B / np.linalg.norm(B, axis=0) * np.geomspace(1e-6, 1e6, k)
    elif kind != "gradients":
        msg = f"unknown kind of right-hand sides {kind!r}; one of {RHS}"
        raise ValueError(msg)
    return B


def exact_solution(matrix: np.ndarray, B: np.ndarray, damping: float) -> np.ndarray:
    """(A + λI)⁻¹B by a dense float64 factorisation."""
    A = matrix.astype(np.float64) + damping * np.eye(len(matrix))
    return scipy.linalg.solve(A, B.astype(np.float64), assume_a="sym")


def true_residuals(matrix: np.ndarray, B: Any, X: Any, damping: float) -> np.ndarray:
    """‖b − (A + λI)x‖/‖b‖ of each column, in float64 with the dense matrix; 0 for b = 0 = x."""
    A, B, X = (np.asarray(M, dtype=np.float64) for M in (matrix, B, X))
    norms = np.linalg.norm(B, axis=0)
    left = np.linalg.norm(B - A @ X - damping * X, axis=0)
    return left / np.where(norms > 0, norms, 1.0)


def relative_errors(X: Any, exact: np.ndarray) -> np.ndarray:
    """‖x − x*‖/‖x*‖ of each column, float64; ‖x‖ where x* = 0."""
    norms = np.linalg.norm(exact, axis=0)
    away = np.linalg.norm(np.asarray(X, dtype=np.float64) - exact, axis=0)
    return away / np.where(norms > 0, norms, 1.0)


@cache
def _logistic(n_train: int) -> tuple[data.Digits, model.Samples, np.ndarray]:
    digits = data.load(n_train, flipped=0.0)
    samples = model.Samples(digits.images, data.one_hot(digits.given))
    return digits, samples, retrain.train(samples, L2)


@cache
def _network(n_train: int, width: int, k: int) -> tuple[network.Network, np.ndarray]:
    digits = data.load(n_train, flipped=0.0)
    net = network.train(digits.images, digits.given, width=width, l2=L2)
    test = net.at(digits.test_images[:k], digits.test_labels[:k])
    return net, test.gradients().to_dense().T


def _symmetric(M: np.ndarray) -> np.ndarray:
    return (M + M.T) / 2


Case = Callable[[], Curvature]
