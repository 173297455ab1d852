"""The base of all operators: validation once, algebra once."""

from __future__ import annotations

from typing import Any

from .. import _backend
from ..gradients._check import check_kind
from ..layout import Layout
from ..protocols import Array, Processes


class LinearOperator:
    """A real symmetric operator on R^n; a subclass implements `_matmat` and nothing else.

    `A @ X` takes (n,) or columns (n, k) of the operator's own dtype, library and device.

    Args:
        n: dimension.
        like: any array of the library, dtype and device the operator works in.
        psd: True only where positive semidefinite by construction; it makes certificates possible.
        layout: names of the parameter blocks, where they are known.
    """

    processes: Processes | None = None
    """Those that take part in every product; None for one alone."""

    __array_ufunc__ = None  # NumPy and CuPy arrays on the left defer to __rmatmul__
    __array_priority__ = 1000

    def __init__(
        self, n: int, *, like: Array, psd: bool = False, layout: Layout | None = None
    ) -> None:
        if n < 1:
            msg = f"an operator needs at least one parameter, got n = {n}"
            raise ValueError(msg)
        if not _backend.is_real_floating(like.dtype):
            msg = (
                f"operators work in a real floating dtype, got {_backend.dtype_name(like.dtype)}; "
                "convert the arrays first"
            )
            raise TypeError(msg)
        if layout is not None and layout.n != n:
            msg = f"the layout has {layout.n} parameters, the operator {n}"
            raise ValueError(msg)
        self._n = int(n)
        self._like = _backend.empty_like(like)
        self._psd = bool(psd)
        self._layout = layout

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self._n, self._n)

    @property
    def dtype(self) -> Any:
        """The dtype of the products, which is also the dtype that `@` accepts."""
        return self._like.dtype

    @property
    def device(self) -> Any:
        """The device on which the operator works."""
        return _backend.device(self._like)

    @property
    def like(self) -> Array:
        """An empty array of this operator's library, dtype and device."""
        return self._like

    @property
    def psd(self) -> bool:
        """Whether the operator is known to be positive semidefinite."""
        return self._psd

    @property
    def layout(self) -> Layout | None:
        """Named blocks of the parameter vector, or None."""
        return self._layout

    def _matmat(self, X: Array, /) -> Array:
        raise NotImplementedError

    def __matmul__(self, X: Array, /) -> Array:
        self.check_operand(X, type(self).__name__)
        if X.ndim == 1:
            return self._matmat(X[:, None])[:, 0]
        return self._matmat(X)

    def __rmatmul__(self, Y: Array, /) -> Array:
        xp = _backend.namespace(Y)
        return self @ Y if Y.ndim == 1 else xp.matrix_transpose(self @ xp.matrix_transpose(Y))

    def check_operand(self, X: Any, what: str) -> None:
        """Raise TypeError or ValueError unless `X` can be multiplied with."""
        check_kind(X, self._like, what)
        if X.ndim not in (1, 2) or X.shape[0] != self._n:
            hint = ""
            if X.ndim == 2 and X.shape[1] == self._n:
                hint = "; vectors are columns: pass the transpose"
            msg = (
                f"{what}: a {self._n} x {self._n} operator takes arrays of shape ({self._n},) or "
                f"({self._n}, k), got {tuple(X.shape)}{hint}"
            )
            raise ValueError(msg)

    def to_dense(self) -> Array:
        """The (n, n) matrix. Cost: n products, n² numbers."""
        xp = _backend.namespace(self._like)
        return self._matmat(xp.eye(self._n, dtype=self.dtype, device=self.device))

    # Algebra lives in `algebra`, which imports this module; the import waits for the call.

    def __add__(self, other: Any) -> LinearOperator:
        from .algebra import Sum
        from .convert import as_operator

        return Sum(self, as_operator(other, like=self._like))

    def __radd__(self, other: Any) -> LinearOperator:
        return self if isinstance(other, int) and other == 0 else self + other  # sum() starts at 0

    def __rsub__(self, other: Any) -> LinearOperator:
        return -self + other

    def __mul__(self, factor: float) -> LinearOperator:
        from .algebra import Scaled

        return Scaled(self, factor)

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def __sub__(self, other: Any) -> LinearOperator:
        from .convert import as_operator

        return self + (-as_operator(other, like=self._like))

    def __truediv__(self, factor: float) -> LinearOperator:
        return self * (1.0 / factor)

    def _describe(self) -> str:
        return f"{self._n}x{self._n}"

    def __repr__(self) -> str:
        dtype = _backend.dtype_name(self.dtype)
        return f"{type(self).__name__}({self._describe()}, {dtype}, {self.device})"
