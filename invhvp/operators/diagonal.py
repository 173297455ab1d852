"""Identity and Diagonal."""

from __future__ import annotations

from .. import _backend, _linalg
from ..layout import Layout
from ..protocols import Array, Damping
from ..solution import SingularError
from .algebra import checked_factor
from .base import LinearOperator
from .damping import as_shift
from .factor import check_definite
from .pseudo_inverse import PseudoInverse, kept_eigenvalues


class Diagonal(LinearOperator):
    """diag(d) for entries `d` of shape (n,).

    Cost: n flops and words per column, no storage beyond d.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> ih.Diagonal(np.array([1.0, 3.0])).inverse(1.0) @ np.ones(2)
        array([0.5 , 0.25])
    """

    def __init__(self, d: Array, *, psd: bool | None = None, layout: Layout | None = None) -> None:
        if d.ndim != 1:
            msg = f"Diagonal takes the entries as an array of shape (n,), got {tuple(d.shape)}"
            raise ValueError(msg)
        if psd is None:
            xp = _backend.namespace(d)
            psd = not _backend.is_tracing(d) and bool(_backend.to_host(xp.all(d >= 0)))
        super().__init__(d.shape[0], like=d, psd=psd, layout=layout)
        self._d = d

    def _matmat(self, X: Array, /) -> Array:
        return self._d[:, None] * X

    def diagonal(self) -> Array:
        """The entries (n,)."""
        return self._d

    def inverse(self, damping: Damping, /) -> Diagonal:
        """(diag(d) + λ)⁻¹, again diagonal. Raises SingularError where an entry vanishes."""
        shift = as_shift(damping, self)
        xp = _backend.namespace(self._d)
        entries = self._d + shift
        regular = xp.all((entries != 0) & xp.isfinite(entries))
        if not _backend.is_tracing(entries) and not bool(_backend.to_host(regular)):
            msg = "diag(d) + λ has an entry that is zero, NaN or Inf; raise the damping"
            raise SingularError(msg)
        return Diagonal(1.0 / entries, layout=self.layout)

    def pseudo_inverse(self) -> PseudoInverse:
        """The inverses of the entries that rise above rounding, and zeros."""
        xp = _backend.namespace(self._d)
        host = _backend.to_host(self._d)
        kept, truncation = kept_eigenvalues(host, self._n, _backend.eps(self.dtype))
        mask = xp.asarray(kept, device=self.device)
        inverted = xp.where(mask, 1.0 / xp.where(mask, self._d, 1.0 + 0.0 * self._d), 0.0 * self._d)
        return PseudoInverse(Diagonal(inverted, layout=self.layout), truncation)

    def power(self, exponent: float, /) -> Diagonal:
        """diag(d) to a power. Raises ValueError unless all entries are known to be positive."""
        check_definite(self.definite)
        return Diagonal(self._d**exponent, psd=True, layout=self.layout)

    def logdet(self) -> float:
        """Sum of log d; one transfer. Raises ValueError unless all are known to be positive."""
        check_definite(self.definite)
        logs = _backend.namespace(self._d).log(self._d)[:, None]
        total = _linalg.column_dot(logs, _backend.namespace(logs).ones_like(logs))
        return float(_backend.to_host(total)[0])

    def __mul__(self, factor: float) -> Diagonal:
        return Diagonal(checked_factor(factor) * self._d, layout=self.layout)

    __rmul__ = __mul__

    @property
    def definite(self) -> bool:
        """Whether all entries are known to be positive (zero entries never are inverses)."""
        return self.psd


class Identity(Diagonal):
    """The identity on R^n, in the library, dtype and device of `like`.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> (2.0 * ih.Identity(3, like=np.ones(1))) @ np.ones(3)
        array([2., 2., 2.])
    """

    def __init__(self, n: int, *, like: Array, layout: Layout | None = None) -> None:
        xp = _backend.namespace(like)
        ones = xp.ones((n,), dtype=like.dtype, device=_backend.device(like))
        super().__init__(ones, psd=True, layout=layout)
