"""The base of all gradient matrices: validation once, fallbacks once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .. import _backend
from ..layout import Layout
from ..protocols import Array
from . import _memory, _sums
from ._check import check_kind, check_library, check_rows
from .transposed import Transposed, from_left


class GradientMatrix:
    """An N × p matrix G with the gradient of one sample in each row.

    A subclass implements `_dense`, `_take`, `_join` and `_scaled`; it overrides the products and
    norms where its structure makes them cheaper than the dense rows, formed a chunk at a time.

    Args:
        n_samples: N.
        n_parameters: p.
        like: any array of the library, dtype and device the rows live in.
        layout: names of the parameter blocks, where they are known.
    """

    __array_ufunc__ = None  # NumPy and CuPy arrays on the left defer to __rmatmul__
    __array_priority__ = 1000
    ndim = 2

    def __init__(
        self, n_samples: int, n_parameters: int, *, like: Array, layout: Layout | None = None
    ) -> None:
        self._n_samples = int(n_samples)
        self._n_parameters = int(n_parameters)
        self._like = _backend.empty_like(like)
        if layout is not None and layout.n != n_parameters:
            msg = f"the layout has {layout.n} parameters, the gradients {n_parameters}"
            raise ValueError(msg)
        self._layout = layout

    @property
    def shape(self) -> tuple[int, int]:
        """(N, p)."""
        return (self._n_samples, self._n_parameters)

    @property
    def dtype(self) -> Any:
        """The dtype of the rows, which is also the dtype that `@` accepts."""
        return self._like.dtype

    @property
    def device(self) -> Any:
        """The device on which the rows live."""
        return _backend.device(self._like)

    @property
    def like(self) -> Array:
        """An empty array of the library, dtype and device of the rows."""
        return self._like

    @property
    def layout(self) -> Layout | None:
        """Named blocks of the parameter vector, or None."""
        return self._layout

    @property
    def block_shape(self) -> tuple[int, ...]:
        """The shape of one row as a parameter block."""
        return (self._n_parameters,)

    @property
    def nbytes(self) -> int:
        """Bytes that the matrix holds on to."""
        return 0

    @property
    def T(self) -> Transposed:
        """The p × N transpose, a view."""
        return Transposed(self)

    def __len__(self) -> int:
        return self._n_samples

    # ----------------------------------------------------------------- what subclasses compute

    def _dense(self) -> Array:
        raise NotImplementedError

    def _take(self, rows: slice | Any) -> GradientMatrix:
        raise NotImplementedError

    @classmethod
    def _join(cls, matrices: Sequence[Any]) -> GradientMatrix:
        raise NotImplementedError

    def _scaled(self, factor: float) -> GradientMatrix:
        raise NotImplementedError

    def _rescaled(self, factors: Mapping[str, float]) -> GradientMatrix:
        if len(factors) == 1:
            return self._scaled(*factors.values())
        msg = (
            f"{type(self).__name__} cannot be scaled by blocks within itself; make every block "
            "of the layout a block of StackedGradients"
        )
        raise TypeError(msg)

    def _matmat(self, V: Array) -> Array:
        xp = _backend.namespace(V)
        return xp.concat([_sums.product(part.to_dense(), V) for part in self.parts()], axis=0)

    def _rmatmat(self, U: Array) -> Array:
        xp, total, start = _backend.namespace(U), None, 0
        for part in self.parts():
            rows = slice(start, start + len(part))
            term = _sums.product(xp.matrix_transpose(part.to_dense()), U[rows, :])
            total = term if total is None else total + term
            start = rows.stop
        return total

    def _gram(self, other: GradientMatrix) -> Array | None:
        """G otherᵀ where the structure of both allows it, else None."""
        return None

    def _triangle(self, cuts: Sequence[slice]) -> _sums.Lines | None:
        """The blocks of G Gᵀ between rows cut so, on and below the diagonal; None as `_gram`."""
        parts = [self] if len(cuts) == 1 else [self._take(rows) for rows in cuts]
        lines = []
        for i, left in enumerate(parts):
            line = [left._gram(right) for right in parts[: i + 1]]
            if any(block is None for block in line):
                return None
            lines.append(line)
        return lines

    def _small_gram(self, other: GradientMatrix) -> Array:
        """G otherᵀ as a small array, from products in float64 where that costs little."""
        return _backend.to_small(self.gram(other))

    # --------------------------------------------------------------------------------- products

    def __matmul__(self, V: Any, /) -> Array:
        if isinstance(V, Transposed):
            return self.gram(V.T)
        N, p = self.shape
        self._check_operand(V, (N, p), "samples x parameters")
        return self._matmat(V[:, None])[:, 0] if V.ndim == 1 else self._matmat(V)

    def __rmatmul__(self, Y: Array, /) -> Array:
        return from_left(Y, self.T)

    def _transposed_matmul(self, U: Array) -> Array:
        N, p = self.shape
        self._check_operand(U, (p, N), "parameters x samples")
        return self._rmatmat(U[:, None])[:, 0] if U.ndim == 1 else self._rmatmat(U)

    def _check_operand(self, X: Any, shape: tuple[int, int], axes: str) -> None:
        name, (other, rows) = type(self).__name__, shape
        check_library(X, self._like, name)
        check_kind(X, self._like, name)
        if X.ndim in (1, 2) and X.shape[0] == rows:
            return
        hint = ""
        if X.ndim in (1, 2) and X.shape[0] == other:
            hint = f"; did you mean {'G.T' if shape == self.shape else 'G'} @ X"
        elif X.ndim == 2 and X.shape[1] == rows:
            hint = "; vectors are columns: pass the transpose"
        msg = (
            f"{name} is {other} x {rows} here ({axes}) and takes arrays of shape "
            f"({rows},) or ({rows}, k), got {tuple(X.shape)}{hint}"
        )
        raise ValueError(msg)

    def gram(self, other: GradientMatrix | None = None, /) -> Array:
        """All inner products of rows, G otherᵀ of shape (N, M); with itself by default.

        With itself it is exactly symmetric, and little more than a triangle is computed.

        Raises TypeError for another library, dtype or device, ValueError for another p.
        Cost: by structure where both share one; else the rows of one are formed by chunks.
        """
        other = self if other is None else other
        self._check_matches(other)
        if other is self:
            lines = self._triangle(_memory.triangle_cuts(self._n_samples))
            return _sums.symmetric(self._pairs(self)) if lines is None else _sums.mirrored(lines)
        return self._pairs(other)

    def _pairs(self, other: GradientMatrix) -> Array:
        result = self._gram(other)
        if result is not None:
            return result
        xp = _backend.namespace(self._like)
        result = other._gram(self)
        if result is not None:
            return xp.matrix_transpose(result)
        blocks = [self._matmat(xp.matrix_transpose(part.to_dense())) for part in other.parts()]
        return xp.concat(blocks, axis=1)

    def _check_matches(self, other: Any) -> None:
        if not isinstance(other, GradientMatrix):
            msg = f"expected a gradient matrix, got {type(other).__name__}; wrap it first"
            raise TypeError(msg)
        check_kind(other.like, self._like, type(self).__name__)
        if other.shape[1] != self._n_parameters:
            msg = (
                f"gradient matrices of one model have the same number of parameters, got "
                f"{self._n_parameters} and {other.shape[1]}"
            )
            raise ValueError(msg)

    # ------------------------------------------------------------------------------------ norms

    def row_norms(self) -> Array:
        """Euclidean norms of the rows, (N,)."""
        xp = _backend.namespace(self._like)
        found = [_sums.norms(part.to_dense(), axis=1) for part in self.parts()]
        return _sums.narrow(xp.concat(found, axis=0), self._like)

    def column_norms(self) -> Array:
        """Euclidean norms of the columns, (p,): √N times the root of the Fisher diagonal."""
        xp, total = _backend.namespace(self._like), None
        for part in self.parts():
            found = _sums.norms(part.to_dense(), axis=0)
            both = found if total is None else xp.stack([total, found], axis=0)
            total = found if total is None else _sums.norms(both, axis=0)
        return _sums.narrow(total, self._like)

    # ------------------------------------------------------------------------------- rearranged

    def __getitem__(self, rows: Any) -> GradientMatrix:
        return self._take(check_rows(rows, self._n_samples))

    def chunks(self, max_bytes: int | None = None) -> Iterator[slice]:
        """Consecutive row slices whose dense rows fit in `max_bytes`.

        By default an eighth of the memory that is free, at most 64 MiB; never less than a row.
        """
        yield from _memory.spans(self._n_samples, self._n_parameters, self._like, max_bytes)

    def parts(self, max_bytes: int | None = None) -> Iterator[GradientMatrix]:
        """The rows in order, as matrices of the size of `chunks`, in one pass over the data."""
        slices = list(self.chunks(max_bytes))
        return iter([self]) if len(slices) == 1 else (self._take(rows) for rows in slices)

    def to_dense(self) -> Array:
        """The (N, p) array. Cost: N p numbers."""
        return self._dense()

    def rescaled(self, factors: Mapping[str, float]) -> GradientMatrix:
        """G diag(c) with one factor c for each named block of the parameters.

        Raises TypeError where the blocks have no names, ValueError for unknown or missing ones.
        """
        if self._layout is None:
            msg = f"{type(self).__name__} has no named blocks to scale; pass a layout"
            raise TypeError(msg)
        unknown = [name for name in factors if name not in self._layout]
        missing = [name for name in self._layout if name not in factors]
        if unknown or missing:
            msg = (
                f"factors need exactly the blocks {list(self._layout.names)}; "
                f"unknown: {unknown}, missing: {missing}"
            )
            raise ValueError(msg)
        return self._rescaled(factors)

    def _describe(self) -> str:
        return f"{self._n_samples}x{self._n_parameters}"

    def __repr__(self) -> str:
        dtype = _backend.dtype_name(self.dtype)
        return f"{type(self).__name__}({self._describe()}, {dtype}, {self.device})"


def concatenate(matrices: Iterable[GradientMatrix]) -> GradientMatrix:
    """The samples of several gradient matrices of one class and structure, one after the other.

    Raises TypeError for several classes, ValueError for several structures.

    Example:
        >>> import numpy as np
        >>> from invhvp.gradients import DenseGradients, concatenate
        >>> concatenate([DenseGradients(np.eye(2)), DenseGradients(np.ones((3, 2)))]).shape
        (5, 2)
    """
    matrices = list(matrices)
    if not matrices:
        msg = "concatenate needs at least one gradient matrix"
        raise ValueError(msg)
    first = matrices[0]
    for other in matrices[1:]:
        first._check_matches(other)
        if type(other) is not type(first):
            msg = f"cannot join {type(first).__name__} with {type(other).__name__}"
            raise TypeError(msg)
    return first if len(matrices) == 1 else first._join(matrices)
