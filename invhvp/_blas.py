"""Arithmetic of PyTorch on a CPU: the faster of two BLAS, and memory that is cheap to get.

PyTorch's x86 builds multiply by MKL, which leaves half of the speed of an AVX-512 processor that
is not Intel's unused; NumPy's OpenBLAS does not (Zen 5, one core, GFLOP/s: 230 against 105 in
float32, 100 against 50 in float64). NumPy multiplies where both run on one thread: two pools of
threads would stand in each other's way.

A fresh block costs PyTorch a page fault for every 4 KB of it, NumPy, which asks for huge pages,
hardly any: X + Y diag(f) of 10⁶ x 16 takes 58 ms in float32 in the one, 15 ms in the other.
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
    if _numpy_multiplies() and _fit(a, b):
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
    if out is None:
        large = a.ndim == b.ndim == 2 and a.shape[0] * b.shape[1] >= _LARGE
        if not (large and _fit(a, b) and _plain(a, b)):
            return a @ b
        out = _fresh(a, b.shape[1])
    return torch.mm(a, b, out=out)


def views(*tensors: Any) -> tuple[Any, ...]:
    """NumPy views of tensors that NumPy multiplies, else the tensors."""
    if _numpy_multiplies() and _plain(*tensors):
        return tuple(tensor.numpy() for tensor in tensors)
    return tensors


def plus_product(z: Any, a: Any, b: Any) -> Any:
    """Compute z + a @ b of tensors, in one new block where nothing is recorded for a gradient."""
    if not (_fit(a, b) and _plain(z, a, b)):
        return z + multiply(a, b)
    return multiply(a, b, out=_fresh(z)).add_(z)


def plus_scaled(z: Any, x: Any, factors: Any) -> Any:
    """Compute z + x · factors of tensors, in one new block where nothing is recorded."""
    torch = sys.modules["torch"]
    number = isinstance(factors, float)
    if z.shape != x.shape or not (_plain(z, x) if number else _plain(z, x, factors)):
        return z + x * factors
    if number:
        return torch.add(z, x, alpha=factors, out=_fresh(z))
    return torch.addcmul(z, x, factors, out=_fresh(z))


def scaled(x: Any, factors: Any) -> Any:
    """Compute x · factors of tensors, in memory that is cheap to get."""
    if x.numel() < _LARGE or not _plain(x, factors):
        return x * factors
    return sys.modules["torch"].mul(x, factors, out=_fresh(x))


def _fresh(like: Any, columns: int | None = None) -> Any:
    shape = like.shape if columns is None else (like.shape[0], columns)
    return sys.modules["torch"].from_numpy(np.empty(shape, _DTYPES[str(like.dtype)]))


_LARGE = 1 << 18  # numbers from which PyTorch's fresh memory costs more than the arithmetic


_DTYPES = {"torch.float32": np.float32, "torch.float64": np.float64}  # that BLAS has


def _plain(*tensors: Any) -> bool:
    """Whether all are on a CPU, of one dtype that NumPy has, and nothing of them is recorded."""
    try:
        for tensor in tensors:
            tensor.numpy()
    except (RuntimeError, TypeError):  # on a device, for gradients, inside of torch.func
        return False
    first = tensors[0].dtype
    alike = str(first) in _DTYPES and all(tensor.dtype == first for tensor in tensors)
    return alike and not any(has_tangent(tensor) for tensor in tensors)


def _fit(a: Any, b: Any) -> bool:
    """Whether both are matrices on a CPU, of one dtype that BLAS has, without tangents, and fit."""
    if not a.device.type == b.device.type == "cpu":
        return False
    known = a.dtype == b.dtype and str(a.dtype) in _DTYPES
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0]
    return known and fits and not (has_tangent(a) or has_tangent(b))


def has_tangent(x: Any) -> bool:
    """Whether a tensor carries a tangent of forward-mode differentiation, which NumPy drops."""
    return sys.modules["torch"].autograd.forward_ad.unpack_dual(x).tangent is not None


def _numpy_multiplies() -> bool:
    return sys.modules["torch"].get_num_threads() == 1 and _numpy_is_faster()


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
