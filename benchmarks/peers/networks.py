"""The networks of the comparison; needs PyTorch alone, for it is imported in every environment."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


class Attention(nn.Module):
    """One pre-norm transformer layer of plain linear maps, so that every library sees them."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Any) -> Any:
        y = self.norm(x)
        q, k, v = (
            t.reshape(*t.shape[:2], self.heads, -1).transpose(1, 2)
            for t in (self.query(y), self.key(y), self.value(y))
        )
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), -1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(x.shape))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Rows(nn.Module):
    """Digits as eight rows of eight pixels."""

    def forward(self, x: Any) -> Any:
        return x.reshape(len(x), 8, 8)


class Image(nn.Module):
    """Digits as images with one channel."""

    def forward(self, x: Any) -> Any:
        return x.reshape(len(x), 1, 8, 8)


class Signal(nn.Module):
    """A signal as an image of one line: curvlinops knows convolutions of images alone."""

    def forward(self, x: Any) -> Any:
        return x.reshape(len(x), 1, 1, -1)


class Mean(nn.Module):
    """The mean over tokens."""

    def forward(self, x: Any) -> Any:
        return x.mean(1)


def _mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in zip(widths, widths[1:]):  # noqa: B905, RUF007
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _cnn() -> nn.Module:
    return nn.Sequential(
        Image(),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.Tanh(),
        nn.Linear(32, 10),
    )


def _cnn1d() -> nn.Module:
    return nn.Sequential(
        Signal(),
        nn.Conv2d(1, 8, (1, 5), padding=(0, 2)),
        nn.Tanh(),
        nn.AvgPool2d((1, 2)),
        nn.Conv2d(8, 16, (1, 5), padding=(0, 2)),
        nn.Tanh(),
        nn.AvgPool2d((1, 2)),
        nn.Flatten(),
        nn.Linear(160, 10),
    )


def _transformer() -> nn.Module:
    layers = [Attention(64, 4, 256) for _ in range(2)]
    return nn.Sequential(Rows(), nn.Linear(8, 64), *layers, Mean(), nn.Linear(64, 10))


NETWORKS = {
    "logreg": lambda: _mlp(64, 10),
    "mlp_small": lambda: _mlp(64, 12, 10),
    "mlp": lambda: _mlp(64, 64, 10),
    "cnn": _cnn,
    "mlp_wide": lambda: _mlp(64, 512, 512, 10),
    "mlp_1m": lambda: _mlp(64, 1024, 896, 10),
    "transformer": _transformer,
    "mnist1d_mlp": lambda: _mlp(40, 64, 10),
    "mnist1d_cnn": _cnn1d,
    "cancer": lambda: _mlp(30, 32, 2),
    "diabetes": lambda: _mlp(10, 32, 1),
}
LOSSES = {"cross_entropy": nn.functional.cross_entropy, "mse": nn.functional.mse_loss}


class Problem:
    """What every library is given: a trained network, its data, k test points, λ."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        self.model = NETWORKS[given["network"]]()
        self.model.load_state_dict(given["state"])
        self.model.eval()
        dtype = next(iter(given["state"].values())).dtype
        self.model.to(dtype)
        self.loss = LOSSES[given["loss"]]
        self.loss_name: str = given["loss"]
        self.train: tuple[Any, Any] = given["train"]
        self.test: tuple[Any, Any] = given["test"]
        self.damping: float = given["damping"]
        self.batch: int = given["batch"]

    def tiny(self) -> Problem:
        """The same with very few samples."""
        few = {"train": [t[:24] for t in self.train], "test": [t[:2] for t in self.test]}
        return Problem({**self.given, **{name: tuple(t) for name, t in few.items()}})

    def cast(self, dtype: Any) -> Problem:
        """The same in another precision."""

        def cast(t: Any) -> Any:
            return t.to(dtype) if t.dtype.is_floating_point else t

        given = {**self.given, "state": {n: cast(t) for n, t in self.given["state"].items()}}
        given |= {name: tuple(cast(t) for t in given[name]) for name in ("train", "test")}
        return Problem(given)

    def loader(self) -> Any:
        data = torch.utils.data.TensorDataset(*self.train)
        return torch.utils.data.DataLoader(data, batch_size=self.batch)

    @property
    def n_parameters(self) -> int:
        return sum(q.numel() for q in self.model.parameters())

    def parameters(self) -> list[Any]:
        return list(self.model.parameters())

    def gradients(self) -> Any:
        """Gradients of the test losses, (k, p), as a user of torch would compute them."""
        found = []
        for x, y in zip(*self.test):  # noqa: B905
            loss = self.loss(self.model(x[None]), y[None])
            parts = torch.autograd.grad(loss, self.parameters())
            found.append(torch.cat([g.reshape(-1) for g in parts]))
        return torch.stack(found)

    def split(self, vector: Any) -> list[Any]:
        """A vector (p, ...) as a list in the shapes of the parameters."""
        sizes = [q.numel() for q in self.parameters()]
        parts = vector.split(sizes)
        return [
            v.reshape(*q.shape, *v.shape[1:])
            for v, q in zip(parts, self.parameters())  # noqa: B905
        ]
