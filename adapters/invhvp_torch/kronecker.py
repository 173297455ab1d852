"""K-FAC and EKFAC of a model: Kronecker-factored Fisher matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from invhvp.layout import Layout
from invhvp.methods._progress import progress_bar
from invhvp.operators import (
    CurvatureBlocks,
    Dense,
    Diagonal,
    EigenKronecker,
    Kronecker,
    LinearOperator,
)

from . import seeds
from .bridge import Bridge, TorchDoor, bridge_to
from .checkpoint import checkpoint_at, owner_of
from .curvature import check_count
from .data import Cache, read
from .distributed import Distributed, check_same_model, own_seed, processes_of
from .evaluation import check_independent, evaluation
from .kronecker_fit import Fit
from .kronecker_shards import Shards
from .mean_curvature import _budget
from .objective import BatchLoss, Loss, Objective, Reduction
from .parameters import Parameters, Selection
from .rows import Rows

FisherKind = Literal["exact", "mc", "empirical", "sign"]
Sharing = Literal["expand", "reduce"]


class KroneckerCurvature(CurvatureBlocks, TorchDoor):
    """What `kfac` and `ekfac` return: a `BlockDiagonal` over the parameters of a model."""


def ekfac(
    model: Any,
    loss: Loss | None = None,
    data: Any = None,
    *,
    fisher: FisherKind = "exact",
    samples: int = 1,
    sharing: Sharing = "expand",
    batch_loss: BatchLoss | None = None,
    parameters: Selection = None,
    training: bool = False,
    reduction: Reduction = "mean",
    count: float | None = None,
    cache: Cache = "auto",
    memory: float | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    rng: int = 0,
    distributed: Distributed = None,
    array_namespace: Any = None,
    transfer: bool = False,
) -> KroneckerCurvature:
    """Build EKFAC: Kronecker-factored eigenvectors, with the exact second moments along them.

    A block for each weight with its bias, [W | b], of linear layers, convolutions (one a group),
    embeddings and attention projections:

        (U ⊗ V) diag(Λ) (U ⊗ V)ᵀ,   Λ = mean over samples of (Uᵀ G_i V)²

    with the eigenvectors U, V of the K-FAC factors and the gradient G_i of the whole sample,
    summed over positions and calls before it is squared. It is the nearest diagonal in that basis
    and its trace is that of the exact block. All other parameters get an exact dense block, or a
    diagonal beyond 1024 of them. `summary()` says which is what. Products are in the order of the
    model's parameters; the damped inverse is exact (`Direct`), for each λ from the same
    eigenvectors; as a preconditioner: `BlockCG(preconditioner=Surrogate(K))`.

    `fisher`: "exact", over the labels that the model would give (the Gauss–Newton matrix: a
    backward pass for each column of the root of the output Hessian); "mc", `samples` drawn labels;
    "sign", `samples` random-sign sums of those columns, unbiased too, for any convex loss, one
    backward pass each; "empirical", the given labels.

    `sharing`: "expand" or "reduce", whether the factors take positions with shared weights one by
    one, or first sum derivatives and average inputs. Λ is the same second moment for both.

    `memory`: bytes for factors, and for derivatives that spare the second pass; by default half of
    what is free. Layers whose factors do not fit take further passes. `progress` shows a bar.

    `checkpoint`: a file in which the sums are saved every `checkpoint_every` batches, and from
    which a killed run goes on, with the same result to the last bit (a file for each process and
    stage, of several processes). The other arguments are those of `gauss_newton`.

    Raises ValueError where a loss has no such Fisher matrix, a factor has NaN (with the layer's
    name), or the checkpoint is about something else; and what `gauss_newton` raises.

    Cost: two passes of a forward and C backward passes (one where derivatives are kept);
    N T (C o² + i²) flops for factors, 10 (o³ + i³) for eigenvectors, for Λ the lesser of
    N T² o i and N T C o i, a layer. Memory: o² + i² + o i numbers a layer.

    Source: Martens and Grosse (2015); George et al. (2018); Eschenhagen et al. (2023) on sharing.

    Example:
        >>> import torch, invhvp as ih, invhvp_torch as it
        >>> model, x = torch.nn.Linear(3, 2), torch.eye(3)
        >>> loss = torch.nn.functional.cross_entropy
        >>> K = it.ekfac(model, loss, (x, torch.tensor([0, 1, 0])))
        >>> round(K.trace_ratio(), 4)
        1.0
        >>> ih.solve(K, torch.ones(8), ih.Direct(), damping=0.1).status.name
        'CONVERGED'
    """
    return _build(
        "EKFAC", model, loss, data, corrected=True, fisher=fisher, n_samples=samples,
        sharing=sharing, batch_loss=batch_loss, parameters=parameters, training=training,
        reduction=reduction, count=count, cache=cache, memory=memory, batch_size=batch_size,
        progress=progress, checkpoint=checkpoint, every=checkpoint_every, rng=rng,
        distributed=distributed, array_namespace=array_namespace, transfer=transfer,
    )  # fmt: skip


def kfac(
    model: Any,
    loss: Loss | None = None,
    data: Any = None,
    *,
    fisher: FisherKind = "exact",
    samples: int = 1,
    sharing: Sharing = "expand",
    batch_loss: BatchLoss | None = None,
    parameters: Selection = None,
    training: bool = False,
    reduction: Reduction = "mean",
    count: float | None = None,
    cache: Cache = "auto",
    memory: float | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    rng: int = 0,
    distributed: Distributed = None,
    array_namespace: Any = None,
    transfer: bool = False,
) -> KroneckerCurvature:
    """Build K-FAC: S ⊗ A for each layer, at the scale of the Fisher matrix of the mean loss.

    With "expand" F ≈ T · (Σ d dᵀ / NT) ⊗ (Σ a aᵀ / NT) over NT positions with a derivative, with
    "reduce" F ≈ (Σ d dᵀ / N) ⊗ (Σ ā āᵀ / N) of derivatives summed and inputs averaged over the
    positions of a sample. One pass; otherwise as `ekfac`, which is the more accurate one.
    `trace_ratio()` says how far the trace is from that of the exact blocks.

    Source: Martens and Grosse (2015); Grosse and Martens (2016); Eschenhagen et al. (2023).

    Example:
        >>> import torch, invhvp_torch as it
        >>> model, x = torch.nn.Linear(3, 1, bias=False), torch.eye(3)
        >>> K = it.kfac(model, torch.nn.functional.mse_loss, (x, torch.zeros(3, 1)))
        >>> K @ torch.ones(3)
        tensor([0.6667, 0.6667, 0.6667])
    """
    return _build(
        "KFAC", model, loss, data, corrected=False, fisher=fisher, n_samples=samples,
        sharing=sharing, batch_loss=batch_loss, parameters=parameters, training=training,
        reduction=reduction, count=count, cache=cache, memory=memory, batch_size=batch_size,
        progress=progress, checkpoint=checkpoint, every=checkpoint_every, rng=rng,
        distributed=distributed, array_namespace=array_namespace, transfer=transfer,
    )  # fmt: skip


def _build(
    name: str,
    model: Any,
    loss: Any,
    data: Any,
    *,
    corrected: bool,
    fisher: str,
    n_samples: int,
    sharing: str,
    batch_loss: Any,
    parameters: Any,
    training: bool,
    reduction: Any,
    count: float | None,
    cache: Any,
    memory: float | None,
    batch_size: int | None,
    progress: bool,
    checkpoint: Any,
    every: int,
    rng: int,
    distributed: Distributed,
    array_namespace: Any,
    transfer: bool,
) -> KroneckerCurvature:
    processes = processes_of(distributed)
    rng = own_seed(rng, processes)
    source = seeds.of_kind(fisher, n_samples, rng)
    if sharing not in ("expand", "reduce"):
        msg = f'sharing= takes "expand" or "reduce", got {sharing!r}'
        raise ValueError(msg)
    observed = batch_loss is not None and fisher != "empirical"
    objective = Objective(
        model=model, loss=loss, batch_loss=batch_loss, reduction=reduction, observed=observed
    )
    selected = Parameters(model, parameters)
    bridge = bridge_to(array_namespace, selected.like, transfer=transfer)
    check_independent(model, training=training)
    if count is not None:
        check_count(count, objective)
    shards = Shards(processes, selected.like)
    check_same_model(processes, selected)
    budget = shards.least(_budget(memory, selected))
    saved = None
    if checkpoint is not None:
        said = (name, fisher, n_samples, sharing, rng, training, reduction, selected.layout, budget)
        owner = owner_of(said if memory else said[:-1], loss, selected.tensors)
        with shards.together():
            saved = checkpoint_at(checkpoint, every, owner, shards.name)
    rows = Rows(objective, selected, source, training=training, seed=rng)
    with evaluation(model, training=training, device=selected.like.device):
        with shards.together():
            batches = read(data, selected.like.device, cache=cache, batch_size=batch_size)
        bar = None

        def tick(total: int) -> None:
            nonlocal bar
            if bar is None:
                bar = progress_bar(progress, total, name)
            elif total == 0:
                bar.update(1)

        fit = Fit(
            model=model,
            parameters=selected,
            rows=rows,
            corrected=corrected,
            sharing=sharing,
            memory=budget,
            checkpoint=saved,
            tick=tick,
            shards=shards,
        )
        fit.run(batches, None if count is None else float(count))
    return _operator(name, fisher, fit, bridge)


def _operator(name: str, fisher: str, fit: Fit, bridge: Bridge | None) -> KroneckerCurvature:
    layout, order = fit.parameters.layout, {}
    names: dict[str, tuple[str, ...]] = {}
    units = {unit.weight: unit for unit in fit.units}
    inside = {name for unit in fit.units for name in unit.parameters}
    for parameter in layout.names:
        unit = units.get(parameter)
        if unit is not None:
            order |= unit.layout(layout)
            names |= dict.fromkeys(unit.blocks, unit.parameters)
        elif parameter not in inside:
            order[parameter] = layout[parameter]
            names[parameter] = (parameter,)
    traces = dict(fit.traces)
    blocks = {block: _bridged(fit.blocks[block], bridge) for block in order}
    K = KroneckerCurvature(
        blocks,
        Layout(order),
        name=name,
        parameters=names,
        said=f"{fisher} Fisher of {fit.n} sample{'s' * (fit.n != 1)}",
    )
    mine = K.traces()
    K.exact_traces = {block: traces.get(block, mine[block]) for block in order}
    return K


def _bridged(A: Any, bridge: Bridge | None) -> LinearOperator:
    """The block in arrays of the other library, which share its memory."""
    if bridge is None:
        return A
    give = bridge.from_torch
    if isinstance(A, Kronecker):
        return Kronecker(give(A.S), give(A.A), A.scale)
    if isinstance(A, EigenKronecker):
        V = None if A.in_vectors is None else give(A.in_vectors)
        return EigenKronecker(give(A.out_vectors), V, give(A.eigenvalues))
    if isinstance(A, Dense):
        return Dense(give(A.to_dense()), psd=True, check=False)
    return Diagonal(give(A.diagonal()), psd=True)
