"""Products of matrices of PyTorch on a CPU, by the faster of the two BLAS that are there.

PyTorch's x86 builds multiply by MKL, which leaves half of the speed of an AVX-512 processor that
is not Intel's unused; NumPy's OpenBLAS does not (Zen 5, one core, GFLOP/s: 230 against 105 in
float32, 100 against 50 in float64). NumPy multiplies where both run on one thread: two pools of
threads would stand in each other's way.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


def multiply(a: Any, b: Any, out: Any = None) -> Any:
    """Compute a @ b, into `out` where it is given; tensors of two dimensions on a CPU.

    Nothing is recorded for a gradient where `out` is given.
    """
    torch = sys.modules["torch"]
    if a.ndim == b.ndim == 2 and torch.get_num_threads() == 1 and _numpy_is_faster():
        try:
            left, right = a.numpy(), b.numpy()
        except (RuntimeError, TypeError):  # a gradient or a transform follows it, or half precision
            pass
        else:
            if out is None:
                return torch.from_numpy(left @ right)
            np.matmul(left, right, out=out.numpy())
            return out
    return a @ b if out is None else torch.mm(a, b, out=out)


@cache
def _numpy_is_faster() -> bool:
    backends = sys.modules["torch"].backends
    wide = backends.cpu.get_cpu_capability() == "AVX512"
    return wide and backends.mkl.is_available() and not _is_intel() and _one_thread()


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
