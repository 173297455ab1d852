"""The range of a sketch, and what it is without each of its columns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .. import _backend, _linalg
from ..protocols import Array


class LeaveOneOut(NamedTuple):
    """Y = Q R, and unit s_i with Q_i Q_iᵀ = Q(I − s_i s_iᵀ)Qᵀ for the range Q_i without column i.

    `s_i` is zero where the other columns span all of Q: the common case of a rank below m.
    """

    Q: Array  # (n, r) orthonormal
    R: np.ndarray  # (r, m), on the host
    S: np.ndarray  # (r, m), on the host
    decay: float  # smallest over largest singular value of Y


def leave_one_out(Y: Array) -> LeaveOneOut:
    """Factor a sketch Y (n, m) of any rank r ≤ m.

    A sketch with NaN keeps it: Q is Y, and everything that is computed from it is NaN too.
    Cost: a CholQR of Y and 2·n·m·r flops; one transfer of (m, m) to the host.

    Source: Epperly, Tropp & Webber (2024), XTrace, with the singular values of R in place of
    its inverse.
    """
    m = Y.shape[1]
    W, T = _linalg.cholqr(Y)
    host = np.asarray(_backend.to_host(T), dtype=np.float64)
    if not np.all(np.isfinite(host)):
        return LeaveOneOut(Y, np.full((m, m), np.nan), np.full((m, m), np.nan), 1.0)
    U, s, Vt = np.linalg.svd(host)
    cut = 10 * m * _backend.eps(Y.dtype) * s[0]
    rank = max(int(np.sum(s > cut)), 1)  # a zero operator keeps one column of zeros
    dependence, s, Vt = np.linalg.norm(Vt[rank:], axis=0), s[:rank], Vt[:rank]
    Q = _linalg.combine(W, U[:, :rank])
    # Column i adds a direction of its own only if no linear relation of the columns contains it.
    needed = dependence <= cut / (s[-1] or 1.0)
    S = np.where(needed, Vt / np.where(s > 0, s, 1.0)[:, None], 0.0)
    norms = np.linalg.norm(S, axis=0)
    S = S / np.where(norms > 0, norms, 1.0)
    decay = float(s[-1] / s[0]) if rank == m and s[0] > 0 else 0.0
    return LeaveOneOut(Q, s[:, None] * Vt, S, decay)
