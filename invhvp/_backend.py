"""The seam to the array libraries; with `_random`, the only file that may name one.

Everything else is written to the array-API standard. What the standard leaves open is decided
here once: which factorisations exist and how they fail, where float64 lives, how a small array
reaches the host, and how much memory is free.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import array_api_compat as compat
import numpy as np

from ._blas import has_tangent
from .protocols import Array

device = compat.device


_NAMESPACES: dict[type, Any] = {}  # by array type: asking an array costs more than a small GEMM


def namespace(*arrays: Array) -> Any:
    """The array-API namespace of the arrays; TypeError where they are of several libraries."""
    kind = type(arrays[0])
    for array in arrays[1:]:
        if type(array) is not kind:
            return compat.array_namespace(*arrays)
    found = _NAMESPACES.get(kind)
    if found is None:
        found = _NAMESPACES[kind] = compat.array_namespace(arrays[0])
    return found


def is_array(x: Any) -> bool:
    """Whether `x` is an array of a library that we can compute with."""
    return compat.is_array_api_obj(x)


def is_numpy(x: Array) -> bool:
    """Whether `x` is a NumPy array."""
    return isinstance(x, np.ndarray | np.generic)


def on_host(x: Array) -> bool:
    """Whether looking at values of `x` costs nothing: NumPy, or PyTorch on the CPU."""
    return is_numpy(x) or (compat.is_torch_array(x) and x.device.type == "cpu")


def library_name(x: Array) -> str:
    """`"numpy"`, `"torch"`, `"jax"`, `"cupy"` or whatever the namespace calls itself."""
    name = namespace(x).__name__
    return name.removeprefix("array_api_compat.").split(".")[0]


def empty_like(x: Array) -> Array:
    """A zero-size array of the same library, dtype and device: it carries no data along."""
    if is_tracing(x):  # a part of x, so that it is known to depend on what is traced
        return namespace(x).reshape(x, (-1,))[:0]
    if compat.is_jax_array(x):  # and of a concrete x never, not even inside of jit
        with sys.modules["jax"].ensure_compile_time_eval():
            return namespace(x).zeros((0,), dtype=x.dtype, device=device(x))
    return namespace(x).zeros((0,), dtype=x.dtype, device=device(x))


def quiet() -> Any:
    """Silence NumPy's floating-point warnings: here every failure is judged from values."""
    return np.errstate(all="ignore")


def is_tracing(x: Array) -> bool:
    """Whether `x` is being traced (`jax.jit`), so that its values cannot be looked at."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.core.Tracer)


# --------------------------------------------------------------------------- dtypes and devices


def eps(dtype: Any) -> float:
    """Unit spacing of a real floating dtype of any library."""
    return {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}[
        dtype_name(dtype)
    ]


def itemsize(dtype: Any) -> int:
    """Bytes of one number of a real floating dtype."""
    return {"float64": 8, "float32": 4}.get(dtype_name(dtype), 2)


def dtype_name(dtype: Any) -> str:
    """`"float32"` for `np.float32`, `torch.float32`, `jnp.float32` and strict's alike."""
    return _dtype_name(type(dtype), dtype)


@lru_cache(maxsize=64)
def _dtype_name(_: type, dtype: Any) -> str:
    # The type is part of the key: strict's dtypes share hashes with NumPy's but hate comparison.
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    return name.rpartition(".")[2]


def is_real_floating(dtype: Any) -> bool:
    """Whether `dtype` is one that the engine solves in."""
    return dtype_name(dtype) in ("float64", "float32", "bfloat16", "float16")


def same_device(x: Array, y: Array) -> bool:
    """Whether two arrays of one namespace live on the same device; nobody knows while tracing."""
    return is_tracing(x) or is_tracing(y) or device(x) == device(y)


@lru_cache(maxsize=256)
def _has_float64(xp: Any, dev: Any) -> bool:
    try:
        probe = xp.zeros((1,), dtype=xp.float64, device=dev)
    except (ValueError, TypeError, RuntimeError):
        return False
    return dtype_name(probe.dtype) == "float64"


def has_float64(x: Array) -> bool:
    """Whether the device of `x` computes in float64 (MPS, TPUs and JAX by default do not)."""
    if is_numpy(x):
        return True
    xp = namespace(x)
    if compat.is_jax_namespace(xp):  # jax.config may change: never cached, never a warning
        return bool(sys.modules["jax"].config.jax_enable_x64)
    try:
        return _has_float64(xp, device(x))
    except TypeError:  # an unhashable device (CuPy): CUDA devices all have float64
        return True


# ------------------------------------------------------------------- planned host transfers


def to_host(x: Array) -> np.ndarray:
    """Copy a small array to the host as NumPy: the one sanctioned synchronisation."""
    if is_numpy(x):
        return x
    if compat.is_cupy_array(x):
        return x.get()
    if compat.is_torch_array(x):
        x = x.detach()
        x = x if x.device.type == "cpu" else x.cpu()
        return (x.float() if dtype_name(x.dtype) == "bfloat16" else x).numpy()
    if compat.is_jax_array(x):
        if is_tracing(x):
            raise TypeError(
                "a value is needed on the host, and inside of jax.jit or jax.grad there is none: "
                "prepare the inverse outside, or use CG, BlockCG or Minres, which run inside "
                "(a Callback that closes over traced arrays needs like= one of them)"
            )
        return np.asarray(x)
    xp = namespace(x)
    cpu = getattr(xp, "Device", None)
    return np.asarray(compat.to_device(x, cpu("CPU_DEVICE") if cpu else "cpu"))


def from_host(a: Any, like: Array, dtype: Any = None) -> Array:
    """Place a host array beside `like`: its namespace, device and (by default) dtype."""
    dtype = like.dtype if dtype is None else dtype
    name = dtype_name(dtype)
    if compat.is_torch_array(like):
        a = np.asarray(a, dtype="float32" if name == "bfloat16" else name)
        if not a.flags.writeable or any(step < 0 for step in a.strides):
            a = a.copy()  # torch warns about read-only memory and refuses to go backwards
        return sys.modules["torch"].from_numpy(a).to(like.device, dtype)
    if name != "bfloat16":
        a = np.asarray(a, dtype=np.dtype(name))  # convert first: the device may lack float64
    return namespace(like).asarray(a, dtype=dtype, device=device(like))


# ----------------------------------------------------------------------------- small arrays
#
# k × k algebra runs in float64: on the device where it has float64, else on the host after one
# planned transfer; while tracing it stays on the device in the widest type there is. For PyTorch
# on the CPU the host is NumPy, in the memory of the tensor: dispatch there is several times as
# fast, and k × k algebra is little else.


def small_on_host(like: Array) -> bool:
    """Whether the small algebra beside `like` runs in NumPy."""
    return on_host(like) or not (is_tracing(like) or has_float64(like))


def to_small(x: Array) -> Array:
    """Move a k × k (or k) array to where small algebra runs, in its precision."""
    if is_numpy(x):
        return np.asarray(x, dtype=np.float64)
    xp = namespace(x)
    if on_host(x) and not has_tangent(x):
        try:
            return x.double().numpy()
        except RuntimeError:
            pass  # recorded for gradients, or inside of torch.func: it stays a tensor
    if has_float64(x):
        return x if dtype_name(x.dtype) == "float64" else xp.astype(x, xp.float64)
    if is_tracing(x):
        return xp.astype(x, xp.float32)
    return np.asarray(to_host(x), dtype=np.float64)


def lift(M: Array, like: Array) -> Array:
    """Bring a small array back beside `like`, in the dtype of `like`."""
    xp = namespace(like)
    if is_numpy(M) and not is_numpy(like):
        return from_host(M, like)
    return M if M.dtype == like.dtype else xp.astype(M, like.dtype)


def together(x: Array, y: Array) -> tuple[Array, Array]:
    """Two small arrays in one library: NumPy's goes to where the other one has to be.

    They differ where one is recorded for gradients, traced or kept beside the data.
    """
    if is_numpy(x) == is_numpy(y):
        return x, y
    return (from_host(x, y), y) if is_numpy(x) else (x, from_host(y, x))


def cast(X: Array, like: Array) -> Array:
    """X in the dtype of `like`; the same array where it is that already."""
    return X if X.dtype == like.dtype else namespace(X).astype(X, like.dtype)


# ---------------------------------------------------------------------------------- memory


def free_memory(x: Array) -> int:
    """Bytes that can still be allocated on the device of `x`."""
    if compat.is_torch_array(x) and x.device.type == "cuda":
        return int(sys.modules["torch"].cuda.mem_get_info(x.device)[0])
    if compat.is_cupy_array(x):
        pool = sys.modules["cupy"].get_default_memory_pool()
        card: Any = x.device
        with card:
            return int(card.mem_info[0]) + int(pool.free_bytes())
    if compat.is_jax_array(x) and not is_tracing(x):
        stats = next(iter(x.devices())).memory_stats()
        if stats and "bytes_limit" in stats:
            return int(stats["bytes_limit"] - stats["bytes_in_use"])
    return _free_host_memory()


def _free_host_memory() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30  # not Linux: assume a small laptop rather than guess high


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of any library says that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    name = type(error).__name__
    return name == "OutOfMemoryError" or (
        name in ("XlaRuntimeError", "JaxRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)
    )
