"""How much each training sample moves the loss of each test sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .. import _backend, _linalg
from ..gradients import GradientMatrix
from ..protocols import Array
from ..solution import Solution
from . import certificates, parts
from .blocks import TEST_BLOCK, ScoreBlock, score_blocks, spans
from .certificates import CertifiedScores, SelfInfluenceBounds
from .curve import DampingCurve, damping_curve
from .store import write
from .topk import TopK, top_k


class Influence:
    """Influence scores g_testᵀ (A + λI)⁻¹ g_train for a prepared inverse and training gradients.

    A positive score is helpful: up-weighting the training sample lowers the test loss, and
    removing it raises the test loss by about score / N.

    Args:
        inverse: what `method.prepare(A, damping)` returned.
        train: gradients of the training samples (N × p).

    Raises TypeError where `train` is not a gradient matrix, ValueError where sizes differ.

    Source: Koh & Liang (2017), equation 2.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> G = ih.DenseGradients(np.eye(3))
        >>> inverse = ih.SampleSpace().prepare(ih.RankOneMean(G), damping=1.0)
        >>> ih.Influence(inverse, G).self_influence()
        array([0.75, 0.75, 0.75])
    """

    def __init__(self, inverse: Any, train: GradientMatrix) -> None:
        _check(train, inverse, "train")
        self.inverse = inverse
        self.train = train

    def factors(self, test: GradientMatrix, /, **options: Any) -> Solution:
        """The vectors (A + λI)⁻¹g of all test samples as columns (p, n_test), with certificates.

        Options are those of `inverse.solve`. Cost: one solve with n_test right-hand sides.
        """
        _check(test, self.inverse, "test")
        return self.inverse.solve(test, **options)

    def scores(self, test: GradientMatrix, /) -> Array:
        """Scores of shape (n_test, n_train).

        An exact sample-space inverse needs Gram matrices alone: no vector of length p is formed.
        Otherwise the right-hand sides are solved in blocks of 128, and each solution meets the
        training gradients in their own structure. Raises where an answer would be meaningless.
        """
        _check(test, self.inverse, "test")
        bilinear = self._bilinear()
        if bilinear is not None:
            return bilinear(test, self.train)
        xp = _backend.namespace(test.like)
        blocks = [xp.matrix_transpose(self.train @ X) for _, X in self._solved(test)]
        return xp.concat(blocks, axis=0)

    def scores_by_block(self, test: GradientMatrix, /) -> dict[str, Array]:
        """Scores by parameter block, {name: (n_test, n_train)}; they add up to `scores`.

        Raises as `scores`, and TypeError where the blocks of `train` have no names.
        Cost: one solve for each test sample, whose solutions meet the blocks one by one.
        """
        _check(test, self.inverse, "test")
        return parts.by_block(self.train, (X for _, X in self._solved(test)))

    def scores_by_position(
        self, test: GradientMatrix, /, *, blocks: str | Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Scores by training token or other position, {block: (n_test, n_train, T)}.

        Over T they add up to `scores_by_block`. By default of all blocks with positions: outer
        products and embeddings. Raises as that, and TypeError for blocks without.
        Cost: that of `scores_by_block`, and a result T times as large.
        """
        _check(test, self.inverse, "test")
        return parts.by_position(self.train, (X for _, X in self._solved(test)), blocks)

    def self_influence(self) -> Array:
        """gᵢᵀ(A + λI)⁻¹gᵢ of every training sample, shape (N,): large for suspicious labels."""
        xp = _backend.namespace(self.train.like)
        bilinear = self._bilinear()
        found = []
        for rows in _blocks(self.train.shape[0]):
            part = self.train[rows]
            if bilinear is not None:
                found.append(xp.linalg.diagonal(bilinear(part, part)))
            else:
                # The gradients are formed for one block only: its solution is dense anyway.
                dense = xp.matrix_transpose(part.to_dense())
                X = self._solve(part)
                found.append(_backend.lift(_linalg.column_dot(dense, X), dense))
        return xp.concat(found, axis=0)

    def self_influence_by_block(self) -> dict[str, Array]:
        """Self-influence by parameter block, {name: (N,)}; raises as `scores_by_block`."""
        return parts.own_by_block(self.train, self._solved(self.train))

    def top_k(self, test: GradientMatrix, /, k: int = 10) -> TopK:
        """The k most helpful and k most harmful training samples of each test sample.

        The scores are looked at block by block, as `blocks` yields them, and not kept.
        Raises as `scores`, and ValueError unless 1 ≤ k ≤ n_train.
        """
        _check(test, self.inverse, "test")
        if not 1 <= k <= self.train.shape[0]:
            msg = f"k must lie between 1 and the {self.train.shape[0]} training samples, got {k}"
            raise ValueError(msg)
        return top_k(self.blocks(test), k)

    def blocks(self, test: GradientMatrix, /) -> Iterator[ScoreBlock]:
        """Yield (test slice, train slice, scores) until every pair of samples has come once.

        Any function may aggregate over it. Blocks of one test slice come in the order of the
        training samples. Raises as `scores`.

        Cost: one solve for each test sample, one pass over the training gradients for as many
        test samples as fit in an eighth of the free memory (all, unless there are very many).

        Example:
            >>> import numpy as np, invhvp as ih
            >>> G = ih.DenseGradients(np.eye(3))
            >>> inverse = ih.SampleSpace().prepare(ih.RankOneMean(G), damping=1.0)
            >>> blocks = ih.Influence(inverse, G).blocks(G)
            >>> round(max(float(scores.max()) for _, _, scores in blocks), 6)
            0.75
        """
        _check(test, self.inverse, "test")
        return score_blocks(self.inverse, self.train, test)

    def write(
        self,
        test: GradientMatrix,
        /,
        out: Any,
        *,
        block_shape: tuple[int, int] | None = None,
        progress: bool = True,
    ) -> Any:
        """Write the scores (n_test, n_train) to a Zarr v3 store, block by block, and return them.

        Two passes: the test samples are solved for once, and what was solved is stored; then each
        block of scores is computed and stored. Both have a mask of what is written: a process
        that was killed at any moment is continued by the same call, which repeats at most one
        block. One process writes at a time.

        The store is a group with the arrays `scores` and `factors`, their masks and the residuals
        of the solves; the attributes tell method, damping, operator, versions and fingerprints.

        Args:
            test: gradients of the test samples.
            out: a path, or any store that Zarr takes.
            block_shape: (test, train) samples of a block; by default up to (128, 2048), as the
                free memory allows. A store keeps the shape that it was begun with.
            progress: show a tqdm bar for each pass.

        Returns the Zarr array of the scores.

        Raises ValueError where the store holds scores of another model, method, damping or other
        data, or something else; otherwise as `scores`.

        Cost: one solve for each test sample, two passes over the training gradients (one of them
        for the fingerprint), four operator-vector products; memory for one block of factors and
        one of training gradients.

        Example:
            >>> import numpy as np, tempfile, invhvp as ih
            >>> G = ih.DenseGradients(np.eye(3))
            >>> inverse = ih.SampleSpace().prepare(ih.RankOneMean(G), damping=1.0)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     scores = ih.Influence(inverse, G).write(G[:1], folder, progress=False)
            ...     scores[...], scores.metadata.dimension_names
            (array([[0.75, 0.  , 0.  ]]), ('test', 'train'))
        """
        _check(test, self.inverse, "test")
        return write(self.inverse, self.train, test, out, block_shape, progress)

    def certified_scores(
        self, test: GradientMatrix, /, *, correct: bool = False
    ) -> CertifiedScores:
        """Scores with a guaranteed error bar on each of them.

        The plain score g_trainᵀx_test is off by at most ‖g_train‖/√λ times the certified error
        ‖e_test‖ in the A-norm. With `correct=True` the training samples are solved for too, and
        a score becomes g_trainᵀx_test + x_trainᵀr_test, off by at most ‖e_train‖·‖e_test‖,
        wherever that is the smaller bound: loose solves then give twice their digits.

        Bounds hold for an operator that is positive semidefinite and λ > 0, with rounding
        included; elsewhere they are inf, and `note` says why.

        Raises as `scores`. Cost: n_test right-hand sides; with `correct=True` n_train more, one
        product each for the residual, and 2·p·n_test numbers.

        Example:
            >>> import numpy as np, invhvp as ih
            >>> G = ih.DenseGradients(np.eye(3))
            >>> inverse = ih.BlockCG().prepare(ih.RankOneMean(G), damping=1.0)
            >>> certified = ih.Influence(inverse, G).certified_scores(G[:1])
            >>> bool(abs(certified.scores[0, 0] - 0.75) <= certified.error_bounds[0, 0] < 1e-12)
            True
        """
        _check(test, self.inverse, "test")
        certificate = certificates.Certificate(self.inverse, self.train)
        own, other = _blocks(self.train.shape[0]), _blocks(test.shape[0])
        if correct:
            return certificates.corrected_scores(certificate, self.train, test, own, other)
        return certificates.plain_scores(certificate, self.train, test, other)

    def self_influence_bounds(self) -> SelfInfluenceBounds:
        """Guaranteed lower and upper bounds on gᵢᵀ(A + λI)⁻¹gᵢ of every training sample.

        For any x with residual r = g − (A + λI)x and A positive semidefinite,
        gᵀx + xᵀr ≤ gᵀ(A + λI)⁻¹g ≤ gᵀx + xᵀr + ‖r‖²/λ. Rounding is included; where A is not
        known to be positive semidefinite or λ = 0 the bounds are infinite, and `note` says why.

        Cost: n_train right-hand sides and one product more for each of them.

        Example:
            >>> import numpy as np, invhvp as ih
            >>> G = ih.DenseGradients(np.eye(3))
            >>> inverse = ih.CG(maxiter=1).prepare(ih.RankOneMean(G), damping=1.0)
            >>> bounds = ih.Influence(inverse, G).self_influence_bounds()
            >>> bool(np.all((bounds.lower <= 0.75) & (0.75 <= bounds.upper)))
            True
        """
        certificate = certificates.Certificate(self.inverse, self.train)
        blocks = _blocks(self.train.shape[0])
        return certificates.self_influence_bounds(certificate, self.train, blocks)

    def damping_curve(self, test: GradientMatrix, dampings: Sequence[float], /) -> DampingCurve:
        """Scores along λ, and how much neighbouring λ agree on the order of training samples.

        Factorised and low-rank inverses give every λ without new products (`with_damping`). CG
        and BlockCG without a preconditioner solve for all λ in one Krylov space (`solve_path`),
        at the products of the smallest. Any other inverse is solved again for each λ.

        Args:
            test: gradients of the test samples.
            dampings: λ > 0, in the order in which neighbours are compared.

        Raises as `scores`, for the λ at which an answer would be meaningless.

        Example:
            >>> import numpy as np, invhvp as ih
            >>> G = ih.DenseGradients(np.diag([1.0, 2.0, 3.0]) + 0.1)
            >>> inverse = ih.BlockCG(rtol=1e-10).prepare(ih.RankOneMean(G), damping=1.0)
            >>> curve = ih.Influence(inverse, G).damping_curve(G[:2], [1.0, 0.1, 0.01])
            >>> curve.scores.shape, curve.rank_correlations.shape
            ((3, 2, 3), (2, 2))
        """
        _check(test, self.inverse, "test")
        return damping_curve(self, test, dampings)

    def _bilinear(self) -> Any:
        return getattr(getattr(self.inverse, "map", None), "bilinear", None)

    def _solved(self, G: GradientMatrix) -> Iterator[tuple[GradientMatrix, Array]]:
        """Rows of `G` and their solutions, as many at a time as are solved together."""
        return ((part, self._solve(part)) for part in (G[rows] for rows in _blocks(G.shape[0])))

    def _solve(self, rows: GradientMatrix) -> Array:
        return self.inverse.solve(rows).raise_if_meaningless().x

    def __repr__(self) -> str:
        return f"Influence({self.inverse!r}, {self.train!r})"


def _blocks(n: int) -> Iterator[slice]:
    return iter(spans(n, TEST_BLOCK))


def _check(gradients: Any, inverse: Any, name: str) -> None:
    if not isinstance(gradients, GradientMatrix):
        msg = (
            f"{name} must be a gradient matrix, such as DenseGradients(rows), got "
            f"{type(gradients).__name__}"
        )
        raise TypeError(msg)
    if gradients.shape[1] != inverse.shape[0]:
        msg = f"{name} has {gradients.shape[1]} columns, the inverse {inverse.shape[0]} parameters"
        raise ValueError(msg)
