"""What the Krylov methods share: their options, and the kernel that the driver advances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from .. import _backend, _tracing
from ..operators import as_operator
from ..protocols import Array, Damping, Reduce
from ._options import check_numbers, check_preconditioner

RADAU_MARGIN = 0.9  # μ = 0.9 λ: rounding moves the spectrum, and the bound stays legal


class Look(NamedTuple):
    """What the host sees of a running iteration, per column (unit right-hand sides)."""

    residuals: np.ndarray
    squared_bounds: np.ndarray
    energies: np.ndarray
    x_norms: np.ndarray
    ok: np.ndarray
    size: float
    asymmetry: float

    @classmethod
    def nothing(cls, k: int) -> Look:
        """Before the first iteration: no bound, no energy."""
        zero = np.zeros(k)
        return cls(np.ones(k), np.full(k, np.inf), zero, zero, zero == 0, 0.0, 0.0)

    @classmethod
    def read(cls, rows: list[Array], k: int) -> Look:
        """Stack small per-column arrays, bring them over in one transfer."""
        xp = _backend.namespace(rows[0])
        host = np.asarray(_backend.to_host(xp.stack(rows)), dtype=np.float64)
        first = host[:, 0] if k else np.zeros(len(rows))
        return cls(host[0], host[1], host[2], host[3], host[4] > 0, first[5], first[6])


@dataclass
class Kernel:
    """One Krylov iteration; `start`, `step`, `look`, `residual`, `solution`, `suspect`.

    Args:
        product: V → (A + λI)V, counted.
        preconditioner: V → M⁻¹V or None.
        mu: a legal lower bound on the spectrum of M⁻¹(A + λI), or None.
        reduce: sum over processes.
        guarded: freeze the state where an iteration fails, for iterations that nobody looks at.
        traced: keep one structure of the state from the start, at the price of the symmetry test.
    """

    product: Callable[[Array], Array]
    preconditioner: Callable[[Array], Array] | None
    mu: float | None
    reduce: Reduce | None
    guarded: bool
    traced: bool = False
    needs_definite: ClassVar[bool] = True

    def start(self, R: Array) -> Any:
        raise NotImplementedError

    def step(self, s: Any) -> Any:
        raise NotImplementedError

    def look(self, s: Any) -> Look:
        raise NotImplementedError

    def residual(self, s: Any) -> Array:
        raise NotImplementedError

    def solution(self, s: Any) -> Array:
        raise NotImplementedError

    def suspect(self, s: Any, failed: np.ndarray) -> Array:
        raise NotImplementedError

    def suspects(self, s: Any) -> Array:
        """Directions among which one has negative curvature where an iteration has failed."""
        raise NotImplementedError

    def residual_norms(self, s: Any) -> Array:
        """Norms of the residuals of the recurrence (k,), on the device."""
        return s.N

    def _keep(self, ok: Array, new: Any, old: Any) -> Any:
        """The new state, or where it failed and nobody looks, the old one."""
        if not self.guarded:
            return new
        if _backend.is_numpy(ok):
            return new if bool(ok) else old._replace(ok=ok)
        kept = {}
        for name in ("X", "W", "P", "S", "N", "gamma", "energy"):
            after, before = getattr(new, name), getattr(old, name)
            if _backend.is_array(after):
                kept[name] = _backend.namespace(after).where(ok, after, before)
        return new._replace(**kept)


def freeze_columns(ok: Array, new: Any, old: Any) -> Any:
    """The new state where a column is well, the old one where it failed: the others go on."""
    if _backend.is_numpy(ok) and bool(np.all(ok)):
        return new
    xp = _backend.namespace(ok)
    weights = xp.where(ok, xp.ones_like(new.size), xp.zeros_like(new.size))
    kept = {}
    for name, after in new._asdict().items():
        if name == "ok" or not _backend.is_array(after) or after.ndim == 0:
            continue
        # Arrays of length n may live elsewhere than small ones.
        flag = ok if after.ndim == 1 else (_backend.lift(weights, after) > 0)[None, :]
        kept[name] = _backend.namespace(after).where(flag, after, getattr(old, name))
    return new._replace(**kept)


@dataclass(frozen=True, kw_only=True)
class KrylovMethod:
    """Options shared by CG and BlockCG; see there."""

    _blocks_held: ClassVar[int] = 15  # blocks (n, k) alive at most, with temporaries: measured

    rtol: float = 1e-5
    atol: float = 0.0
    etol: float | None = None
    maxiter: int | None = None
    max_products: int | None = None
    max_seconds: float | None = None
    preconditioner: Any = None
    recycle: int | None = None
    check_every: int | None = 1
    residual_operator: Any = None
    max_restarts: int = 2
    symmetry_tol: float | None = None
    indefinite: Literal["raise", "shift"] = "raise"
    reduce: Reduce | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_numbers(
            self,
            sizes=("rtol", "atol", "etol", "symmetry_tol", "max_seconds"),
            counts=("maxiter", "check_every", "max_products", "recycle"),
        )
        if self.indefinite not in ("raise", "shift"):
            msg = f"indefinite must be 'raise' or 'shift', got {self.indefinite!r}"
            raise ValueError(msg)
        check_preconditioner(self.preconditioner)
        if self.preconditioner is not None and self.recycle is not None:
            msg = "recycle builds a preconditioner of its own: give one of the two"
            raise ValueError(msg)

    def _kernel(self, **context: Any) -> Kernel:
        raise NotImplementedError

    def _width(self, k: int, n: int, like: Array) -> int:
        """Columns at work together: all of them, unless memory is short."""
        room = int(0.6 * _backend.free_memory(like))
        return min(k, max(4, room // (self._blocks_held * n * _backend.itemsize(like.dtype))))

    def prepare(self, A: Any, /, damping: Damping) -> Any:
        """An inverse that iterates at every product; nothing is precomputed but M."""
        from ._driver import KrylovInverse  # the driver imports the kernels' base from here

        A = as_operator(A)
        values = damping.values() if isinstance(damping, Mapping) else [damping]
        with _tracing.eagerly(A.like, *values):  # a preconditioner looks at values
            return KrylovInverse(self, A, damping)
