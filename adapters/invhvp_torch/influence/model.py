"""Influence of training samples on test samples, by any method of the engine."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from invhvp.methods import Blockwise
from invhvp.operators import LinearOperator
from invhvp.solution import ConvergenceWarning, InvhvpWarning, Solution, Status

from . import scores, zero
from .blocks import Blocks, BlockStructure, Regularization, by_layer, dampings, of_structure
from .modes import BlockMode, InfluenceMode, Mode, NotFittedError, SecondOrderMode
from .operators import curvature
from .scores import ByName
from .shipping import Shippable

_ONLY_MAXITER = rf"MAXITER in columns? [0-9., ]+: {re.escape(Status.MAXITER.value)}\. Largest"


class InfluenceModel(Shippable):
    """Scores g_testᵀ (A + λI)⁻¹ g_train of a model, A its curvature on the data of `fit`.

    A positive score is helpful: removing the training sample raises the test loss by about
    score / N. The model is left as it was found, and must not be trained after `fit`.

    Args:
        model: the model.
        loss: loss(output, target), a mean over the samples of a batch.
        method: any method of the engine, prepared for each block.
        regularization: λ; None is 0. A mapping gives λ by block, 0 for blocks that it leaves out;
            the name of a parent module covers its children.
        block_structure: parameters that are solved for together: a `BlockMode`, or a mapping
            from names to lists of parameters. What it leaves out is held fixed.
        second_order_mode: which matrix A is, a `SecondOrderMode`.
        progress, warn_on_max_iteration: show bars; warn of the limit on iterations.

    Raises NotFittedError, UnsupportedModeError and other ValueErrors for bad input.

    Example:
        >>> import torch, invhvp as ih
        >>> from invhvp_torch.influence import InfluenceModel
        >>> model, x, y = torch.nn.Linear(3, 2), torch.eye(3), torch.tensor([0, 1, 0])
        >>> loss = torch.nn.functional.cross_entropy
        >>> influence = InfluenceModel(model, loss, ih.BlockCG(), regularization=0.1)
        >>> influence.fit([(x, y)]).influences(x[:1], y[:1], x, y).shape
        torch.Size([1, 3])
    """

    __slots__ = (
        "__weakref__", "_blocks", "_data", "_inverse", "_layers", "_operator", "_regularization",
        "_solution", "_whole", "loss", "method", "model", "progress", "second_order_mode",
        "warn_on_max_iteration",
    )  # fmt: skip

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Any,
        method: Any,
        regularization: Regularization = None,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
        *,
        progress: bool = False,
        warn_on_max_iteration: bool = True,
    ) -> None:
        self.model, self.loss, self.method = model, loss, method
        self.second_order_mode = SecondOrderMode(second_order_mode)
        self.progress, self.warn_on_max_iteration = progress, warn_on_max_iteration
        self._blocks = blocks = of_structure(model, block_structure)
        self._layers = by_layer(model, blocks)
        self._whole = Blocks(model, {"": list(blocks.names)})
        self._regularization = self._checked(regularization)
        self._operator = self._inverse = self._solution = self._data = None

    def fit(self, data: Any) -> Self:
        """Build A on a DataLoader, batches (x, y) or one such tuple, and prepare its inverse.

        λ = 0 alone never raises: what has no inverse is a pseudo-inverse then, or runs and tells
        its status, and one warning names the smallest λ that is safe.
        """
        operator = self._curvature(data)
        method = Blockwise(self.method) if len(self.block_names) > 1 else self.method
        self._inverse = method.prepare(operator, damping=self._damping(self._regularization))
        self._operator, self._data, self._solution = operator, data, None
        self._warn_about_zero()
        return self

    def _curvature(self, data: Any) -> LinearOperator:
        return curvature(self.model, self.loss, data, self._blocks, self.second_order_mode)

    def _damping(self, regularization: Regularization) -> float | dict[str, float]:
        found = dampings(regularization, self._blocks.parameters)
        return found if len(found) > 1 else next(iter(found.values()))

    def _checked(self, regularization: Regularization) -> Regularization:
        dampings(regularization, self._blocks.parameters)
        return dict(regularization) if isinstance(regularization, Mapping) else regularization

    @property
    def regularization(self) -> Regularization:
        """λ as it was given; assigning after `fit` re-uses all that does not depend on it."""
        return self._regularization

    @regularization.setter
    def regularization(self, value: Regularization) -> None:
        found, inverse = self._checked(value), self._inverse
        inverse = None if inverse is None else inverse.with_damping(self._damping(found))
        self._regularization, self._inverse, self._solution = found, inverse, None
        self._warn_about_zero()

    hessian_regularization = regularization

    def with_regularization(self, regularization: Regularization) -> Self:
        """Assign `regularization`, and return this model."""
        self.regularization = regularization
        return self

    def to(self, device: torch.device | str) -> Self:
        """Move the model, and fit again where that changes the device."""
        if torch.empty(0, device=device).device != self.device:
            self.model.to(device)
            if self.is_fitted:
                self.fit(self._data)
        return self

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` has been called."""
        return self._inverse is not None

    @property
    def n_parameters(self) -> int:
        """Number of parameters in all blocks."""
        return self._blocks.n

    @property
    def block_names(self) -> list[str]:
        """Names of the blocks, in order."""
        return list(self._blocks.parameters)

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, and of factors and scores."""
        return next(self.model.parameters()).dtype

    @property
    def is_thread_safe(self) -> bool:
        """False: evaluating a model is not."""
        return False

    @property
    def operator_(self) -> LinearOperator:
        """A, block-diagonal where there are several blocks, in `named_parameters()` order."""
        return self._fitted(self._operator)

    @property
    def inverse_(self) -> Any:
        """(A + λI)⁻¹, as the method prepared it."""
        return self._fitted(self._inverse)

    @property
    def solution_(self) -> Solution:
        """The last solve, in columns: status, true residuals, error bounds."""
        return self._fitted(self._solution)

    def _fitted(self, thing: Any) -> Any:
        if thing is None:
            what = "there is no solve yet" if self.is_fitted else "call fit first"
            msg = f"{type(self).__name__}: {what}"
            raise NotFittedError(msg)
        return thing

    def influence_factors(self, x: Any, y: Any) -> torch.Tensor:
        """(A + λI)⁻¹∇ℓ of every sample, rows (N, p) on the model's device."""
        return self._blocks.outside(self._solve(x, y))

    def influence_factors_by_block(self, x: Any, y: Any) -> ByName:
        """Factors by block, each (N, p_block)."""
        return self._blocks.split(self._solve(x, y))

    def influence_factors_by_layer(self, x: Any, y: Any) -> ByName:
        """Factors by module, whatever the blocks; each (N, p_layer)."""
        return self._layers.split(self._solve(x, y))

    def influences(
        self, x_test: Any, y_test: Any, x: Any = None, y: Any = None, mode: Mode = InfluenceMode.Up
    ) -> torch.Tensor:
        """Scores (n_test, n_train), or how they change with the training inputs.

        Up is g_testᵀ(A + λI)⁻¹g_train; Perturbation its derivative in each x, of shape
        (n_test, n_train, *x.shape[1:]). Without x and y the test samples meet themselves, and Up
        is symmetric.
        """
        return self._influences(self._whole, x_test, y_test, x, y, mode)[""]

    def influences_by_block(
        self, x_test: Any, y_test: Any, x: Any = None, y: Any = None, mode: Mode = InfluenceMode.Up
    ) -> ByName:
        """What each block contributes to `influences`."""
        return self._influences(self._blocks, x_test, y_test, x, y, mode)

    def influences_by_layer(
        self, x_test: Any, y_test: Any, x: Any = None, y: Any = None, mode: Mode = InfluenceMode.Up
    ) -> ByName:
        """What each module contributes to `influences`; blocks may couple several."""
        return self._influences(self._layers, x_test, y_test, x, y, mode)

    def influences_from_factors(
        self, z_test_factors: torch.Tensor, x: Any, y: Any, mode: Mode = InfluenceMode.Up
    ) -> torch.Tensor:
        """What `influences` gives, for factors that are there already."""
        scores.check_rows(z_test_factors, self.n_parameters, "factors")
        rows = {"": self._blocks.inside(z_test_factors)}
        return self._meet(self._whole, rows, x, y, mode)[""]

    def influences_from_factors_by_block(
        self, z_test_factors: Mapping[str, torch.Tensor], x: Any, y: Any,
        mode: Mode = InfluenceMode.Up,
    ) -> ByName:  # fmt: skip
        """What each block contributes to `influences_from_factors`."""
        parts = self._blocks
        return self._meet(parts, parts.inside_by_name(z_test_factors), x, y, mode)

    def influences_from_factors_by_layer(
        self, z_test_factors: Mapping[str, torch.Tensor], x: Any, y: Any,
        mode: Mode = InfluenceMode.Up,
    ) -> ByName:  # fmt: skip
        """What each module contributes to `influences_from_factors`."""
        rows = self._layers.inside_by_name(z_test_factors)
        return self._meet(self._layers, rows, x, y, mode)

    def explore_hessian_regularization(
        self, x: Any, y: Any, regularization_values: Sequence[float]
    ) -> dict[float, ByName]:
        """Scores (N, N) of the samples among themselves by λ and block, from one gradient pass.

        Factorised and low-rank inverses are not solved again, and CG shares one Krylov space
        between all λ; other inverses solve for each.
        """
        inverses = zero.blocks_of(self.inverse_).values()
        G = scores.gradients(self.model, self.loss, x, y, self._blocks.names)
        return scores.explore(inverses, self._blocks.engine_names, G, regularization_values)

    def _influences(
        self, parts: Blocks, x_test: Any, y_test: Any, x: Any, y: Any, mode: Mode
    ) -> ByName:
        mode, alone = InfluenceMode(mode), x is None and mode == InfluenceMode.Up
        x, y = scores.pair(x_test, y_test, x, y)
        rows = parts.engine_split(self._solve(x_test, y_test))
        found = self._meet(parts, rows, x, y, mode)
        if not alone or parts is self._layers:
            return found
        return {name: scores.symmetric(S) for name, S in found.items()}

    def _meet(
        self, parts: Blocks, rows: Mapping[str, torch.Tensor], x: Any, y: Any, mode: Mode
    ) -> ByName:
        self._fitted(self._inverse)
        mode, names = InfluenceMode(mode), parts.engine_names
        return scores.meet(self.model, self.loss, rows, names, x, y, mode)

    def _solve(self, x: Any, y: Any) -> torch.Tensor:
        """Factors as rows (N, p) in the engine's order."""
        inverse = self.inverse_
        G = scores.gradients(self.model, self.loss, x, y, self._blocks.names)
        with warnings.catch_warnings():
            if not self.warn_on_max_iteration:
                warnings.filterwarnings("ignore", _ONLY_MAXITER, ConvergenceWarning)
            self._solution = inverse.solve(G, progress=self.progress)
        return self._solution.x.detach().mT

    def _warn_about_zero(self) -> None:
        damping = dampings(self._regularization, self.block_names)
        message = zero.message(self._inverse, damping) if self.is_fitted else None
        if message is not None:
            warnings.warn(f"{type(self).__name__}: {message}", InvhvpWarning, stacklevel=3)

    def _describe(self) -> str:
        blocks = len(self.block_names)
        return (
            f"{type(self.model).__name__}, {self.n_parameters} parameters in {blocks} "
            f"block{'s' * (blocks != 1)}, {self.second_order_mode}, {self.method!r}, "
            f"regularization={self._regularization!r}"
        )

    def __repr__(self) -> str:
        more = zero.cuts(self._inverse) if self.is_fitted else ["not fitted"]
        return f"{type(self).__name__}({', '.join([self._describe(), *more])})"
