"""Per-sample gradients of a table of which each sample looks up a few rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

from .. import _backend
from ..layout import Layout
from ..protocols import Array
from . import _memory, _sums
from ._check import check_data, take_rows
from ._groups import Groups, most_equal
from .base import GradientMatrix


class EmbeddingGradients(GradientMatrix):
    """Rows vec(Σ_t e_r(t) d_itᵀ), row-major, of a table (n_rows, d) that is looked up at r(t).

    Args:
        output_grads: derivatives of the loss in what was looked up, (N, T, d) or (N, d).
        indices: the rows that were looked up, integers (N, T) or (N,).
        n_rows: number of rows of the table.
        padding_index: a row without gradient, as `torch.nn.Embedding` has it.
        layout: names of the parameter blocks.

    A row that a sample looks up several times has the sum of its gradients. Samples of different
    length are padded with zeros in `output_grads`, at any index. All sums have one order: results
    are the same bits each time, on GPUs too.

    Raises TypeError for another kind or device, ValueError where shapes differ or an index is
    outside the table.
    Cost: memory N T (d + 1). G V reads N T d numbers a column, Gᵀ U takes 32 N T d flops a
    column, both beside the p numbers of the argument or the result. A Gram matrix takes
    2 N M T T' d flops, column norms a copy of `output_grads`. Indices are sorted once when the
    matrix is made, which on a GPU waits for the device.

    Example:
        >>> import numpy as np
        >>> from invhvp.gradients import EmbeddingGradients
        >>> d = np.array([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
        >>> G = EmbeddingGradients(output_grads=d, indices=np.array([[2, 0, 2]]), n_rows=3)
        >>> G.to_dense()
        array([[3., 4., 0., 0., 6., 8.]])
        >>> G.row_norms()
        array([11.18...])
    """

    def __init__(
        self,
        *,
        output_grads: Array,
        indices: Array,
        n_rows: int,
        padding_index: int | None = None,
        layout: Layout | None = None,
    ) -> None:
        check_data(output_grads, "output_grads", {2: "(N, d)", 3: "(N, T, d)"})
        _check_indices(indices, output_grads)
        xp = _backend.namespace(output_grads)
        if output_grads.ndim == 2:
            output_grads, indices = output_grads[:, None, :], indices[:, None]
        self._indices = xp.astype(indices, xp.arange(1).dtype)  # the library's own index type
        self._d = output_grads
        N, self._length, self._size = output_grads.shape
        self._n_rows = int(n_rows)
        super().__init__(N, self._n_rows * self._size, like=output_grads, layout=layout)
        self._most, lowest, highest = most_equal(self._indices)
        if lowest < 0 or highest >= self._n_rows:
            msg = f"indices must lie in range({n_rows}), got {lowest} to {highest}"
            raise ValueError(msg)
        if padding_index is not None:
            if not 0 <= padding_index < self._n_rows:
                msg = f"padding_index must be a row of the {n_rows}, got {padding_index}"
                raise ValueError(msg)
            padding = (self._indices == padding_index)[:, :, None]
            self._d = xp.where(padding, xp.zeros_like(self._d), self._d)

    @property
    def output_grads(self) -> Array:
        """The derivatives in what was looked up, (N, T, d); zero where it was padding."""
        return self._d

    @property
    def indices(self) -> Array:
        """The rows that were looked up, integers (N, T)."""
        return self._indices

    @property
    def block_shape(self) -> tuple[int, int]:
        """(n_rows, d)."""
        return (self._n_rows, self._size)

    @property
    def nbytes(self) -> int:
        """Bytes of derivatives and indices."""
        return self._n_samples * self._length * (self._size * _memory.itemsize(self._like) + 8)

    def _with(self, d: Array, indices: Array) -> EmbeddingGradients:
        """The same table with other samples, whose indices are known to be right."""
        other = copy.copy(self)
        other._d, other._indices = d, indices
        other._n_samples, other._length = indices.shape
        return other

    def _dense(self) -> Array:
        xp, found = _backend.namespace(self._d), []
        for rows in _memory.spans(self._n_samples, 3 * self._n_parameters, self._like):
            d, indices = self._d[rows, :, :], self._indices[rows, :]
            n, T = indices.shape
            sample = xp.arange(n, dtype=indices.dtype, device=_backend.device(indices))
            keys = xp.reshape(sample[:, None] * self._n_rows + indices, (n * T,))
            groups = Groups.of(keys, n * self._n_rows, min(T, self._most))
            sums = groups.sums(xp.reshape(d, (n * T, self._size)))
            found.append(xp.reshape(sums, (n, self._n_parameters)))
        return xp.concat(found, axis=0) if len(found) > 1 else found[0]

    def _take(self, rows: slice | Any) -> EmbeddingGradients:
        return self._with(take_rows(self._d, rows), take_rows(self._indices, rows))

    @classmethod
    def _join(cls, matrices: Sequence[Any]) -> EmbeddingGradients:
        first = matrices[0]
        if any(other.block_shape != first.block_shape for other in matrices[1:]):
            shapes = [other.block_shape for other in matrices]
            msg = f"gradients of embeddings are joined for tables of one shape, got {shapes}"
            raise ValueError(msg)
        xp, length = _backend.namespace(first._d), max(G._length for G in matrices)
        d = xp.concat([_padded(G._d, length) for G in matrices], axis=0)
        indices = xp.concat([_padded(G._indices, length) for G in matrices], axis=0)
        joined = first._with(d, indices)
        padding = sum(len(G) * (length - G._length) for G in matrices)  # of row 0
        joined._most = min(sum(G._most for G in matrices) + padding, len(joined) * length)
        return joined

    def _scaled(self, factor: float) -> EmbeddingGradients:
        return self._with(factor * self._d, self._indices)

    # --------------------------------------------------------------------------------- products

    def _matmat(self, V: Array) -> Array:
        xp, k, size = _backend.namespace(V), V.shape[1], self._size
        step = xp.arange(size, dtype=self._indices.dtype, device=_backend.device(V))
        found = []
        for rows in _memory.spans(self._n_samples, self._length * size * (k + 3), V):
            d, indices = self._d[rows, :, :], self._indices[rows, :]
            n, terms = d.shape[0], self._length * size
            # Positions in the vector: reshaping V would copy it where its columns are not rows.
            places = indices[:, :, None] * size + step[None, None, :]
            seen = xp.take(V, xp.reshape(places, (n * terms,)), axis=0)
            seen = xp.reshape(seen, (n, terms, k))
            found.append(_sums.product(xp.reshape(d, (n, 1, terms)), seen)[:, 0, :])
        return xp.concat(found, axis=0) if len(found) > 1 else found[0]

    def _rmatmat(self, U: Array) -> Array:
        xp, k, T = _backend.namespace(U), U.shape[1], self._length
        terms, groups = self._n_samples * T, self._groups()
        d = xp.take(xp.reshape(self._d, (terms, self._size)), groups.order, axis=0)
        sample = groups.order // T
        columns = []
        for c in _memory.spans(k, 4 * terms, U):
            u, parts = xp.take(U[:, c], sample, axis=0), []
            for some in _memory.spans(self._size, 4 * terms * u.shape[1], U):
                products = d[:, some, None] * u[:, None, :]
                sums = groups.sums_in_order(xp.reshape(products, (terms, -1)))
                parts.append(xp.reshape(sums, (self._n_rows, -1, u.shape[1])))
            whole = xp.concat(parts, axis=1) if len(parts) > 1 else parts[0]
            columns.append(xp.reshape(whole, (self._n_parameters, u.shape[1])))
        return xp.concat(columns, axis=1) if len(columns) > 1 else columns[0]

    def _groups(self) -> Groups:
        flat = _backend.namespace(self._indices).reshape(self._indices, (-1,))
        return Groups.of(flat, self._n_rows, self._most)

    def _gram(self, other: GradientMatrix) -> Array | None:
        if not (isinstance(other, EmbeddingGradients) and other.block_shape == self.block_shape):
            return None
        xp = _backend.namespace(self._like)
        most = _memory.budget(self._like) // _memory.itemsize(self._like)
        side = max(math.isqrt(most // (4 * self._length * other._length)), 1)
        lines = []
        for left in _pieces(self, side):
            line = [_pairs(left, right) for right in _pieces(other, side)]
            lines.append(xp.concat(line, axis=1) if len(line) > 1 else line[0])
        return xp.concat(lines, axis=0) if len(lines) > 1 else lines[0]

    def row_norms(self) -> Array:
        """Euclidean norms of the rows, (N,)."""
        xp, found = _backend.namespace(self._like), []
        for rows in _memory.spans(self._n_samples, 4 * self._length**2, self._like):
            summed = _summed_once(self._d[rows, :, :], self._indices[rows, :])
            found.append(_sums.norms(xp.reshape(summed, (summed.shape[0], -1)), axis=1))
        return _sums.narrow(xp.concat(found, axis=0), self._like)

    def column_norms(self) -> Array:
        """Euclidean norms of the columns, (p,)."""
        xp, terms = _backend.namespace(self._like), self._n_samples * self._length
        groups = self._groups()
        summed = [
            _summed_once(self._d[rows, :, :], self._indices[rows, :])
            for rows in _memory.spans(self._n_samples, 4 * self._length**2, self._like)
        ]
        whole = xp.reshape(xp.concat(summed, axis=0), (terms, self._size))
        found = []
        for some in _memory.spans(self._size, 8 * terms, self._like):
            part, scale = _sums.unit_columns(_sums.wide(whole[:, some]))
            norms = xp.sqrt(groups.sums(part * part)) * scale[None, :]
            found.append(_sums.narrow(norms, self._like))
        return xp.reshape(xp.concat(found, axis=1), (self._n_parameters,))

    def _describe(self) -> str:
        T = f", T={self._length}" if self._length > 1 else ""
        return f"{self._n_samples}x({self._n_rows}x{self._size}){T}"


def _summed_once(d: Array, indices: Array) -> Array:
    """Derivatives (n, T, d), all of a sample's for one row at the first of its uses."""
    xp, T = _backend.namespace(d), indices.shape[1]
    if T == 1:
        return d
    same = indices[:, :, None] == indices[:, None, :]
    position = xp.arange(T, dtype=indices.dtype, device=_backend.device(indices))
    first = ~xp.any(same & (position[None, None, :] < position[None, :, None]), axis=2)
    return _sums.product(xp.astype(same & first[:, :, None], d.dtype), d)


def _pieces(G: EmbeddingGradients, size: int) -> list[EmbeddingGradients]:
    if size >= len(G):
        return [G]
    return [G._take(slice(n, min(n + size, len(G)))) for n in range(0, len(G), size)]


def _pairs(left: EmbeddingGradients, right: EmbeddingGradients) -> Array:
    """Inner products of all pairs of derivatives, where they are of the same row of the table."""
    xp = _backend.namespace(left.like)

    def flat(G: EmbeddingGradients) -> tuple[Array, Array]:
        terms = len(G) * G._length
        return xp.reshape(G._d, (terms, G._size)), xp.reshape(G._indices, (terms,))

    (x, r), (y, s) = flat(left), flat(right)
    products = _sums.product(x, xp.matrix_transpose(y))
    products = xp.where(r[:, None] == s[None, :], products, xp.zeros_like(products))
    if left._length == right._length == 1:
        return products
    shape = (len(left), left._length, len(right), right._length)
    return xp.sum(xp.reshape(products, shape), axis=(1, 3), dtype=products.dtype)


def _check_indices(indices: Any, output_grads: Array) -> None:
    if not _backend.is_array(indices):
        msg = f"indices must be an integer array (N, T) or (N,), got {type(indices).__name__}"
        raise TypeError(msg)
    mine, theirs = _backend.library_name(output_grads), _backend.library_name(indices)
    if mine != theirs:
        msg = f"output_grads is an array of {mine}, indices of {theirs}; convert one of them"
        raise TypeError(msg)
    if not _backend.namespace(indices).isdtype(indices.dtype, "integral"):
        msg = f"indices must be integers, got {_backend.dtype_name(indices.dtype)}"
        raise TypeError(msg)
    if not _backend.is_tracing(indices) and not _backend.same_device(indices, output_grads):
        msg = (
            f"output_grads is on device {_backend.device(output_grads)}, indices on "
            f"{_backend.device(indices)}; move one of them"
        )
        raise TypeError(msg)
    if tuple(indices.shape) != tuple(output_grads.shape[:-1]):
        msg = (
            "indices must have the shape of output_grads without its last axis, got "
            f"{tuple(indices.shape)} and {tuple(output_grads.shape)}"
        )
        raise ValueError(msg)


def _padded(x: Array, length: int) -> Array:
    """Zeros appended along the second axis: a zero term adds nothing, whatever its row."""
    short = length - x.shape[1]
    if short == 0:
        return x
    xp, shape = _backend.namespace(x), (x.shape[0], short, *x.shape[2:])
    return xp.concat([x, xp.zeros(shape, dtype=x.dtype, device=_backend.device(x))], axis=1)
