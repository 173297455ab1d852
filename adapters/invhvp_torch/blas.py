"""Products of matrices on a CPU, by the faster of the two BLAS that are there."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import torch


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write a @ b to `out`; none of them may need a gradient.

    PyTorch's x86 builds multiply by MKL, which leaves half of the speed of an AVX-512 processor
    that is not Intel's unused; NumPy's OpenBLAS does not (Zen 5, one core, GFLOP/s: 230 against
    105 in float32, 100 against 50 in float64). It is used where both run on one thread: two pools
    of threads would stand in each other's way.
    """
    if a.device.type == "cpu" and torch.get_num_threads() == 1 and _numpy_is_faster():
        np.matmul(a.numpy(), b.numpy(), out=out.numpy())
        return out
    return torch.mm(a, b, out=out)


@cache
def _numpy_is_faster() -> bool:
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkl.is_available() and not _is_intel() and _one_thread()


def _one_thread() -> bool:
    """Whether OpenBLAS was told to use one thread: it reads this once, when it is loaded."""
    for name in ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"):
        if os.environ.get(name):
            return os.environ[name] == "1"
    return os.cpu_count() == 1


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True  # nobody knows: PyTorch's own choice
