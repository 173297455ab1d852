"""Scores block by block: each test sample is solved for once, then meets the training samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .. import _backend
from ..gradients import GradientMatrix, StreamedGradients
from ..operators.data_parallel import agreed
from ..operators.rank_one_mean import SampleSpaceInverse
from ..protocols import Array
from ..solution import Solution

TEST_BLOCK = 128  # right-hand sides solved together: the widest block that still pays in BlockCG
TRAIN_BLOCK = 2048  # a block of float32 scores is 1 MiB
_LEAST_TRAIN_BLOCK = 64  # where rows would not fit, streams hold factors of them
_ROOM = 8  # a temporary takes at most this share of the free memory
_WORKING = 16  # vectors of length p that an iterative method holds for each right-hand side
_NATURAL = 1 << 62  # `parts` of this size are the batches as they come

ScoreBlock = tuple[slice, slice, Array]
Against = Callable[[GradientMatrix, Array], Array]


class ParameterFactors:
    """Factors are the solutions (A + λI)⁻¹g, as rows of p numbers."""

    space = "parameters"

    def __init__(self, inverse: Any, train: GradientMatrix) -> None:
        self._inverse = inverse
        self.width = inverse.shape[0]
        self.like = train.like
        room = _backend.free_memory(self.like) // (
            _ROOM * _WORKING * self.width * _backend.itemsize(self.like.dtype)
        )
        rows = agreed(inverse.operator, max(1, min(TEST_BLOCK, room)))
        columns = TRAIN_BLOCK
        if isinstance(train, StreamedGradients):  # a block of what is read is held: maybe rows
            columns = max(_LEAST_TRAIN_BLOCK, min(columns, _WORKING * room))
        self.block_shape = (int(rows), columns)

    def solve(self, rows: GradientMatrix) -> tuple[Array, Solution]:
        """Factors (n, p) of some test samples; raises where they would be meaningless."""
        solution = self._inverse.solve(rows).raise_if_meaningless()
        return _backend.namespace(solution.x).matrix_transpose(solution.x), solution

    def against(self, part: GradientMatrix) -> Against:
        """A function (test rows, factors) → scores with these training samples."""
        xp = _backend.namespace(part.like)
        return lambda _, factors: xp.matrix_transpose(part @ xp.matrix_transpose(factors))


class SampleFactors:
    """Factors are the coefficients of the solution in sample space: nothing of length p."""

    space = "samples"

    def __init__(self, sample_space: SampleSpaceInverse) -> None:
        self._map = sample_space
        self._gradients = sample_space.operator.gradients
        self.width = self._gradients.shape[0]
        # The scores are a difference of Gram matrices: it is taken in float64.
        self.like = _backend.to_small(sample_space.like)
        room = _backend.free_memory(self.like) // (_ROOM * self.width * 8)
        self.block_shape = (TEST_BLOCK, max(1, min(TRAIN_BLOCK, room)))

    def solve(self, rows: GradientMatrix) -> tuple[Array, None]:
        """Coefficients (n, N) of some test samples."""
        found = self._map.coefficients(rows)
        return _backend.namespace(found).matrix_transpose(found), None

    def against(self, part: GradientMatrix) -> Against:
        """A function (test rows, coefficients) → scores with these training samples."""
        small, lam = _backend.to_small, self._map.shift
        cross = small(part.gram(self._gradients))
        xp = _backend.namespace(cross)

        def scores(rows: GradientMatrix, coefficients: Array) -> Array:
            correction = cross @ xp.matrix_transpose(coefficients)
            value = (small(part.gram(rows)) - correction) / lam
            return _backend.lift(xp.matrix_transpose(value), part.like)

        return scores


def factors_for(inverse: Any, train: GradientMatrix) -> ParameterFactors | SampleFactors:
    """How the test samples of this inverse are solved for."""
    exact = getattr(inverse, "map", None)
    if isinstance(exact, SampleSpaceInverse):
        return SampleFactors(exact)
    return ParameterFactors(inverse, train)


def spans(n: int, size: int) -> list[slice]:
    """Consecutive slices of range(n)."""
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def train_blocks(train: GradientMatrix, size: int) -> Iterator[tuple[slice, list[GradientMatrix]]]:
    """Blocks of consecutive training samples in one pass; each in the pieces that it came in."""
    start = position = 0
    pieces: list[GradientMatrix] = []
    for batch in train.parts(_NATURAL):
        used = 0
        while used < len(batch):
            more = min(start + size - position, len(batch) - used)
            pieces.append(batch if more == len(batch) else batch[used : used + more])
            used, position = used + more, position + more
            if position == start + size:
                yield slice(start, position), pieces
                start, pieces = position, []
    if pieces:
        yield slice(start, position), pieces


def joined(against: list[Against], rows: GradientMatrix, factors: Array) -> Array:
    """The scores of one block from those with its pieces."""
    parts = [scores(rows, factors) for scores in against]
    return parts[0] if len(parts) == 1 else _backend.namespace(*parts).concat(parts, axis=1)


def score_blocks(inverse: Any, train: GradientMatrix, test: GradientMatrix) -> Iterator[ScoreBlock]:
    """See `Influence.blocks`."""
    system = factors_for(inverse, train)
    height, width = system.block_shape
    each = system.width * _backend.itemsize(system.like.dtype)
    held = max(1, _backend.free_memory(system.like) // (_ROOM * each) // height)
    for strip in spans(test.shape[0], held * height):
        blocks = [
            slice(strip.start + s.start, strip.start + s.stop)
            for s in spans(strip.stop - strip.start, height)
        ]
        chosen = [test[rows] for rows in blocks]
        factors = [system.solve(rows)[0] for rows in chosen]
        for columns, pieces in train_blocks(train, width):
            against = [system.against(piece) for piece in pieces]
            for rows, sample, solved in zip(blocks, chosen, factors, strict=True):
                yield rows, columns, joined(against, sample, solved)
