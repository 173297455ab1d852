"""Means over data that several processes hold, each its own share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _backend
from ..gradients import GradientMatrix, StreamedGradients
from ..protocols import Array, Damping, HasDiagonal, HasTerms, Processes
from ._gathered import agreed as agreed
from ._gathered import everyones as everyones
from ._gathered import gathered as gathered
from .base import LinearOperator
from .rank_one_mean import RankOneMean


class DataParallel(LinearOperator):
    """Σ_r c_r A_r / Σ_r c_r over processes r, of which this one holds A_r and c_r.

    Every process calls the same products with the same arrays, and gets the same ones: methods
    run on each of them unchanged. Data may be shared out unevenly. Sums and counts are reduced,
    once for a whole block of columns, never means.

    Args:
        local: the operator of this process, a mean over `count` samples.
        share: c_r, the samples (or the sum of their weights) of this process.
        processes: the sum over processes of an array; see `invhvp.protocols.Processes`.
        count: Σ_r c_r, where it is known already.

    Raises ValueError where the shares have no positive sum. Cost: one local product and one sum
    of n numbers a column. Where one process alone runs out of memory, its product is made in
    halves there, so that no process waits for another.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> class Alone:  # stands for torch.distributed, NCCL or MPI
        ...     rank, size = 0, 1
        ...     def __call__(self, x): return x
        >>> A = ih.DataParallel(ih.Diagonal(np.array([1.0, 2.0])), share=7, processes=Alone())
        >>> A @ np.ones(2)
        array([1., 2.])
    """

    processes: Any
    diagonal: Callable[[], Array]  # there only where every process knows that of its own

    def __init__(
        self,
        local: LinearOperator,
        *,
        share: float,
        processes: Processes,
        count: float | None = None,
    ) -> None:
        like = local.like
        diagonal = isinstance(local, HasDiagonal)
        can = everyones(processes, like, local.psd + 2 * diagonal).astype(int)
        psd = bool((can & 1).all())
        super().__init__(local.shape[0], like=like, psd=psd, layout=local.layout)
        if (can & 2).all():  # `estimate.diagonal` and `Jacobi` ask whether it is there
            self.diagonal = self._diagonal
        self.local = local
        self.processes = processes
        self.share = float(share)
        shares = everyones(processes, like, share)
        self.count = float(shares.sum() if count is None else count)
        if not (np.isfinite(self.count) and self.count > 0):
            msg = f"the shares of all processes must have a positive sum, got {shares.tolist()}"
            raise ValueError(msg)

    def _matmat(self, X: Array, /) -> Array:
        if self.share == 0.0:  # no samples here
            return self.processes(_backend.namespace(X).zeros_like(X))
        return self.processes(self._product(X) * (self.share / self.count))

    def _product(self, X: Array) -> Array:
        try:
            return self.local._matmat(X)
        except Exception as error:
            if X.shape[1] < 2 or not _backend.is_out_of_memory(error):
                raise
        middle = X.shape[1] // 2
        parts = [self._product(X[:, :middle]), self._product(X[:, middle:])]
        return _backend.namespace(X).concat(parts, axis=1)

    def _diagonal(self) -> Array:
        """The diagonal (n,); all processes must ask."""
        local: Any = self.local
        return self.processes(local.diagonal() * (self.share / self.count))

    def _describe(self) -> str:
        rank, size = self.processes.rank, self.processes.size
        return f"{super()._describe()}, process {rank} of {size} with {self.local!r}"


class DataParallelTerms(DataParallel):
    """Of operators that can restrict themselves to some terms; terms are numbered by process."""

    local: Any

    def __init__(self, local: Any, **options: Any) -> None:
        super().__init__(local, **options)
        shares = everyones(self.processes, self.like, local.n_terms).astype(int)
        self._first = int(shares[: self.processes.rank].sum())
        self._n_terms = int(shares.sum())

    @property
    def n_terms(self) -> int:
        """The terms of all processes."""
        return self._n_terms

    def subset(self, indices: Any, /) -> DataParallel:
        """The mean over some terms at the scale of the whole; the same indices everywhere."""
        chosen = np.asarray(_backend.to_host(indices) if _backend.is_array(indices) else indices)
        mine = chosen - self._first
        mine = mine[(mine >= 0) & (mine < self.local.n_terms)]
        share = self.share * len(mine) / self.local.n_terms
        local = self.local.subset(mine) if len(mine) else self.local
        count = self.count * len(chosen) / self._n_terms
        return DataParallel(local, share=share, processes=self.processes, count=count)


class DataParallelMean(DataParallelTerms):
    """Of means of rank-one matrices: gradients are gathered where a method asks for them."""

    local: RankOneMean
    _whole: RankOneMean | None = None

    @property
    def gradients(self) -> GradientMatrix:
        """The rows of all processes; all of them must ask. Cost: their memory, in each process."""
        return self._gathered().gradients

    def inverse(self, damping: Damping, /) -> LinearOperator:
        """The exact inverse of `RankOneMean`, from the rows of all processes."""
        return self._gathered().inverse(damping)

    def _gathered(self) -> RankOneMean:
        if self._whole is None:
            G = gathered(self.local.gradients, self.processes)
            self._whole = RankOneMean(G, count=self.count)
        return self._whole


def data_parallel(
    local: LinearOperator, *, share: float, processes: Processes, count: float | None = None
) -> DataParallel:
    """`DataParallel` with whatever else the operators of all processes can do.

    Arguments and errors are those of `DataParallel`.
    """
    mean = isinstance(local, RankOneMean) and not isinstance(local.gradients, StreamedGradients)
    level = 2 if mean else int(isinstance(local, HasTerms))
    least = int(everyones(processes, local.like, level).min())
    kind = (DataParallel, DataParallelTerms, DataParallelMean)[least]
    return kind(local, share=share, processes=processes, count=count)
