"""The words that choose what is computed, and the errors for those that do not exist."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NoReturn, TypeAlias


class UnsupportedModeError(ValueError):
    """A mode that there is not."""


class NotFittedError(ValueError):
    """Something that needs `fit` first."""


class _Mode(StrEnum):
    @classmethod
    def _missing_(cls, value: Any) -> NoReturn:
        known = ", ".join(repr(str(mode)) for mode in cls)
        msg = f"{value!r} is no {cls.__name__}; there are {known}"
        raise UnsupportedModeError(msg)


class InfluenceMode(_Mode):
    """What moves: the weight of a training sample (Up), or its input (Perturbation)."""

    Up = "up"
    Perturbation = "perturbation"


Mode: TypeAlias = InfluenceMode | str


class BlockMode(_Mode):
    """Which parameters are solved for together.

    FULL is one block named ''; LAYER_WISE one for each module that owns parameters, by its path;
    PARAMETER_WISE one for each parameter.
    """

    LAYER_WISE = "layer_wise"
    PARAMETER_WISE = "parameter_wise"
    FULL = "full"


class SecondOrderMode(_Mode):
    """Which matrix is inverted.

    GAUSS_NEWTON is the mean of g gᵀ over the per-sample gradients, which is what pyDVL calls so
    (`it.empirical_fisher`); GENERALIZED_GAUSS_NEWTON is Jᵀ H J (`it.gauss_newton`).
    """

    HESSIAN = "hessian"
    GAUSS_NEWTON = "gauss_newton"
    GENERALIZED_GAUSS_NEWTON = "generalized_gauss_newton"
    FISHER = "fisher"
