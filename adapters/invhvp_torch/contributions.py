"""What one call of a layer adds to a parameter's gradients, and the sum over calls."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch.nn import functional as F

from invhvp.gradients import (
    DenseGradients,
    EmbeddingGradients,
    GradientMatrix,
    OuterProductGradients,
    StackedGradients,
)

PIECE = 64 << 20  # bytes of an array that is formed only to be multiplied


@dataclass(frozen=True)
class Outer:
    """Rows vec(Σ_t d_t a_tᵀ), by groups of channels; d and a may have N or N C rows each."""

    d: torch.Tensor  # (·, T, groups · o)
    a: torch.Tensor  # (·, T, groups · i)
    groups: int = 1

    def joined(self, other: Outer) -> Outer | None:
        """The sum of both, as more terms; None where their shapes differ."""
        same = self.groups == other.groups and all(
            x.shape[0] == y.shape[0] and x.shape[2] == y.shape[2]
            for x, y in ((self.d, other.d), (self.a, other.a))
        )
        if not same:
            return None
        d, a = torch.cat([self.d, other.d], 1), torch.cat([self.a, other.a], 1)
        return Outer(d, a, self.groups)

    @property
    def is_small(self) -> bool:
        """Whether the factors take less memory than the rows."""
        T, o, i = self.d.shape[1], self.d.shape[2], self.a.shape[2]
        return T * (o + i) <= o * i // self.groups

    def rows(self) -> torch.Tensor:
        """The rows themselves."""
        n = math.gcd(self.d.shape[0], self.a.shape[0])
        d, a = (
            t.reshape(n, -1, t.shape[1], self.groups, t.shape[2] // self.groups).movedim(3, 2)
            for t in (self.d, self.a)
        )
        rows = d.mT @ a  # (n, C, groups, o, i)
        return rows.reshape(rows.shape[0] * rows.shape[1], -1)

    def factored(self) -> GradientMatrix:
        """The factors, one pair of them a group."""
        d, a = self.d, self.a
        if d.shape[0] < a.shape[0]:
            d = d.repeat_interleave(a.shape[0] // d.shape[0], 0)
        if self.groups == 1:
            return OuterProductGradients(output_grads=d, inputs=a)
        pairs = zip(d.chunk(self.groups, 2), a.chunk(self.groups, 2), strict=True)
        blocks = [OuterProductGradients(output_grads=d, inputs=a) for d, a in pairs]
        return StackedGradients({f"group {g}": block for g, block in enumerate(blocks)})


@dataclass(frozen=True)
class Lookup:
    """Rows of a table (words, o) that were looked up; d may have C rows for one of indices."""

    d: torch.Tensor  # (·, T, o)
    indices: torch.Tensor  # (N, T)
    words: int
    padding: int | None = None

    def joined(self, other: Lookup) -> Lookup | None:
        """The sum of both, as more positions; None where their padding differs."""
        if self.padding != other.padding:
            return None
        d, indices = torch.cat([self.d, other.d], 1), torch.cat([self.indices, other.indices], 1)
        return replace(self, d=d, indices=indices)

    @property
    def is_small(self) -> bool:
        """Whether derivatives and indices (of 8 bytes) take less memory than the rows."""
        T, o = self.d.shape[1:]
        return T * (o * self.d.element_size() + 8) <= self.words * o * self.d.element_size()

    def outer(self) -> Outer:
        """The same as products with one-hot rows."""
        chosen = F.one_hot(self.indices, self.words).to(self.d.dtype)
        if self.padding is not None:
            chosen[..., self.padding] = 0.0  # our own
        return Outer(chosen, self.d)

    def rows(self) -> torch.Tensor:
        """The rows themselves: products in some order, where a scatter adds in any."""
        N, T = self.indices.shape
        step = max(1, PIECE // max(1, T * self.words * self.d.element_size()))
        each = self.d.shape[0] // N
        pieces = [
            replace(
                self,
                d=self.d[i * each : (i + step) * each],
                indices=self.indices[i : i + step],
            )
            for i in range(0, N, step)
        ]
        return torch.cat([piece.outer().rows() for piece in pieces])

    def factored(self) -> GradientMatrix:
        """Derivatives and indices."""
        each = self.d.shape[0] // self.indices.shape[0]
        return EmbeddingGradients(
            output_grads=self.d,
            indices=self.indices.repeat_interleave(each, 0),
            n_rows=self.words,
            padding_index=self.padding,
        )


@dataclass(frozen=True)
class Span:
    """Some rows of a parameter: `size` of its `total`, from `start`."""

    start: int
    size: int
    total: int


@dataclass(frozen=True)
class Slice:
    """What a call adds to some rows of a parameter."""

    part: Outer | torch.Tensor
    span: Span

    def rows(self) -> torch.Tensor:
        """The rows of the whole parameter, zero elsewhere."""
        inner, span = _rows(self.part), self.span
        each = inner.shape[1] // span.size  # numbers in a row of the parameter
        return F.pad(inner, (span.start * each, (span.total - span.start - span.size) * each))


Part: TypeAlias = Outer | Lookup | Slice | torch.Tensor


def block(parts: list[Part]) -> GradientMatrix:
    """The sum of what all calls add to one parameter, in its smaller form."""
    slices = [part for part in parts if isinstance(part, Slice)]
    if len(slices) == len(parts):
        found = _stacked(slices)
        if found is not None:
            return found
    total = parts[0]
    for part in parts[1:]:
        total = _sum(total, part)
    if isinstance(total, Outer | Lookup) and total.is_small:
        return total.factored()
    return DenseGradients(_rows(total))


def _stacked(slices: list[Slice]) -> GradientMatrix | None:
    """Spans that are all of the parameter, one below the other; None where that is no gain."""
    by_span: dict[Span, list[Part]] = {}
    for part in slices:
        by_span.setdefault(part.span, []).append(part.part)
    stop, blocks = 0, {}
    for span in sorted(by_span, key=lambda span: span.start):
        if span.start != stop:
            return None
        stop += span.size
        blocks[f"rows {span.start}:{stop}"] = block(by_span[span])
    gain = all(not isinstance(part, DenseGradients) for part in blocks.values())
    return StackedGradients(blocks) if gain and stop == slices[0].span.total else None


def _sum(x: Part, y: Part) -> Part:
    both: Part | None = None
    if isinstance(x, Lookup) and isinstance(y, Lookup):
        both = x.joined(y)
    elif isinstance(x, Outer | Lookup) and isinstance(y, Outer | Lookup):
        # A tied weight: the output layer's factors are as long as one-hot rows.
        x, y = (part.outer() if isinstance(part, Lookup) else part for part in (x, y))
        both = x.joined(y)
        if both is not None and not both.is_small:
            both = None
    return _rows(x) + _rows(y) if both is None else both


def _rows(part: Part) -> torch.Tensor:
    return part if isinstance(part, torch.Tensor) else part.rows()
