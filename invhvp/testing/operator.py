"""The checks of an operator."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _backend, _random
from ..operators import LinearOperator, as_operator
from ..protocols import Array, HasDiagonal, HasGradients, HasInverse, HasTerms
from ._measure import attempt, close, fail, host, like, norm, raises, require, roundoff, same_bits
from .gradients import check_gradients

_DENSE_LIMIT = 2000  # above it, `to_dense` is not asked for


def check_operator(
    A: Any, /, *, rng: Any = 0, dense: np.ndarray | None = None, psd: bool | None = None
) -> None:
    """Check that `A` is a real symmetric operator that keeps every promise it makes.

    Products: shape, dtype, device, argument left alone, same bits twice, vectors and columns and
    memory orders alike, linear, symmetric, finite. Then `psd`, `layout`, `to_dense`, `diagonal`,
    `inverse`, `gradients` and `subset`, where A has them.

    Args:
        A: an operator, or anything that `as_operator` takes.
        rng: seed of the test vectors.
        dense: the matrix that A should be, float64 on the host.
        psd: what A should say of itself; by default only the claim psd=True is checked.

    Raises AssertionError naming the first property that fails.
    Cost: about 60 products; n products more where n ≤ 2000.

    Example:
        >>> import numpy as np
        >>> from invhvp.operators import Callback
        >>> from invhvp.testing import check_operator
        >>> check_operator(Callback(lambda X: 2 * X, 3, like=np.ones(1)), psd=False)
        >>> S = np.array([[0.0, 1.0], [-1.0, 0.0]])
        >>> check_operator(Callback(lambda X: S @ X, 2, like=np.ones(1)))
        Traceback (most recent call last):
        AssertionError: A is not symmetric: |xᵀ(A y) - yᵀ(A x)| = ...
    """
    A = attempt(lambda: as_operator(A), "as_operator(A)")
    _check_door(A)
    random = _random.generator(rng, A.like)
    X = random.normal((A.shape[0], 3))
    Y = attempt(lambda: A @ X, "A @ X with X of shape (n, 3)")
    like(Y, X, tuple(X.shape), "A @ X")
    require(np.all(np.isfinite(host(Y))), "A @ X has NaN or Inf for a finite X", "Overflow, 0/0?")
    _check_products(A, X, Y)
    _check_linear(A, X, Y, random.normal((A.shape[0], 3)))
    _check_symmetric(A, host(X), host(Y))
    ritz = _ritz_values(A, host(X)[:, 0])
    size = max(float(np.max(np.abs(ritz))), norm(host(Y)) / norm(host(X)))
    _check_psd(A, psd, ritz, size)
    _check_matrix(A, host(X), host(Y), dense, size)
    if isinstance(A, HasGradients):
        _check_gradients(A, X, host(Y), size)
    if isinstance(A, HasTerms):
        _check_terms(A, X, host(Y), size)
    if isinstance(A, HasInverse):
        _check_inverse(A, X, size)


def _check_products(A: LinearOperator, X: Array, Y: Array) -> None:
    n = A.shape[0]
    before = host(X)
    again = A @ X
    close(host(X), before, 0.0, "A @ X changed its argument", "Never write into X; look for +=.")
    same_bits(
        again,
        Y,
        "a second A @ X differs from the first",
        "A must be deterministic: look "
        "for dropout, batch statistics, random batches, state kept between calls.",
    )
    allowed = roundoff(A.dtype, n) * norm(host(Y))
    vector = attempt(lambda: A @ X[:, 0], "A @ x with x of shape (n,)")
    like(vector, X, (n,), "A @ x")
    cause = (
        "Each column must be multiplied alone (a wrong axis, a sum over columns?), and as "
        f"precisely as {_backend.dtype_name(A.dtype)} claims."
    )
    close(
        host(vector), host(Y)[:, 0], allowed, "A @ x of shape (n,) is not column 0 of A @ X", cause
    )
    single = attempt(lambda: A @ X[:, 1:2], "A @ X with X of shape (n, 1)")
    like(single, X, (n, 1), "A @ X for one column")
    close(
        host(single)[:, 0],
        host(Y)[:, 1],
        allowed,
        "A @ X of shape (n, 1) is not column 1 of A @ X of shape (n, 3)",
        cause,
    )
    rows = _backend.from_host(np.ascontiguousarray(host(X).T), X)
    other = A @ _backend.namespace(X).matrix_transpose(rows)
    close(
        host(other),
        host(Y),
        allowed,
        "A @ X depends on the memory order of X",
        "Index by axes, never by strides: reshape, ravel or data pointers are suspects.",
    )
    # Called by name: array-api-strict refuses foreign operands instead of deferring to them.
    left = attempt(lambda: A.__rmatmul__(rows), "Xᵀ @ A")
    like(left, X, (3, n), "Xᵀ @ A")
    close(host(left), host(Y).T, allowed, "Xᵀ @ A is not (A @ X)ᵀ", "__rmatmul__ is wrong.")


def _check_linear(A: LinearOperator, X: Array, Y: Array, Z: Array) -> None:
    n = A.shape[0]
    zero = host(A @ _backend.namespace(X).zeros_like(X))
    close(zero, np.zeros_like(zero), 0.0, "A @ 0 is not 0", "A is affine: drop the constant.")
    W = A @ Z
    combined = host(A @ (2.0 * X - 3.0 * Z))
    sizes = 2 * norm(host(Y)) + 3 * norm(host(W))
    close(
        combined,
        2 * host(Y) - 3 * host(W),
        roundoff(A.dtype, n) * sizes,
        "A is not linear: A(2X - 3Z) is not 2 AX - 3 AZ",
        "Finite differences, clipping, rounding inside? Or fewer digits than the dtype has.",
    )
    factor = 2.0**-20
    small = host(A @ (factor * X)) / factor
    close(
        small,
        host(Y),
        roundoff(A.dtype, n) * norm(host(Y)),
        "A is not linear: A(X/2²⁰) is not A(X)/2²⁰",
        "Products by finite differences, or an absolute threshold inside?",
    )


def _check_symmetric(A: LinearOperator, X: np.ndarray, Y: np.ndarray) -> None:
    inner = X.T @ Y
    misfit = float(np.max(np.abs(inner - inner.T)))
    allowed = roundoff(A.dtype, A.shape[0]) * float(
        np.max(np.linalg.norm(X, axis=0)) * np.max(np.linalg.norm(Y, axis=0))
    )
    require(
        misfit <= allowed,
        f"A is not symmetric: |xᵀ(A y) - yᵀ(A x)| = {misfit:.2e} (allowed {allowed:.2e})",
        "Is the operator symmetric, deterministic, and as precise as "
        f"{_backend.dtype_name(A.dtype)} claims?",
    )


def _ritz_values(A: LinearOperator, start: np.ndarray, steps: int = 20) -> np.ndarray:
    """Ritz values after a few Lanczos steps with full reorthogonalisation on the host."""
    basis, columns = np.zeros((A.shape[0], 0)), []
    v = start / norm(start)
    for _ in range(min(steps, A.shape[0])):
        basis = np.column_stack([basis, v])
        columns.append(host(A @ _backend.from_host(v, A.like)))
        w = columns[-1]
        for _ in range(2):
            w = w - basis @ (basis.T @ w)
        if not norm(w) > 1e3 * _backend.eps(A.dtype) * norm(columns[-1]):
            break
        v = w / norm(w)
    inner = basis.T @ np.column_stack(columns)
    return np.linalg.eigvalsh((inner + inner.T) / 2)


def _check_psd(A: LinearOperator, psd: bool | None, ritz: np.ndarray, size: float) -> None:
    require(isinstance(A.psd, bool), f"A.psd is {A.psd!r}", "It must be True or False.")
    if psd is not None:
        require(A.psd == psd, f"A.psd is {A.psd}, expected {psd}", "Pass psd= when A is built.")
    allowed = roundoff(A.dtype, A.shape[0]) * size
    if A.psd and ritz[0] < -allowed:
        fail(
            f"A claims psd=True and has curvature {ritz[0]:.2e} (allowed {-allowed:.2e})",
            "Declare psd only where it holds by construction: a Hessian is not, Gauss-Newton is.",
        )


def _check_matrix(
    A: LinearOperator, X: np.ndarray, Y: np.ndarray, dense: np.ndarray | None, size: float
) -> None:
    n = A.shape[0]
    scale = roundoff(A.dtype, n) * size
    if A.layout is not None:
        require(A.layout.n == n, f"A.layout has {A.layout.n} parameters, A has {n}", "Rebuild it.")
    if dense is not None:
        M = np.asarray(dense, dtype=np.float64)
        close(
            Y,
            M @ X,
            scale * norm(X),
            "A @ X is not dense @ X",
            "The operator is another matrix: look at scale, order of blocks, transposes.",
        )
    if n <= _DENSE_LIMIT:
        matrix = attempt(A.to_dense, "A.to_dense()")
        like(matrix, A.like, (n, n), "A.to_dense()")
        close(
            host(matrix) @ X,
            Y,
            scale * norm(X),
            "A.to_dense() @ X is not A @ X",
            "to_dense and the product disagree.",
        )
    if isinstance(A, HasDiagonal):
        diagonal = attempt(A.diagonal, "A.diagonal()")
        like(diagonal, A.like, (n,), "A.diagonal()")
        chosen = np.unique(np.linspace(0, n - 1, min(n, 16)).astype(int))
        units = np.eye(n)[:, chosen] if n <= _DENSE_LIMIT else _units(n, chosen)
        true = host(A @ _backend.from_host(units, A.like))[chosen, np.arange(chosen.size)]
        close(
            host(diagonal)[chosen],
            true,
            scale * np.sqrt(chosen.size),
            "A.diagonal() is not eᵢᵀ(A eᵢ)",
            "A wrong diagonal makes Jacobi wrong, not slow.",
        )


def _units(n: int, chosen: np.ndarray) -> np.ndarray:
    units = np.zeros((n, chosen.size))
    units[chosen, np.arange(chosen.size)] = 1.0
    return units


def _check_inverse(A: Any, X: Array, size: float) -> None:
    n = A.shape[0]
    for damping in (2.0 * size, *([1e-2 * size] if A.psd else [])):
        what = f"A.inverse({damping:.2g})"
        inverse = attempt(lambda value=damping: A.inverse(value), what)
        back = attempt(lambda K=inverse: K @ X, f"{what} @ X")
        like(back, X, tuple(X.shape), f"{what} @ X")
        condition = (size + damping) / (damping - (0 if A.psd else size))
        allowed = roundoff(A.dtype, n) * norm(host(X)) * condition
        close(
            host(A @ back) + damping * host(back),
            host(X),
            allowed,
            f"(A + λI) {what} X is not X",
            "The inverse belongs to another matrix, or λ enters twice or not at all.",
        )
        forward = inverse @ (A @ X + damping * X)
        close(
            host(forward),
            host(X),
            allowed * condition,
            f"{what} (A + λI) X is not X",
            "The inverse is not symmetric, or not exact.",
        )
    raises(ValueError, lambda: A.inverse(-1.0), "A.inverse(-1.0)")


def _check_gradients(A: Any, X: Array, Y: np.ndarray, size: float) -> None:
    G = A.gradients
    check_gradients(G)
    product = host(G.T @ (G @ X))
    count = float(np.sum(product * Y) / max(np.sum(Y * Y), np.finfo(float).tiny))
    allowed = roundoff(A.dtype, A.shape[0]) * size * norm(host(X)) * max(count, 1e-300)
    close(
        product,
        count * Y,
        allowed,
        "A is no multiple of GᵀG for G = A.gradients",
        "A.gradients must be the rows g_i of A = (1/c) Σ g_i g_iᵀ.",
    )


def _check_terms(A: Any, X: Array, Y: np.ndarray, size: float) -> None:
    N = int(A.n_terms)
    require(N > 0, f"A.n_terms is {N}", "It counts the terms of the mean.")
    order = np.arange(N)
    allowed = roundoff(A.dtype, A.shape[0]) * size * norm(host(X))
    parts = [part for part in (order[: N // 3], order[N // 3 :]) if part.size]
    total = sum(part.size / N * host(A.subset(part) @ X) for part in parts)
    close(
        np.asarray(total),
        Y,
        2 * allowed,
        "the mean over subsets is not A @ X",
        "A.subset(indices) must be the mean over those terms, at the scale of the whole.",
    )


def _check_door(A: LinearOperator) -> None:
    xp = _backend.namespace(A.like)
    X = xp.zeros((A.shape[0], 2), dtype=A.dtype, device=A.device)
    long = xp.concat([X, X[:1, :]], axis=0)
    raises(ValueError, lambda: A @ long, "A @ X with n + 1 rows")
    raises(TypeError, lambda: A @ xp.astype(X, xp.int32), "A @ X of an integer dtype")
    raises(TypeError, lambda: A @ [[0.0]] * 2, "A @ a list")
