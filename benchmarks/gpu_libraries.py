"""What the GPU check asks of an array library: to place, to wait, to copy, to tell its memory."""

from __future__ import annotations

import contextlib
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import array_api_compat
import numpy as np

from invhvp import _backend


class Library:
    """NumPy; the others say where they differ."""

    name = "numpy"
    on_gpu = False

    def __init__(self) -> None:
        self.module: Any = np

    @property
    def xp(self) -> Any:
        return array_api_compat.array_namespace(self.place(np.zeros(1)))

    def place(self, a: np.ndarray, dtype: str | None = None) -> Any:
        return np.array(a, dtype=dtype)

    def host(self, x: Any) -> np.ndarray:
        return np.asarray(_backend.to_host(x), dtype=np.float64)

    def wait(self) -> None: ...

    def copy(self, target: Any, source: Any) -> None:
        self.module.copyto(target, source)

    def reset_peak(self) -> None: ...

    def peak_bytes(self) -> int | None:
        return None

    def pointer(self, x: Any) -> int:
        return x.__array_interface__["data"][0]

    def describe(self) -> str:
        return f"{self.name} {self.module.__version__}"


class CuPy(Library):
    """On the current device; its pool reports what it holds, not a peak of what is used."""

    name = "cupy"
    on_gpu = True

    def __init__(self, module: Any) -> None:
        self.module = module

    def place(self, a: np.ndarray, dtype: str | None = None) -> Any:
        return self.module.asarray(np.asarray(a, dtype=dtype))

    def wait(self) -> None:
        self.module.cuda.get_current_stream().synchronize()

    def reset_peak(self) -> None:
        self.module.get_default_memory_pool().free_all_blocks()

    def peak_bytes(self) -> int | None:
        return int(self.module.get_default_memory_pool().total_bytes())

    def pointer(self, x: Any) -> int:
        return x.data.ptr


class Torch(Library):
    """On the CPU or on a GPU, without TF32."""

    name = "torch"

    def __init__(self, module: Any, device: str) -> None:
        self.module, self.device = module, device
        self.on_gpu = device == "cuda"

    def place(self, a: np.ndarray, dtype: str | None = None) -> Any:
        return self.module.from_numpy(np.array(a, dtype=dtype)).to(self.device)

    def wait(self) -> None:
        if self.on_gpu:
            self.module.cuda.synchronize()

    def copy(self, target: Any, source: Any) -> None:
        target.copy_(source)

    def reset_peak(self) -> None:
        if self.on_gpu:
            self.module.cuda.empty_cache()
            self.module.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        return int(self.module.cuda.max_memory_allocated()) if self.on_gpu else None

    def pointer(self, x: Any) -> int:
        return x.data_ptr()


def libraries(device: str) -> tuple[list[Library], list[tuple[str, str]]]:
    """Those that compute here, and those that do not with the reason. NumPy always does."""
    found: list[Library] = [Library()]
    missing = []
    for name in ("cupy", "torch"):
        try:
            module = importlib.import_module(name)
        except Exception as error:  # CuPy without CUDA libraries raises what it likes
            missing.append((name, f"not installed: {error!r:.80}"))
            continue
        sees = bool(module.cuda.is_available())
        if device == "cuda" and not sees:
            missing.append((name, "sees no CUDA device"))
        elif name == "cupy" and device == "cpu":
            missing.append((name, "computes on GPUs only"))
        else:
            found.append(CuPy(module) if name == "cupy" else Torch(module, device))
    return found, missing


@dataclass(frozen=True)
class Timing:
    """Median seconds, and (largest − smallest) over it."""

    seconds: float
    spread: float


def timed(library: Library, work: Callable[[], Any], repeats: int, warm: int = 2) -> Timing:
    """Wall time between two points at which the device has nothing left to do."""
    for _ in range(warm):
        work()
    library.wait()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        library.wait()
        found.append(time.perf_counter() - started)
    middle = statistics.median(found)
    return Timing(middle, (max(found) - min(found)) / max(middle, 1e-12))


@dataclass
class Transfers:
    """Planned copies from the device to the host, each of which waits for the device."""

    count: int = 0
    numbers: int = field(default=0)


@contextlib.contextmanager
def counted_transfers() -> Iterator[Transfers]:
    """Count what the engine brings to the host; on NumPy what it would bring."""
    counted, original = Transfers(), _backend.to_host

    def to_host(x: Any) -> np.ndarray:
        counted.count += 1
        counted.numbers += int(np.prod(x.shape))
        return original(x)

    _backend.to_host = to_host
    try:
        yield counted
    finally:
        _backend.to_host = original


@contextlib.contextmanager
def unplanned_synchronisations(library: Library) -> Iterator[list[str]]:
    """What PyTorch says of operations that wait for the GPU; empty for other libraries."""
    import warnings

    seen: list[str] = []
    if not (library.on_gpu and library.name == "torch"):
        yield seen
        return
    cuda = library.module.cuda
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            cuda.set_sync_debug_mode("default")
    seen += [str(w.message) for w in caught if "synchroniz" in str(w.message)]
