"""One pool of GPU memory for CuPy and PyTorch in one process."""

from __future__ import annotations


def share_memory_pool() -> None:
    """Have CuPy take its memory from PyTorch's caching allocator, for the rest of the process.

    Each library keeps the memory that it has freed for itself: where both run in one process, as
    with a torch model behind a CuPy solve, the sum of both peaks must fit. Afterwards the peak of
    the sum is what counts, and `torch.cuda.max_memory_allocated()` tells it; CuPy's own pool
    reports nothing any more. Blocks belong to the CUDA stream that they were asked for on. What
    CuPy holds already stays where it is; call this before the first allocation.

    Raises ImportError without CuPy or PyTorch, RuntimeError without a CUDA device that both see.
    Cost: none beyond that of PyTorch's allocator.

    Example:
        >>> import invhvp as ih
        >>> ih.share_memory_pool()  # doctest: +SKIP
    """
    try:
        import cupy
        import torch
    except ImportError as error:
        msg = (
            "share_memory_pool is for processes that use both CuPy and PyTorch: "
            'pip install "invhvp[torch,cuda13]" (or cuda12)'
        )
        raise ImportError(msg) from error
    if not (cupy.cuda.is_available() and torch.cuda.is_available()):
        seen = [name for name, x in (("CuPy", cupy), ("PyTorch", torch)) if x.cuda.is_available()]
        msg = f"no CUDA device that both see ({' and '.join(seen) or 'none of the two'} sees one)"
        raise RuntimeError(msg)

    def allocate(size: int, device: int) -> int:
        stream = cupy.cuda.get_current_stream(device).ptr
        return torch.cuda.caching_allocator_alloc(size, device, stream)

    def free(pointer: int, _device: int) -> None:
        torch.cuda.caching_allocator_delete(pointer)

    torch.cuda.init()
    allocator = cupy.cuda.PythonFunctionAllocator(allocate, free)
    cupy.cuda.set_allocator(allocator.malloc)
    cupy.get_default_memory_pool().free_all_blocks()
