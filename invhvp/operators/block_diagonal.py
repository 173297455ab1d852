"""Independent operators on the named blocks of the parameter vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import _backend
from ..layout import Layout
from ..protocols import Array, Damping, HasDiagonal, HasInverse
from .algebra import checked_factor
from .base import LinearOperator
from .damping import as_shift
from .dense import Dense
from .pseudo_inverse import PseudoInverse, Truncation, pseudo_inverse


class BlockDiagonal(LinearOperator):
    """One operator per block of a `Layout`, acting on that block's index set.

    Args:
        blocks: operator by block name; each has the size of its block.
        layout: the index sets; by default the blocks follow one another.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.BlockDiagonal({"w": ih.Diagonal(np.ones(2)), "b": ih.Dense(np.array([[4.0]]))})
        >>> A.inverse({"w": 1.0, "b": 0.0}) @ np.ones(3)
        array([0.5 , 0.5 , 0.25])
    """

    def __init__(self, blocks: Mapping[str, LinearOperator], layout: Layout | None = None) -> None:
        if not blocks:
            msg = "BlockDiagonal needs at least one block"
            raise ValueError(msg)
        if layout is None:
            layout = Layout.from_shapes({name: (A.shape[0],) for name, A in blocks.items()})
        sizes = {name: A.shape[0] for name, A in blocks.items()}
        expected = {name: block.size for name, block in layout.items()}
        if sizes != expected:
            msg = f"the blocks have sizes {sizes}, the layout says {expected}"
            raise ValueError(msg)
        first = blocks[layout.names[0]]
        for name, A in blocks.items():
            library = _backend.library_name(A.like)
            if (
                library != _backend.library_name(first.like)  # first: dtypes of two do not compare
                or A.dtype != first.dtype
                or A.device != first.device
            ):
                msg = (
                    f"all blocks must share library, dtype and device; block {name!r} has "
                    f"{library} {_backend.dtype_name(A.dtype)} on {A.device}"
                )
                raise TypeError(msg)
        psd = all(A.psd for A in blocks.values())
        super().__init__(layout.n, like=first.like, psd=psd, layout=layout)
        self.blocks = {name: blocks[name] for name in layout.names}
        self._index_sets = layout

    def _matmat(self, X: Array, /) -> Array:
        layout = self._index_sets
        return layout.assemble(
            {name: A._matmat(layout.take(X, name)) for name, A in self.blocks.items()}
        )

    def diagonal(self) -> Array:
        """The diagonal (n,); blocks that do not know theirs are densified."""
        parts = {}
        for name, A in self.blocks.items():
            parts[name] = (A if isinstance(A, HasDiagonal) else Dense(A.to_dense())).diagonal()
        return self._index_sets.assemble(parts)

    def inverse(self, damping: Damping, /) -> BlockDiagonal:
        """The block-wise inverse; blocks without one of their own are densified."""
        as_shift(damping, self)  # validates λ and, by block, the names
        inverses = {}
        for name, A in self.blocks.items():
            value = damping[name] if isinstance(damping, Mapping) else damping
            block = A if isinstance(A, HasInverse) else Dense(A.to_dense(), psd=A.psd)
            inverses[name] = block.inverse(value)
        return BlockDiagonal(inverses, self._index_sets)

    def pseudo_inverse(self) -> PseudoInverse:
        """A⁺, block by block; what is rounding is judged in each block for itself."""
        found = {name: pseudo_inverse(A) for name, A in self.blocks.items()}
        kept = [block.truncation for block in found.values()]
        truncation = Truncation(sum(t.rank for t in kept), self._n, max(t.cut for t in kept))
        return PseudoInverse(BlockDiagonal(found, self._index_sets), truncation)

    def power(self, exponent: float, /) -> BlockDiagonal:
        """Every block to a power. Raises ValueError for a block that has no powers."""
        powers = {name: _of(A, "power", exponent) for name, A in self.blocks.items()}
        return BlockDiagonal(powers, self._index_sets)

    def logdet(self) -> float:
        """The sum over the blocks; raises as `power`."""
        return sum(_of(A, "logdet") for A in self.blocks.values())

    @property
    def definite(self) -> bool:
        """Whether every block is known to be positive definite."""
        return all(getattr(A, "definite", False) for A in self.blocks.values())

    def __mul__(self, factor: float) -> BlockDiagonal:
        factor = checked_factor(factor)
        return BlockDiagonal({k: A * factor for k, A in self.blocks.items()}, self._index_sets)

    __rmul__ = __mul__

    def _describe(self) -> str:
        shown = [f"{name}: {A!r}" for name, A in list(self.blocks.items())[:4]]
        more = ", ..." if len(self.blocks) > 4 else ""
        return ", ".join(shown) + more


def _of(A: LinearOperator, name: str, *arguments: float) -> Any:
    if not hasattr(A, name):
        msg = f"{type(A).__name__} has no {name}: it keeps no eigenvalues and no factorisation"
        raise ValueError(msg)
    return getattr(A, name)(*arguments)
