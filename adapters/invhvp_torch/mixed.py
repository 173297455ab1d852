"""How a gradient in the parameters moves with the inputs: perturbation influence."""

from __future__ import annotations

from typing import Any

import torch

from . import samples
from .data import TUPLE_BATCH
from .double_backward import explained
from .evaluation import check_independent, evaluation, seed
from .objective import Loss, Objective, Reduction, is_separable
from .parameters import Parameters, Selection


def mixed_gradients(
    model: torch.nn.Module,
    loss: Loss,
    x: torch.Tensor,
    y: Any,
    V: torch.Tensor,
    *,
    parameters: Selection = None,
    training: bool = False,
    reduction: Reduction = "mean",
    batch_size: int | None = None,
    rng: int = 0,
) -> torch.Tensor:
    """Compute ∇_x ⟨v_j, ∇_θ ℓ(x_i)⟩ for every sample i and every column v_j of V.

    With v = (H + λI)⁻¹∇ℓ_test this is how the influence of a training sample on the test loss
    changes with the sample's own input.

    `x` are inputs (N, ...) of a floating dtype, `y` targets with N rows, `V` is (n, k), or (n,)
    for one vector, in the order of `to_array`. The other arguments are those of `hessian`.

    The result is (k, N, ...), or (N, ...) for one vector, on the device of the parameters.

    Raises TypeError for integer inputs, and what `hessian` raises.

    Cost: one gradient with its graph a batch, and one more derivative for each column; never an
    array of samples times inputs times parameters.

    Source: Koh & Liang (2017), equation 5.

    Example:
        >>> import torch, invhvp_torch as it
        >>> model, x, y = torch.nn.Linear(3, 1), torch.ones(4, 3), torch.zeros(4, 1)
        >>> it.mixed_gradients(model, torch.nn.functional.mse_loss, x, y, torch.ones(4, 2)).shape
        torch.Size([2, 4, 3])
    """
    _check_input(x)
    objective = Objective(model=model, loss=loss, batch_loss=None, reduction=reduction)
    selected = Parameters(model, parameters)
    check_independent(model, training=training)
    like = selected.like
    _check_vectors(V, selected.n, like)
    rows = (V[:, None] if V.ndim == 1 else V).detach().mT.clone()
    vectors = selected.split(rows)
    step = TUPLE_BATCH if batch_size is None else batch_size
    found, sentinel = [], None
    with evaluation(model, training=training, device=like.device):
        for index, start in enumerate(range(0, x.shape[0], step)):
            part = slice(start, start + step)
            inputs = x[part].detach().to(like.device).clone().requires_grad_()
            batch = (inputs, samples.move(samples.take(y, part), like.device))
            if training:
                seed(rng + index, like.device)
            forward = objective.forward(batch)
            sentinel = forward.check(sentinel)
            if index == 0:
                is_separable(forward, batch, training=training)
            found.append(_of_batch(forward.total(), inputs, selected, vectors, rows.shape[0]))
    result = torch.cat(found, 1)
    return result[0] if V.ndim == 1 else result


def _of_batch(
    total: torch.Tensor,
    inputs: torch.Tensor,
    parameters: Parameters,
    vectors: list[torch.Tensor],
    k: int,
) -> torch.Tensor:
    """(k, N, ...) of one batch: samples do not touch each other, so that a sum separates them."""
    with explained():
        slopes = torch.autograd.grad(
            total, parameters.tensors, create_graph=True, allow_unused=True
        )
    active = [i for i, s in enumerate(slopes) if s is not None and s.requires_grad]
    if not active or k == 0:
        return inputs.new_zeros((k, *inputs.shape))
    columns = []
    for j in range(k):
        with explained():
            (column,) = torch.autograd.grad(
                [slopes[i] for i in active],
                [inputs],
                [vectors[i][j] for i in active],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        columns.append(column)
    return torch.stack(columns)


def _check_input(x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        msg = f"x must be one tensor (N, ...), got {type(x).__name__}"
        raise TypeError(msg)
    if not x.dtype.is_floating_point:
        msg = (
            f"x has dtype {x.dtype}, and there is no derivative in integers: differentiate in "
            "the embeddings instead, with x = model.embedding(tokens).detach() and a model that "
            "starts behind its embedding"
        )
        raise TypeError(msg)
    if x.ndim == 0 or x.shape[0] == 0:
        msg = f"x must have one row a sample, got shape {tuple(x.shape)}"
        raise ValueError(msg)


def _check_vectors(V: Any, n: int, like: torch.Tensor) -> None:
    if not isinstance(V, torch.Tensor) or V.dtype != like.dtype or V.device != like.device:
        got = f"{V.dtype} on {V.device}" if isinstance(V, torch.Tensor) else type(V).__name__
        msg = f"V must be a tensor of {like.dtype} on {like.device}, got {got}"
        raise TypeError(msg)
    if V.ndim not in (1, 2) or V.shape[0] != n:
        msg = f"V must have shape ({n},) or ({n}, k), one row a parameter, got {tuple(V.shape)}"
        raise ValueError(msg)
