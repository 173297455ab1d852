"""Small models of every kind, and dense float64 references by torch.func."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.utils.parametrize
from torch import nn
from torch.func import functional_call

cross_entropy = nn.functional.cross_entropy


class Attention(nn.Module):
    """Embedding, a pre-norm attention block through both APIs of torch, mean pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.query = nn.Linear(4, 12)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embedding(x)
        q, k, v = self.query(self.norm(h)).chunk(3, dim=-1)
        h = h + nn.functional.scaled_dot_product_attention(q, k, v)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(h.mean(1))


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(x))).mean(1))


class Twice(nn.Module):
    """One layer called twice, one whose weight is also used by hand, one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(5, 5)
        self.shared = nn.Linear(5, 5)
        self.out = nn.Linear(5, 3)
        self.idle = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.again(torch.tanh(self.again(x))))
        h = self.shared(h) + torch.sin(nn.functional.linear(h, self.shared.weight))
        return self.out(h)


class TimeFirst(nn.Module):
    """Linear layers whose first axis is time, or time and samples in one."""

    def __init__(self) -> None:
        super().__init__()
        self.time_first = nn.Linear(5, 4)
        self.flat = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.time_first(x.transpose(0, 1))).transpose(0, 1)
        h = torch.tanh(self.flat(h.reshape(-1, 4))).reshape(h.shape)
        return self.out(h).mean(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(5, 3, batch_first=True)
        self.out = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.cell(x)[0][:, -1, :])


class Squeezed(nn.Module):
    """Drops every axis of length one: what it does to a single sample is its own affair."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.out = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.hidden(x)) * self.scale).squeeze()


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    tokens: bool = False
    loss: Callable = cross_entropy
    target: str = "class"
    whole: int | None = None  # the only size of a batch that the model takes

    def build(
        self, n: int = 7, dtype: torch.dtype = torch.float64
    ) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
        rng = torch.Generator().manual_seed(3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = self.make().to(dtype)
        if self.tokens:
            x = torch.randint(0, 7, (n, *self.inputs), generator=rng)
        else:
            x = torch.randn((n, *self.inputs), generator=rng, dtype=torch.float64).to(dtype)
        if self.target == "class":
            y = torch.randint(0, 3, (n,), generator=rng)
        elif self.target == "classes":
            y = torch.randint(0, 3, (n, 4), generator=rng)
        else:
            shape = (n, 2) if self.target == "real" else (n,)
            y = torch.rand(shape, generator=rng, dtype=torch.float64).to(dtype)
        return model, x, y


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def _regression() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 2, bias=False))


def _in_place() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.ELU(inplace=True), nn.LayerNorm(6), nn.Linear(6, 3))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.Softplus(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 2, 2, groups=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def _tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def _token_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return cross_entropy(output.reshape(-1, 3), target.reshape(-1))


def _parametrised() -> nn.Module:
    layer = nn.Linear(5, 4)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3))


CASES = (
    Case("mlp", _mlp, (5,)),
    Case("regression", _regression, (5,), loss=nn.MSELoss(), target="real"),
    Case("in-place", _in_place, (5,)),
    Case("cnn", _cnn, (1, 6, 6)),
    Case("attention", Attention, (4,), tokens=True),
    Case("tied", Tied, (4,), tokens=True),
    Case("twice", Twice, (5,)),
    Case("time-first", TimeFirst, (4, 5)),
    Case("time-first-square", TimeFirst, (7, 5)),  # as many steps as samples
    Case("tokens", _tokens, (4, 5), loss=_token_loss, target="classes"),
    Case("parametrised", _parametrised, (5,)),
    Case("recurrent", Recurrent, (4, 5)),
    Case("squeezed", Squeezed, (5,), loss=nn.BCEWithLogitsLoss(), target="probability", whole=7),
)
BY_NAME = {case.name: case for case in CASES}


def sample_losses(
    model: nn.Module, loss: Callable, x: torch.Tensor, y: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """θ ↦ ℓ_i (N,) in float64, without anything of the adapter."""
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def losses(theta: torch.Tensor) -> torch.Tensor:
        parts = zip(named.items(), theta.split(sizes), strict=True)
        values = {name: part.reshape(p.shape) for (name, p), part in parts}
        output = functional_call(model, values, (x,))
        return torch.stack([loss(output[i : i + 1], y[i : i + 1]) for i in range(len(y))])

    return losses


def reference(
    model: nn.Module, loss: Callable, x: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense Hessian of the mean loss and per-sample gradients (N, n), in float64."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    losses = sample_losses(model, loss, x, y)
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        H = torch.autograd.functional.hessian(lambda t: losses(t).mean(), theta)
        G = torch.autograd.functional.jacobian(losses, theta)
    for module, mode in modes:
        module.training = mode
    assert isinstance(H, torch.Tensor)
    assert isinstance(G, torch.Tensor)
    return H, G


def assert_close(actual: torch.Tensor, expected: torch.Tensor, eps: float = 1e-12) -> None:
    """Equal as matrices, to `eps` of the largest entry."""
    assert actual.shape == expected.shape
    scale = float(expected.abs().max())
    assert float((actual.double() - expected.double()).abs().max()) <= eps * max(scale, 1e-30)
