"""What each method would cost: passes from the model, arithmetic and memory counted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from .. import _backend
from ..operators import BlockDiagonal, Dense, LinearOperator
from ..protocols import HasGradients, HasInverse
from ._plan_model import ModelSpectrum, Trial
from .block_cg import BlockCG
from .cg import CG
from .direct import Direct
from .lissa import LiSSA
from .minres import Minres
from .nystroem_preconditioner import NystroemPreconditioner
from .nystroem_sketch import NystroemSketch
from .sample_space import SampleSpace

_UNKNOWN = 500  # flops per parameter of a product whose structure is not known


@dataclass(frozen=True, kw_only=True)
class PlanOption:
    """One method and what it is predicted to cost, preparation and solve together.

    Attributes:
        label: a short name.
        method: the method with its options.
        passes: sweeps over the data.
        products: operator-vector products.
        work: products plus the arithmetic around them, in units of one product.
        bytes: memory beside the operator.
        exact: whether it factorises; solves after the first are then nearly free.
        usable: whether it reaches rtol on this operator, and fits.
        note: what else there is to know.
        seconds: `work` at the measured time of a product; wide passes are usually cheaper.
    """

    label: str
    method: Any
    passes: int
    products: int
    work: float
    bytes: int
    exact: bool = False
    usable: bool = True
    note: str = ""
    seconds: float = math.nan


def plan_options(
    A: LinearOperator, k: int, rtol: float, model: ModelSpectrum, effective: float, lowest: float
) -> list[PlanOption]:
    """All methods that make sense for A, most direct first."""
    item, n, flops = _backend.itemsize(A.dtype), A.shape[0], product_flops(A)
    definite = lowest + model.damping > 0
    options = [_factorised(A, k, rtol, flops)]
    if definite:
        options += [
            _iterative("BlockCG", BlockCG(rtol=rtol), A, k, model, 16.0 * n * min(k, 128)),
            _sketched(A, k, rtol, model, effective),
        ]
        if k > 1:
            options.append(_iterative("CG", CG(rtol=rtol), A, k, model, 10.0 * n))
    options.append(_iterative("Minres", Minres(rtol=rtol), A, k, model, 14.0 * n))
    if definite:
        options += [_approximate(A, k, model, effective), _stochastic(A, k, rtol, model)]
    room = 0.8 * _backend.free_memory(A.like)
    finished = []
    for option in options:
        if option is None:
            continue
        if option.bytes + 2 * n * k * item > room:
            option = replace(option, usable=False, note="does not fit in memory")
        finished.append(option)
    return finished


def product_flops(A: LinearOperator) -> float:
    """Arithmetic of one product with one vector, where the structure tells it."""
    n = A.shape[0]
    if isinstance(A, Dense):
        return 2.0 * n * n
    if isinstance(A, HasGradients):
        return 4.0 * n * A.gradients.shape[0]
    return float(_UNKNOWN * n)


def _factorised(A: LinearOperator, k: int, rtol: float, flops: float) -> PlanOption | None:
    """SampleSpace, the operator's own inverse, or the dense matrix."""
    n, solves = A.shape[0], 5.0 * k
    # One pass is the residual: refinement is rare. The bound of a PSD operator takes six products
    # of one column for ‖A‖, in the first solve.
    norm = 6 if A.psd else 0
    if isinstance(A, HasGradients) and isinstance(A, HasInverse):
        N = A.gradients.shape[0]
        m = min(N, n)
        own = (2.0 * N * n * m + m**3 / 3) / flops
        note = f"exact, through {m} x {m}"
        method, size = SampleSpace(rtol=rtol), 24 * m * m
        norm = 0 if n > N else norm  # its Gram matrix knows ‖A‖
        return PlanOption(
            label="SampleSpace",
            method=method,
            passes=1 + norm,
            products=k + norm,
            work=own + solves,
            bytes=size,
            exact=True,
            note=note,
        )
    method = Direct(rtol=rtol)
    if isinstance(A, HasInverse):
        sizes = [n] if isinstance(A, Dense) else []
        if isinstance(A, BlockDiagonal):
            sizes = [block.shape[0] for block in A.blocks.values()]
        own = sum(size**3 / 3 for size in sizes) / flops
        size = sum(16 * size * size for size in sizes)
        return PlanOption(
            label="Direct",
            method=method,
            passes=1 + norm,
            products=k + norm,
            work=own + solves,
            bytes=size,
            exact=True,
            note="exact, by its own inverse",
        )
    if n > method.max_size:
        return None
    return PlanOption(
        label="Direct",
        method=method,
        passes=2 + norm,
        products=n + k + norm,
        work=n + n**3 / (3 * flops) + solves,
        bytes=24 * n * n,
        exact=True,
        note=f"exact, through {n} x {n}",
    )


def _iterative(
    label: str,
    method: Any,
    A: LinearOperator,
    k: int,
    model: ModelSpectrum,
    flops: float,
    prepared: int = 0,
    note: str = "",
) -> PlanOption:
    """A Krylov method, tried on the model; the last pass is the residual."""
    n, item = A.shape[0], _backend.itemsize(A.dtype)
    columns = k if isinstance(method, BlockCG) else min(k, 2)
    trial = model.trial(method, columns, _backend.dtype_name(A.dtype))
    sweeps = -(-k // 128) if isinstance(method, BlockCG) else 1
    passes = trial.passes * sweeps + (1 if prepared else 0)
    products = trial.passes * k + prepared
    return PlanOption(
        label=label, method=method, passes=passes, products=products,
        work=products * (1 + flops / product_flops(A)),
        bytes=method._blocks_held * n * min(k, 128) * item, usable=trial.finished,
        note=_verdict(trial, max(trial.residual, model.floor), method.rtol, note),
    )  # fmt: skip


def _verdict(trial: Trial, residual: float, rtol: float, note: str) -> str:
    if not trial.finished:
        return "does not get there"
    if residual > rtol:
        note = f"ends at the floor, about {residual:.0e}" + (f"; {note}" if note else "")
    return note


def _sketched(
    A: LinearOperator, k: int, rtol: float, model: ModelSpectrum, effective: float
) -> PlanOption | None:
    """BlockCG with a Nyström sketch of about the effective dimension."""
    n = A.shape[0]
    rank = 8 * math.ceil(min(max(effective, 8.0), 256.0) / 8)
    if rank > n // 4:
        return None
    method = BlockCG(rtol=rtol, preconditioner=NystroemPreconditioner(rank=rank))
    extra = 0 if A.psd else 3
    option = _iterative(
        "BlockCG + Nystroem", method, A, k, model, 4.0 * n * rank + 20.0 * n * min(k, 128),
        prepared=rank + extra, note=f"rank {rank}; later batches save its {rank} products",
    )  # fmt: skip
    return replace(option, bytes=option.bytes + 3 * n * rank * _backend.itemsize(A.dtype))


def _approximate(
    A: LinearOperator, k: int, model: ModelSpectrum, effective: float
) -> PlanOption | None:
    """The sketch alone, with the error that the spectrum beyond its rank implies."""
    n, damping = A.shape[0], model.damping
    rank = max(8, math.ceil(2 * min(effective, n / 8)))
    if rank > n // 4 or damping == 0:
        return None
    tail = float(model.eigenvalue(rank + 0.5))
    return PlanOption(
        label="NystroemSketch", method=NystroemSketch(rank=rank), passes=2, products=rank + k,
        work=(rank + k) * (1 + 8.0 * n * rank / product_flops(A)), usable=False,
        bytes=3 * n * rank * _backend.itemsize(A.dtype),
        note=f"approximate: errors up to about {max(tail, 0.0) / (tail + damping):.0%}",
    )  # fmt: skip


def _stochastic(A: LinearOperator, k: int, rtol: float, model: ModelSpectrum) -> PlanOption | None:
    """The Neumann series; mini-batches trade its passes for noise."""
    if model.damping == 0 or rtol <= 0:
        return None
    largest = float(model.eigenvalue(0.0))
    steps = math.ceil(1.1 * (1 + largest / model.damping) * math.log(1 / min(rtol, 0.5)))
    return PlanOption(
        label="LiSSA", method=LiSSA(rtol=rtol), passes=steps, products=steps * k,
        work=steps * k * (1 + 6.0 * A.shape[0] / product_flops(A)), usable=False,
        bytes=6 * A.shape[0] * k * _backend.itemsize(A.dtype), note="full batches",
    )  # fmt: skip
