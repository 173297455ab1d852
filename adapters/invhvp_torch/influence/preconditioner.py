"""Preconditioners under pyDVL's names: values, which one model after the other may use."""

from __future__ import annotations

from invhvp import Jacobi
from invhvp import NystroemPreconditioner as _NystroemPreconditioner


def JacobiPreconditioner(num_samples_estimator: int = 1) -> Jacobi:
    """The diagonal of the matrix, from that many products where it is not known exactly.

    Example:
        >>> from invhvp_torch.influence.preconditioner import JacobiPreconditioner
        >>> JacobiPreconditioner(num_samples_estimator=4).samples
        4
    """
    return Jacobi(samples=num_samples_estimator)


def NystroemPreconditioner(rank: int) -> _NystroemPreconditioner:
    """A Nyström sketch of the matrix, from `rank` products in one pass.

    Example:
        >>> from invhvp_torch.influence.preconditioner import NystroemPreconditioner
        >>> NystroemPreconditioner(rank=10).rank
        10
    """
    return _NystroemPreconditioner(rank=rank)
