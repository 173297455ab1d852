"""Per-sample gradients that are read again for every operation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from .. import _backend
from ..layout import Layout
from ..protocols import Array
from .base import GradientMatrix, concatenate
from .dense import DenseGradients

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


class StreamedGradients(GradientMatrix):
    """Batches of rows that come from a file, a computation or a memory map, one at a time.

    Args:
        batches: a collection that can be iterated over again, a function without arguments that
            returns a new iterator, or one array-like (N, p) that is read in slices, such as a
            memory map or a Zarr array. Each batch is an array (n_b, p) or a gradient matrix.
        n_samples: N; by default counted in a first pass.
        convert: makes an array or a gradient matrix of what the batches are, for example
            `torch.from_numpy` for rows of a memory map.
        layout: names of the parameter blocks; by default that of the first batch.

    Raises TypeError for an iterator that can be read only once, ValueError where a pass yields
    another number of samples than N.
    Cost: one pass over the batches an operation, two where N is not given at the first. A Gram
    matrix holds batches of up to a quarter of the free memory and takes one pass of the other
    matrix for each such panel. Rows chosen by an index array are held; those of a slice are not.

    Example:
        >>> import numpy as np
        >>> from invhvp.gradients import StreamedGradients
        >>> rows = np.arange(10.0).reshape(5, 2)
        >>> G = StreamedGradients(lambda: (rows[i : i + 2] for i in range(0, 5, 2)))
        >>> G.shape, G @ np.ones(2)
        ((5, 2), array([ 1.,  5.,  9., 13., 17.]))
    """

    def __init__(
        self,
        batches: Batches,
        n_samples: int | None = None,
        *,
        convert: Callable[[Any], Any] | None = None,
        layout: Layout | None = None,
    ) -> None:
        if n_samples is not None and n_samples < 1:
            msg = f"n_samples must be at least 1, got {n_samples}; leave it out to have it counted"
            raise ValueError(msg)
        self._source = _reiterable(batches)
        self._convert = convert
        first = next(self._wrapped(layout), None)
        if first is None:
            msg = "the batches are empty: StreamedGradients needs at least one sample"
            raise ValueError(msg)
        layout = first.layout if layout is None else layout
        super().__init__(
            1 if n_samples is None else n_samples, first.shape[1], like=first.like, layout=layout
        )
        if n_samples is None:
            self._n_samples = sum(len(batch) for batch in self._checked())

    def _wrapped(self, layout: Layout | None) -> Iterator[GradientMatrix]:
        """The batches as gradient matrices; empty ones are left out."""
        for raw in self._source():
            batch = raw if self._convert is None else self._convert(raw)
            if isinstance(batch, GradientMatrix):
                yield batch
            elif not _backend.is_array(batch):
                msg = (
                    f"a batch must be an array (n, p) or a gradient matrix, got "
                    f"{type(batch).__name__}; pass convert="
                )
                raise TypeError(msg)
            elif batch.ndim != 2:
                msg = (
                    f"a batch must have shape (n, p), got {tuple(batch.shape)}; for one array of "
                    "all rows use DenseGradients"
                )
                raise ValueError(msg)
            elif batch.shape[0]:
                yield DenseGradients(batch, layout=layout)

    def _checked(self) -> Iterator[GradientMatrix]:
        for batch in self._wrapped(self._layout):
            self._check_matches(batch)
            yield batch

    def _batches(self) -> Iterator[GradientMatrix]:
        """One pass, which must yield N samples if it is read to its end."""
        seen = 0
        for batch in self._checked():
            seen += len(batch)
            if seen > self._n_samples:
                break
            yield batch
        if seen != self._n_samples:
            count = "more" if seen > self._n_samples else f"{seen}"
            msg = (
                f"this pass over the batches yielded {count} samples, not {self._n_samples}; "
                "every pass must yield the same rows (an iterator that is read once is not enough)"
            )
            raise ValueError(msg)

    def _derived(self, source: Callable[[], Iterable[Any]], n_samples: int) -> Self:
        """The same kind of rows from another source, without reading anything."""
        other = copy.copy(self)
        other._source, other._convert, other._n_samples = source, None, n_samples
        return other

    # --------------------------------------------------------------------------------- products

    def parts(self, max_bytes: int | None = None) -> Iterator[GradientMatrix]:
        """The rows in order, in one pass; a large batch comes in several parts."""
        for batch in self._batches():
            yield from batch.parts(max_bytes)

    def _dense(self) -> Array:
        return self._collect(lambda batch: batch.to_dense())

    def _matmat(self, V: Array) -> Array:
        return self._collect(lambda batch: batch._matmat(V))

    def _rmatmat(self, U: Array) -> Array:
        total, start = None, 0
        for batch in self._batches():
            part = batch._rmatmat(U[start : start + len(batch), :])
            total = part if total is None else total + part
            start += len(batch)
        return total

    def _gram(self, other: GradientMatrix) -> Array:
        xp = _backend.namespace(self._like)
        lines = []
        for panel in self._panels():
            whole = other is self and len(panel) == len(self)
            lines.append(panel.gram() if whole else xp.matrix_transpose(_against(other, panel)))
        return xp.concat(lines, axis=0)

    def _triangle(self, cuts: Sequence[slice]) -> None:
        return None  # a pass for each of them

    def _panels(self) -> Iterator[GradientMatrix]:
        """Batches joined up to a quarter of the free memory: each costs a pass of the other."""
        room = _backend.free_memory(self._like) // 4
        held: list[GradientMatrix] = []
        size = 0
        for batch in self._batches():
            if held and (size + batch.nbytes > room or type(batch) is not type(held[0])):
                yield concatenate(held)
                held, size = [], 0
            held.append(batch)
            size += 2 * batch.nbytes  # the batches and what they are joined into
        yield concatenate(held)

    def row_norms(self) -> Array:
        """Euclidean norms of the rows, (N,)."""
        return self._collect(lambda batch: batch.row_norms())

    def _collect(self, compute: Callable[[GradientMatrix], Array]) -> Array:
        xp = _backend.namespace(self._like)
        return xp.concat([compute(batch) for batch in self._batches()], axis=0)

    # ------------------------------------------------------------------------------- rearranged

    def _take(self, rows: slice | Any) -> GradientMatrix:
        if isinstance(rows, slice):
            chosen = range(rows.start, rows.stop, rows.step)
            return self._derived(lambda: self._sliced(chosen), len(chosen))
        order = rows.argsort(kind="stable")
        picked = concatenate(self._picked(rows[order]))
        return picked._take(order.argsort(kind="stable"))

    def _sliced(self, chosen: range) -> Iterator[GradientMatrix]:
        """The chosen rows batch by batch; the pass ends with the last of them."""
        start = 0
        for batch in self._batches():
            before = -(-(start - chosen.start) // chosen.step) if start > chosen.start else 0
            after = -(-(start + len(batch) - chosen.start) // chosen.step)
            here = chosen[before : max(after, 0)]
            if len(here):
                yield batch._take(slice(here[0] - start, here[-1] - start + 1, chosen.step))
            start += len(batch)
            if start >= chosen.stop:
                return

    def _picked(self, ascending: Any) -> Iterator[GradientMatrix]:
        start = 0
        for batch in self._batches():
            first, last = ascending.searchsorted([start, start + len(batch)])
            if first < last:
                yield batch._take(ascending[first:last] - start)
            start += len(batch)
            if start > ascending[-1]:
                return

    @classmethod
    def _join(cls, matrices: Sequence[Any]) -> StreamedGradients:
        def chained() -> Iterator[GradientMatrix]:
            for G in matrices:
                yield from G._batches()

        return matrices[0]._derived(chained, sum(len(G) for G in matrices))

    def _scaled(self, factor: float) -> StreamedGradients:
        return self._mapped(lambda batch: batch._scaled(factor))

    def _rescaled(self, factors: Mapping[str, float]) -> StreamedGradients:
        return self._mapped(lambda batch: batch.rescaled(factors))

    def _mapped(self, change: Callable[[GradientMatrix], GradientMatrix]) -> StreamedGradients:
        return self._derived(lambda: map(change, self._batches()), self._n_samples)


def _against(other: GradientMatrix, panel: GradientMatrix) -> Array:
    """The product other panelᵀ, with the batches of a stream one after the other."""
    if isinstance(other, StreamedGradients):
        return other._collect(lambda batch: batch.gram(panel))
    return other.gram(panel)


_BATCH_BYTES = 64 << 20  # what is read at a time of one array that holds all rows


def _reiterable(batches: Batches) -> Callable[[], Iterable[Any]]:
    array: Any = batches
    shape = getattr(batches, "shape", ())
    if (
        len(shape) == 2
        and hasattr(batches, "__getitem__")
        and not isinstance(batches, GradientMatrix)
    ):
        rows = max(1, _BATCH_BYTES // (8 * max(1, shape[1])))
        return lambda: (array[i : min(i + rows, shape[0]), :] for i in range(0, shape[0], rows))
    if isinstance(batches, Iterator):
        msg = (
            f"the batches are read several times, but a {type(batches).__name__} can be read only "
            "once; pass a list, or a function that returns a new iterator"
        )
        raise TypeError(msg)
    if isinstance(batches, Iterable):
        return lambda: batches
    if callable(batches):
        return batches
    msg = f"batches must be iterable or a function without arguments, got {type(batches).__name__}"
    raise TypeError(msg)
