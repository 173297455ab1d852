"""The inverse that the Krylov methods prepare: one solve from the door to the `Solution`."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from .. import _backend, _linalg, _tracing
from ..operators import LinearOperator, as_operator
from ..operators.damping import by_block, smallest
from ..operators.data_parallel import agreed
from ..protocols import Array, Damping
from ..solution import Curvature, Record, Solution, Status
from . import _traced
from ._columns import distinct, expand
from ._cycles import Block
from ._definite import definite_damping
from ._inverse import (
    PreparedInverse,
    Products,
    accepted,
    check_finite_columns,
    codes_for,
    column_look,
    pack_solution,
    prepare_preconditioner,
    residual_error_bounds,
)
from ._krylov import RADAU_MARGIN, Kernel, KrylovMethod, Look
from ._progress import progress_bar
from .nystroem_preconditioner import NystroemPreconditioner


class KrylovInverse(PreparedInverse):
    """(A + λI)⁻¹ by CG or BlockCG; every product iterates anew."""

    method: KrylovMethod

    def __init__(
        self,
        method: KrylovMethod,
        A: LinearOperator,
        damping: Damping,
        preconditioner: Any = None,
    ) -> None:
        accurate = method.residual_operator
        self.outer = A if accurate is None else as_operator(accurate)
        if self.outer.shape != A.shape:
            msg = f"residual_operator has shape {self.outer.shape}, A has {A.shape}"
            raise ValueError(msg)
        spent = 0
        if method.indefinite == "shift" and not A.psd:
            damping, spent = definite_damping(A, damping)
        # Right-hand sides and solutions have the precision of the residuals.
        super().__init__(method, A, damping, products=spent, like=self.outer.like)
        self.least = smallest(self.shift)
        # λ by block in the precision of the residuals: a rounded λ is another system.
        self.outer_shift = self.shift
        if _backend.is_array(self.shift) and self.outer is not A:
            if (
                by_block(self.shift)
                and A.layout is not None
                and not _backend.is_tracing(self.shift)
            ):
                self.outer_shift = _backend.from_host(A.layout.shifts(damping), self.outer.like)
            else:
                self.outer_shift = _backend.cast(self.shift, self.outer.like)
        if method.etol is not None and not (self.outer.psd and self.least > 0):
            msg = (
                "etol needs an error bound: a positive semidefinite operator (psd=True) and "
                "damping > 0; use rtol"
            )
            raise ValueError(msg)
        self.known_size = 0.0  # ‖A + λI‖ once somebody has measured it
        self.preconditioner = preconditioner
        if preconditioner is None:
            self.preconditioner = prepare_preconditioner(method, A, damping)
        if self.preconditioner is not None:
            self.products += self.preconditioner.products

    def _solve(
        self, B: Array, *, x0: Array | None = None, callback: Any = None, progress: bool = False
    ) -> Solution:
        run = Run(self, callback, progress)
        if B.shape[1] == 0:
            empty = np.zeros((0,))
            return run.finish(B, empty, empty, empty, codes_for([]))
        if _tracing.staged(B, self.shift, self.operator.like):
            return _traced.solve(run, B, x0)
        if self.method.check_every is None:
            return run.unwatched(B, x0)
        self._recycle(run)
        columns = distinct(B, merge=x0 is None, reduce=self.method.reduce)
        B_work = columns.take(B)
        parts = []
        width = self.width(B_work.shape[1])
        with run.bar:
            for first in range(0, B_work.shape[1], width):
                cut = slice(first, min(first + width, B_work.shape[1]))
                start = None if x0 is None else columns.take(x0)[:, cut]
                parts.append(Block(run, B_work[:, cut], columns.work_norms[cut], start).solve())
        return expand(run, B, columns, parts)

    def with_damping(self, damping: Damping, /) -> KrylovInverse:
        """The inverse at another λ: nothing is re-used but what the preconditioner can."""
        inner = self.preconditioner
        if inner is not None:
            inner = accepted(inner.with_damping(damping))  # another λ may not be definite
        return KrylovInverse(self.method, self.operator, damping, inner)

    def _recycle(self, run: Run) -> None:
        """Sketch A at the first solve: this batch and all later ones are preconditioned by it."""
        rank = self.method.recycle
        if rank is None or self.preconditioner is not None:
            return
        inner = NystroemPreconditioner(rank=rank).prepare(self.operator, damping=self.damping)
        self.preconditioner = inner
        run.products.columns += inner.products
        # The sketch is one pass; what else it cost are single products.
        run.products.passes += 1 + inner.products - min(rank, self.shape[0])

    def width(self, k: int) -> int:
        """How many of k columns are iterated together."""
        width = max(1, self.method._width(max(1, k), self.shape[0], self.like))
        return int(agreed(self.operator, width, self.method.reduce))

    def radau_mu(self) -> float | None:
        """A legal lower bound on the spectrum of M⁻¹(A + λI), for Gauss–Radau."""
        if not self.operator.psd or not self.least > 0:
            return None
        if self.preconditioner is None:
            return RADAU_MARGIN * self.least
        floor = getattr(self.preconditioner, "relative_floor", None)
        return None if floor is None else RADAU_MARGIN * floor


class Run:
    """What one call of `solve` spends and sees."""

    def __init__(self, inverse: KrylovInverse, callback: Any, progress: bool) -> None:
        self.inverse = inverse
        self.method = inverse.method
        self.products = Products(inverse.operator, inverse.shift)
        same = inverse.outer is inverse.operator
        self.outer = self.products if same else Products(inverse.outer, inverse.outer_shift)
        self.callback = callback
        self.started = time.perf_counter()
        n = inverse.shape[0]
        self.maxiter = 10 * n if self.method.maxiter is None else self.method.maxiter
        self.bar = progress_bar(progress, self.maxiter, type(self.method).__name__)
        self.iterations = 0
        self.history: list[Record] = []
        self.curvature: Curvature | None = None

    @property
    def columns_spent(self) -> int:
        """Products so far, of both operators."""
        extra = 0 if self.outer is self.products else self.outer.columns
        return self.products.columns + extra

    def out_of_budget(self, next_columns: int) -> bool:
        """Whether products or seconds would be exceeded by one more iteration."""
        most, seconds = self.method.max_products, self.method.max_seconds
        # The true residual at the end is part of the promise and of the budget.
        if most is not None and self.columns_spent + 2 * next_columns > most:
            return True
        if seconds is None:
            return False
        left = seconds - (time.perf_counter() - self.started)
        return agreed(self.inverse.operator, left, self.method.reduce) < 0

    def kernel(self, *, guarded: bool, traced: bool = False) -> Kernel:
        inverse, M = self.inverse, self.inverse.preconditioner
        return self.method._kernel(
            product=self.products,
            preconditioner=None if M is None else M._matmat,
            mu=inverse.radau_mu(),
            reduce=self.method.reduce,
            guarded=guarded,
            traced=traced,
        )

    def norms(self, X: Array) -> Array:
        return _linalg.column_norms(X, reduce=self.method.reduce)

    def record(self, look: Look, scale: np.ndarray, b_norms: np.ndarray) -> None:
        safe = np.where(b_norms > 0, b_norms, 1.0)
        bounds = None
        if self.inverse.radau_mu() is not None:
            bounds = np.sqrt(np.maximum(look.squared_bounds, 0.0)) * scale
        entry = Record(
            self.iterations,
            self.columns_spent,
            time.perf_counter() - self.started,
            look.residuals * scale / safe,
            bounds,
        )
        self.history.append(entry)
        if self.callback is not None:
            self.callback(entry)

    def unwatched(self, B: Array, x0: Array | None) -> Solution:
        """Exactly `maxiter` iterations; no value is looked at before they are over."""
        R = B if x0 is None else B - self.outer(x0)
        b_norms, d = self.norms(B), self.norms(R)
        xp = _backend.namespace(d)
        safe = xp.where(d > 0, d, xp.ones_like(d))
        inner = self.inverse.operator
        R = _backend.cast(_linalg.scale_columns(R, 1 / safe), inner.like)
        width = self.inverse.width(R.shape[1])
        parts, size = [], xp.sum(d) * 0.0
        for first in range(0, R.shape[1], width):
            kernel = self.kernel(guarded=True)
            state = kernel.start(R[:, first : min(first + width, R.shape[1])])
            for _ in range(self.maxiter):
                state = kernel.step(state)
                self.iterations += 1
            parts.append(kernel.solution(state))
            size = xp.maximum(size, xp.max(state.size))
        X = _backend.namespace(B).concat(parts, axis=1)
        X = _linalg.scale_columns(_backend.cast(X, B), d)
        X = X if x0 is None else x0 + X
        norms = self.norms(B - self.outer(X))
        tolerance = xp.where(
            b_norms * self.method.rtol > self.method.atol,
            b_norms * self.method.rtol,
            self.method.atol * xp.ones_like(d),
        )
        norms, b_norms, tolerance, x_norms, sizes = column_look(
            norms, b_norms, tolerance, self.norms(X), size + xp.zeros_like(norms)
        )
        check_finite_columns(b_norms)
        codes = _verdicts(norms, b_norms, tolerance)
        # Nobody measured ‖A + λI‖ here: twice the largest that the iteration has met.
        known = 2 * sizes if self.inverse.preconditioner is None else np.inf
        floors = 4 * _backend.eps(B.dtype) * np.maximum(b_norms, x_norms * known)
        bounds = residual_error_bounds(self.inverse.outer, self.inverse.shift, norms, floors)
        return self.finish(X, norms, b_norms, bounds, codes)

    def finish(self, X: Array, norms: Any, b_norms: Any, bounds: Any, codes: Any) -> Solution:
        solution = pack_solution(
            X,
            codes=codes,
            norms=norms,
            b_norms=b_norms,
            bounds=bounds,
            started=self.started,
            products=self.products,
            iterations=self.iterations,
            history=tuple(self.history),
            curvature=self.curvature,
        )
        if self.outer is self.products:
            return solution
        return replace(
            solution,
            products=solution.products + self.outer.columns,
            passes=solution.passes + self.outer.passes,
        )


def _verdicts(norms: np.ndarray, b_norms: np.ndarray, tolerance: np.ndarray) -> np.ndarray:
    """Status codes of an unwatched run, by values alone."""
    codes = np.where(norms <= tolerance, Status.CONVERGED.code, Status.MAXITER.code)
    codes = np.where(np.isfinite(norms), codes, Status.NONFINITE.code)
    return np.where(b_norms == 0, Status.ZERO.code, codes)
