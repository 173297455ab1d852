"""Kronecker factors and corrected eigenvalues of layers, summed over samples in any order."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from .. import _arithmetic, _backend
from ..operators import EigenKronecker, Kronecker
from ..operators.kronecker import eigenbases
from ..protocols import Array
from . import _layer_sums
from ._mergeable import Sums, working

Basis = tuple[Array, Array | None]


class FactorAccumulator(Sums):
    """Σ a aᵀ and Σ d dᵀ of the inputs and output gradients of layers.

    A commutative monoid: parts of the data can be summed anywhere, in any order, and `merge`d.

        F ≈ T · (Σ d dᵀ / NT) ⊗ (Σ a aᵀ / NT)

    NT counts positions that have a derivative (what a padding mask cuts off has none), N·C rows d
    may come with N inputs a (C derivatives a sample, which add up), and "reduce" sums d and
    averages a over the positions of a sample first.

    Args:
        shapes: (o, i) by layer.
        like: an array of the library and device of the sums, in the dtype of the results.
        sharing: "expand" or "reduce", what is done with positions that share the weights.

    Raises ValueError for unknown layers and shapes that do not fit. Cost: 2 N T (C o² + i²) flops,
    and the squared norms of the gradients, N T² (C o + i) or less; o² + i² numbers in float64.

    Source: Martens and Grosse (2015), §3; Grosse and Martens (2016) and Eschenhagen et al. (2023)
    on expand and reduce.

    Example:
        >>> import numpy as np
        >>> from invhvp.estimate import FactorAccumulator
        >>> sums = FactorAccumulator({"w": (1, 2)}, like=np.ones(1))
        >>> sums.add("w", np.array([[2.0]]), np.array([[1.0, 3.0]]))
        >>> sums.count(1)
        >>> sums.kronecker()["w"].to_dense()
        array([[ 4., 12.],
               [12., 36.]])
    """

    _kind = "factors"

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], *, like: Array, sharing: str = "expand"
    ) -> None:
        if sharing not in ("expand", "reduce"):
            msg = f'sharing= takes "expand" or "reduce", got {sharing!r}'
            raise ValueError(msg)
        self.sharing = sharing
        super().__init__(shapes, like=like, sharing=sharing)

    def _empty(self) -> FactorAccumulator:
        return FactorAccumulator(self.shapes, like=self._like, sharing=self.sharing)

    def add(
        self, name: str, output_grads: Array, inputs: Array, *, weights: Array | None = None
    ) -> None:
        """Add the samples of a batch to one layer; with `weights` (N,), d carries their roots."""
        d, a = self.checked(name, output_grads, inputs)
        reduce = self.sharing == "reduce"
        S, A, positions = _layer_sums.factors(d, a, weights, reduce=reduce)
        self.add_sums(name, S=S, A=A, positions=positions, squares=_layer_sums.squares(d, a))

    def traces(self) -> dict[str, float]:
        """The exact trace of the block of every layer; one transfer each."""
        found = {}
        for name in self.shapes:
            if f"{name}/squares" in self._sums:
                square = self.normalised(f"{name}/squares", self.total)
                found[name] = float(_backend.to_host(square)[0])
        return found

    def factors(self, name: str) -> tuple[Array, Array]:
        """S and A of one layer, with F ≈ S ⊗ A; a one-dimensional A is a diagonal."""
        xp = _backend.namespace(self._sums[f"{name}/positions"])
        positions = self._sums[f"{name}/positions"]
        positions = xp.where(positions > 0, positions, xp.ones_like(positions))
        S = self.normalised(f"{name}/S", self.total)
        A = self._sums[f"{name}/A"]
        return S, A / (positions if A.ndim == 1 else positions[:, None])

    def kronecker(self) -> dict[str, Kronecker | EigenKronecker]:
        """K-FAC: S ⊗ A by layer, by its eigenvectors where A is a diagonal."""
        found: dict[str, Kronecker | EigenKronecker] = {}
        for name in self.shapes:
            S, A = self.factors(name)
            if A.ndim == 1:
                ((s, U),) = eigenbases({f"S of layer {name!r}": S}, unit=self._unit).values()
                U = _lifted(U, self._like)
                s, A = _backend.together(s, A)
                found[name] = _eigen_kronecker((U, None), s[:, None] * A[None, :], self._like)
            else:
                factors = (_lifted(M, self._like) for M in (S, A))
                found[name] = Kronecker(*factors, like=self._like)
        return found

    def eigenbases(self) -> dict[str, Basis]:
        """Eigenvectors (U, V) of both factors by layer, V = None where A is a diagonal.

        Raises ValueError, naming the layer, for a factor with NaN or Inf.
        """
        wanted = {}
        for name in self.shapes:
            for which, M in zip("SA", self.factors(name), strict=True):
                if M.ndim == 2:
                    wanted[f"{which} of layer {name!r}"] = M
        found = eigenbases(wanted, unit=self._unit)
        vectors = {key: _lifted(V, self._like) for key, (_, V) in found.items()}
        return {
            name: (vectors[f"S of layer {name!r}"], vectors.get(f"A of layer {name!r}"))
            for name in self.shapes
        }


class MomentAccumulator(Sums):
    """Σ (Uᵀ G V)² entry by entry: the corrected eigenvalues of EKFAC, as second moments.

    Of all diagonals in that eigenbasis it is the nearest to F in the Frobenius norm, and it keeps
    the trace. A commutative monoid like `FactorAccumulator`.

    Args:
        bases: (U, V) by layer, as from `FactorAccumulator.eigenbases`; V = None is the identity.
        shapes: (o, i) by layer.
        like: an array of the library and device of the sums, in the dtype of the results.

    Cost: by pairs of positions N T² (o i + 20 (C o + i)), or row by row N C o i (2 T + 80) flops,
    whichever is less; pieces of 64 MiB.

    Source: George et al. (2018), equation 8.

    Example:
        >>> import numpy as np
        >>> from invhvp.estimate import MomentAccumulator
        >>> eye = np.eye(2)
        >>> sums = MomentAccumulator({"w": (eye[:1, :1], eye)}, {"w": (1, 2)}, like=eye)
        >>> sums.add("w", np.array([[2.0]]), np.array([[1.0, 3.0]]))
        >>> sums.count(1)
        >>> sums.eigen_kronecker()["w"].eigenvalues
        array([[ 4., 36.]])
    """

    _kind = "moments"

    def __init__(
        self, bases: Mapping[str, Basis], shapes: Mapping[str, tuple[int, int]], *, like: Array
    ) -> None:
        self.bases = dict(bases)
        super().__init__(shapes, like=like, bases=_checksum(self.bases))

    def _empty(self) -> MomentAccumulator:
        return MomentAccumulator(self.bases, self.shapes, like=self._like)

    def add(self, name: str, output_grads: Array, inputs: Array) -> None:
        """Add the samples of a batch to one layer."""
        d, a = self.checked(name, output_grads, inputs)
        U, V = self.bases[name]
        x = a if V is None else _arithmetic.matmul(a, _backend.cast(V, a))
        self.add_sums(
            name, moments=_layer_sums.moments(_arithmetic.matmul(d, _backend.cast(U, d)), x)
        )

    def eigen_kronecker(self) -> dict[str, EigenKronecker]:
        """EKFAC by layer."""
        return {
            name: _eigen_kronecker(
                self.bases[name], self.normalised(f"{name}/moments", self.total), self._like
            )
            for name in self.shapes
        }


def _eigen_kronecker(basis: Basis, values: Array, like: Array) -> EigenKronecker:
    xp = _backend.namespace(values)
    values = xp.where(values > 0, values, xp.zeros_like(values))  # zero, to rounding
    return EigenKronecker(*basis, _backend.lift(values, basis[0]), like=like)


def _lifted(M: Array, like: Array) -> Array:
    """Beside `like`, in its dtype, or in float32 where that is a half precision."""
    return _backend.lift(M, working(like))


def _checksum(bases: Mapping[str, Basis]) -> int:
    value = 0
    for name, (U, V) in sorted(bases.items()):
        for M in (U, V):
            raw = b"" if M is None else _backend.to_host(M).tobytes()
            value = zlib.crc32(name.encode() + raw, value)
    return value
