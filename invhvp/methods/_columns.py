"""Which right-hand sides have to be solved at all, and how blocks of columns are reassembled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _backend, _linalg
from ..protocols import Array, Reduce
from ..solution import Solution, Status
from ._inverse import check_finite_columns, codes_for, column_look

_MERGE_UP_TO = 1024  # beyond it the k × k Gram matrix costs more than copies are likely to save


@dataclass(frozen=True)
class Columns:
    """The distinct non-zero columns of B, and how each column of B follows from one of them."""

    norms: np.ndarray  # (k,) of B
    work: np.ndarray  # indices into B of the columns that are solved
    source: np.ndarray  # (k,) position in `work`; 0 for zero columns
    factor: np.ndarray  # (k,) x_j = factor_j · x_work[source_j]; 0 for zero columns

    @property
    def work_norms(self) -> np.ndarray:
        """Norms of the columns that are solved."""
        return self.norms[self.work]

    def take(self, B: Array) -> Array:
        """The columns that are solved."""
        return take_columns(B, self.work)


def distinct(B: Array, *, merge: bool, reduce: Reduce | None = None) -> Columns:
    """Look at B once: refuse NaN, set zero columns aside, merge exact multiples.

    Raises ValueError naming columns with NaN or Inf. Cost: one Gram matrix of B.
    """
    k = B.shape[1]
    norms = _linalg.column_norms(B, reduce=reduce)
    merge = merge and 1 < k <= _MERGE_UP_TO
    if merge:
        xp = _backend.namespace(norms)
        usable = (norms > 0) & xp.isfinite(norms)
        unit = _linalg.scale_columns(B, 1 / xp.where(usable, norms, xp.ones_like(norms)))
        host = column_look(norms, *_rows(_linalg.gram(unit, reduce=reduce)))
        norms, cosines = host[0], np.stack(host[1:])
    else:
        (norms,) = column_look(norms)
        unit, cosines = B, np.eye(k)
    check_finite_columns(norms)
    first, sign = np.arange(k), np.ones(k)
    if merge:
        first, sign = _copies(unit, cosines, norms, reduce)
    work = np.asarray([j for j in range(k) if norms[j] > 0 and first[j] == j], dtype=int)
    place = {int(j): i for i, j in enumerate(work)}
    source = np.asarray([place.get(int(first[j]), 0) for j in range(k)], dtype=int)
    factor = np.zeros(k)
    alive = norms > 0
    factor[alive] = (sign * norms)[alive] / norms[first][alive]
    return Columns(norms, work, source, factor)


def _rows(M: Array) -> list[Array]:
    return [M[i, :] for i in range(M.shape[0])]


def _copies(
    unit: Array, cosines: np.ndarray, norms: np.ndarray, reduce: Reduce | None
) -> tuple[np.ndarray, np.ndarray]:
    """For each column the first one that it is a multiple of, and the sign."""
    k = len(norms)
    first, sign = np.arange(k), np.ones(k)
    pairs = np.argwhere(np.triu(np.abs(cosines) > 1 - 1e-5, 1))
    pairs = [(i, j) for i, j in pairs if norms[i] > 0 and norms[j] > 0]
    if not pairs:
        return first, sign
    signs = np.sign([cosines[i, j] for i, j in pairs])
    left = take_columns(unit, np.asarray([i for i, _ in pairs]))
    right = take_columns(unit, np.asarray([j for _, j in pairs]))
    (gaps,) = column_look(
        _linalg.column_norms(left - _linalg.scale_columns(right, signs), reduce=reduce)
    )
    for (i, j), s, gap in zip(pairs, signs, gaps, strict=True):
        # The scaling itself rounds each entry once: nothing looser counts as a copy.
        if gap <= 2 * _backend.eps(unit.dtype) and first[j] == j:
            first[j], sign[j] = first[i], s * sign[i]
    return first, sign


def expand(run: Any, B: Array, columns: Columns, blocks: list[Any]) -> Solution:
    """Assemble the solution for all of B from its distinct columns."""
    k = B.shape[1]
    if not blocks:  # every column is zero
        zeros = np.zeros(k)
        X = _backend.namespace(B).zeros_like(B)
        return run.finish(X, zeros, zeros, zeros, codes_for([Status.ZERO] * k))
    X = _backend.namespace(B).concat([block.X for block in blocks], axis=1)
    if not (np.array_equal(columns.source, np.arange(k)) and np.all(columns.factor == 1)):
        X = _linalg.scale_columns(take_columns(X, columns.source, always=True), columns.factor)
    source, size = columns.source, np.abs(columns.factor)
    norms = np.concatenate([block.norms for block in blocks])[source] * size
    with np.errstate(invalid="ignore"):
        bounds = np.concatenate([block.bounds for block in blocks])[source] * size
    alive = columns.norms > 0
    statuses = [status for block in blocks for status in block.status]
    chosen = [statuses[s] if a else Status.ZERO for s, a in zip(source, alive, strict=True)]
    return run.finish(X, norms, columns.norms, np.where(alive, bounds, 0.0), codes_for(chosen))


def take_columns(X: Array, columns: np.ndarray, *, always: bool = False) -> Array:
    """X[:, columns]; X itself where that is all of them in order."""
    if not always and np.array_equal(columns, np.arange(X.shape[1])):
        return X
    xp = _backend.namespace(X)
    return xp.take(X, xp.asarray(columns, device=_backend.device(X)), axis=1)


def merge_columns(old: Array, new: Array, position: np.ndarray) -> Array:
    """Columns of [old, new] chosen by position."""
    k = old.shape[1]
    if new.shape[1] == k and np.array_equal(position, k + np.arange(k)):
        return new
    return take_columns(_backend.namespace(old).concat([old, new], axis=1), position, always=True)
