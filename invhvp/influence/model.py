"""How much each training sample moves the loss of each test sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .. import _backend, _linalg
from ..gradients import GradientMatrix
from ..protocols import Array
from ..solution import Solution
from . import certificates
from .certificates import CertifiedScores, SelfInfluenceBounds
from .curve import DampingCurve, damping_curve
from .topk import TopK, top_k

_BLOCK = 128  # right-hand sides solved together: the widest block that still pays in BlockCG


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
        blocks = [
            xp.matrix_transpose(self.train @ self._solve(test[rows]))
            for rows in _blocks(test.shape[0])
        ]
        return xp.concat(blocks, axis=0)

    def self_influence(self) -> Array:
        """gᵢᵀ(A + λI)⁻¹gᵢ of every training sample, shape (N,): large for suspicious labels."""
        xp = _backend.namespace(self.train.like)
        bilinear = self._bilinear()
        parts = []
        for rows in _blocks(self.train.shape[0]):
            part = self.train[rows]
            if bilinear is not None:
                parts.append(xp.linalg.diagonal(bilinear(part, part)))
            else:
                # The gradients are formed for one block only: its solution is dense anyway.
                dense = xp.matrix_transpose(part.to_dense())
                X = self._solve(part)
                parts.append(_backend.lift(_linalg.column_dot(dense, X), dense))
        return xp.concat(parts, axis=0)

    def top_k(self, test: GradientMatrix, /, k: int = 10) -> TopK:
        """The k most helpful and k most harmful training samples of each test sample."""
        return top_k(self.scores(test), k)

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

    def _solve(self, rows: GradientMatrix) -> Array:
        return self.inverse.solve(rows).raise_if_meaningless().x

    def __repr__(self) -> str:
        return f"Influence({self.inverse!r}, {self.train!r})"


def _blocks(n: int) -> Iterator[slice]:
    return (slice(i, min(i + _BLOCK, n)) for i in range(0, n, _BLOCK))


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
