"""Arrays and memory that two libraries share: the last sections of the GPU check."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import numpy as np

from .gpu_libraries import Library, Torch, timed
from .gpu_measures import Row, Size, relative_error


def every_pair(libraries: list[Library], size: Size) -> Iterator[Row]:
    """DLPack between every two libraries on one device: same memory, and a write is seen."""
    for giver in libraries:
        for taker in libraries:
            if giver is taker or giver.on_gpu != taker.on_gpu:
                continue
            x = giver.place(np.ones(size.copied), "float32")
            y = taker.module.from_dlpack(x)
            t = timed(taker, lambda x=x, t=taker: t.module.from_dlpack(x), size.repeats)
            same = giver.pointer(x) == taker.pointer(y)
            x[0] = 5.0
            giver.wait()
            seen = float(taker.host(y[:1])[0]) == 5.0
            yield {
                "section": "exchange", "what": f"{giver.name} to {taker.name}", "ok": same and seen,
                "same_memory": same, "write_seen": seen, "seconds": t.seconds,
            }  # fmt: skip


def torch_model(torch: Torch, taker: Library, size: Size) -> Iterator[Row]:
    """A Hessian of a torch model in another library's arrays: the same products, in what time."""
    import invhvp_torch as it

    module = torch.module
    module.manual_seed(0)
    width = max(16, int(math.sqrt(size.p / 4)))
    model = module.nn.Sequential(
        module.nn.Linear(width, width), module.nn.Tanh(), module.nn.Linear(width, 10)
    ).to(torch.device)
    x = module.randn(size.N, width, device=torch.device)
    y = module.randint(10, (size.N,), device=torch.device)
    loss = module.nn.functional.cross_entropy
    plain = it.hessian(model, loss, (x, y))
    bridged = it.hessian(model, loss, (x, y), array_namespace=taker.module)
    V = np.random.default_rng(0).standard_normal((plain.shape[0], min(8, size.k)))
    mine, theirs = torch.place(V, "float32"), taker.place(V, "float32")
    exact = torch.host(plain @ mine)
    error = relative_error(taker, bridged @ theirs, exact)
    inside = timed(torch, lambda: plain @ mine, size.repeats)
    through = timed(taker, lambda: bridged @ theirs, size.repeats)
    yield {
        "section": "exchange", "what": f"Hessian of a torch model in {taker.name} arrays",
        "ok": error <= 1e-5, "error": error, "seconds": through.seconds,
        "over_torch": through.seconds / inside.seconds,
    }  # fmt: skip


_POOL = """
import sys, cupy, torch, invhvp as ih
if sys.argv[1] == "shared":
    ih.share_memory_pool()
size = 1 << 28
x = cupy.ones(size, dtype=cupy.float32); x.sum(); del x       # CuPy works, and is done
y = torch.ones(size, device="cuda"); y.sum(); del y           # then PyTorch
free, total = torch.cuda.mem_get_info()
print((total - free) / 4 / size)
"""


def memory(device: str, found: list[Library]) -> Iterator[Row]:
    """How much of the device both pools hold after 1 GiB in CuPy and then 1 GiB in PyTorch."""
    if device != "cuda" or {x.name for x in found} < {"numpy", "cupy", "torch"}:
        why = "needs CuPy and PyTorch on one GPU"
        yield {"section": "skipped", "what": "one memory pool for both", "why": why}
        return
    held = {}
    for pools in ("separate", "shared"):
        done = subprocess.run(
            [sys.executable, "-c", _POOL, pools],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1]
            yield {"section": "memory", "what": f"{pools} pools", "ok": False, "error": last}
            return
        held[pools] = float(done.stdout)
    for pools, gib in held.items():
        ok = pools == "separate" or gib < held["separate"] - 0.5
        yield {"section": "memory", "what": f"{pools} pools", "ok": ok, "GiB_held": gib}
