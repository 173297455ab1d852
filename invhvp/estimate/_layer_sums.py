"""Sums over the samples of a layer: second moments of its factors, and of rotated gradients.

Everywhere d is (N·C, T, o), the C rows of a sample together, and a is (N, T, i): the gradients are
G_nc = Σ_t d_nct a_ntᵀ. Results are small arrays, float64.
"""

from __future__ import annotations

from typing import Any

from .. import _arithmetic, _backend, _linalg
from ..gradients._memory import spans
from ..protocols import Array

# Flops that a device does while it moves one number: 5 to 15 a byte, on CPUs and GPUs alike.
_FLOPS_PER_NUMBER = 40


def factors(d: Array, a: Array, weights: Array | None, *, reduce: bool) -> tuple[Array, ...]:
    """Σ d dᵀ (o, o), Σ w a aᵀ (i, i) and the number of positions Σ w (1,).

    A position counts where any of its derivatives is not zero: what a mask has cut off has none.
    With `reduce` a sample is one position, its derivatives summed and its inputs averaged.
    """
    xp = _backend.namespace(a)
    N, T, i = a.shape
    o, C = d.shape[2], d.shape[0] // N
    hit = xp.any(xp.reshape(d, (N, C, T, o)) != 0, axis=(1, 3))
    valid = xp.astype(hit, a.dtype)
    if reduce:
        d = xp.sum(d, axis=1, dtype=d.dtype)
        number = xp.sum(valid, axis=1, dtype=a.dtype)
        share = valid / xp.where(number > 0, number, xp.ones_like(number))[:, None]
        a = _arithmetic.matmul(share[:, None, :], a)[:, 0, :]
        valid = xp.astype(number > 0, a.dtype)
    else:
        d, a = xp.reshape(d, (N * C * T, o)), xp.reshape(a, (N * T, i))
        if weights is not None:
            valid = valid * weights[:, None]
        valid = xp.reshape(valid, (N * T,))
    if weights is not None and reduce:
        valid = valid * weights
    S = _linalg.gram(d)
    A = _linalg.gram(a * xp.sqrt(valid)[:, None])
    ones = xp.ones_like(valid)
    return S, A, _linalg.column_dot(valid[:, None], ones[:, None])


def squares(d: Array, a: Array) -> Array:
    """Σ ‖G_nc‖² (1,)."""
    xp = _backend.namespace(a)
    N, T, i = a.shape
    o, C = d.shape[2], d.shape[0] // N
    total = None
    if not _pairs_pay(T, 1, C * o, i, whole=False, rows=C * o * i):
        return _sum_all(xp.sum(x, axis=0, dtype=x.dtype) for x in _squared(d, a, N))
    D = xp.permute_dims(xp.reshape(d, (N, C, T, o)), (0, 2, 1, 3))
    D = xp.reshape(D, (N, T, C * o))
    for n in spans(N, 3 * T * T, a):
        x, y = D[n, :, :], a[n, :, :]
        pairs = _arithmetic.matmul(x, xp.matrix_transpose(x))
        pairs = pairs * _arithmetic.matmul(y, xp.matrix_transpose(y))
        flat = xp.reshape(pairs, (-1, 1))
        part = _linalg.column_dot(flat, xp.ones_like(flat))
        total = part if total is None else total + part
    return total


def moments(y: Array, x: Array) -> Array:
    """Σ_nc (G_nc)² entry by entry (o, i), for the rotated d and a, in the cheaper way.

    By pairs of positions, Σ_st (Σ_c y_cs y_ct) x_s x_t: a few GEMMs, whatever C is; or sample by
    sample, from the rows, a piece at a time.
    """
    xp = _backend.namespace(x)
    N, T, i = x.shape
    o, C = y.shape[2], y.shape[0] // N
    y = xp.reshape(y, (N, C, T, o))
    if not pairs_pay(T, C, o, i):
        total = None
        for part in _squared(xp.reshape(y, (N * C, T, o)), x, N):
            part = _backend.to_small(xp.sum(part, axis=0, dtype=x.dtype))
            total = part if total is None else total + part
        return total
    total = None
    for n in spans(N, T * (C * o + o + i), x):
        for step in range(T):  # s = t first, then each pair once
            ys = xp.sum(y[n, :, : T - step, :] * y[n, :, step:, :], axis=1, dtype=x.dtype)
            xs = x[n, : T - step, :] * x[n, step:, :]
            part = _linalg.gram(xp.reshape(ys, (-1, o)), xp.reshape(xs, (-1, i)))
            part = part if step == 0 else 2.0 * part
            total = part if total is None else total + part
    return total


def pairs_pay(T: int, C: int, o: int, i: int) -> bool:
    """Whether pairs of positions are cheaper than the rows of all samples."""
    return _pairs_pay(T, o * i, C * o, i, whole=True, rows=C * o * i)


def _pairs_pay(T: int, out: int, left: int, right: int, *, whole: bool, rows: int) -> bool:
    pairs = T * (T + 1) // 2
    by_pairs = pairs * (2 * out + _FLOPS_PER_NUMBER * (left + right))
    if not whole:  # only the sum of all entries: inner products of positions
        by_pairs = 2 * T * T * (left + right)
    return by_pairs < rows * (2 * T + 2 * _FLOPS_PER_NUMBER)


def _squared(d: Array, a: Array, N: int) -> Any:
    """The entries of (G_nc)² for a few samples at a time, (·, o, i)."""
    xp = _backend.namespace(a)
    T, i, o, C = a.shape[1], a.shape[2], d.shape[2], d.shape[0] // N
    d = xp.reshape(d, (N, C, T, o))
    for n in spans(N, C * o * i * 2, a):
        x = a[n, :, :]
        y = xp.reshape(xp.permute_dims(d[n, :, :, :], (0, 1, 3, 2)), (x.shape[0], C * o, T))
        rows = xp.reshape(_arithmetic.matmul(y, x), (x.shape[0] * C, o, i))
        yield rows * rows


def _sum_all(parts: Any) -> Array:
    total = None
    for part in parts:
        flat = _backend.namespace(part).reshape(part, (-1, 1))
        part = _linalg.column_dot(flat, _backend.namespace(flat).ones_like(flat))
        total = part if total is None else total + part
    return total
