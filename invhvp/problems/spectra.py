"""Prescribed spectra: the difficulty of a system is its eigenvalues, so choose them."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np

from .. import _backend
from ..operators import Dense
from ..protocols import Array
from .problem import Problem, place

RightHandSides = Literal["gaussian", "gradient", "dependent", "near_duplicate", "scaled"]


def spectrum_decay(n: int, *, exponent: float = 2.0, largest: float = 1.0) -> np.ndarray:
    """Eigenvalues largest·i^(-exponent): polynomial decay, as in the bulk of a network."""
    return largest * np.arange(1, n + 1, dtype=np.float64) ** (-exponent)


def spectrum_geometric(n: int, *, smallest: float = 1e-6, largest: float = 1.0) -> np.ndarray:
    """Eigenvalues evenly spaced in their logarithm: no gap for a method to exploit."""
    return np.geomspace(largest, smallest, n)


def spectrum_step(n: int, *, rank: int, largest: float = 1.0, floor: float = 0.0) -> np.ndarray:
    """`rank` equal eigenvalues above a flat floor: a sketch of that rank is exact."""
    return np.where(np.arange(n) < rank, largest, floor)


def spectrum_clustered(
    n: int, *, centers: tuple[float, ...] = (1e-3, 1.0, 1e3), width: float = 1e-3
) -> np.ndarray:
    """Tight clusters of relative `width` around `centers`, of almost equal sizes."""
    position = np.arange(n)
    centre = np.asarray(centers, dtype=np.float64)[position % len(centers)]
    return centre * (1 + width * np.cos(position))


def spectrum_network(n: int, *, outliers: int = 10, top: float = 1e3) -> np.ndarray:
    """A network's shape: `outliers` geometric from `top` to 10 above a bulk i⁻²."""
    bulk = spectrum_decay(n - outliers)
    return np.concatenate([np.geomspace(top, 10.0, outliers), bulk])


def spectrum_indefinite(
    n: int, *, negative: int = 1, smallest: float = -1e-2, exponent: float = 2.0
) -> np.ndarray:
    """A decaying spectrum whose last `negative` eigenvalues equal `smallest` < 0."""
    values = spectrum_decay(n, exponent=exponent)
    return np.where(np.arange(n) < n - negative, values, smallest)


def from_spectrum(
    eigenvalues: np.ndarray,
    *,
    damping: float = 0.0,
    rhs: RightHandSides = "gaussian",
    n_rhs: int = 4,
    rng: int = 0,
    like: Array | None = None,
) -> Problem:
    """A dense matrix with these eigenvalues and Haar-distributed eigenvectors.

    The matrix is rounded to the dtype of `like`; solution and spectrum are those of the exact one.

    Example:
        >>> from invhvp import problems
        >>> problem = problems.from_spectrum(problems.spectrum_decay(20), damping=1e-2)
        >>> problem.rhs.shape, round(problem.condition)
        ((20, 4), 81)
    """
    values = np.asarray(eigenvalues, dtype=np.float64)
    vectors = _orthogonal(values.shape[0], rng)
    matrix = (vectors * values) @ vectors.T
    B = _host_rhs(values.shape[0], n_rhs, rhs, rng + 1, (values, vectors))
    X = vectors @ ((vectors.T @ B) / (values + damping)[:, None])
    psd = bool(np.all(values >= 0))
    return Problem(
        name=f"prescribed spectrum, n = {values.shape[0]}",
        operator=Dense(place((matrix + matrix.T) / 2, like), psd=psd),
        rhs=place(B, like),
        damping=damping,
        solution=place(X, like),
        spectrum=np.sort(values),
    )


def right_hand_sides(
    n: int,
    k: int,
    *,
    kind: RightHandSides = "gaussian",
    matrix: Array | None = None,
    rng: int = 0,
    like: Array | None = None,
) -> Array:
    """Columns (n, k) that are hard in the way `kind` says.

    Args:
        n: length.
        k: number of columns.
        kind: "gaussian"; "gradient" (covariance `matrix`, as gradients have that of the Fisher);
            "dependent" (copies, multiples, sums and, from k = 6, a zero column);
            "near_duplicate" (one vector and relative noise 1e-5); "scaled" (norms 1e-12 to 1e12).
        matrix: the symmetric positive semidefinite (n, n) matrix of "gradient".
        rng: seed.
        like: library, dtype and device of the result.
    """
    eigen = None
    if matrix is not None:
        host = np.asarray(_backend.to_host(matrix), dtype=np.float64)
        eigen = np.linalg.eigh((host + host.T) / 2)
    return place(_host_rhs(n, k, kind, rng, eigen), like)


def _host_rhs(
    n: int, k: int, kind: str, rng: int, eigen: tuple[np.ndarray, np.ndarray] | None
) -> np.ndarray:
    generator = np.random.default_rng(rng)
    B = generator.standard_normal((n, k))
    if kind == "gradient":
        if eigen is None:
            msg = 'right-hand sides of kind "gradient" need matrix=, their covariance'
            raise ValueError(msg)
        values, vectors = eigen
        B = vectors @ (np.sqrt(np.maximum(values, 0.0))[:, None] * B)
    elif kind == "dependent":
        B[:, k // 2] = 2.0 * B[:, 0]
        B[:, -1] = B[:, 0] + B[:, k // 3] if k > 2 else B[:, 0]
        if k > 5:
            B[:, k // 2 + 1] = 0.0
    elif kind == "near_duplicate":
        B = B[:, :1] + 1e-5 * generator.standard_normal((n, k))
    elif kind == "scaled":
        B = B * np.geomspace(1e-12, 1e12, k)
    elif kind != "gaussian":
        msg = f"unknown kind of right-hand sides {kind!r}; one of {get_args(RightHandSides)}"
        raise ValueError(msg)
    return B


def distinct_eigenvalues(
    m: int = 3, *, n: int = 200, n_rhs: int = 5, rng: int = 0, like: Array | None = None
) -> Problem:
    """A matrix with the eigenvalues 1, ..., m only: m passes of a Krylov method solve it."""
    values = 1.0 + np.arange(n) * m // n
    problem = from_spectrum(values, n_rhs=n_rhs, rng=rng, like=like)
    return _named(problem, f"{m} distinct eigenvalues", {"passes": m}, "finite termination")


def nn_spectrum(
    n: int = 800, *, damping: float = 1e-3, n_rhs: int = 16, rng: int = 0, like: Array | None = None
) -> Problem:
    """The spectrum of a small network: 10 outliers and a decaying bulk (`spectrum_network`)."""
    values = spectrum_network(n)
    problem = from_spectrum(values, damping=damping, n_rhs=n_rhs, rng=rng, like=like)
    effective = float(np.sum(values / (values + damping)))
    return _named(problem, "network spectrum", {"effective_dimension": effective}, "")


def _named(problem: Problem, name: str, constants: dict[str, float], source: str) -> Problem:
    return replace(problem, name=name, constants=MappingProxyType(constants), source=source)


def _orthogonal(n: int, rng: int) -> np.ndarray:
    """A Haar-distributed orthogonal matrix: QR with the signs of R removed."""
    Q, R = np.linalg.qr(np.random.default_rng(rng).standard_normal((n, n)))
    return Q * np.where(np.diagonal(R) < 0, -1.0, 1.0)
