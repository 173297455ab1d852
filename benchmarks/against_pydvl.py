"""pyDVL's side of the Gauss-Newton benchmark: its own interpreter, timed there without imports."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


class MissingError(RuntimeError):
    """There is no pyDVL, it failed, or it took too long; the text says which."""


def solve(which: str, given: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Solutions, scores and seconds of "cg" or "harmonic" at a problem.

    Raises MissingError where the interpreter that INVHVP_PYDVL_PYTHON names gives none.
    """
    import torch

    interpreter = os.environ.get("INVHVP_PYDVL_PYTHON")
    if not interpreter:
        raise MissingError("INVHVP_PYDVL_PYTHON names no interpreter with pyDVL")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    with tempfile.TemporaryDirectory() as folder:
        where, out = Path(folder) / "problem.pt", Path(folder) / "found.npz"
        torch.save({**given, "which": which, "threads": torch.get_num_threads()}, where)
        try:
            done = subprocess.run(
                [interpreter, "-c", _SCRIPT, str(where), str(out)],
                capture_output=True,
                text=True,
                timeout=timeout,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise MissingError(f"not ready after {timeout:.0f} s") from None
        if done.returncode:
            raise MissingError(done.stderr.strip().splitlines()[-1])
        found = json.loads(done.stdout.strip().splitlines()[-1])
        with np.load(out) as arrays:
            return {**found, "x": arrays["x"], "scores": arrays["scores"]}


_SCRIPT = """
import json, sys, time
import numpy as np, torch
from torch.utils.data import DataLoader, TensorDataset
import pydvl
from pydvl.influence.torch import CgInfluence, InverseHarmonicMeanInfluence, SecondOrderMode
given = torch.load(sys.argv[1])
torch.set_num_threads(given["threads"])
layers, widths = [], given["widths"]
for i, o in zip(widths, widths[1:]):
    layers += [torch.nn.Linear(i, o), torch.nn.Tanh()]
model = torch.nn.Sequential(*layers[:-1])
model.load_state_dict(given["state"])
loss, damping = torch.nn.functional.cross_entropy, given["damping"]
clocks = [(time.perf_counter(), time.process_time())]
def tick():
    clocks.append((time.perf_counter(), time.process_time()))
if given["which"] == "cg":
    influence = CgInfluence(
        model, loss, regularization=damping, rtol=given["rtol"], maxiter=given["maxiter"],
        solve_simultaneously=True, second_order_mode=SecondOrderMode.GAUSS_NEWTON,
    )
else:
    influence = InverseHarmonicMeanInfluence(model, loss, regularization=damping)
influence = influence.fit(DataLoader(TensorDataset(*given["train"]), batch_size=256))
tick()
X = influence.influence_factors(*given["test"])
tick()
scores = influence.influences_from_factors(X, *given["train"])
tick()
np.savez(sys.argv[2], x=X.detach().numpy().T, scores=scores.detach().numpy())
spent = [[b - a for a, b in zip(*pair)] for pair in zip(clocks, clocks[1:])]
names = ("fit", "solve", "scores_after")
print(json.dumps({"version": pydvl.__version__, "clocks": dict(zip(names, spent))}))
"""
