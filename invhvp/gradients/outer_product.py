"""Per-sample gradients of a dense layer: sums of outer products that are never multiplied out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeGuard

from .. import _backend
from ..layout import Layout
from ..protocols import Array
from . import _memory, _outer_grams, _shared_inputs, _sums
from ._check import check_data, check_kind, take_rows
from .base import GradientMatrix


class OuterProductGradients(GradientMatrix):
    """Rows vec(Σ_t d_it a_itᵀ), row-major, of the weights (o, i) of a dense layer.

    G V = Σ_t d_tᵀ V a_t,   G G'ᵀ = Σ_ts (d_t · d'_s) (a_t · a'_s)

    Args:
        output_grads: d, (N, T, o) or (N, o): derivatives of the loss in the layer's outputs.
        inputs: a, (N, T, i) or (N, i): what the layer was applied to. With N / C rows, each
            serves C consecutive rows of d, as it does for the columns of a Jacobian.
        layout: names of the parameter blocks.

    A bias is a block of its own in `StackedGradients`: `DenseGradients` of Σ_t d_it. Samples of
    different length T are padded with zeros, which changes nothing.

    Raises TypeError for another kind, dtype or device, ValueError where N or T differ.
    Cost: memory N T (o + i). A product takes 2 N T o i flops a column, C times fewer where C rows
    share their inputs; a Gram matrix 2 N M T T' (o + i), a few milliseconds for T = 1 at any
    number of parameters. For T > 1 the dense rows are formed, a bounded piece at a time, where
    flops and traffic say so.

    Example:
        >>> import numpy as np
        >>> from invhvp.gradients import OuterProductGradients
        >>> d, a = np.array([[1.0, 2.0]]), np.array([[3.0, 4.0, 5.0]])
        >>> G = OuterProductGradients(output_grads=d, inputs=a)
        >>> G.to_dense()
        array([[ 3.,  4.,  5.,  6.,  8., 10.]])
        >>> G.gram()
        array([[250.]])
    """

    def __init__(self, *, output_grads: Array, inputs: Array, layout: Layout | None = None) -> None:
        check_data(output_grads, "output_grads", {2: "(N, o)", 3: "(N, T, o)"})
        check_data(inputs, "inputs", {2: "(N, i)", 3: "(N, T, i)"})
        check_kind(inputs, output_grads, "OuterProductGradients (output_grads)")
        N, each = output_grads.shape[0], output_grads.shape[0] // inputs.shape[0]
        whole = each > 0 and each * inputs.shape[0] == N
        if not whole or output_grads.shape[1:-1] != inputs.shape[1:-1]:
            msg = (
                "output_grads and inputs must agree in all but their last axis, or the first must "
                f"have several rows for each of the second, got shapes {tuple(output_grads.shape)} "
                f"and {tuple(inputs.shape)}"
            )
            raise ValueError(msg)
        if output_grads.ndim == 2:
            output_grads, inputs = output_grads[:, None, :], inputs[:, None, :]
        self._d, self._distinct, self._each = output_grads, inputs, each
        self._repeated = inputs if each == 1 else None
        self._o, self._i = output_grads.shape[2], inputs.shape[2]
        super().__init__(N, self._o * self._i, like=output_grads, layout=layout)

    @property
    def output_grads(self) -> Array:
        """d, (N, T, o)."""
        return self._d

    @property
    def inputs(self) -> Array:
        """a, (N, T, i), repeated where several rows share one."""
        return self._a

    @property
    def distinct_inputs(self) -> Array:
        """The inputs as they were given, (N / C, T, i) where C rows share one."""
        return self._distinct

    @property
    def block_shape(self) -> tuple[int, int]:
        """(o, i)."""
        return (self._o, self._i)

    @property
    def nbytes(self) -> int:
        """Bytes of d and a."""
        numbers = self._n_terms * self._o + self._n_terms // self._each * self._i
        return numbers * _memory.itemsize(self._like)

    @property
    def _n_terms(self) -> int:
        return self._n_samples * self._length

    @property
    def _a(self) -> Array:
        if self._repeated is None:
            xp = _backend.namespace(self._distinct)
            self._repeated = xp.repeat(self._distinct, self._each, axis=0)
        return self._repeated

    @property
    def _length(self) -> int:
        return self._d.shape[1]

    def _with(self, d: Array, a: Array) -> OuterProductGradients:
        layout = self._layout if (d.shape[2], a.shape[2]) == self.block_shape else None
        return OuterProductGradients(output_grads=d, inputs=a, layout=layout)

    def _dense(self) -> Array:
        xp = _backend.namespace(self._d)
        if self._length == 1:
            rows = self._d[:, 0, :, None] * self._a[:, 0, None, :]
        else:
            rows = _sums.product(xp.matrix_transpose(self._d), self._a)
        return xp.reshape(rows, self.shape)

    def _take(self, rows: slice) -> OuterProductGradients:
        d = take_rows(self._d, rows)
        if self._each > 1 and isinstance(rows, slice) and rows.step in (None, 1):
            each, (start, stop, _) = self._each, rows.indices(len(self))
            if start % each == stop % each == 0 and start < stop:
                return self._with(d, self._distinct[start // each : stop // each, :, :])
        return self._with(d, take_rows(self._a, rows))

    @classmethod
    def _join(cls, matrices: Sequence[Any]) -> OuterProductGradients:
        first = matrices[0]
        for other in matrices[1:]:
            if other.block_shape != first.block_shape:
                msg = (
                    "outer products are joined over layers of one shape, got "
                    f"{first.block_shape} and {other.block_shape}"
                )
                raise ValueError(msg)
        xp, length = _backend.namespace(first._d), max(G._length for G in matrices)
        shared = len({G._each for G in matrices}) == 1
        return first._with(
            xp.concat([_padded(G._d, length) for G in matrices], axis=0),
            xp.concat([_padded(G._distinct if shared else G._a, length) for G in matrices], axis=0),
        )

    def _scaled(self, factor: float) -> OuterProductGradients:
        return self._with(factor * self._d, self._distinct)

    # --------------------------------------------------------------------------------- products

    def _matmat(self, V: Array) -> Array:
        if self._dense_pays(V.shape[1], passes_of_result=1):
            return super()._matmat(V)
        xp = _backend.namespace(V)
        groups = _memory.spans(V.shape[1], self._n_parameters, V)  # what reshaping may copy
        contract = self._contract
        if self._each > 1:
            contract = partial(_shared_inputs.matmat, self._d, self._distinct)
        columns = [contract(V[:, c]) for c in groups]
        return xp.concat(columns, axis=1) if len(columns) > 1 else columns[0]

    def _contract(self, V: Array) -> Array:
        """Contract the longer of o and i first: what is left over, (N T k) times it, is short."""
        xp, k = _backend.namespace(V), V.shape[1]
        o, i, found = self._o, self._i, []
        if o <= i:
            V = xp.reshape(xp.matrix_transpose(V), (k * o, i))
        else:
            V = xp.reshape(V, (o, i * k))
        for rows in _memory.spans(self._n_samples, self._length * min(o, i) * k, V):
            d, a = self._d[rows, :, :], self._a[rows, :, :]
            N, T = d.shape[:2]
            if o <= i:
                left = _sums.product(xp.reshape(a, (N * T, i)), xp.matrix_transpose(V))
                terms = _sums.product(xp.reshape(left, (N, T, k, o)), d[:, :, :, None])
                found.append(xp.sum(terms[:, :, :, 0], axis=1, dtype=V.dtype))
            else:
                left = _sums.product(xp.reshape(d, (N * T, o)), V)
                flat = xp.reshape(a, (N, 1, T * i))
                found.append(_sums.product(flat, xp.reshape(left, (N, T * i, k)))[:, 0, :])
        return xp.concat(found, axis=0)

    def _rmatmat(self, U: Array) -> Array:
        k = U.shape[1]
        if self._dense_pays(k, passes_of_result=3):
            return super()._rmatmat(U)
        if self._each > 1:
            return _shared_inputs.rmatmat(self._d, self._distinct, U)
        xp, total = _backend.namespace(U), None
        o, i = self._o, self._i
        for rows in _memory.spans(self._n_samples, self._length * min(o, i) * k, U):
            u, d, a = U[rows, :], self._d[rows, :, :], self._a[rows, :, :]
            terms = d.shape[0] * d.shape[1]
            if o <= i:
                weighted = xp.reshape(d[:, :, None, :] * u[:, None, :, None], (terms, k * o))
                part = _sums.product(xp.matrix_transpose(weighted), xp.reshape(a, (terms, i)))
            else:
                weighted = xp.reshape(a[:, :, :, None] * u[:, None, None, :], (terms, i * k))
                outputs = xp.matrix_transpose(xp.reshape(d, (terms, o)))
                part = _sums.product(outputs, weighted)
            total = part if total is None else total + part
        if o <= i:
            return xp.matrix_transpose(xp.reshape(total, (k, o * i)))
        return xp.reshape(total, (o * i, k))

    def _dense_pays(self, k: int, *, passes_of_result: int) -> bool:
        """Whether k columns are cheaper with the dense rows, formed a chunk at a time."""
        N, T, p, short = self._n_samples, self._length, self._n_parameters, min(self._o, self._i)
        if T == 1 or k == 1:
            return False
        chunks = len(_memory.spans(N, p, self._like))
        factored = _memory.cost(2 * N * T * (p + short) * k, 2 * N * T * short * k + 2 * p * k)
        if self._each > 1:
            moved = 2 * (N // self._each) * T * self._o * k + 2 * p * k
            factored = _memory.cost(_shared_inputs.flops(self._d, self._distinct, k), moved)
        dense = _memory.cost(2 * N * p * (T + k), 2 * N * p + chunks * passes_of_result * p * k)
        return dense < factored

    # ------------------------------------------------------------------------------------ grams

    def _gram(self, other: GradientMatrix) -> Array | None:
        return _outer_grams.gram(self, other) if self._alike(other) else None

    def _triangle(self, cuts: Sequence[slice]) -> _sums.Lines | None:
        if len(cuts) > 1 and _outer_grams.forms_triangle(self):
            return _outer_grams.formed_triangle(self, cuts)
        return super()._triangle(cuts)

    def _small_gram(self, other: GradientMatrix) -> Array:
        if not self._alike(other):
            return super()._small_gram(other)
        xp, right = _backend.namespace(self._like), other._widened()
        each = 2 * self._length * (self._o + self._i)  # numbers of twice the size
        parts = [self._take(rows) for rows in _memory.spans(len(self), each, self._like)]
        found = [_outer_grams.gram(part._widened(), right) for part in parts]
        return _backend.to_small(xp.concat(found, axis=0))

    def _alike(self, other: GradientMatrix) -> TypeGuard[OuterProductGradients]:
        return isinstance(other, OuterProductGradients) and other.block_shape == self.block_shape

    def _widened(self) -> OuterProductGradients:
        return self._with(_sums.wide(self._d), _sums.wide(self._distinct))

    def row_norms(self) -> Array:
        """Euclidean norms of the rows, (N,)."""
        T, xp = self._length, _backend.namespace(self._like)
        if T * (self._o + self._i) > self._n_parameters:
            return super().row_norms()
        if T == 1:
            found = _sums.norms(self._d[:, 0, :], axis=1) * _sums.norms(self._a[:, 0, :], axis=1)
            return _sums.narrow(found, self._like)
        norms = []
        for rows in _memory.spans(self._n_samples, 3 * T * T, self._like):
            d, a = self._d[rows, :, :], self._a[rows, :, :]
            pairs = _sums.product(d, xp.matrix_transpose(d))
            pairs = _sums.wide(pairs) * _sums.wide(_sums.product(a, xp.matrix_transpose(a)))
            square = xp.sum(pairs, axis=(1, 2))
            norms.append(xp.sqrt(xp.where(square > 0, square, xp.zeros_like(square))))
        return _sums.narrow(xp.concat(norms, axis=0), self._like)

    def column_norms(self) -> Array:
        """Euclidean norms of the columns, (p,); for T = 1 one product of squares (o, N)(N, i)."""
        if self._length > 1:
            return super().column_norms()
        xp = _backend.namespace(self._like)
        d, d_scale = _sums.unit_columns(self._d[:, 0, :])
        a, a_scale = _sums.unit_columns(self._a[:, 0, :])
        square = _sums.product(xp.matrix_transpose(d * d), a * a)
        found = xp.sqrt(square) * d_scale[:, None] * a_scale[None, :]
        return xp.reshape(found, (self._n_parameters,))

    def _describe(self) -> str:
        N, T = self._n_samples, self._length
        return f"{N}x({self._o}x{self._i})" + (f", T={T}" if T > 1 else "")


def _padded(x: Array, length: int) -> Array:
    """Zeros appended along the second axis: a zero term adds nothing to a sum."""
    N, T, n = x.shape
    if length == T:
        return x
    xp = _backend.namespace(x)
    zeros = xp.zeros((N, length - T, n), dtype=x.dtype, device=_backend.device(x))
    return xp.concat([x, zeros], axis=1)
