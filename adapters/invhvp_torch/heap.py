"""Memory of the C library that products get again without asking the system for it."""

from __future__ import annotations

from functools import cache

import torch

_BYTES = 31 << 20  # glibc follows blocks of up to 32 MiB


@cache
def keep_freed_blocks() -> None:
    """Have the C library keep what is freed, up to 62 MiB, for the next block; once a process.

    glibc maps blocks above a threshold afresh, which costs a page fault for every 4 KB, and
    returns what lies free at its end beyond twice that. The threshold, 128 KB at first, becomes
    the size of the largest mapped block that was freed; so it is by luck that a program whose
    tensors have a few megabytes does without the system. The block freed here is never written
    to (Zen 5, one core, the Hessian of a CNN by 16 vectors: 1.38 s with 331,000 faults before,
    0.74 s with 1,000 after; mallopt(3), M_MMAP_THRESHOLD). Elsewhere nothing comes of it.
    """
    torch.empty(_BYTES, dtype=torch.uint8)
