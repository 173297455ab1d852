"""Layers with Kronecker structure that the common models do not have."""

from __future__ import annotations

import torch
from torch import nn

from tests.adapters.invhvp_torch.models import Case


class Conv1D(nn.Module):
    """What transformers call a linear layer: the weight is (in, out)."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(i, o) / i**0.5)
        self.bias = nn.Parameter(torch.zeros(o))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Words(nn.Module):
    """An embedding with a padding word, and attention that looks at something else."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=0)
        self.memory = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(4))
        self.head = Conv1D(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embedding(x)
        memory = torch.tanh(self.memory(h[:, :2, :]))
        h = h + self.attention(h, memory, memory, need_weights=False)[0] * self.scale
        return self.head(h.mean(1))


class Repeated(nn.Module):
    """One layer called twice, at two lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.again(x))
        return self.head(torch.tanh(self.again(h[:, :2, :])).mean(1))


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv1d(4, 6, 3, groups=2, stride=2),
        nn.Tanh(),
        nn.Unflatten(2, (1, 1, -1)),
        nn.Conv3d(6, 2, 1, bias=False),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def _deep_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3, bias=False), nn.Linear(3, 2))


MORE = (
    Case("convolutions", _convolutions, (2, 7)),
    Case("words", Words, (4,), tokens=True),
    Case("repeated", Repeated, (3, 4)),
)
DEEP_LINEAR = Case("deep-linear", _deep_linear, (5,), loss=nn.MSELoss(), target="real")
