"""Products where C consecutive rows of outer products share their inputs.

The columns of a Jacobian, one a class, differ in their derivatives alone. Summed with the inputs
outside, a product takes 2 N T o k (i + C) flops instead of C times 2 N T o i k.
"""

from __future__ import annotations

from .. import _backend
from ..protocols import Array
from . import _memory, _sums


def flops(d: Array, a: Array, k: int) -> int:
    """Of a product with k columns."""
    C, T, o, i = d.shape[0] // a.shape[0], *d.shape[1:], a.shape[2]
    return 2 * a.shape[0] * T * o * k * (i + C)


def matmat(d: Array, a: Array, V: Array) -> Array:
    """Σ_t d_tᵀ V_k a_t for d (N C, T, o), a (N, T, i) and V (o i, k): (N C, k)."""
    xp, k = _backend.namespace(V), V.shape[1]
    (N, T, i), o = a.shape, d.shape[2]
    C = d.shape[0] // N
    V = xp.reshape(xp.permute_dims(xp.reshape(V, (o, i, k)), (1, 0, 2)), (i, o * k))
    found = []
    for rows in _memory.spans(N, T * o * k, V):
        inputs, at = a[rows, :, :], slice(rows.start * C, rows.stop * C)
        n = inputs.shape[0]
        left = _sums.product(xp.reshape(inputs, (n * T, i)), V)
        outputs = xp.reshape(d[at, :, :], (n, C, T * o))
        part = _sums.product(outputs, xp.reshape(left, (n, T * o, k)))
        found.append(xp.reshape(part, (n * C, k)))
    return xp.concat(found, axis=0) if len(found) > 1 else found[0]


def rmatmat(d: Array, a: Array, U: Array) -> Array:
    """Σ_nt u_n d_t a_tᵀ for d (N C, T, o), a (N, T, i) and U (N C, k): (o i, k)."""
    xp, k, total = _backend.namespace(U), U.shape[1], None
    (N, T, i), o = a.shape, d.shape[2]
    C = d.shape[0] // N
    for rows in _memory.spans(N, T * o * k, U):
        inputs, at = a[rows, :, :], slice(rows.start * C, rows.stop * C)
        n = inputs.shape[0]
        outputs = xp.matrix_transpose(xp.reshape(d[at, :, :], (n, C, T * o)))
        weighted = _sums.product(outputs, xp.reshape(U[at, :], (n, C, k)))
        flat = xp.matrix_transpose(xp.reshape(inputs, (n * T, i)))
        part = _sums.product(flat, xp.reshape(weighted, (n * T, o * k)))
        total = part if total is None else total + part
    total = xp.permute_dims(xp.reshape(total, (i, o, k)), (1, 0, 2))
    return xp.reshape(total, (o * i, k))
