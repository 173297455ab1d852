"""One contender of `collection`, in a process of its own: python collection_worker.py NAME FOLDER.

It runs in this library's interpreter or in pyDVL's, so it imports nothing of the benchmarks.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


def main(name: str, folder: Path) -> None:
    """Run the contender; write scores.npy and found.json into the folder."""
    torch.set_num_threads(1)
    given = torch.load(folder / "given.pt", weights_only=True)
    model = _network(given["widths"])
    model.load_state_dict(given["state"])
    prepared = CONTENDERS[name](given, model, folder)  # imports, which are not measured
    before, started = _peak(forget=True), time.perf_counter()
    model = prepared["fit"]()
    fitted = time.perf_counter()
    scores = prepared["score"](model)
    done = time.perf_counter()
    peak = _peak()
    np.save(folder / "scores.npy", np.asarray(scores))
    found = {
        "fit_seconds": fitted - started,
        "score_seconds": done - fitted,
        "memory": peak - before,
        "version": prepared["version"],
    }
    (folder / "found.json").write_text(json.dumps(found))


def _peak(*, forget: bool = False) -> int:
    """The most resident memory so far, in bytes; with `forget`, of now and from now on."""
    try:
        if forget:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except OSError:  # not Linux: what the imports took at their peak counts as theirs
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _network(widths: list[int]) -> torch.nn.Module:
    layers: list[Any] = []
    for i, o in itertools.pairwise(widths):
        layers += [torch.nn.Linear(i, o), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1])


def _loader(data: Any, batch: int) -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=batch)


LOSS = torch.nn.functional.cross_entropy


def written(method: str) -> Callable[..., dict[str, Any]]:
    """`Influence.write` to a Zarr store."""

    def contender(given: dict[str, Any], model: Any, folder: Path) -> dict[str, Any]:
        import zarr  # noqa: F401

        import invhvp as ih
        import invhvp_torch as it

        chosen = {
            "SampleSpace": ih.SampleSpace(),
            "BlockCG": ih.BlockCG(rtol=given["rtol"]),
        }[method]

        def fit() -> Any:
            F = it.empirical_fisher(model, LOSS, given["train"])
            return ih.Influence(chosen.prepare(F, damping=given["damping"]), F.gradients)

        def score(influence: Any) -> Any:
            test = it.per_sample_gradients(model, LOSS, *given["test"])
            return influence.write(test, folder / "scores.zarr", progress=False)[...]

        return {"fit": fit, "score": score, "version": f"invhvp {ih.__version__}"}

    return contender


def sequential(library: str, method: str) -> Callable[..., dict[str, Any]]:
    """The sequential calculator of either library: the same names, the same calls."""

    def contender(given: dict[str, Any], model: Any, _: Path) -> dict[str, Any]:
        if library == "invhvp":
            import invhvp
            import invhvp_torch.influence as names

            version, calculator = invhvp.__version__, names.SequentialInfluenceCalculator
            aggregator, modes = names.NestedTorchCatAggregator, names.SecondOrderMode
        else:
            import pydvl
            import pydvl.influence.torch as names
            from pydvl.influence import SequentialInfluenceCalculator as calculator
            from pydvl.influence.torch import SecondOrderMode as modes
            from pydvl.influence.torch.util import NestedTorchCatAggregator as aggregator

            version = pydvl.__version__
        options = {"regularization": given["damping"], "second_order_mode": modes.GAUSS_NEWTON}
        if method == "cg":
            limits = {"rtol": given["rtol"], "maxiter": given["maxiter"]}
            fitted = names.CgInfluence(model, LOSS, solve_simultaneously=True, **limits, **options)
        else:
            fitted = names.NystroemSketchInfluence(model, LOSS, rank=given["rank"], **options)
        train, test = (_loader(given[key], given[f"{key}_batch"]) for key in ("train", "test"))

        def score(model: Any) -> Any:
            lazy = calculator(model).influences(test, train)
            return lazy.compute(aggregator=aggregator()).detach().numpy()

        return {
            "fit": lambda: fitted.fit(train),
            "score": score,
            "version": f"{library} {version}",
        }

    return contender


CONTENDERS: dict[str, Callable[..., dict[str, Any]]] = {
    "write SampleSpace": written("SampleSpace"),
    "write BlockCG": written("BlockCG"),
    "sequential cg": sequential("invhvp", "cg"),
    "sequential sketch": sequential("invhvp", "sketch"),
    "pydvl cg": sequential("pydvl", "cg"),
    "pydvl sketch": sequential("pydvl", "sketch"),
}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
