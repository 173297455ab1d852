"""The checks of a gradient matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _random
from ._measure import attempt, close, host, like, norm, require, roundoff, same_bits


def check_gradients(G: Any, /, *, dense: np.ndarray | None = None, rng: Any = 0) -> None:
    """Check that `G` is an N × p matrix in all its forms: products, Gram matrix, norms, slices.

    Args:
        G: a gradient matrix.
        dense: the matrix that G should be, float64 on the host.
        rng: seed of the test vectors.

    Raises AssertionError naming the first property that fails. Cost: the dense N × p matrix.

    Example:
        >>> import numpy as np
        >>> from invhvp.gradients import DenseGradients
        >>> from invhvp.testing import check_gradients
        >>> check_gradients(DenseGradients(np.arange(6.0).reshape(2, 3)))
    """
    N, p = G.shape
    require(N > 0 and p > 0, f"G.shape is {G.shape}", "It needs rows and columns.")
    require(len(G) == N, f"len(G) is {len(G)}, G.shape[0] is {N}", "Samples are rows.")
    matrix = attempt(G.to_dense, "G.to_dense()")
    like(matrix, matrix, (N, p), "G.to_dense()")
    require(matrix.dtype == G.dtype, f"G.dtype is {G.dtype}", f"to_dense() has {matrix.dtype}.")
    M = host(matrix)
    require(np.all(np.isfinite(M)), "G has NaN or Inf", "A diverged model, or 0/0 in a loss?")
    unit = roundoff(G.dtype, max(N, p))
    if dense is not None:
        close(
            M,
            np.asarray(dense, dtype=np.float64),
            unit * norm(M),
            "G is not `dense`",
            "Another order of parameters, another loss, or a mean where a sum belongs?",
        )
    random = _random.generator(rng, matrix)
    _check_products(G, M, random.normal((p, 2)), random.normal((N, 2)), unit)
    _check_rows(G, M, unit)
    _check_gram(G, M, unit)


def _check_products(G: Any, M: np.ndarray, V: Any, U: Any, unit: float) -> None:
    v, u = host(V), host(U)
    for what, product, argument, expected in (
        ("G @ V", lambda X: G @ X, V, M @ v),
        ("G.T @ U", lambda X: G.T @ X, U, M.T @ u),
    ):
        before = host(argument)
        Y = attempt(lambda f=product, X=argument: f(X), what)
        like(Y, V, expected.shape, what)
        allowed = unit * norm(M) * norm(before)
        close(
            host(Y),
            expected,
            allowed,
            f"{what} is not that of G.to_dense()",
            "A transposed factor, a missing bias, or samples in the wrong order?",
        )
        close(host(argument), before, 0.0, f"{what} changed its argument", "Look for +=.")
        same_bits(product(argument), Y, f"a second {what} differs", "G must be deterministic.")
        vector = attempt(lambda f=product, X=argument: f(X[:, 0]), f"{what} for one vector")
        like(vector, V, expected.shape[:1], f"{what} for one vector")
        close(host(vector), expected[:, 0], allowed, f"{what} for one vector", "Wrong axis?")


def _check_gram(G: Any, M: np.ndarray, unit: float) -> None:
    N = M.shape[0]
    K = attempt(G.gram, "G.gram()")
    require(tuple(K.shape) == (N, N), f"G.gram() has shape {tuple(K.shape)}", f"Expected {N, N}.")
    require(K.dtype == G.dtype, f"G.gram() has dtype {K.dtype}", f"Expected {G.dtype}.")
    allowed = unit * norm(M) ** 2
    close(
        host(K),
        M @ M.T,
        allowed,
        "G.gram() is not GGᵀ",
        "For sums over positions, all pairs count: (Σ_t d aᵀ)(Σ_s d aᵀ), not the diagonal t = s.",
    )
    close(host(K), host(K).T, allowed, "G.gram() is not symmetric", "Wrong transposition?")
    half = max(1, N // 2)
    cross = attempt(lambda: G.gram(G[:half]), "G.gram(G[:half])")
    close(host(cross), M @ M[:half].T, allowed, "G.gram(other) is not G otherᵀ", "Rows are G's.")


def _check_rows(G: Any, M: np.ndarray, unit: float) -> None:
    N = M.shape[0]
    norms = attempt(G.row_norms, "G.row_norms()")
    require(tuple(norms.shape) == (N,), f"G.row_norms() has shape {tuple(norms.shape)}", "(N,)!")
    sizes = np.sqrt(np.sum(M * M, axis=1))
    close(
        host(norms),
        sizes,
        unit * norm(M),
        "G.row_norms() are not the norms of the rows",
        "Square roots, or positions t ≠ s, forgotten?",
    )
    middle = slice(N // 3, N // 3 + max(1, N // 2))
    chosen = np.arange(N)[::-2].copy()
    for what, key in (("slice", middle), ("array of indices", chosen)):
        part = attempt(lambda k=key: G[k], f"G[{what}]")
        close(
            host(part.to_dense()),
            M[key],
            unit * norm(M),
            f"G[{what}] has other rows",
            "Indexing selects samples, in the order asked for.",
        )
