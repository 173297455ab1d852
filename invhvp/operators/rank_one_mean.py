"""(1/c) Σ g_i g_iᵀ: Fisher and Gauss-Newton matrices in terms of per-sample gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .. import _backend, _lapack, _linalg
from ..gradients import GradientMatrix
from ..protocols import Array, Damping
from ..solution import SingularError
from .algebra import checked_factor
from .base import LinearOperator
from .damping import as_shift, by_block, scalar, smallest
from .dense import Dense, DenseInverse
from .factor import SymmetricFactor
from .pseudo_inverse import PseudoInverse, kept_eigenvalues, pseudo_inverse


class RankOneMean(LinearOperator):
    """(1/c) Σ_i g_i g_iᵀ over the rows g_i of a gradient matrix (N × p); PSD by construction.

    Args:
        gradients: the rows.
        count: c, by default N. Rows that share a sample (output columns of a Gauss-Newton
            matrix) are counted once: pass the number of samples.

    Cost: two products with the gradient matrix a column.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.RankOneMean(ih.DenseGradients(np.eye(3)[:2]))
        >>> A.inverse(0.5) @ np.ones(3)
        array([1., 1., 2.])
    """

    def __init__(self, gradients: GradientMatrix, *, count: float | None = None) -> None:
        N, p = gradients.shape
        super().__init__(p, like=gradients.like, psd=True, layout=gradients.layout)
        self._gradients = gradients
        self.count = float(N if count is None else count)
        if not (math.isfinite(self.count) and self.count > 0):
            msg = f"count must be positive and finite, got {count}"
            raise ValueError(msg)

    @property
    def gradients(self) -> GradientMatrix:
        """The N × p matrix of rows g_i."""
        return self._gradients

    @property
    def n_terms(self) -> int:
        """Number of rank-one terms N."""
        return self._gradients.shape[0]

    def subset(self, indices: Array, /) -> RankOneMean:
        """The mean over some of the terms, at the scale of the whole: N/|B| times their sum."""
        rows = self._gradients[indices]
        return RankOneMean(rows, count=self.count * rows.shape[0] / self.n_terms)

    def _matmat(self, X: Array, /) -> Array:
        G = self._gradients
        return (G.T @ (G @ X)) / self.count

    def diagonal(self) -> Array:
        """The exact diagonal (n,)."""
        return self._gradients.column_norms() ** 2 / self.count

    def inverse(self, damping: Damping, /) -> LinearOperator:
        """The exact inverse: N × N through the sample-space Gram matrix for N < p, else p × p.

        Raises SingularError for λ = 0 unless N ≥ p and the gradients span R^p.
        Cost: one Gram matrix and one Cholesky factorisation of size min(N, p), in float64.
        """
        shift = as_shift(damping, self)
        N, p = self._gradients.shape
        if p <= N:  # at N = p too: the p × p form cancels nothing
            return ParameterSpaceInverse(self, shift)
        if by_block(shift):
            return self._by_block(damping, shift)
        return SampleSpaceInverse(self, scalar(shift, "the sample-space inverse"))

    def pseudo_inverse(self) -> PseudoInverse:
        """A⁺ = c GᵀK⁻²G on the range of K = GGᵀ, from the N × N Gram matrix; p × p for N ≥ p."""
        G, c = self._gradients, self.count
        if self.shape[0] <= G.shape[0]:
            return pseudo_inverse(Dense(self.to_dense(), layout=self.layout, check=False))
        w, V = _lapack.eigh(_linalg.symmetric(_backend.to_small(G.gram())))
        host = _backend.to_host(w)
        kept, truncation = kept_eigenvalues(host / c, self.shape[0], _backend.eps(self.dtype))
        xp = _backend.namespace(w)
        mask = xp.asarray(kept, device=_backend.device(w))
        safe = xp.where(mask, w, xp.ones_like(w))
        inner = xp.where(mask, c / (safe * safe), xp.zeros_like(w))
        C = (V * inner[None, :]) @ xp.matrix_transpose(V)
        return PseudoInverse(GradientForm(self, 0.0, C), truncation)

    def _by_block(self, damping: Mapping[str, float], shift: Array) -> LinearOperator:
        """λ by block: substitute g → Λ^(-1/2) g, which leaves a problem with λ = 1."""
        if not smallest(shift) > 0:
            msg = "the sample-space inverse needs λ > 0 in every block"
            raise SingularError(msg)
        roots = {name: 1.0 / math.sqrt(float(value)) for name, value in damping.items()}
        inner = RankOneMean(self._gradients.rescaled(roots), count=self.count)
        xp = _backend.namespace(shift)
        return Congruence(SampleSpaceInverse(inner, 1.0), 1.0 / xp.sqrt(shift))

    def __mul__(self, factor: float) -> LinearOperator:
        factor = checked_factor(factor)
        if factor > 0:
            return RankOneMean(self._gradients, count=self.count / factor)
        return super().__mul__(factor)

    __rmul__ = __mul__

    def _describe(self) -> str:
        return f"{self._gradients!r}"


class SampleSpaceInverse(LinearOperator):
    """(GᵀG/c + λI)⁻¹b = (b − Gᵀ(GGᵀ + cλI)⁻¹G b)/λ.

    Structured right-hand sides never leave sample space: `bilinear` needs Gram matrices alone.
    """

    definite = True

    def __init__(self, A: RankOneMean, shift: float | Array, gram: Array | None = None) -> None:
        if isinstance(shift, float) and not shift > 0:
            msg = "the sample-space inverse needs damping > 0: A has rank at most N"
            raise SingularError(msg)
        super().__init__(A.shape[0], like=A.like, psd=True, layout=A.layout)
        self.operator = A
        self.shift = shift
        self._gram = _backend.to_small(A.gradients.gram()) if gram is None else gram
        eye = _linalg.identity_like(self._gram)
        self._factor = SymmetricFactor(self._gram + (A.count * shift) * eye)

    def with_shift(self, shift: float) -> SampleSpaceInverse:
        """The inverse at another λ; the Gram matrix is kept, the factorisation is not."""
        return SampleSpaceInverse(self.operator, shift, self._gram)

    def _matmat(self, X: Array, /) -> Array:
        return self._combined(X, self._factor.solve(_backend.to_small(self.operator.gradients @ X)))

    def of_gradients(self, rows: GradientMatrix, columns: Array) -> Array:
        """This inverse times rowsᵀ, which `columns` (p, k) are: one product with Gᵀ."""
        return self._combined(columns, self.coefficients(rows))

    def _combined(self, X: Array, weights: Array) -> Array:
        return (X - self.operator.gradients.T @ _backend.lift(weights, X)) / self.shift

    def damped_norm(self) -> float:
        """‖A + λI‖₂ to a few percent (never above it), from the Gram matrix; one transfer."""
        xp, K = _backend.namespace(self._gram), self._gram
        largest = xp.argmax(xp.linalg.diagonal(K))
        v = xp.take(K, xp.reshape(largest, (1,)), axis=1)
        for _ in range(4):
            norm = xp.sqrt(xp.sum(v * v))
            v = K @ (v / xp.where(norm > 0, norm, xp.ones_like(norm)))
        size = xp.sqrt(xp.sum(v * v))
        return float(_backend.to_host(size)) / self.operator.count + float(self.shift)

    def power(self, exponent: float, /) -> LinearOperator:
        """This inverse to a power: λ⁻ᵉ + GᵀCG with a C of size N from the Gram matrix's eigenpairs.

        Cost: some 10 N³ flops, no product.
        """
        A, w, V = self.operator, *_lapack.eigh(self._gram)
        xp, cut = _backend.namespace(w), A.count * self.shift
        # ((s + λ)⁻ᵉ − λ⁻ᵉ)/s without cancellation where s = w/c is far below λ.
        ratio = xp.where(w > 0, w, xp.zeros_like(w)) / cut
        safe = xp.where(ratio > 0, ratio, xp.ones_like(ratio))
        slope = xp.where(ratio > 0, _power_less_one(safe, -exponent) / safe, -exponent + ratio)
        rest = self.shift**-exponent
        C = (V * (slope * (rest / cut))[None, :]) @ xp.matrix_transpose(V)
        return GradientForm(A, rest, C)

    def logdet(self) -> float:
        """The log-determinant of this inverse; one transfer."""
        N, p = self.operator.gradients.shape
        inside = self._factor.logdet() - N * math.log(self.operator.count)
        return -inside - (p - N) * math.log(self.shift)

    def coefficients(self, right: GradientMatrix) -> Array:
        """(GGᵀ + cλI)⁻¹G rightᵀ, shape (N, n_right), small: what `bilinear` solves for."""
        return self._factor.solve(self.operator.gradients._small_gram(right))

    def bilinear(self, left: GradientMatrix, right: GradientMatrix) -> Array:
        """All left (A + λI)⁻¹ rightᵀ, shape (n_left, n_right), from Gram matrices alone.

        Cost: the smaller side is solved for. Where the other is the operator's own matrix G, that
        is all: G (A + λI)⁻¹ = c (GGᵀ + cλI)⁻¹G, in which nothing cancels.
        """
        xp = _backend.namespace(self._gram)
        own = right is self.operator.gradients
        if not own and (left is self.operator.gradients or left.shape[0] > right.shape[0]):
            return _backend.namespace(self.like).matrix_transpose(self.bilinear(right, left))
        G = self.operator.gradients
        cross = G._small_gram(left)
        solved = xp.matrix_transpose(self._factor.solve(cross))
        if own:
            return _backend.lift(self.operator.count * solved, self.like)
        if left is not right:
            cross = _backend.to_small(G.gram(right))
        direct = left._small_gram(right)
        return _backend.lift((direct - solved @ cross) / self.shift, self.like)


class GradientForm(LinearOperator):
    """αI + GᵀCG for a small symmetric C (N, N); positive definite by its construction."""

    definite = True

    def __init__(self, A: RankOneMean, alpha: float, C: Array) -> None:
        super().__init__(A.shape[0], like=A.like, psd=True, layout=A.layout)
        self._gradients, self._alpha, self._C = A.gradients, alpha, C

    def _matmat(self, X: Array, /) -> Array:
        G = self._gradients
        C, inside = _backend.together(self._C, _backend.to_small(G @ X))
        return self._alpha * X + G.T @ _backend.lift(C @ inside, X)


def _power_less_one(x: Array, exponent: float) -> Array:
    """(1 + x)ᵉ − 1."""
    xp = _backend.namespace(x)
    return xp.expm1(exponent * xp.log1p(x))


class ParameterSpaceInverse(DenseInverse):
    """The p × p factorisation for N ≥ p."""

    def __init__(self, A: RankOneMean, shift: float | Array) -> None:
        total = None
        for rows in A.gradients.parts():
            part = _linalg.gram(rows.to_dense())
            total = part if total is None else total + part
        assert total is not None
        M = _linalg.symmetric(total) / A.count
        eye = _linalg.identity_like(M)
        diagonal = _backend.to_small(shift)[:, None] if by_block(shift) else shift
        super().__init__(M + diagonal * eye, A)


class Congruence(LinearOperator):
    """D K D for a positive diagonal D."""

    definite = True

    def __init__(self, K: LinearOperator, d: Array) -> None:
        super().__init__(K.shape[0], like=K.like, psd=K.psd, layout=K.layout)
        self._K = K
        self._d = d[:, None]

    def _matmat(self, X: Array, /) -> Array:
        return self._d * self._K._matmat(self._d * X)
