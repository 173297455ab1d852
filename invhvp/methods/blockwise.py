"""Every block of a block-diagonal operator solved for itself."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _backend, _linalg
from ..layout import Layout
from ..operators import BlockDiagonal
from ..protocols import Array, Damping, Method
from ..solution import Curvature, Solution, Status
from ._fixed_map import MapInverse
from ._inverse import PreparedInverse

# From best to worst; what several blocks come to is the worst of them.
_ORDER = (
    Status.ZERO,
    Status.CONVERGED,
    Status.APPROXIMATE,
    Status.FLOOR,
    Status.MAXITER,
    Status.STAGNATED,
    Status.DIVERGED,
    Status.NEGATIVE_CURVATURE,
    Status.NOT_SYMMETRIC,
    Status.NONFINITE,
)
_SEVERITY = np.argsort([status.code for status in _ORDER])
_CODE = np.asarray([status.code for status in _ORDER])


@dataclass(frozen=True)
class Blockwise:
    """Solve a `BlockDiagonal` block by block: each has its own stopping, step, rank and λ.

    One method applied to the whole operator would share one Krylov space, one step or one rank
    between blocks of very different size. A column's status is the worst of its blocks, its
    residual and its error bound are those of the whole vector. The inverse is positive definite,
    and may precondition, where all of its blocks are.

    Args:
        each: the method for every block.

    Raises TypeError unless the operator is a `BlockDiagonal`, and what `each` raises.
    Cost: the sum over the blocks.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.BlockDiagonal({"w": ih.Diagonal(np.ones(2)), "b": ih.Dense(np.array([[4.0]]))})
        >>> inverse = ih.Blockwise(ih.BlockCG()).prepare(A, damping={"w": 1.0, "b": 0.0})
        >>> inverse @ np.ones(3), inverse.solve(np.ones(3)).status.name
        (array([0.5 , 0.5 , 0.25]), 'CONVERGED')
    """

    each: Method

    def prepare(self, A: Any, /, damping: Damping) -> BlockwiseInverse:
        if not isinstance(A, BlockDiagonal):
            msg = f"Blockwise needs a BlockDiagonal operator, got {type(A).__name__}"
            raise TypeError(msg)
        blocks = {
            name: self.each.prepare(block, damping=of_block(damping, name))
            for name, block in A.blocks.items()
        }
        return BlockwiseInverse(self, A, damping, blocks)


class BlockwiseInverse(PreparedInverse):
    """Inverses of the blocks.

    Attributes:
        blocks: the prepared inverse of every block, by name.
    """

    def __init__(
        self, method: Blockwise, A: BlockDiagonal, damping: Damping, blocks: Mapping[str, Any]
    ) -> None:
        products = sum(inverse.products for inverse in blocks.values())
        super().__init__(method, A, damping, products=products)
        self.blocks = dict(blocks)
        self.fixed_spd = all(inverse.fixed_spd for inverse in blocks.values())
        self._psd = bool(self.fixed_spd)

    @property
    def _index_sets(self) -> Layout:
        assert self.layout is not None, "a BlockDiagonal has a layout"
        return self.layout

    def _matmat(self, X: Array, /) -> Array:
        if not all(isinstance(inverse, MapInverse) for inverse in self.blocks.values()):
            return super()._matmat(X)
        parts = {
            name: inverse._matmat(self._index_sets.take(X, name))
            for name, inverse in self.blocks.items()
        }
        return self._index_sets.assemble(parts)

    def _solve(
        self, B: Array, *, x0: Array | None = None, callback: Any = None, progress: bool = False
    ) -> Solution:
        started, layout = time.perf_counter(), self._index_sets
        found = {}
        for name, inverse in self.blocks.items():
            start = None if x0 is None else layout.take(x0, name)
            found[name] = inverse._solve(
                layout.take(B, name), x0=start, callback=callback, progress=progress
            )
        return _together(layout, found, B, time.perf_counter() - started)

    def with_damping(self, damping: Damping, /) -> BlockwiseInverse:
        """The inverse at another λ; each block re-uses what does not depend on it."""
        blocks = {
            name: inverse.with_damping(of_block(damping, name))
            for name, inverse in self.blocks.items()
        }
        return BlockwiseInverse(self.method, self.operator, damping, blocks)


def of_block(damping: Damping, name: str) -> Damping:
    """The λ of one block; ValueError where a mapping leaves it out."""
    if not isinstance(damping, Mapping):
        return damping
    if name not in damping:
        msg = f"damping by block has no value for the block {name!r}"
        raise ValueError(msg)
    return damping[name]


def _together(layout: Layout, found: Mapping[str, Solution], B: Array, seconds: float) -> Solution:
    parts = list(found.values())
    norms = _root_of_squares(part.residual_norms for part in parts)
    xp = _backend.namespace(norms)
    lengths = _backend.lift(_linalg.column_norms(B), norms)
    relative = norms / xp.where(lengths > 0, lengths, xp.ones_like(lengths))
    codes = parts[0].status_codes
    cxp = _backend.namespace(codes)
    severity = _table(_SEVERITY, codes)
    worst = cxp.take(severity, _index(codes), axis=0)
    for part in parts[1:]:
        worst = cxp.maximum(worst, cxp.take(severity, _index(part.status_codes), axis=0))
    codes = cxp.astype(cxp.take(_table(_CODE, codes), worst, axis=0), cxp.int8)
    return Solution(
        x=layout.assemble({name: part.x for name, part in found.items()}),
        status_codes=codes,
        residual_norms=norms,
        relative_residuals=relative,
        error_bounds=_root_of_squares(part.error_bounds for part in parts),
        error_norm="A",
        iterations=max(part.iterations for part in parts),
        products=sum(part.products for part in parts),
        passes=sum(part.passes for part in parts),
        seconds=seconds,
        curvature=_first_proof(layout, found),
    )


def _first_proof(layout: Layout, found: Mapping[str, Solution]) -> Curvature | None:
    """A direction of negative curvature of one block, with zeros in the others."""
    proofs = {name: part.curvature for name, part in found.items() if part.curvature is not None}
    if not proofs:
        return None
    name, proof = next(iter(proofs.items()))
    xp = _backend.namespace(proof.vector)
    zeros = {
        other: xp.zeros(
            (block.size,), dtype=proof.vector.dtype, device=_backend.device(proof.vector)
        )
        for other, block in layout.items()
    }
    return Curvature(layout.assemble({**zeros, name: proof.vector}), proof.value)


def _root_of_squares(values: Iterable[Array]) -> Array:
    """The norm of a vector from the norms of its blocks, without overflow; inf stays inf."""
    stacked = list(values)
    xp = _backend.namespace(*stacked)
    table = xp.stack(stacked, axis=0)
    largest = xp.max(table, axis=0)
    usable = (largest > 0) & xp.isfinite(largest)
    safe = xp.where(usable, largest, xp.ones_like(largest))
    scaled = table / safe[None, ...]
    total = safe * xp.sqrt(xp.sum(scaled * scaled, axis=0, dtype=table.dtype))
    return xp.where(usable, total, largest)


def _table(values: np.ndarray, like: Array) -> Array:
    xp = _backend.namespace(like)
    return xp.asarray(values, dtype=xp.int32, device=_backend.device(like))


def _index(codes: Array) -> Array:
    xp = _backend.namespace(codes)
    return xp.astype(codes, xp.int32)
