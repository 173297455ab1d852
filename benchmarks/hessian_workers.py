"""Processes that do products with a Hessian, each by one library, when they are told to."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np

OURS = "invhvp"

CONTENDERS = {
    OURS: """
import invhvp, invhvp_torch as it
H = it.hessian(model, loss, loader)
product, said = H.__matmul__, f"invhvp {invhvp.__version__}"
""",
    "curvlinops": """
import importlib.metadata
from curvlinops import HessianLinearOperator
H = HessianLinearOperator(
    model, torch.nn.CrossEntropyLoss(), list(model.parameters()), list(loader),
    check_deterministic=False,
)
product = H.__matmul__
said = "curvlinops " + importlib.metadata.version("curvlinops-for-pytorch")
""",
    "pyDVL HessianOperator": """
import pydvl
from pydvl.influence.torch.operator import HessianOperator
H = HessianOperator(model, loss, loader)
takes_rows, product, said = True, H.apply, f"pyDVL {pydvl.__version__}"
""",
    "pyDVL create_hvp_function": """
import pydvl
from pydvl.influence.torch.functional import create_hvp_function
product = create_hvp_function(model, loss, loader, precompute_grad=True)
takes_rows, said = True, f"pyDVL {pydvl.__version__}"
""",
}


class Worker:
    """A process of a contender that does a product when told to."""

    def __init__(self, name: str, given: Path) -> None:
        self.said = ""
        self._out = given.parent / name.replace(" ", "-")
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None
        interpreter, environment = sys.executable, dict(os.environ)
        if name.startswith("pyDVL"):
            interpreter = os.environ.get("INVHVP_PYDVL_PYTHON", "")
            environment = {k: v for k, v in environment.items() if not k.startswith("PYTHON")}
            if not interpreter:
                self.said = "skipped: INVHVP_PYDVL_PYTHON names no interpreter with pyDVL"
                return
        elif name == "curvlinops" and importlib.util.find_spec("curvlinops") is None:
            self.said = "skipped: curvlinops is not installed"
            return
        source = _BEFORE + CONTENDERS[name] + _AFTER
        self._errors = Path(f"{self._out}.log").open("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [interpreter, "-W", "ignore", "-c", source, str(given), str(self._out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        answer = self._answer()
        if answer is not None:
            self.said = answer["said"]

    def product(self, k: int) -> float | None:
        """Median seconds of a few products with k vectors in a row; None where there is none."""
        if self._process is None or self._process.stdin is None:
            return None
        self._process.stdin.write(f"{k}\n")
        self._process.stdin.flush()
        answer = self._answer()
        return None if answer is None else answer["seconds"]

    def result(self, k: int) -> np.ndarray:
        """The first columns of the first product with k vectors."""
        return np.load(f"{self._out}-{k}.npy")

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()  # closes its input, which ends it
            self._process = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def _answer(self) -> dict[str, Any] | None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries may print
                return json.loads(line)
        assert self._errors is not None
        self._process.wait()
        self._process = None
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["it ended without a word"]
        self.said = f"skipped: {lines[-1][:200]}"
        return None


def build(network: str) -> Any:
    """An untrained network by its name."""
    import torch

    namespace: dict[str, Any] = {}
    exec(NETWORKS, namespace)
    return namespace["build"](torch, network)


_BEFORE = """
import json, sys, time
import numpy as np, torch
from torch.utils.data import DataLoader, TensorDataset
given = torch.load(sys.argv[1])
torch.set_num_threads(given["threads"])
exec(given["networks"])
model = build(torch, given["network"])
model.load_state_dict(given["state"])
model.eval()
loss = torch.nn.functional.cross_entropy
loader = DataLoader(TensorDataset(*given["train"]), batch_size=given["batch_size"])
n = sum(p.numel() for p in model.parameters())
takes_rows = False
"""

_AFTER = """
rows = torch.randn((64, n), generator=torch.Generator().manual_seed(0))
product(rows[:1] if takes_rows else rows[:1].T.contiguous())  # imports, and what is kept
print(json.dumps({"said": f"{said}, torch {torch.__version__.split('+')[0]}"}), flush=True)
done = set()
for line in sys.stdin:
    k = int(line)
    V = rows[:k] if takes_rows else rows[:k].T.contiguous()
    if k == 1 and "create" not in sys.argv[2]:
        V = V.reshape(-1)
    seconds = []
    while len(seconds) < 30 and sum(seconds) < 0.1:
        started = time.perf_counter()
        Y = product(V)
        seconds.append(time.perf_counter() - started)
    if k not in done:
        done.add(k)
        Y = Y.detach().reshape(k, n).T if takes_rows else Y.detach().reshape(n, k)
        np.save(f"{sys.argv[2]}-{k}.npy", Y[:, :2].double().numpy())
    print(json.dumps({"seconds": sorted(seconds)[len(seconds) // 2]}), flush=True)
"""

# Text, because a worker may have an interpreter without this package.
NETWORKS = '''
def build(torch, name):
    nn = torch.nn

    class Transformer(nn.Module):
        """Eight tokens, the rows of an image; attention in plain operations."""

        def __init__(self, width=64):
            super().__init__()
            self.embedding = nn.Linear(8, width)
            self.place = nn.Parameter(0.1 * torch.randn(8, width))
            self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
            self.head = nn.Linear(width, 10)

        def forward(self, x):
            h = self.embedding(x.reshape(-1, 8, 8)) + self.place
            for block in self.blocks:
                h = block(h)
            return self.head(h.mean(1))

    class Block(nn.Module):
        def __init__(self, width, heads=4):
            super().__init__()
            self.heads = heads
            self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            n, t, d = x.shape
            parts = self.qkv(self.norms[0](x)).reshape(n, t, 3, self.heads, d // self.heads)
            q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
            weights = torch.softmax(q @ k.transpose(-1, -2) / (d // self.heads) ** 0.5, dim=-1)
            x = x + self.out((weights @ v).transpose(1, 2).reshape(n, t, d))
            return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))

    torch.manual_seed(0)
    if name == "logistic":
        return nn.Linear(64, 10)
    if name == "mlp":
        return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    if name == "wide mlp":
        layers = [nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(512, 10))
    if name == "cnn":
        layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.Tanh()]
        layers += [nn.Conv2d(16, 32, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10))
    return Transformer()
'''
