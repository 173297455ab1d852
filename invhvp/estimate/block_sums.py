"""Exact blocks of a curvature matrix, summed over samples in any order."""

from __future__ import annotations

from collections.abc import Mapping

from .. import _backend, _linalg
from ..gradients import GradientMatrix
from ..operators import Dense, Diagonal, LinearOperator
from ..protocols import Array
from ._mergeable import Sums, working


class BlockAccumulator(Sums):
    """Σ g gᵀ of the per-sample gradients of small blocks, and Σ g² of larger ones.

    For parameters without Kronecker structure: scales, shifts, lone biases. A commutative monoid
    like `FactorAccumulator`.

    Args:
        sizes: number of parameters by block.
        like: an array of the library and device of the sums, in the dtype of the results.
        most_dense: blocks with more parameters than this are diagonal.

    Cost: N p² flops and p² numbers for a dense block, N p and p for a diagonal.

    Example:
        >>> import numpy as np
        >>> from invhvp.estimate import BlockAccumulator
        >>> from invhvp.gradients import DenseGradients
        >>> sums = BlockAccumulator({"bias": 2}, like=np.ones(1))
        >>> sums.add("bias", DenseGradients(np.array([[1.0, 2.0]])))
        >>> sums.count(1)
        >>> sums.operators()["bias"].to_dense()
        array([[1., 2.],
               [2., 4.]])
    """

    _kind = "blocks"

    def __init__(self, sizes: Mapping[str, int], *, like: Array, most_dense: int = 1024) -> None:
        self.sizes = dict(sizes)
        self.most_dense = most_dense
        shapes = {name: (p, p if p <= most_dense else 1) for name, p in sizes.items()}
        super().__init__(shapes, like=like, most_dense=most_dense)

    def _empty(self) -> BlockAccumulator:
        return BlockAccumulator(self.sizes, like=self._like, most_dense=self.most_dense)

    def add(self, name: str, gradients: GradientMatrix) -> None:
        """Add the gradients (N, p) of a batch in one block."""
        if name not in self.sizes or gradients.shape[1] != self.sizes[name]:
            msg = f"unknown block {name!r} of {gradients.shape[1]} parameters; here: {self.sizes}"
            raise ValueError(msg)
        if self.sizes[name] <= self.most_dense:
            self.add_sums(name, matrix=_linalg.gram(working(gradients.to_dense())))
        else:
            norms = _backend.to_small(gradients.column_norms())
            self.add_sums(name, squares=norms * norms)

    def operators(self) -> dict[str, LinearOperator]:
        """The blocks, `Dense` or `Diagonal`. Raises ValueError, with the name, for NaN or Inf."""
        found: dict[str, LinearOperator] = {}
        for name, p in self.sizes.items():
            dense = p <= self.most_dense
            M = self.normalised(f"{name}/{'matrix' if dense else 'squares'}", self.total)
            xp = _backend.namespace(M)
            if not bool(_backend.to_host(xp.all(xp.isfinite(M)))):
                msg = f"the curvature of block {name!r} contains NaN or Inf"
                raise ValueError(msg)
            M = _backend.lift(_linalg.symmetric(M) if dense else M, self._like)
            found[name] = Dense(M, psd=True, check=False) if dense else Diagonal(M, psd=True)
        return found
