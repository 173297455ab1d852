"""The diagonal and the trace of an operator, estimated from its products."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import _backend, _linalg
from .._random import Random, generator
from ..operators import LinearOperator, as_operator
from ..protocols import Array, HasDiagonal
from ._estimates import DiagonalEstimate, TraceEstimate
from ._leave_one_out import LeaveOneOut, leave_one_out
from ._leave_one_out_nystroem import nystroem_samples

_CHUNK = 16  # probes multiplied at a time: full speed, and few vectors held
_PILOT = 4  # probes below which nothing can be said about the spectrum
_GOOD = 0.1  # relative standard error at which plain probes are kept whatever the spectrum


def diagonal(A: Any, *, samples: int = 16, rng: Any = 0, kind: str = "auto") -> DiagonalEstimate:
    """Estimate the diagonal of a symmetric operator.

    Args:
        A: an operator, or anything `as_operator` takes.
        samples: products to spend at most.
        rng: an int or a generator.
        kind: "hutchinson": the mean of ω ∘ Aω over Rademacher ω; the diagonal itself adds no
            variance. "xdiag": deflation by a sketch with each column left out in turn; better by
            orders of magnitude where the spectrum decays, worse where it is flat. "xnysdiag": the
            same with a Nyström model, for a PSD operator; usually 2 to 10 times better still.
            "auto": the operator's own diagonal, or all n products if they are not more than
            `samples`; else half of the samples are spent on probes, and the rest goes to XNysDiag
            (XDiag where A is not known to be PSD) where these err by more than 10 % and their
            singular values fall by a factor of 10.

    Raises ValueError for samples < 1 (< 4 for "xdiag" and "xnysdiag"), an unknown kind, and
    "xnysdiag" for an operator that is not declared psd.
    Cost: at most `samples` products; 48 vectors, for XDiag 4·samples.

    Source: Bekas, Kokiopoulou & Saad (2007), An estimator for the diagonal of a matrix; Epperly,
    Tropp & Webber (2024), XTrace: making the most of every sample.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> from invhvp.estimate import diagonal
        >>> A = ih.Callback(lambda X: np.array([[1.0], [2.0]]) * X, 2, like=np.ones(1))
        >>> diagonal(A, samples=1, kind="hutchinson").values
        array([1., 2.])
    """
    A = as_operator(A)
    _check(A, samples, kind, "xdiag", "xnysdiag")
    if kind == "auto":
        exact = _exact(A, samples)
        if exact is not None:
            return exact
    random, running = generator(rng, A.like), _Running(A)
    if kind == "xnysdiag":
        return _xnysdiag(A, *_extended(A, samples, random))
    sketch = _sketch(A, samples, random, kind, "xdiag")
    if sketch is not None:
        Omega, Y, pieces = sketch
        running.add(Omega * Y)
        if kind == "xdiag" or _pays(pieces, running.relative_error()):
            if kind == "auto" and A.psd:
                return _xnysdiag(A, *_extended(A, samples, random, Omega, Y))
            return _xdiag(A, Omega, pieces)
    while running.count < samples:
        Omega = random.rademacher((A.shape[0], min(_CHUNK, samples - running.count)))
        running.add(Omega * A._matmat(Omega))
    return running.estimate("hutchinson", samples)


def trace(A: Any, *, samples: int = 16, rng: Any = 0, kind: str = "auto") -> TraceEstimate:
    """Estimate the trace of a symmetric operator.

    Args:
        A: an operator, or anything `as_operator` takes.
        samples: products to spend at most.
        rng: an int or a generator.
        kind: "hutchinson", "xtrace", "xnystrace" or "auto", which chooses as `diagonal` does.

    Raises ValueError for samples < 1 (< 4 for "xtrace" and "xnystrace"), an unknown kind, and
    "xnystrace" for an operator that is not declared psd.
    Cost: at most `samples` products; 32 vectors, for XTrace 4·samples; one transfer to the host.

    Source: Hutchinson (1990); Epperly, Tropp & Webber (2024), XTrace.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> from invhvp.estimate import trace
        >>> trace(ih.Diagonal(np.arange(4.0))).value
        6.0
    """
    A = as_operator(A)
    _check(A, samples, kind, "xtrace", "xnystrace")
    if kind == "auto":
        exact = _exact(A, samples)
        if exact is not None:
            d = exact.values[:, None]
            total = _linalg.column_dot(d, _backend.namespace(d).ones_like(d))
            return _trace_of(_host(total), exact.products, "exact")
    random = generator(rng, A.like)
    values = np.zeros(0)
    if kind == "xnystrace":
        return _xnystrace(*_extended(A, samples, random))
    sketch = _sketch(A, samples, random, kind, "xtrace")
    if sketch is not None:
        Omega, Y, pieces = sketch
        values = _host(_linalg.column_dot(Omega, Y))
        error = float(np.std(values, ddof=1) / math.sqrt(len(values)))
        if kind == "xtrace" or _pays(pieces, error / (abs(float(np.mean(values))) or 1.0)):
            if kind == "auto" and A.psd:
                return _xnystrace(*_extended(A, samples, random, Omega, Y))
            return _xtrace(A, Omega, pieces)
    while len(values) < samples:
        Omega = random.rademacher((A.shape[0], min(_CHUNK, samples - len(values))))
        values = np.append(values, _host(_linalg.column_dot(Omega, A._matmat(Omega))))
    return _trace_of(values, samples, "hutchinson")


# ------------------------------------------------------------------------------ the estimators


def _xdiag(A: LinearOperator, Omega: Array, pieces: LeaveOneOut) -> DiagonalEstimate:
    """The mean over i of diag(Q_i Q_iᵀA) + ω_i ∘ (I − Q_i Q_iᵀ)Aω_i, Q_i without column i."""
    Q, S = pieces.Q, pieces.S
    Z = A._matmat(Q)
    xp = _backend.namespace(Q)
    base = xp.sum(Q * Z, axis=1, dtype=Q.dtype)[:, None]
    # Q_i Q_iᵀ = Q(I − s_i s_iᵀ)Qᵀ, and Aω_i = Q r_i lies in the range of Q.
    QS, ZS = _linalg.combine(Q, S), _linalg.combine(Z, S)
    inner = _linalg.scale_columns(QS, np.sum(S * pieces.R, axis=0))
    running = _Running(A)
    running.add(base - QS * ZS + Omega * inner)
    return running.estimate("xdiag", Omega.shape[1] + Q.shape[1])


def _extended(
    A: LinearOperator,
    samples: int,
    random: Random,
    Omega: Array | None = None,
    Y: Array | None = None,
) -> tuple[Array, Array]:
    """Ω and AΩ with as many columns as the budget (and n) allows."""
    had = 0 if Omega is None else Omega.shape[1]
    fresh = random.rademacher((A.shape[0], min(samples, A.shape[0]) - had))
    product = A._matmat(fresh)
    if Omega is None or Y is None:
        return fresh, product
    xp = _backend.namespace(fresh)
    return xp.concat([Omega, fresh], axis=1), xp.concat([Y, product], axis=1)


def _xnysdiag(A: LinearOperator, Omega: Array, Y: Array) -> DiagonalEstimate:
    running = _Running(A)
    running.add(nystroem_samples(Omega, Y)[0])
    return running.estimate("xnysdiag", Omega.shape[1])


def _xnystrace(Omega: Array, Y: Array) -> TraceEstimate:
    return _trace_of(nystroem_samples(Omega, Y)[1], Omega.shape[1], "xnystrace")


def _xtrace(A: LinearOperator, Omega: Array, pieces: LeaveOneOut) -> TraceEstimate:
    """The mean over i of tr(Q_iᵀAQ_i) + ω_iᵀ(I − Q_i Q_iᵀ)A(I − Q_i Q_iᵀ)ω_i."""
    Q, S, R = pieces.Q, pieces.S, pieces.R
    H = _host(_linalg.symmetric(_linalg.gram(Q, A._matmat(Q))))
    W = _host(_linalg.gram(Q, Omega))
    inside = W - S * np.sum(S * W, axis=0)  # (I − s_i s_iᵀ)Qᵀω_i
    range_part = np.trace(H) - np.sum(S * (H @ S), axis=0)
    rest = np.sum(W * R - 2 * inside * R + inside * (H @ inside), axis=0)
    return _trace_of(range_part + rest, Omega.shape[1] + Q.shape[1], "xtrace")


def _sketch(
    A: LinearOperator, samples: int, random: Random, kind: str, leave: str
) -> tuple[Array, Array, LeaveOneOut] | None:
    """Half of the samples as Ω, AΩ and its range; None where that makes no sense."""
    half = min(samples // 2, A.shape[0])
    if kind not in ("auto", leave) or (kind == "auto" and half < _PILOT):
        return None
    Omega = random.rademacher((A.shape[0], half))
    Y = A._matmat(Omega)
    return Omega, Y, leave_one_out(Y)


def _pays(pieces: LeaveOneOut, error: float) -> bool:
    return pieces.decay < 0.1 and not error <= _GOOD


class _Running:
    """Mean and variance of columns that come in chunks (Chan, Golub & LeVeque 1983)."""

    def __init__(self, A: LinearOperator) -> None:
        xp = _backend.namespace(A.like)
        self._mean = xp.zeros((A.shape[0],), dtype=A.dtype, device=A.device)
        self._square = self._mean
        self.count = 0

    def add(self, D: Array) -> None:
        xp, c = _backend.namespace(D), D.shape[1]
        mean = xp.sum(D, axis=1, dtype=D.dtype) / c
        away = D - mean[:, None]
        delta, total = mean - self._mean, self.count + c
        between = delta * delta * (self.count * c / total)
        self._square = self._square + xp.sum(away * away, axis=1, dtype=D.dtype) + between
        self._mean = self._mean + delta * (c / total)
        self.count = total

    def _standard_error(self) -> Array:
        xp = _backend.namespace(self._mean)
        if self.count < 2:
            return xp.full_like(self._mean, math.inf)
        return xp.sqrt(self._square / (self.count * (self.count - 1)))

    def relative_error(self) -> float:
        """‖standard error‖ / ‖mean‖; one transfer to the host."""
        xp = _backend.namespace(self._mean)
        both = xp.stack([self._standard_error(), self._mean], axis=1)
        error, size = _host(_linalg.column_norms(both))
        return float(error / (size or 1.0))

    def estimate(self, kind: str, products: int) -> DiagonalEstimate:
        return DiagonalEstimate(
            values=self._mean,
            standard_error=self._standard_error(),
            samples=self.count,
            products=products,
            kind=kind,
        )


def _exact(A: LinearOperator, samples: int) -> DiagonalEstimate | None:
    """The operator's own diagonal, or that of its n ≤ samples columns."""
    if isinstance(A, HasDiagonal):
        values, spent = A.diagonal(), 0
    elif A.shape[0] <= samples:
        M = A.to_dense()
        values, spent = _backend.namespace(M).linalg.diagonal(M), A.shape[0]
    else:
        return None
    zero = _backend.namespace(values).zeros_like(values)
    return DiagonalEstimate(
        values=values, standard_error=zero, samples=max(spent, 1), products=spent, kind="exact"
    )


def _trace_of(values: np.ndarray, products: int, kind: str) -> TraceEstimate:
    m = len(values)
    error = float(np.std(values, ddof=1) / math.sqrt(m)) if m > 1 else math.inf
    return TraceEstimate(
        value=float(np.mean(values)),
        standard_error=0.0 if kind == "exact" else error,
        samples=m,
        products=products,
        kind=kind,
    )


def _host(x: Array) -> np.ndarray:
    return np.asarray(_backend.to_host(x), dtype=np.float64)


def _check(A: LinearOperator, samples: int, kind: str, *deflated: str) -> None:
    if kind not in ("auto", "hutchinson", *deflated):
        known = ", ".join(f'"{name}"' for name in ("auto", "hutchinson", *deflated))
        msg = f"kind must be one of {known}; got {kind!r}"
        raise ValueError(msg)
    least = 4 if kind in deflated else 1
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < least:
        msg = f'kind="{kind}" needs samples, an int of at least {least}; got {samples!r}'
        raise ValueError(msg)
    if kind.startswith("xnys") and not A.psd:
        msg = (
            f'kind="{kind}" needs a positive semidefinite operator (psd=True where it is built); '
            f'use "{deflated[0]}"'
        )
        raise ValueError(msg)
