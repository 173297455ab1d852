"""Column algebra on tall blocks: every reduction over n goes through this file.

Blocks have shape (n, k) with n large; what is reduced over n is small and float64 (see
`_backend.to_small`). The `reduce` hook sums a small array over the processes that share a
sharded parameter vector; nothing else in the engine knows about it.
"""

from __future__ import annotations

import math

from . import _arithmetic, _backend, _lapack
from .protocols import Array, Reduce

_CHUNK = 1 << 16  # rows per partial sum: float32 dots lose 5 digits at n = 2e7 without it
_IN_CACHE = 1 << 14  # on the host, rows whose products stay in the cache
_MAX_CHUNKS = 64  # beyond it the chunks grow instead: launches cost more than they save


def _row_chunks(n: int, size: int | None = None) -> list[slice]:
    size = max(_CHUNK, -(-n // _MAX_CHUNKS)) if size is None else size
    return [slice(i, min(i + size, n)) for i in range(0, n, size)] or [slice(0, 0)]


def _working(X: Array) -> Array:
    """Half precision is summed in float32: no library factorises or accumulates in less."""
    xp = _backend.namespace(X)
    return xp.astype(X, xp.float32) if _backend.eps(X.dtype) > 2.0**-23 else X


def _sum_chunks(parts: list[Array], like: Array, reduce: Reduce | None) -> Array:
    xp = _backend.namespace(like)
    if len(parts) > 1 and _backend.is_numpy(parts[0]):
        small = _backend.namespace(parts[0])
        parts = [small.sum(small.stack(parts), axis=0, dtype=small.float64)]
    elif len(parts) > 1 and _backend.has_float64(like):
        parts = [xp.astype(part, xp.float64) for part in parts]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    if reduce is not None:
        total = reduce(total)
    return _backend.to_small(total)


def gram(X: Array, Y: Array | None = None, *, reduce: Reduce | None = None) -> Array:
    """XᵀY as a small float64 array of shape (k, m); partial sums over rows are added in float64.

    Cost: 2·n·k·m flops, one pass over X and Y, no temporary of length n.
    """
    right = X if Y is None else Y
    if reduce is None:  # it takes arrays of the caller's library
        X, right = _arithmetic.for_blas(X, right)
    xp = _backend.namespace(X)
    parts = []
    with _backend.quiet():
        for rows in _row_chunks(X.shape[0], _arithmetic.gram_rows(X, right)):
            x = _working(X[rows, :])
            y = x if right is X else _working(right[rows, :])
            parts.append(_arithmetic.matmul(xp.matrix_transpose(x), y))
    return _sum_chunks(parts, X, reduce)


def column_dot(X: Array, Y: Array, *, reduce: Reduce | None = None) -> Array:
    """The k inner products of matching columns, as a small float64 array of shape (k,)."""
    if reduce is None:  # it takes arrays of the caller's library
        X, Y = _arithmetic.for_blas(X, Y)
    chunk = _IN_CACHE if _backend.on_host(X) else None
    with _backend.quiet():
        parts = [
            _arithmetic.column_sums(_working(X[rows, :]) * _working(Y[rows, :]))
            for rows in _row_chunks(X.shape[0], chunk)
        ]
    return _sum_chunks(parts, X, reduce)


def column_norms(X: Array, *, reduce: Reduce | None = None) -> Array:
    """Euclidean norms of the columns, as a small float64 array of shape (k,).

    Columns are scaled by their largest entry, so that a right-hand side of size 1e-30 in float32
    (1e-170 in float64) keeps its norm although its square underflows.
    """
    xp = _backend.namespace(X)
    if reduce is not None:  # the largest entry of a sharded column is not known here
        square = column_dot(X, X, reduce=reduce)
        return _backend.namespace(square).sqrt(square)
    if _backend.on_host(X) and _backend.eps(X.dtype) <= 2.0**-23:
        square = column_dot(X, X)
        if _squares_are_safe(square, X):
            return _backend.namespace(square).sqrt(square)  # the usual case
    largest = xp.max(xp.abs(X), axis=0) if X.shape[0] else xp.zeros_like(X[0, :])
    usable = (largest > 0) & (largest < math.inf)  # Inf stays Inf, without Inf/Inf on the way
    scale = xp.where(usable, largest, xp.ones_like(largest))
    scaled = X / scale
    square = column_dot(scaled, scaled)
    return _backend.namespace(square).sqrt(square) * _backend.to_small(scale)


def _squares_are_safe(squares: Array, X: Array) -> bool:
    """Whether no column of X on the host lost entries whose squares vanish or overflow.

    Entries whose squares vanish are at most 1e-8 of such a sum.
    """
    if _backend.eps(X.dtype) > 2.0**-23:
        return False
    least = 1e-280 if _backend.eps(X.dtype) < 2.0**-30 else 1e-30 * (1 + X.shape[0])
    return bool(_backend.namespace(squares).all((squares > least) & (squares < least**-1)))


def combine(X: Array, M: Array) -> Array:
    """X @ M for a tall X (n, b) and a small M (b, c), in the dtype of X."""
    return _arithmetic.matmul(X, _backend.lift(M, X))


def scale_columns(X: Array, factors: Array) -> Array:
    """X · diag(factors) for small factors (k,), in the dtype of X."""
    return _arithmetic.scale(X, _backend.lift(factors, X)[None, :])


def add_combined(Z: Array, X: Array, M: Array) -> Array:
    """Z + X @ M for tall Z (n, c) and X (n, b) and a small M (b, c), in the dtype of X."""
    return _arithmetic.add_product(Z, X, _backend.lift(M, X))


def add_scaled(Z: Array, X: Array, factors: Array) -> Array:
    """Z + X · diag(factors) for small factors (k,), in the dtype of X."""
    return _arithmetic.add_scaled(Z, X, _backend.lift(factors, X)[None, :])


def between(U: Array, values: Array, X: Array) -> Array:
    """U diag(values) Uᵀ X for a tall U (n, r) and small values (r,), in the dtype of X."""
    values, inside = _backend.together(values, gram(U, X))
    return combine(U, values[:, None] * inside)


def symmetric(M: Array) -> Array:
    """The symmetric part of a small square matrix."""
    return (M + _backend.namespace(M).matrix_transpose(M)) / 2


def identity_like(M: Array, n: int | None = None) -> Array:
    """A small identity matrix in the space of `M`."""
    xp = _backend.namespace(M)
    return xp.eye(M.shape[0] if n is None else n, dtype=M.dtype, device=_backend.device(M))


def unit_diagonal(G: Array) -> tuple[Array, Array, Array]:
    """G = D Ĝ D with ones on the diagonal of Ĝ; returns Ĝ, d and whether the diagonal allows it.

    A row of zeros belongs to a direction that is zero: it gets a one, and disturbs nothing.
    """
    xp = _backend.namespace(G)
    diagonal = xp.linalg.diagonal(G)
    positive = xp.all(diagonal > 0)
    if _backend.is_numpy(G) and bool(positive):
        d = xp.sqrt(diagonal)
        return G / (d[:, None] * d[None, :]), d, positive
    empty = xp.max(xp.abs(G), axis=1) == 0
    good = (diagonal > 0) | empty
    one = xp.ones_like(diagonal)
    d = xp.sqrt(xp.where(diagonal > 0, diagonal, one))
    scaled = G / (d[:, None] * d[None, :])
    return scaled + identity_like(G) * xp.where(empty, one, 0.0 * one)[:, None], d, xp.all(good)


def cholqr(Y: Array, *, passes: int = 4, reduce: Reduce | None = None) -> tuple[Array, Array]:
    """Orthonormalise the columns of a block: Y = W T, by column-scaled iterated Cholesky QR.

    Returns W (n, b) in the dtype of Y and the small T (b, b). Linearly dependent columns are
    completed by directions from rounding, with rows of T that are rounding-small: nothing is
    dropped; columns that vanish exactly stay zero. Each pass is one Gram matrix and one product
    (4·n·b² flops). On the host two passes are the rule and more run where they are needed;
    elsewhere looking would cost a synchronisation, so three always run, after a scaling.

    Source: Yamamoto, Nakatsukasa, Yanagisawa & Fukaya (2015), CholeskyQR2, iterated, with the
    column scaling and the small shift that single precision needs.
    """
    first, squares = None, None
    if _backend.on_host(Y):
        first = gram(Y, reduce=reduce)
        squares = _backend.namespace(first).linalg.diagonal(first)
    if squares is not None and _squares_are_safe(squares, Y):
        W, T = Y, identity_like(squares, Y.shape[1])
    else:
        norms, first = column_norms(Y, reduce=reduce), None
        xp = _backend.namespace(norms)
        W = scale_columns(Y, 1 / xp.where(norms > 0, norms, xp.ones_like(norms)))
        T = identity_like(norms, Y.shape[1]) * norms[None, :]
    xp = _backend.namespace(T)
    unit = _backend.eps(_working(Y[:0, :]).dtype)
    gap = math.inf
    for step in range(passes):
        G, d, _ = unit_diagonal(symmetric(gram(W, reduce=reduce) if first is None else first))
        first = None
        if _backend.is_numpy(G):
            if step:
                gap = max(_distance(G), _distance(d[None, :]))
            if gap < 25 * unit * math.sqrt(Y.shape[1]):
                break
        elif step == 3:
            break
        L = _semidefinite_cholesky(G, unit)
        W = combine(W, xp.matrix_transpose(_lapack.inv_lower(L)) / d[:, None])
        T = (xp.matrix_transpose(L) * d[None, :]) @ T
        if gap < 0.1:  # a pass over what is nearly orthonormal leaves rounding alone
            break
    return W, T


def _distance(G: Array) -> float:
    """Largest deviation from the identity (a matrix) or from ones (a row)."""
    xp = _backend.namespace(G)
    return float(xp.max(xp.abs(G - (identity_like(G) if G.shape[0] == G.shape[1] else 1.0))))


def _semidefinite_cholesky(G: Array, unit: float) -> Array:
    """Cholesky factor of a unit-diagonal Gram matrix that rounding may have made indefinite.

    Near the identity the plain factor is used; else a shift of a few roundings of G, which the
    next pass repairs. The choice is made by values and without looking at them.
    """
    xp = _backend.namespace(G)
    b = G.shape[0]
    eye = identity_like(G)
    plain = _lapack.cholesky(G)
    use_plain = xp.all(xp.isfinite(plain)) & (xp.max(xp.abs(G - eye)) < 0.5)
    if _backend.is_numpy(G) and bool(use_plain):
        return plain
    small = _lapack.cholesky(G + (10 * b * unit) * eye)
    large = _lapack.cholesky(G + (1000 * b * unit) * eye)
    shifted = xp.where(xp.all(xp.isfinite(small)), small, large)
    return xp.where(use_plain, plain, shifted)
