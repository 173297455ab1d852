"""Tables of what is tested everywhere: one row each.

An operator is a function of the backend that gives the operator and its matrix in float64; a
method is a function that gives an instance whose tolerance float32 can reach.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from invhvp import methods, operators
from invhvp.gradients import DenseGradients
from invhvp.layout import Block, Layout
from tests.backends import Backend

N = 12
LAYOUT = Layout.from_shapes({"weight": (2, 4), "bias": (4,)})
# Blocks that interleave: what a Kronecker layer [W | b] does to the parameter vector.
PERMUTED = Layout(
    {
        "weight": Block((2, 4), np.array([0, 1, 2, 3, 11, 10, 9, 8])),
        "bias": Block((4,), np.array([7, 5, 6, 4])),
    }
)

Case = tuple[operators.LinearOperator, np.ndarray]


def matrix(*eigenvalues: float, seed: int = 0) -> np.ndarray:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((len(eigenvalues), len(eigenvalues))))
    M = (Q * np.asarray(eigenvalues)) @ Q.T
    return (M + M.T) / 2


def rows(n_samples: int, n: int = N, *, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n_samples, n))


def placed(backend: Backend, M: np.ndarray, **options: Any) -> Case:
    """The dense operator on the backend, and the matrix that it holds."""
    A = operators.Dense(backend.asarray(M), **options)
    return A, backend.to_numpy(backend.asarray(M))


def counted(A: operators.LinearOperator) -> tuple[operators.LinearOperator, list[int]]:
    """The operator again, and a list of the widths that reach it."""
    seen: list[int] = []

    def product(X: Any) -> Any:
        seen.append(X.shape[1])
        return A @ X

    return operators.Callback(product, A.shape[0], like=A.like, psd=A.psd, layout=A.layout), seen


def _rounded(backend: Backend, a: np.ndarray) -> np.ndarray:
    """The values as the backend holds them: inputs are not what is tested."""
    return np.asarray(a, dtype=backend.np_dtype).astype(np.float64)


def _dense(backend: Backend, M: np.ndarray, **options: Any) -> Case:
    return operators.Dense(backend.asarray(M), **options), _rounded(backend, M)


def _callback(backend: Backend) -> Case:
    M = matrix(*np.geomspace(1.0, 0.01, N))
    placed = backend.asarray(M)
    operator = operators.Callback(
        lambda X: placed @ X, N, like=backend.asarray([]), psd=True, layout=LAYOUT
    )
    return operator, _rounded(backend, M)


def _diagonal(backend: Backend) -> Case:
    d = np.linspace(-1.0, 3.0, N)
    return operators.Diagonal(backend.asarray(d), layout=LAYOUT), np.diag(_rounded(backend, d))


def _identity(backend: Backend) -> Case:
    return operators.Identity(N, like=backend.asarray([]), layout=LAYOUT), np.eye(N)


def _block_diagonal(backend: Backend, layout: Layout = LAYOUT) -> Case:
    weight, dense = _dense(backend, matrix(*np.geomspace(2.0, 0.02, 8)), psd=True)
    d = np.array([0.5, 1.0, 0.0, 2.0])
    bias = operators.Diagonal(backend.asarray(d))
    M = np.zeros((N, N))
    for name, block in (("weight", dense), ("bias", np.diag(_rounded(backend, d)))):
        index = np.arange(N)[layout[name].indices]
        M[np.ix_(index, index)] = block
    return operators.BlockDiagonal({"weight": weight, "bias": bias}, layout), M


def _low_rank(backend: Backend, *, orthonormal: bool = True) -> Case:
    U = rows(N, 4, seed=5)
    U = np.linalg.qr(U)[0] if orthonormal else U
    s = np.array([3.0, 1.0, 0.5, 0.1])
    U, s = _rounded(backend, U), _rounded(backend, s)
    operator = operators.LowRank(backend.asarray(U), backend.asarray(s), layout=LAYOUT)
    return operator, (U * s) @ U.T


def _rank_one_mean(backend: Backend, n_samples: int, count: float | None = None) -> Case:
    G = _rounded(backend, rows(n_samples))
    gradients = DenseGradients(backend.asarray(G), layout=LAYOUT)
    operator = operators.RankOneMean(gradients, count=count)
    return operator, G.T @ G / (n_samples if count is None else count)


def _factor(n: int, *, seed: int) -> np.ndarray:
    return matrix(*np.geomspace(2.0, 0.05, n), seed=seed)


def _kronecker(backend: Backend, o: int = 3, i: int = 4) -> Case:
    S, A = _factor(o, seed=7), _factor(i, seed=8)
    operator = operators.Kronecker(backend.asarray(S), backend.asarray(A), 0.5)
    return operator, 0.5 * np.kron(_rounded(backend, S), _rounded(backend, A))


def _eigen_kronecker(backend: Backend, o: int = 3, i: int = 4) -> Case:
    U, V = (np.linalg.qr(rows(n, n, seed=n))[0] for n in (o, i))
    values = np.linspace(0.0, 2.0, o * i).reshape(o, i)[::-1, :]
    U, V, values = (_rounded(backend, M) for M in (U, V, values))
    placed = (backend.asarray(M) for M in (U, V, values))
    Q = np.kron(U, V)
    return operators.EigenKronecker(*placed), (Q * values.reshape(-1)) @ Q.T


def _kronecker_blocks(backend: Backend, layout: Layout = PERMUTED) -> Case:
    blocks = {"weight": _kronecker(backend, 2, 4), "bias": _eigen_kronecker(backend, 4, 1)}
    M = np.zeros((N, N))
    for name, (_, block) in blocks.items():
        index = np.arange(N)[layout[name].indices]
        M[np.ix_(index, index)] = block
    return operators.BlockDiagonal({name: A for name, (A, _) in blocks.items()}, layout), M


def _sum(backend: Backend) -> Case:
    (A, M), (D, d) = _rank_one_mean(backend, 5), _diagonal(backend)
    return A + D, M + d


def _scaled(backend: Backend) -> Case:
    A, M = _callback(backend)
    return 0.25 * A, 0.25 * M


def _damped(backend: Backend) -> Case:
    A, M = _low_rank(backend)
    shift = {"weight": 0.5, "bias": 0.125}
    return operators.Damped(A, shift), M + np.diag(LAYOUT.shifts(shift))


OPERATORS: dict[str, Callable[[Backend], Case]] = {
    "dense": lambda b: _dense(b, matrix(*np.geomspace(1.0, 0.01, N)), psd=True, layout=LAYOUT),
    "dense-indefinite": lambda b: _dense(b, matrix(*np.linspace(-0.5, 2.0, N)), layout=LAYOUT),
    "diagonal": _diagonal,
    "identity": _identity,
    "callback": _callback,
    "block-diagonal": _block_diagonal,
    "block-diagonal-permuted": lambda b: _block_diagonal(b, PERMUTED),
    "low-rank": _low_rank,
    "low-rank-oblique": lambda b: _low_rank(b, orthonormal=False),
    "rank-one-mean-wide": lambda b: _rank_one_mean(b, 5),
    "rank-one-mean-tall": lambda b: _rank_one_mean(b, 40),
    "rank-one-mean-counted": lambda b: _rank_one_mean(b, 6, 2.0),
    "kronecker": _kronecker,
    "eigen-kronecker": _eigen_kronecker,
    "kronecker-blocks": _kronecker_blocks,
    "sum": _sum,
    "scaled": _scaled,
    "damped": _damped,
}

METHODS: dict[str, Callable[[], Any]] = {
    "direct": methods.Direct,
    "sample-space": methods.SampleSpace,
    "cg": lambda: methods.CG(rtol=1e-5),
    "cg-preconditioned": lambda: methods.CG(rtol=1e-5, preconditioner=methods.Direct()),
    "block-cg": lambda: methods.BlockCG(rtol=1e-5),
    "block-cg-narrow": lambda: methods.BlockCG(rtol=1e-5, block_width=2),
    "block-cg-preconditioned": lambda: methods.BlockCG(rtol=1e-5, preconditioner=methods.Direct()),
    "minres": lambda: methods.Minres(rtol=1e-5),
    "lissa": methods.LiSSA,
    "arnoldi": methods.Arnoldi,
    "arnoldi-drop": lambda: methods.Arnoldi(rank=2, krylov_dimension=6, complement="drop"),
    "nystroem-sketch": methods.NystroemSketch,
    "nystroem-columns": lambda: methods.NystroemSketch(sketch="columns"),
    "nystroem-preconditioner": methods.NystroemPreconditioner,
    "pivoted-cholesky": lambda: methods.PivotedCholesky(rank=3),
    "jacobi": methods.Jacobi,
    "inverse-harmonic-mean": methods.InverseHarmonicMean,
}
