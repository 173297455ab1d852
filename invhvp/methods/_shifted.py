"""One block of right-hand sides, iterated at the smallest λ for all λ."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _arithmetic, _backend, _linalg
from ..protocols import Array
from ..solution import Curvature
from ._inverse import Products, column_look
from .block_cg import BlockCG, inverse_root


class ShiftedBlock:
    """One block of right-hand sides, iterated at the smallest λ, for all λ."""

    def __init__(
        self,
        method: BlockCG,
        products: Products,
        B: Array,
        b_norms: np.ndarray,
        targets: np.ndarray,
        dampings: list[float],
    ) -> None:
        self.method, self.products, self.B = method, products, B
        self.b_norms, self.targets, self.dampings = b_norms, targets, dampings
        xp = _backend.namespace(B)
        self.X = [xp.zeros_like(B) for _ in dampings]
        self.size = 0.0
        self.iterations = 0

    def run(self) -> Curvature | None:
        """Iterate until every λ has converged; the proof if the smallest is not definite."""
        safe = np.where(self.b_norms > 0, self.b_norms, 1.0)
        base = self.dampings[0]
        kernel = self.method._kernel(
            product=_At(self.products, base),
            preconditioner=None,
            mu=None,
            reduce=None,
            guarded=False,
        )
        state = kernel.start(_linalg.scale_columns(self.B, 1 / safe))
        shifts = [_Shift(value - base, state.P, state.S) for value in self.dampings]
        live = list(range(len(shifts)))
        limit = 10 * self.products.operator.shape[0]
        limit = limit if self.method.maxiter is None else self.method.maxiter
        while self.iterations < limit and live:
            new = kernel.step(state)
            self.iterations += 1
            seen = kernel.look(new)
            if not np.all(seen.ok) or not np.all(np.isfinite(seen.residuals)):
                return self._proof(kernel, state, ~seen.ok)
            self.size = max(self.size, seen.size)
            for index in live:
                self.X[index] = shifts[index].advance(state, new, self.X[index], safe)
            looks = column_look(
                *[shifts[index].residuals() for index in live],
                *[_linalg.column_norms(self.X[index]) for index in live],
            )
            # As in `_cycles`: below a tenth of ε‖A‖‖x‖ the recurrence only pretends.
            unit = 0.1 * _backend.eps(self.B.dtype) * self.size
            goals = [np.maximum(0.9 * self.targets, unit * x) for x in looks[len(live) :]]
            live = [
                index
                for index, residual, goal in zip(live, looks, goals, strict=False)
                if np.any(residual * safe > goal)
            ]
            state = new
        return None

    def _proof(self, kernel: Any, state: Any, failed: np.ndarray) -> Curvature | None:
        v = kernel.suspect(state, failed)
        v = _linalg.scale_columns(v, 1 / _linalg.column_norms(v))
        Av = kernel.product(v)
        q, size = column_look(_linalg.column_dot(v, Av), _linalg.column_norms(Av))
        rounding = 4 * _backend.eps(v.dtype) * max(self.size, size[0])
        if np.isfinite(q[0]) and (q[0] < -rounding or size[0] == 0):
            return Curvature(v[:, 0], float(q[0]) - self.dampings[0])
        return None


class _At:
    """(A + λI)V for one fixed λ, counted with the other products."""

    def __init__(self, products: Products, damping: float) -> None:
        self.products, self.damping = products, damping

    def __call__(self, V: Array) -> Array:
        return _arithmetic.add_scaled(self.products(V), V, self.damping)


class _Shift:
    """The recurrence of one λ = λ₀ + σ on the Lanczos matrix of the smallest.

    Its pivots are D = G + E with E = σI + ζ(G₋ − G₋D₋⁻¹G₋)ζᵀ; the bracket is written as
    E₋D₋⁻¹G₋, which subtracts nothing, so that E vanishes exactly for σ = 0.
    """

    def __init__(self, sigma: float, V: Array, y: Array) -> None:
        self.sigma, self.V, self.y = sigma, V, y
        self.carry: Array | None = None

    def advance(self, state: Any, new: Any, X: Array, scale: np.ndarray) -> Array:
        """X and the step V D⁻¹y of this block, scaled; V and y are moved on to the next."""
        G = new.G
        xp = _backend.namespace(G)
        E = self.sigma * _linalg.identity_like(G)
        if self.carry is not None:
            E = E + _linalg.symmetric(state.zeta @ self.carry @ xp.matrix_transpose(state.zeta))
        K, _, _ = inverse_root(_linalg.symmetric(G + E), _backend.eps(self.V.dtype))
        inverse = xp.matrix_transpose(K) @ K
        step = inverse @ self.y
        scales, step = _backend.together(scale, step)
        X = _linalg.add_combined(X, self.V, step * scales[None, :])
        M = inverse @ G
        self.V = _linalg.add_combined(new.W, self.V, M @ xp.matrix_transpose(new.zeta))
        self.y = new.zeta @ (xp.matrix_transpose(M) @ self.y)
        self.carry = E @ M
        return X

    def residuals(self) -> Array:
        """‖r_j‖ = ‖y e_j‖ of unit right-hand sides."""
        xp = _backend.namespace(self.y)
        return xp.sqrt(xp.sum(self.y * self.y, axis=0))
