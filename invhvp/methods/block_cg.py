"""The breakdown-free block conjugate gradient method in Dubrulle's form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import _backend, _lapack, _linalg
from ..protocols import Array
from ._krylov import Kernel, KrylovMethod, Look


@dataclass(frozen=True, kw_only=True)
class BlockCG(KrylovMethod):
    """Solve (A + λI)X = B for all columns from one block Krylov space.

    The residual block is kept as R = W S with W orthonormal (Dubrulle's R-form), so that neither
    dependent right-hand sides nor float32 can break the recurrence, and nothing is ever deflated.
    Repeated columns are solved once. For a PSD operator and λ > 0 each solution carries a bound
    on its error in the A-norm (two-sided block Gauss–Radau, and ‖r‖/√λ). Negative curvature is
    detected, checked by a product of its own and returned with the vector.

    Args:
        rtol, atol: stopping rule per column, ‖r_j‖ ≤ max(rtol·‖b_j‖, atol), on true residuals.
        etol: stop on the certified error instead, ‖e_j‖_A ≤ etol·‖x_j‖_A; needs a PSD operator
            and λ > 0.
        maxiter: block iterations for each block of columns; None is 10·n.
        max_products, max_seconds: end with the best iterate so far.
        preconditioner: a Method whose inverse is one fixed positive-definite map.
        recycle: rank of a Nyström sketch of A that the first solve makes and that preconditions
            it and all later solves of the same inverse; its products are those of the first
            solve. It pays from the second batch of right-hand sides on. Products for 4 batches of
            16 on a network's spectrum (n = 800, λ = 1e-3), rank 64: 512 instead of 816 in float64
            (rtol 1e-5), 488 instead of 1,208 in float32; with CG 576 instead of 10,768. Without
            effect under `jit` and for check_every=None.
        check_every: look at the residuals every so many iterations (one small transfer to the
            host); None runs exactly `maxiter` iterations and never looks.
        block_width: columns iterated together; by default min(k, n, 128), less if memory is short.
        residual_operator: a more accurate A (float64 around a float32 solve): residuals are
            computed with it, and right-hand sides and solutions have its dtype.
        max_restarts: restarts on the true residual where the recurrence and the truth differ.
        symmetry_tol: asymmetry of the products, in units of ‖A‖, that is taken for rounding.
        indefinite: "raise" ends at negative curvature, with the vector that proves it; "shift"
            measures the lowest eigenvalue in `prepare` and, where it has to, raises λ (the
            inverse says to what, with a warning).
        reduce: sum over processes where the parameter vector is sharded.

    Cost per iteration and column block of width b: b products, 14-16·n·b² flops, 12-15 blocks of
    memory (n × b), one look every `check_every` iterations. One pass more for the residual.

    Source: Dubrulle (2001), algorithm BCGrQ; Ji & Li (2017) for the breakdown-free idea; the
    block Gauss–Radau recurrence extends Meurant & Tichý (2013) to blocks.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.Diagonal(np.arange(1.0, 11.0))
        >>> sol = ih.BlockCG(rtol=1e-10).prepare(A, damping=1e-3).solve(np.ones((10, 2)))
        >>> sol.status[0].name, sol.products
        ('CONVERGED', 11)
    """

    block_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_width is not None and self.block_width < 1:
            msg = f"block_width must be at least 1, got {self.block_width}"
            raise ValueError(msg)

    def _kernel(self, **context: Any) -> Kernel:
        return _DubrulleR(**context)

    def _width(self, k: int, n: int, like: Array) -> int:
        if self.block_width is not None:
            return min(k, n, self.block_width)
        return min(n, 128, super()._width(k, n, like))


class _State(NamedTuple):
    X: Array  # (n, k) solution of this cycle
    W: Array  # (n, b) orthonormal residual directions (M⁻¹-orthonormal if preconditioned)
    P: Array  # (n, b) search directions
    S: Array  # (b, k) coefficients: R = W S
    N: Array  # (k,) Euclidean residual norms
    gamma: Array  # (b, b) block Gauss–Radau matrix Γ
    energy: Array  # (k,) accumulated decrease of the squared A-norm error
    zeta: Array | None  # (b, b) last transfer matrix
    G: Array | None  # (b, b) last Pᵀ(A + λ)P
    size: Array  # () lower bound on ‖A + λ‖, unpreconditioned only
    asymmetry: Array  # () largest asymmetry seen, in units of the operator
    ok: Array  # () the last PᵀAP was positive definite and finite
    first: tuple[Array, Array] | None  # P and Q of the first iteration, for the symmetry test


class _DubrulleR(Kernel):
    def start(self, R: Array) -> _State:
        xp = _backend.namespace(R)
        E, T = self._orthonormalise(R)
        W, Z, T_m = self._m_orthonormalise(E)
        sxp = _backend.namespace(T)
        eye = _linalg.identity_like(T)
        zero = sxp.sum(T) * 0.0
        return _State(
            X=xp.zeros_like(R),
            W=W,
            P=Z,
            S=T if T_m is None else T_m @ T,
            N=_column_lengths(T),
            gamma=eye / (self.mu or 1.0),
            energy=sxp.sum(T, axis=0) * 0.0,
            zeta=0.0 * T if self.traced else None,
            G=0.0 * T if self.traced else None,
            size=zero,
            asymmetry=zero,
            ok=zero == 0.0,
            first=None,
        )

    def step(self, s: _State) -> _State:
        P, W = s.P, s.W
        Q = self.product(P)
        raw = _linalg.gram(P, Q, reduce=self.reduce)
        xp = _backend.namespace(raw)
        G = _linalg.symmetric(raw)
        K, _, ok = inverse_root(G, _backend.eps(P.dtype))
        inverse = xp.matrix_transpose(K) @ K  # G⁻¹
        scaled = K @ s.S
        X = _linalg.add_combined(s.X, P, xp.matrix_transpose(K) @ scaled)
        energy = s.energy + xp.sum(scaled * scaled, axis=0)

        E, T = self._orthonormalise(_linalg.add_combined(W, Q, -inverse))
        residual = T @ s.S
        W_new, Z, T_m = self._m_orthonormalise(E)
        zeta = T if T_m is None else T_m @ T
        P_new = _linalg.add_combined(Z, P, xp.matrix_transpose(zeta))
        new = _State(
            X=X,
            W=W_new,
            P=P_new,
            S=residual if T_m is None else T_m @ residual,
            N=_column_lengths(residual),
            gamma=self._radau(s.gamma, inverse, zeta),
            energy=energy,
            zeta=zeta,
            G=G,
            size=xp.maximum(s.size, self._lower_bound(G, P, Q, s)),
            asymmetry=self._asymmetry(raw, P, Q, s),
            ok=ok & (xp.max(xp.abs(G)) > 0),  # A + λI = 0 has no curvature to divide by
            first=(P, Q) if s.zeta is None else None,
        )
        return self._keep(ok, new, s)

    def _orthonormalise(self, Y: Array) -> tuple[Array, Array]:
        return _linalg.cholqr(Y, reduce=self.reduce)

    def _m_orthonormalise(self, E: Array) -> tuple[Array, Array, Array | None]:
        """W and Z = M⁻¹W with WᵀZ = I, and T with E = W T, for orthonormal E."""
        if self.preconditioner is None:
            return E, E, None
        W, Z, total = E, self.preconditioner(E), None
        for _ in range(2):  # the second pass repairs what rounding left of the first
            G = _linalg.symmetric(_linalg.gram(W, Z, reduce=self.reduce))
            K, root, _ = inverse_root(G, _backend.eps(E.dtype))
            back = _backend.namespace(G).matrix_transpose(K)
            W, Z = _linalg.combine(W, back), _linalg.combine(Z, back)
            total = root if total is None else root @ total
        return W, Z, total

    def _radau(self, gamma: Array, inverse: Array, zeta: Array) -> Array:
        """Γ ← (μI + ζ(Γ − G⁻¹)⁻¹ζᵀ)⁻¹; restarted at I/μ where rounding makes it indefinite."""
        xp = _backend.namespace(gamma)
        eye = _linalg.identity_like(gamma)
        if self.mu is None:
            return gamma
        K, _, ok = inverse_root(_linalg.symmetric(gamma - inverse), None)
        half = K @ xp.matrix_transpose(zeta)
        M = self.mu * eye + xp.matrix_transpose(half) @ half
        L, _, ok_m = inverse_root(_linalg.symmetric(M), None)
        return xp.where(ok & ok_m, xp.matrix_transpose(L) @ L, eye / self.mu)

    def _lower_bound(self, G: Array, P: Array, Q: Array, s: _State) -> Array:
        """‖A + λI‖ is at least that of the diagonal block G + ζ G₋ ζᵀ of the Lanczos matrix."""
        xp = _backend.namespace(G)
        if self.preconditioner is not None:  # there the Lanczos matrix is that of M⁻¹(A + λI)
            if s.zeta is not None and s.first is None:
                return s.size
            return xp.max(_linalg.column_norms(Q, reduce=self.reduce) / _lengths(P, self.reduce))
        M = G if s.zeta is None else G + s.zeta @ s.G @ xp.matrix_transpose(s.zeta)
        scale = xp.sqrt(xp.sum(M * M))
        M = M / xp.where(scale > 0, scale, xp.ones_like(scale))
        for _ in range(3):
            M = M @ M
        return scale * xp.sum(M * M) ** (1.0 / 16.0)

    def _asymmetry(self, raw: Array, P: Array, Q: Array, s: _State) -> Array:
        """Two free tests: PᵀAP against its transpose, and P₀ᵀ(AP₁) against (P₁ᵀAP₀)ᵀ.

        The gap is in units of the operator: |xᵀAy − yᵀAx| / (‖x‖‖y‖).
        """
        if s.zeta is not None and s.first is None:
            return s.asymmetry
        xp = _backend.namespace(raw)
        right = _lengths(P, self.reduce)
        if s.first is None:
            left, gap = right, raw - xp.matrix_transpose(raw)
        else:
            P0, Q0 = s.first
            left = _lengths(P0, self.reduce)
            forward = _linalg.gram(P0, Q, reduce=self.reduce)
            gap = forward - xp.matrix_transpose(_linalg.gram(P, Q0, reduce=self.reduce))
        return xp.maximum(s.asymmetry, xp.max(xp.abs(gap) / (left[:, None] * right[None, :])))

    def look(self, s: _State) -> Look:
        xp = _backend.namespace(s.N)
        k = s.N.shape[0]
        bound = xp.sum(s.S * (s.gamma @ s.S), axis=0)
        x_norms = _linalg.column_norms(s.X, reduce=self.reduce)
        ones = xp.ones_like(s.N)
        ok = xp.where(s.ok, ones, 0.0 * ones)
        return Look.read([s.N, bound, s.energy, x_norms, ok, s.size * ones, s.asymmetry * ones], k)

    def residual(self, s: _State) -> Array:
        return _linalg.combine(s.W, s.S)

    def solution(self, s: _State) -> Array:
        return s.X

    def suspect(self, s: _State, failed: Any) -> Array:
        """The direction of least curvature in the span of P (n, 1); one product of the block."""
        G = _linalg.symmetric(_linalg.gram(s.P, self.product(s.P), reduce=self.reduce))
        d = _lengths(s.P, self.reduce)
        _, V = _lapack.eigh(G / (d[:, None] * d[None, :]))
        return _linalg.combine(s.P, V[:, :1] / d[:, None])

    def suspects(self, s: _State) -> Array:
        return self.suspect(s, None)


def _column_lengths(S: Array) -> Array:
    xp = _backend.namespace(S)
    return xp.sqrt(xp.sum(S * S, axis=0))


def _lengths(P: Array, reduce: Any) -> Array:
    """Column norms, with ones for columns that vanish."""
    norms = _linalg.column_norms(P, reduce=reduce)
    xp = _backend.namespace(norms)
    return xp.where(norms > 0, norms, xp.ones_like(norms))


def inverse_root(G: Array, unit: float | None) -> tuple[Array, Array, Array]:
    """K and R = K⁻ᵀ with G⁻¹ = KᵀK, G = RᵀR, and whether G is positive definite at all.

    G is scaled to unit diagonal first. With `unit`, a G that is indefinite only by rounding in
    that precision is shifted; without, it is reported.
    """
    xp = _backend.namespace(G)
    scaled, d, good = _linalg.unit_diagonal(G)
    L = _lapack.cholesky(scaled)
    plain = xp.all(xp.isfinite(L))
    if _backend.is_numpy(G) and bool(good & plain):
        return _lapack.inv_lower(L) / d, L.T * d, plain
    if unit is not None and not (_backend.is_numpy(G) and bool(plain)):
        shift = (2.0 * G.shape[0] * unit) * _linalg.identity_like(G)
        L = xp.where(plain, L, _lapack.cholesky(scaled + shift))
    ok = good & xp.all(xp.isfinite(L))
    L = xp.where(ok, L, _linalg.identity_like(G))  # keeps what follows finite
    return _lapack.inv_lower(L) / d[None, :], xp.matrix_transpose(L) * d[None, :], ok
