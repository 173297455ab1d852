"""The nouns of the library, as structural types: anything that quacks is accepted."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, runtime_checkable

Array: TypeAlias = Any
"""An array of any library that implements the array-API standard (2024.12)."""

Damping: TypeAlias = Any
"""λ ≥ 0: a float, a 0-d array, or a mapping from block names of a `Layout` to floats."""


@runtime_checkable
class Operator(Protocol):
    """A real symmetric linear map on R^n, known through its products."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def device(self) -> Any: ...
    def __matmul__(self, X: Array, /) -> Array: ...


class Reduce(Protocol):
    """Sum a small array over the processes that share a sharded parameter vector."""

    def __call__(self, x: Array, /) -> Array: ...


class Processes(Reduce, Protocol):
    """The processes of one computation: calling it sums an array over them.

    Every process makes the same calls in the same order and gets the same bits. The argument is
    given up: it may be overwritten.
    """

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...


@runtime_checkable
class Inverse(Operator, Protocol):
    """(A + λI)⁻¹ or an approximation of it, as an operator with diagnostics."""

    @property
    def fixed_spd(self) -> bool: ...
    def solve(self, B: Any, /) -> Any: ...
    def with_damping(self, damping: Damping, /) -> Any: ...


@runtime_checkable
class Method(Protocol):
    """A frozen set of options that knows how to prepare an `Inverse`."""

    def prepare(self, A: Any, /, damping: Damping) -> Any: ...


@runtime_checkable
class GradientMatrix(Protocol):
    """Per-sample gradients as an N × p matrix with samples in rows."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def device(self) -> Any: ...
    @property
    def T(self) -> Any: ...
    def __matmul__(self, V: Array, /) -> Array: ...
    def gram(self, other: Any = None, /) -> Array: ...
    def row_norms(self) -> Array: ...
    def to_dense(self) -> Array: ...


@runtime_checkable
class HasInverse(Protocol):
    """An operator with an exact damped inverse of its own."""

    def inverse(self, damping: Damping, /) -> Any: ...


@runtime_checkable
class HasDiagonal(Protocol):
    """An operator that knows its diagonal, shape (n,)."""

    def diagonal(self) -> Array: ...


@runtime_checkable
class HasGradients(Protocol):
    """An operator (1/c) Σ g_i g_iᵀ that exposes the rows g_i."""

    @property
    def gradients(self) -> GradientMatrix: ...


@runtime_checkable
class HasTerms(Protocol):
    """An operator that is a mean of `n_terms` terms and can restrict itself to some."""

    @property
    def n_terms(self) -> int: ...
    def subset(self, indices: Any, /) -> Operator: ...
