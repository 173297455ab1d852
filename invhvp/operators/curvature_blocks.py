"""Blocks of a curvature matrix that know how much of the exact one they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import _backend, _linalg
from ..layout import Layout
from ..protocols import Damping
from ..solution import SingularError
from .base import LinearOperator
from .block_diagonal import BlockDiagonal
from .damping import as_shift
from .diagonal import Diagonal
from .eigen_kronecker import EigenKronecker
from .kronecker import Kronecker


class CurvatureBlocks(BlockDiagonal):
    """A block-diagonal model of a curvature matrix, with traces for diagnostics.

    Args:
        blocks: operator by block name.
        layout: the index sets of the blocks.
        name: what it is, for the repr.
        traces: the traces of the exact blocks, where they are known.
        parameters: which named parameters are in a block; λ by block may be given by these names.
        said: more for the repr.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> from invhvp.operators import CurvatureBlocks
        >>> K = CurvatureBlocks({"w": ih.Kronecker(np.eye(2), np.eye(3))}, traces={"w": 8.0})
        >>> K.trace(), K.trace_ratio(), K.relative_damping(0.1)
        (6.0, 0.75, {'w': 0.1})
    """

    def __init__(
        self,
        blocks: Mapping[str, LinearOperator],
        layout: Layout | None = None,
        *,
        name: str = "CurvatureBlocks",
        traces: Mapping[str, float] | None = None,
        parameters: Mapping[str, tuple[str, ...]] | None = None,
        said: str = "",
    ) -> None:
        super().__init__(blocks, layout)
        if parameters is not None:
            self._layout = self._index_sets = _Aliased(self._index_sets, parameters)
        self._name, self._said = name, said
        self.exact_traces = dict(traces or {})

    def traces(self) -> dict[str, float]:
        """The trace of every block."""
        return {name: _trace(A) for name, A in self.blocks.items()}

    def trace(self) -> float:
        """The trace."""
        return sum(self.traces().values())

    def trace_ratio(self) -> float:
        """The trace over that of the exact blocks: 1 where the diagonal of the spectrum is right.

        Raises ValueError where the exact traces are not known.
        """
        if set(self.exact_traces) != set(self.blocks):
            raise ValueError("the traces of the exact blocks are not known; pass traces=")
        exact = sum(self.exact_traces.values())
        return self.trace() / exact if exact else 1.0

    def relative_damping(self, factor: float = 0.1) -> dict[str, float]:
        """λ by block: `factor` times the block's mean eigenvalue, to be passed as damping=.

        The heuristic of Grosse et al. (2023), with 0.1. A block that is zero gets the smallest λ of
        the others.
        """
        means = {name: trace / self.blocks[name].shape[0] for name, trace in self.traces().items()}
        least = min((mean for mean in means.values() if mean > 0), default=1.0)
        return {name: factor * (mean if mean > 0 else least) for name, mean in means.items()}

    def inverse(self, damping: Damping, /) -> BlockDiagonal:
        """The block-wise inverse; λ by block is named by blocks, or by all their parameters.

        Raises SingularError, with the name of the block.
        """
        as_shift(damping, self)  # validates λ and, by block, the names
        layout, inverses = self._index_sets, {}
        if isinstance(damping, Mapping) and isinstance(layout, _Aliased):
            damping = layout.by_block(damping)
        for name, A in self.blocks.items():
            value = damping[name] if isinstance(damping, Mapping) else damping
            try:
                inverses[name] = A.inverse(value)  # pyright: ignore[reportAttributeAccessIssue]
            except SingularError as error:
                msg = f"block {name!r}: {error}"
                raise SingularError(msg) from None
        return BlockDiagonal(inverses, layout)

    def __mul__(self, factor: float) -> BlockDiagonal:
        return BlockDiagonal(super().__mul__(factor).blocks, self._index_sets)

    __rmul__ = __mul__

    def summary(self) -> str:
        """A table: every block, what it is, its size, its share of the trace, trace / exact."""
        traces, total = self.traces(), self.trace() or 1.0
        lines = [("block", "kind", "parameters", "trace", "of exact")]
        for name, A in self.blocks.items():
            exact = self.exact_traces.get(name)
            ratio = "" if not exact else f"{traces[name] / exact:.3f}"
            share = f"{100 * traces[name] / total:.1f} %"
            lines.append((name, _kind(A), str(A.shape[0]), share, ratio))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join(rows)

    def __repr__(self) -> str:
        traces, total = self.traces(), self.trace() or 1.0
        shares: dict[str, list[float]] = {}
        for name, A in self.blocks.items():
            kind = "Kronecker" if isinstance(A, Kronecker | EigenKronecker) else _kind(A)
            shares.setdefault(kind, []).append(traces[name] / total)
        parts = [
            f"{len(found)} {kind} block{'s' * (len(found) != 1)} with {100 * sum(found):.3g} % "
            "of the trace"
            for kind, found in shares.items()
        ]
        if set(self.exact_traces) == set(self.blocks):
            parts.append(f"trace {self.trace_ratio():.3f} of the exact one")
        parts += [self._said] * bool(self._said)
        dtype = _backend.dtype_name(self.dtype)
        n = self.shape[0]
        return f"{self._name}({n}x{n}, {', '.join(parts)}, {dtype}, {self.device})"


class _Aliased(Layout):
    """Blocks that may also be named by the parameters in them."""

    def __init__(self, layout: Layout, parameters: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__(dict(layout))
        self._parameters = dict(parameters)

    def shifts(self, damping: Any) -> Any:
        return super().shifts(self.by_block(damping))

    def by_block(self, damping: Mapping[str, Any]) -> Mapping[str, Any]:
        """λ by block from λ by parameter; unchanged where it is by block already."""
        known = {name for names in self._parameters.values() for name in names}
        if set(damping) == set(self.names) or set(damping) != known:
            return damping
        found = {}
        for block, names in self._parameters.items():
            values = {float(damping[name]) for name in names}
            if len(values) > 1:
                msg = (
                    f"block {block!r} couples {list(names)}, which need one λ, got "
                    f"{[float(damping[name]) for name in names]}"
                )
                raise ValueError(msg)
            found[block] = values.pop()
        return found


def _trace(A: Any) -> float:
    if hasattr(A, "trace"):
        return A.trace()
    diagonal = A.diagonal()[:, None]
    ones = _backend.namespace(diagonal).ones_like(diagonal)
    return float(_backend.to_host(_linalg.column_dot(diagonal, ones))[0])


def _kind(A: LinearOperator) -> str:
    if isinstance(A, EigenKronecker | Kronecker):
        o, i = A.block_shape
        return f"Kronecker {o}x{i}"
    return "diagonal" if isinstance(A, Diagonal) else "dense"
