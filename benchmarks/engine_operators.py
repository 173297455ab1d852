"""The operators that the engine is measured on, and the clock on their products."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import invhvp as ih

from .gpu_libraries import Library, Transfers


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operator by kind: "dense", "synthetic" (diagonal plus rank r) or "network"."""

    kind: str
    n: int
    k: int = 16
    terms: int = 32  # rank of the synthetic operator, samples × positions of the network
    rank: int = 64  # of the sketches
    methods: tuple[str, ...] = ()  # all of them by default


class Mark(NamedTuple):
    """A product: when it began and ended, its columns, and transfers to the host before it."""

    began: float
    ended: float
    columns: int
    transfers: int


class Clocked(ih.LinearOperator):
    """An operator that marks its products."""

    def __init__(self, A: Any) -> None:
        super().__init__(A.shape[0], like=A.like, psd=True)
        self.operator = A
        self.marks: list[Mark] = []
        self.counted: Transfers | None = None

    def _matmat(self, X: Any, /) -> Any:
        seen = 0 if self.counted is None else self.counted.count
        began = time.perf_counter()
        Y = self.operator._matmat(X)
        self.marks.append(Mark(began, time.perf_counter(), X.shape[1], seen))
        return Y

    @property
    def seconds(self) -> float:
        return sum(mark.ended - mark.began for mark in self.marks)

    def iterations(self, k: int, limit: int) -> list[tuple[Mark, Mark]]:
        """Consecutive products of k columns within one cycle, without the first: it warms up."""
        wide = [mark for mark in self.marks if mark.columns == k][1 : limit + 1]
        return list(itertools.pairwise(wide[:limit]))


def operator(library: Library, case: Case) -> ih.LinearOperator:
    """PSD, largest eigenvalue about 1, eigenvalues down to 1e-4."""
    n, r = case.n, case.terms
    rng = np.random.default_rng(5)
    spread = np.geomspace(1.0, 1e-4, n)
    if case.kind == "network":  # a linear layer: V ↦ aᵀ(a V), for each of its outputs
        o, i = layer_shape(n)
        a = library.place(rng.standard_normal((r, i)) / np.sqrt(r), "float32")

        def layer(V: Any) -> Any:
            W = library.xp.reshape(V, (o, i, V.shape[1]))
            return library.xp.reshape(a.T @ (a @ W), V.shape)

        return ih.Callback(layer, n, like=a, psd=True)
    U = rng.standard_normal((n, r)).astype(np.float32) / np.float32(np.sqrt(n))
    if case.kind == "dense":
        M = U @ U.T
        M[np.arange(n), np.arange(n)] += spread.astype(np.float32)
        return ih.Dense(library.place(M), psd=True)
    factor, diagonal = library.place(U), library.place(spread[:, None], "float32")
    return ih.Callback(lambda V: diagonal * V + factor @ (factor.T @ V), n, like=factor, psd=True)


def layer_shape(n: int) -> tuple[int, int]:
    o = int(np.sqrt(n))
    if o * o != n:
        msg = f"a square layer needs a square number of parameters, got {n}"
        raise ValueError(msg)
    return o, o
