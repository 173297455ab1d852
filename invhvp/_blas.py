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
    """Compute a @ b, into `out` where it is given; of tensors.

    Nothing is recorded for a gradient where `out` is given.
    """
    torch = sys.modules["torch"]
    if torch.get_num_threads() == 1 and _numpy_is_faster() and _alike(a, b, torch):
        try:
            left, right = a.numpy(), b.numpy()
        except RuntimeError:  # recorded for gradients, or inside of torch.func
            pass
        else:
            with np.errstate(all="ignore"):  # as torch does
                if out is None:
                    return torch.from_numpy(left @ right)
                np.matmul(left, right, out=out.numpy())
                return out
    return a @ b if out is None else torch.mm(a, b, out=out)


def _alike(a: Any, b: Any, torch: Any) -> bool:
    """Whether both are matrices on a CPU, of one dtype that BLAS has, without tangents, and fit."""
    if not a.device.type == b.device.type == "cpu":
        return False
    known = a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64)
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0]
    return known and fits and not (has_tangent(a) or has_tangent(b))


def has_tangent(x: Any) -> bool:
    """Whether a tensor carries a tangent of forward-mode differentiation, which NumPy drops."""
    return sys.modules["torch"].autograd.forward_ad.unpack_dual(x).tangent is not None


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
