"""Runs the contenders of one library in its own interpreter: worker.py LIBRARY PROBLEM OUT NAMES.

Each contender runs in a forked child, so that one that is killed at the cap, runs out of memory
or crashes takes nothing along, and its peak of memory is its own.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

# What pip calls the library of a side.
DISTRIBUTIONS = {
    "ours_side": "invhvp",
    "torch_side": "torch",
    "lineax_side": "lineax",
    "pydvl_side": "pydvl",
    "curvlinops_side": "curvlinops-for-pytorch",
    "dattri_side": "dattri",
    "kronfluence_side": "kronfluence",
}


def main() -> None:
    library, problem_path, out, cap, *names = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parent))
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    from networks import Problem

    side = importlib.import_module(library)
    given = torch.load(problem_path, weights_only=False)
    chosen = names or list(side.CONTENDERS)
    having = versions(library)
    for name in chosen:
        row = forked(side, Problem(given), name, Path(out), float(cap))
        row["with"] = having
        print("ROW " + json.dumps(row), flush=True)


def versions(side: str) -> dict:
    """Of the library and of the PyTorch in this interpreter, which may be another than ours."""
    found = {}
    for name in dict.fromkeys((DISTRIBUTIONS.get(side, "torch"), "torch")):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # of a folder on the path
            found[name] = str(getattr(sys.modules.get(name), "__version__", "unknown"))
    return found


def forked(side, problem, name: str, folder: Path, cap: float) -> dict:
    """One contender in a child; what it said, or how it ended."""
    where = folder / f"{side.__name__}-{abs(hash(name))}.pt"
    read, write = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the end at the cap leaves no file
        limit_processor(cap + 10)  # for warming up
        before = peak_bytes()
        said = run(side, problem, name, where, cap)
        said["peak_mib"] = max(0, peak_bytes() - before) / 2**20
        os.write(write, json.dumps(said).encode())
        os._exit(0)
    os.close(write)
    patience, waited = 10 * cap + 60, False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.perf_counter() - started > patience:  # waits for something
            waited = True
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    row = json.loads(text) if text else {"failed": how_it_ended(status & 127, cap, waited)}
    if "failed" in row:
        return {"name": name, **row}
    return {"name": name, **row, "where": str(where)}


def how_it_ended(died: int, cap: float, waited: bool) -> str:
    """In words; a SIGKILL that is not ours is the kernel's, as a rule for want of memory."""
    if waited:
        return f"did not end in {10 * cap + 60:g} s, at a cap of {cap:g} s of the processor"
    if died == signal.SIGXCPU:
        return over(cap)
    return "killed (out of memory?)" if died == signal.SIGKILL else f"died of signal {died}"


def over(cap: float) -> str:
    return f"over the cap of {cap:g} s"


def limit_processor(seconds: float | None) -> None:
    """End this process after so many more seconds of the processor; with None, not any more."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = hard
    if seconds is not None:
        soft = math.ceil(time.process_time() + seconds)  # the kernel counts in whole seconds
        soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def peak_bytes() -> int:
    """The most memory of this process so far; what it was made from does not count on Linux."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


def warm_up(contender, problem) -> None:
    """A run on very few samples: libraries import and compile at the first call."""

    def stop(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    try:
        contender(problem.tiny())()
    except Exception:
        pass
    finally:
        signal.alarm(0)


def run(side, problem, name: str, where: Path, cap: float) -> dict:
    """Fit and solve, in seconds of the processor; the answer is saved outside both."""
    import torch

    warm_up(side.CONTENDERS[name], problem)
    limit_processor(cap)
    try:
        wall, started = time.perf_counter(), time.process_time()
        solve = side.CONTENDERS[name](problem)
        fitted = time.process_time()
        answer = solve()
        solved = time.process_time()
        wall = time.perf_counter() - wall
    except BaseException as error:
        last = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        return {"failed": f"raised {last[:160]}"}
    limit_processor(None)  # what follows is not the method's
    if solved - started > cap:
        return {"failed": over(cap)}
    said = ""
    if isinstance(answer, tuple):
        answer, said = answer
    door = getattr(solve, "inverse", None)
    if door is not None and problem.n_parameters <= 1000:  # what is compared as a matrix
        answer = {"solutions": answer, "inverse": door()}
    torch.save(answer, where)
    return {"fit": fitted - started, "solve": solved - fitted, "wall": wall, "said": said}


if __name__ == "__main__":
    main()
