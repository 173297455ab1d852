"""Gauss–Newton and Fisher matrices of a model's mean loss."""

from __future__ import annotations

from typing import Any, Literal

from invhvp.operators import LinearOperator

from . import seeds
from .data import Cache
from .distributed import Distributed
from .mean_curvature import Kind, build
from .objective import BatchLoss, Loss, Reduction
from .output_curvature import known_curvature, output_curvature
from .parameters import Selection


def gauss_newton(
    model: Any,
    loss: Loss | None = None,
    data: Any = None,
    *,
    batch_loss: BatchLoss | None = None,
    parameters: Selection = None,
    training: bool = False,
    reduction: Reduction = "mean",
    count: float | None = None,
    cache: Cache = "auto",
    memory: float | None = None,
    batch_size: int | None = None,
    rng: int = 0,
    distributed: Distributed = None,
    array_namespace: Any = None,
    transfer: bool = False,
) -> LinearOperator:
    """Build the generalised Gauss–Newton matrix Σ w_i J_iᵀ H_i J_i / Σ w_i of the mean loss.

    J_i is the Jacobian of a sample's outputs in the parameters, H_i the Hessian of its loss in
    the outputs: a closed form for cross-entropy, squared error and binary cross-entropy with
    logits, and the second derivative of the loss alone for any other. Written as the mean of
    rank-one matrices, with a row for each column of a root of H_i, it has an exact damped
    inverse (`SampleSpace`), which is a strong preconditioner of the Hessian:
    `BlockCG(preconditioner=Surrogate(gauss_newton, SampleSpace()))`.

    `memory` is how many bytes the rows may take, by default half of what is free. Rows that fit
    are kept; else they are computed batch by batch at every product, where those of a batch fit
    and are few; else products run through the model without any rows. The repr says which.
    `batch_loss` must call the model exactly once. The other arguments are those of `hessian`.

    Raises ValueError for a loss that is linear in the model's outputs, and what `hessian` raises.

    Cost: kept, C backward passes to build, for C columns of the roots (C = 1 for one output,
    classes for cross-entropy), and N C rows; products are then a few small GEMMs. Without
    rows, a product costs three gradients and the two of each column.

    Source: Schraudolph (2002), equation 10; the columns are those of Dangel, Kunstner and
    Hennig (2020), BackPACK.

    Example:
        >>> import torch, invhvp_torch as it
        >>> model, x = torch.nn.Linear(3, 1, bias=False), torch.eye(3)
        >>> K = it.gauss_newton(model, torch.nn.functional.mse_loss, (x, torch.zeros(3, 1)))
        >>> K @ torch.ones(3)
        tensor([0.6667, 0.6667, 0.6667])
    """
    kind = Kind("GaussNewton", seeds.of_gauss_newton, output_curvature)
    return build(
        kind,
        model,
        loss,
        data,
        batch_loss=batch_loss,
        parameters=parameters,
        training=training,
        reduction=reduction,
        count=count,
        cache=cache,
        memory=memory,
        batch_size=batch_size,
        rng=rng,
        distributed=distributed,
        array_namespace=array_namespace,
        transfer=transfer,
    )


def fisher(
    model: Any,
    loss: Loss | None = None,
    data: Any = None,
    *,
    kind: Literal["exact", "mc"] = "exact",
    samples: int = 1,
    parameters: Selection = None,
    training: bool = False,
    reduction: Reduction = "mean",
    count: float | None = None,
    cache: Cache = "auto",
    memory: float | None = None,
    batch_size: int | None = None,
    rng: int = 0,
    distributed: Distributed = None,
    array_namespace: Any = None,
    transfer: bool = False,
) -> LinearOperator:
    """Build the Fisher matrix, the mean of g gᵀ over labels that the model itself would give.

    The loss is taken for a negative log-likelihood. For cross-entropy, squared error and binary
    cross-entropy with logits the exact expectation is the Gauss–Newton matrix, at the scale of
    the loss: a mean over m outputs counts 1/m.

    `kind="mc"` draws `samples` labels for each sample by `rng`: unbiased, that many rows a
    sample instead of one a class, and one matrix for the life of the operator. The other
    arguments are those of `gauss_newton`.

    Raises ValueError for a loss whose likelihood is not known.

    Cost: that of `gauss_newton`, with C = `samples` for "mc".

    Source: Martens (2020), New insights and perspectives on the natural gradient method, §9.

    Example:
        >>> import torch, invhvp_torch as it
        >>> model, x = torch.nn.Linear(3, 2), torch.eye(3)
        >>> F = it.fisher(model, torch.nn.functional.cross_entropy, (x, torch.tensor([0, 1, 0])))
        >>> F.gradients.shape
        (6, 8)
    """
    if kind not in ("exact", "mc"):
        msg = f'kind= takes "exact" or "mc", got {kind!r}; given labels: empirical_fisher'
        raise ValueError(msg)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        msg = f"samples must be an integer of at least 1, got {samples!r}"
        raise ValueError(msg)
    exact = Kind("Fisher", seeds.of_fisher, known_curvature)
    drawn = Kind("Fisher", seeds.OfSampledFisher(samples, rng), None)
    return build(
        exact if kind == "exact" else drawn,
        model,
        loss,
        data,
        batch_loss=None,
        parameters=parameters,
        training=training,
        reduction=reduction,
        count=count,
        cache=cache,
        memory=memory,
        batch_size=batch_size,
        rng=rng,
        distributed=distributed,
        array_namespace=array_namespace,
        transfer=transfer,
    )


def empirical_fisher(
    model: Any,
    loss: Loss | None = None,
    data: Any = None,
    *,
    batch_loss: BatchLoss | None = None,
    parameters: Selection = None,
    training: bool = False,
    reduction: Reduction = "mean",
    count: float | None = None,
    cache: Cache = "auto",
    memory: float | None = None,
    batch_size: int | None = None,
    rng: int = 0,
    distributed: Distributed = None,
    array_namespace: Any = None,
    transfer: bool = False,
) -> LinearOperator:
    """Build the mean of g_i g_iᵀ over the per-sample gradients at the given labels.

    Not the Fisher matrix, and no approximation of the Hessian where the model fits its labels;
    it is what pyDVL calls Gauss–Newton.

    Arguments are those of `gauss_newton`. Cost: one forward and one backward pass to build, and
    N rows; for the rest see there.

    Source: Kunstner, Balles and Hennig (2019) on what it is and is not.

    Example:
        >>> import torch, invhvp as ih, invhvp_torch as it
        >>> model, x = torch.nn.Linear(3, 2), torch.eye(3)
        >>> loss, y = torch.nn.functional.cross_entropy, torch.tensor([0, 1, 0])
        >>> F = it.empirical_fisher(model, loss, (x, y))
        >>> ih.solve(F, torch.ones(8), ih.SampleSpace(), damping=0.1).status.name
        'CONVERGED'
    """
    kind = Kind("EmpiricalFisher", seeds.of_empirical_fisher, None)
    return build(
        kind,
        model,
        loss,
        data,
        batch_loss=batch_loss,
        parameters=parameters,
        training=training,
        reduction=reduction,
        count=count,
        cache=cache,
        memory=memory,
        batch_size=batch_size,
        rng=rng,
        distributed=distributed,
        array_namespace=array_namespace,
        transfer=transfer,
    )
