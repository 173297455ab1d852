"""Problems of numerical linear algebra whose answers and iteration counts are known."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Literal

import numpy as np

from .. import _backend
from ..operators import Callback, Dense, Diagonal
from ..protocols import Array
from .problem import Problem, place, reference


def poisson_1d(
    n: int = 50,
    *,
    rhs: Literal["first", "ones", "ends"] = "first",
    like: Array | None = None,
) -> Problem:
    """tridiag(-1, 2, -1): CG needs exactly n passes for e₁, ⌈n/2⌉ for 1 or for [e₁, eₙ]."""
    i = np.arange(1, n + 1, dtype=np.float64)
    low, high = np.minimum(i[:, None], i), np.maximum(i[:, None], i)
    inverse = low * (n + 1 - high) / (n + 1)
    B = {"first": np.eye(n)[:, 0], "ones": np.ones(n), "ends": np.eye(n)[:, [0, n - 1]]}[rhs]
    spectrum = 4 * np.sin(i * math.pi / (2 * (n + 1))) ** 2
    return Problem(
        name=f"Poisson on {n} points, b = {rhs}",
        operator=Dense(place(_tridiagonal(np.full(n, 2.0), -1.0), like), psd=True),
        rhs=place(B, like),
        damping=0.0,
        solution=place(inverse @ B, like),
        spectrum=spectrum,
        constants=MappingProxyType({"passes": n if rhs == "first" else -(-n // 2)}),
        source="finite termination by symmetry",
    )


def poisson_2d(m: int = 32, *, rhs: np.ndarray | None = None, like: Array | None = None) -> Problem:
    """The five-point Laplacian on an m × m grid, matrix-free; b = 1 unless given (host array)."""
    angle = np.arange(1, m + 1) * math.pi / (m + 1)
    one = 4 * np.sin(angle / 2) ** 2
    values = one[:, None] + one
    S = math.sqrt(2 / (m + 1)) * np.sin(np.outer(np.arange(1, m + 1), angle))
    B = np.ones(m * m) if rhs is None else np.asarray(rhs, dtype=np.float64)
    grid = B.reshape(m, m, -1)
    # The sine transform diagonalises: X = S ((S B S) / values) S in each column.
    spectral = np.tensordot(S, np.tensordot(S, grid, axes=(1, 0)), axes=(1, 1)).swapaxes(0, 1)
    spectral = spectral / values[:, :, None]
    X = np.tensordot(S, np.tensordot(S, spectral, axes=(1, 0)), axes=(1, 1)).swapaxes(0, 1)
    constants = {"condition": 1 / math.tan(math.pi / (2 * (m + 1))) ** 2}
    if m == 32 and rhs is None:
        constants |= {"cg_1e-8": 59, "cg_1e-10": 66, "cg_1e-5_float32": 46}
    return Problem(
        name=f"Poisson on a {m} x {m} grid",
        operator=Callback(lambda V: _five_point(V, m), m * m, like=reference(like), psd=True),
        rhs=place(B, like),
        damping=0.0,
        solution=place(X.reshape(B.shape), like),
        spectrum=np.sort(values, axis=None),
        constants=MappingProxyType(constants),
        source="discrete sine transform; counts of CG measured in float64 and float32",
    )


def _five_point(V: Array, m: int) -> Array:
    xp = _backend.namespace(V)
    U = xp.reshape(V, (m, m, V.shape[1]))
    row, column = xp.zeros_like(U[:1, :, :]), xp.zeros_like(U[:, :1, :])
    neighbours = (
        xp.concat([U[1:, :, :], row], axis=0)
        + xp.concat([row, U[:-1, :, :]], axis=0)
        + xp.concat([U[:, 1:, :], column], axis=1)
        + xp.concat([column, U[:, :-1, :]], axis=1)
    )
    return xp.reshape(4.0 * U - neighbours, V.shape)


def wishart(
    n: int = 400, *, m: int = 1600, damping: float = 0.0, rng: int = 0, like: Array | None = None
) -> Problem:
    """XXᵀ/m for Gaussian X (n, m): residuals of CG fall like (n/m)^(j/2), almost surely."""
    generator = np.random.default_rng(rng)
    X = generator.standard_normal((n, m))
    b = generator.standard_normal(n)
    A = X @ X.T / m
    ratio = math.sqrt(n / m)
    constants = {"rate": ratio, "lower_edge": (1 - ratio) ** 2, "upper_edge": (1 + ratio) ** 2}
    if (n, rng, damping) == (400, 0, 0.0) and m in (1600, 6400):
        constants["cg_1e-8"] = 27 if m == 1600 else 14
    return Problem(
        name=f"Wishart, {n} x {m}",
        operator=Dense(place((A + A.T) / 2, like), psd=True),
        rhs=place(b, like),
        damping=damping,
        solution=place(np.linalg.solve(A + damping * np.eye(n), b), like),
        spectrum=np.linalg.eigvalsh(A),
        constants=MappingProxyType(constants),
        source="rate: Deift & Trogdon (2021); edges: Marchenko & Pastur (1967)",
    )


def strakos(
    n: int = 48,
    *,
    smallest: float = 0.1,
    largest: float = 1e3,
    rho: float = 0.8,
    like: Array | None = None,
) -> Problem:
    """A diagonal matrix on which rounding delays CG far beyond n passes; b = 1/√n."""
    i = np.arange(1, n + 1)
    values = smallest + (i - 1) / (n - 1) * (largest - smallest) * rho ** (n - i)
    b = np.full(n, 1 / math.sqrt(n))
    constants: dict[str, float] = {}
    if (n, smallest, largest, rho) == (48, 0.1, 1e3, 0.8):
        # Passes of textbook CG until the relative error in the A-norm falls below the number.
        constants = {"cg_error_1e-2": 54, "cg_error_1e-4": 81, "cg_error_1e-8": 120}
        constants |= {"cg_error_1e-12": 155, "cg_error_1e-2_float32": 92}
    return Problem(
        name=f"Strakos({n}, {smallest:g}, {largest:g}, {rho:g})",
        operator=Diagonal(place(values, like), psd=True),
        rhs=place(b, like),
        damping=0.0,
        solution=place(b / values, like),
        spectrum=values,
        constants=MappingProxyType(constants),
        source="Strakos (1991), On the real convergence rate of the conjugate gradient method",
    )


def hilbert(n: int = 8, *, like: Array | None = None) -> Problem:
    """1/(i + j - 1), b = e₁: the solution is the first column of an integer matrix.

    The rounded matrix is not the Hilbert matrix: errors of order condition·eps are no defect.
    """
    i = np.arange(1, n + 1, dtype=np.float64)
    first = [
        (-1) ** row * (row + 1) * math.comb(n + row, n - 1) * math.comb(n, row + 1)
        for row in range(n)
    ]
    known = {6: 1.4951e7, 8: 1.5258e10, 10: 1.6025e13}
    return Problem(
        name=f"Hilbert({n})",
        operator=Dense(place(1 / (i[:, None] + i - 1), like), psd=True),
        rhs=place(np.eye(n)[:, 0], like),
        damping=0.0,
        solution=place(np.asarray(first, dtype=np.float64), like),
        constants=MappingProxyType({"condition": known[n]} if n in known else {}),
        source="Choi (1983), Tricks or treats with the Hilbert matrix",
    )


def wilkinson(
    half: int = 10, *, damping: float = 2.0, n_rhs: int = 2, rng: int = 0, like: Array | None = None
) -> Problem:
    """W⁺ of order 2·half + 1: tridiag(|i|, 1), whose top eigenvalues agree to 14 digits."""
    size = np.abs(np.arange(-half, half + 1, dtype=np.float64))
    A = _tridiagonal(size, 1.0)
    B = np.random.default_rng(rng).standard_normal((size.shape[0], n_rhs))
    known = {"largest": 10.746194182903393, "gap": 7.1e-14} if half == 10 else {}
    return Problem(
        name=f"W{2 * half + 1}+",
        operator=Dense(place(A, like)),
        rhs=place(B, like),
        damping=damping,
        solution=place(np.linalg.solve(A + damping * np.eye(size.shape[0]), B), like),
        spectrum=np.linalg.eigvalsh(A),
        constants=MappingProxyType(known),
        source="Wilkinson (1965), The Algebraic Eigenvalue Problem, p. 308",
    )


def ji_li_breakdown(n: int = 200, *, like: Array | None = None) -> Problem:
    """diag(1..n) with B = [b, Ab/n, A²b/n², A³b/n³]: textbook block CG breaks down.

    Its residual block loses rank on the way; O'Leary's recurrence meets a singular matrix at pass
    55, a recurrence that carries an orthonormal block needs 51.
    """
    values = np.arange(1.0, n + 1)
    b = np.full(n, 1 / math.sqrt(n))
    B = b[:, None] * (values / n)[:, None] ** np.arange(4)
    return Problem(
        name=f"Krylov-dependent right-hand sides, n = {n}",
        operator=Diagonal(place(values, like), psd=True),
        rhs=place(B, like),
        damping=0.0,
        solution=place(B / values[:, None], like),
        spectrum=values,
        constants=MappingProxyType({"passes": 51, "oleary_singular_at": 55} if n == 200 else {}),
        source="after Ji & Li (2017), A breakdown-free block conjugate gradient method",
    )


def _tridiagonal(diagonal: np.ndarray, off: float) -> np.ndarray:
    n = diagonal.shape[0]
    return np.diag(diagonal) + off * (np.eye(n, k=1) + np.eye(n, k=-1))
