"""The seven models under pyDVL's names: each is a method of the engine and a matrix."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from invhvp import (
    CG,
    Arnoldi,
    BlockCG,
    Direct,
    InverseHarmonicMean,
    LiSSA,
    NystroemSketch,
)

from .blocks import BlockStructure, Regularization, dampings
from .model import InfluenceModel
from .modes import BlockMode, SecondOrderMode


class DirectInfluence(InfluenceModel):
    """Exact: a dense factorisation, or the exact inverse that a matrix of gradients has.

    For up to some 10,000 parameters a block. λ = 0 with a singular matrix is its pseudo-inverse.

    Example:
        >>> import torch
        >>> from invhvp_torch.influence import DirectInfluence
        >>> model, x, y = torch.nn.Linear(3, 1), torch.eye(3), torch.ones(3, 1)
        >>> influence = DirectInfluence(model, torch.nn.functional.mse_loss, regularization=0.1)
        >>> influence.fit([(x, y)]).influences(x, y).shape
        torch.Size([3, 3])
    """

    __slots__ = ()

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Any,
        regularization: Regularization = None,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        method = Direct(singular="truncate")
        super().__init__(model, loss, method, regularization, block_structure, second_order_mode)


class CgInfluence(InfluenceModel):
    """Conjugate gradients: exact to `rtol`, with certificates, for any number of parameters.

    Each column stops when its true residual meets ‖r‖ ≤ max(rtol·‖b‖, atol). All right-hand
    sides share one Krylov space (`BlockCG`) with `solve_simultaneously=True`, which needs fewer
    products. `preconditioner` is any method of the engine, or one of `influence.preconditioner`.
    """

    __slots__ = ()

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Any,
        regularization: Regularization = None,
        rtol: float = 1e-6,
        atol: float = 0.0,
        maxiter: int | None = None,
        progress: bool = False,
        precompute_grad: bool = False,
        preconditioner: Any = None,
        solve_simultaneously: bool = False,
        warn_on_max_iteration: bool = True,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        if precompute_grad:
            _without_meaning("precompute_grad", "gradients are kept wherever they fit in memory")
        method = (BlockCG if solve_simultaneously else CG)(
            rtol=rtol, atol=atol, maxiter=maxiter, preconditioner=preconditioner
        )
        super().__init__(
            model, loss, method, regularization, block_structure, second_order_mode,
            progress=progress, warn_on_max_iteration=warn_on_max_iteration,
        )  # fmt: skip


class LissaInfluence(InfluenceModel):
    """Averaged stochastic gradient steps, for losses with very many samples and low accuracy.

    A step is u ← u − ((A_B + λ + dampen·scale)u − b)/scale on a mini-batch B. With
    scale="auto" the step follows from the measured λmax and noise, and variance reduction makes
    the iteration converge to `rtol`; a number is honoured, and one that must diverge raises at
    `fit` with the smallest stable scale, unless `force=True`.
    """

    __slots__ = ()

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Any,
        regularization: Regularization = None,
        maxiter: int = 1000,
        dampen: float = 0.0,
        scale: float | str = "auto",
        rtol: float = 1e-4,
        progress: bool = False,
        warn_on_max_iteration: bool = True,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
        *,
        force: bool = False,
    ) -> None:
        method = LiSSA(
            maxiter=maxiter, dampen=dampen, scale=scale, rtol=rtol, force=force,
            variance_reduction="svrg",
        )  # fmt: skip
        super().__init__(
            model, loss, method, regularization, block_structure, second_order_mode,
            progress=progress, warn_on_max_iteration=warn_on_max_iteration,
        )  # fmt: skip


class ArnoldiInfluence(InfluenceModel):
    """The `rank` eigenpairs of largest size: V (D + λ)⁻¹ Vᵀ, and zero on all other directions.

    With `use_woodbury=True` the other directions are inverted as λI, which is continuous in the
    rank and in λ. Eigenvalues keep their signs.
    """

    __slots__ = ()

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Any,
        regularization: Regularization = None,
        rank: int = 10,
        krylov_dimension: int | None = None,
        tol: float = 1e-6,
        max_iter: int | None = None,
        eigen_computation_on_gpu: bool = False,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
        use_woodbury: bool = False,
    ) -> None:
        if eigen_computation_on_gpu:
            _without_meaning("eigen_computation_on_gpu", "all work stays on the model's device")
        method = Arnoldi(
            rank=rank, krylov_dimension=krylov_dimension, tol=tol, maxiter=max_iter,
            complement="damping" if use_woodbury else "drop", nonpositive="keep",
            singular="truncate",
        )  # fmt: skip
        super().__init__(model, loss, method, regularization, block_structure, second_order_mode)

    def _describe(self) -> str:
        dropped = f"all but {self.method.rank} eigenvectors a block dropped"
        woodbury = self.method.complement == "damping"
        return super()._describe() + ("" if woodbury else f", {dropped}")


class NystroemSketchInfluence(InfluenceModel):
    """A Nyström model of the given rank from one block of products; the rest is inverted as λI.

    For λ = 0 it is the pseudo-inverse of the model's positive part.
    """

    __slots__ = ()

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Any,
        regularization: Regularization,
        rank: int,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        method = NystroemSketch(rank=rank, singular="truncate")
        super().__init__(model, loss, method, regularization, block_structure, second_order_mode)


class InverseHarmonicMeanInfluence(InfluenceModel):
    """DataInf: the mean of (g gᵀ + λI)⁻¹, a biased stand-in for the inverse of the mean of g gᵀ.

    Cheap, and for many samples close to the inner product of gradients over λ. λ must be positive
    in every block.
    """

    __slots__ = ()

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Any,
        regularization: Regularization,
        block_structure: BlockStructure = BlockMode.FULL,
    ) -> None:
        method, mode = InverseHarmonicMean(), SecondOrderMode.GAUSS_NEWTON
        super().__init__(model, loss, method, regularization, block_structure, mode)

    def _checked(self, regularization: Regularization) -> Regularization:
        missing = [k for k, v in dampings(regularization, self.block_names).items() if v == 0]
        if missing:
            where = f" in {', '.join(missing)}" if any(missing) else ""
            msg = f"InverseHarmonicMeanInfluence needs regularization > 0; it is 0{where}"
            raise ValueError(msg)
        return super()._checked(regularization)


def _without_meaning(name: str, why: str) -> None:
    msg = f"{name} has no meaning here and is ignored: {why}"
    warnings.warn(msg, DeprecationWarning, stacklevel=3)
