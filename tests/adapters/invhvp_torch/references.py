"""Dense Gauss–Newton matrices from Jacobians, sample by sample, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.func import functional_call


def gauss_newton_terms(
    model: nn.Module, loss: Callable, x: torch.Tensor, y: torch.Tensor
) -> list[torch.Tensor]:
    """J_iᵀ H_i J_i of every sample, with torch's dense Jacobian and Hessian."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def outputs(theta: torch.Tensor) -> torch.Tensor:
        parts = zip(named.items(), theta.split(sizes), strict=True)
        values = {name: part.reshape(p.shape) for (name, p), part in parts}
        return functional_call(model, values, (x,))

    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        J = torch.autograd.functional.jacobian(outputs, theta)
        made = outputs(theta).detach()
    for module, mode in modes:
        module.training = mode
    assert isinstance(J, torch.Tensor)
    terms = []
    for i in range(len(y)):
        one = y[i : i + 1]
        H = torch.autograd.functional.hessian(lambda o, t=one: loss(o, t), made[i : i + 1])
        assert isinstance(H, torch.Tensor)
        m = made[i].numel()
        j = J[i].reshape(m, -1)
        terms.append(j.T @ H.reshape(m, m) @ j)
    return terms


def gauss_newton_reference(
    model: nn.Module, loss: Callable, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """The mean over samples."""
    return torch.stack(gauss_newton_terms(model, loss, x, y)).mean(0)


def weighted_mean(
    model: nn.Module, loss: Callable, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor
) -> torch.Tensor:
    """Σ w_i J_iᵀ H_i J_i / Σ w_i."""
    terms = torch.stack(gauss_newton_terms(model, loss, x, y))
    return (w[:, None, None] * terms).sum(0) / w.sum()
