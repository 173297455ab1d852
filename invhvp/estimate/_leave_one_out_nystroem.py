"""The Nyström model of a sketch, and what it is without each of its columns."""

from __future__ import annotations

import numpy as np

from .. import _backend, _linalg
from ..protocols import Array


def nystroem_samples(Omega: Array, Y: Array) -> tuple[Array, np.ndarray]:
    """One estimate of diag(A) per column (n, m), and one of tr(A) each (m,), for a PSD A.

    With H = ΩᵀY and V = Y H⁻¹ the model is Â = Y H⁻¹Yᵀ, and without column i it is
    Â − v_i v_iᵀ/h_i, h_i = (H⁻¹)_ii. What it leaves of ω_i is v_i/h_i, so that

        diag:  diag(Â) + (ω_i ∘ v_i − v_i ∘ v_i)/h_i        trace:  tr(Â) + (1 − ‖v_i‖²)/h_i

    are unbiased for Rademacher ω_i. Where H is singular to rounding, A has no
    more rank than the sketch and both are exact.
    Cost: no product beyond Y = AΩ; 4·n·m² flops, two blocks of memory (n × m).

    Source: Epperly, Tropp & Webber (2024), XTrace: making the most of every sample, XNysTrace;
    the diagonal follows from the same downdate.
    """
    xp = _backend.namespace(Y)
    H = np.asarray(_backend.to_host(_linalg.symmetric(_linalg.gram(Omega, Y))), dtype=np.float64)
    if not np.all(np.isfinite(H)):
        return Y * float("nan"), np.full(Y.shape[1], np.nan)
    w, U = np.linalg.eigh(H)
    cut = 100 * Y.shape[1] * _backend.eps(Y.dtype) * max(float(w[-1]), 0.0)
    kept = w > cut
    inverse = (U[:, kept] / w[kept]) @ U[:, kept].T
    V = _linalg.combine(Y, inverse)
    model = xp.sum(V * Y, axis=1, dtype=Y.dtype)[:, None]
    total = float(np.sum(_backend.to_host(_linalg.column_dot(V, Y))))
    if not np.all(kept):
        # The sketch has spanned the range: the model stays what it is without any one column.
        return model + xp.zeros_like(Y), np.full(Y.shape[1], total)
    h = np.diag(inverse)
    columns = model + _linalg.scale_columns(Omega * V - V * V, 1.0 / h)
    lengths = np.asarray(_backend.to_host(_linalg.column_dot(V, V)), dtype=np.float64)
    return columns, total + (1.0 - lengths) / h
