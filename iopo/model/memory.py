"""How the C library hands out memory on the CPU."""

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc
MIB = 2**20


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed tensors for the next ones; call it once, early.

    By default glibc gives large blocks back to the system, which clears them page by page when they
    are asked for again. A forward pass that keeps its activations then spends more time on that
    than on arithmetic (docs/performance.md). Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 * MIB)
        mallopt(M_TRIM_THRESHOLD, 2047 * MIB)
        mallopt(M_TOP_PAD, 64 * MIB)


def give_back_freed_memory() -> None:
    """Return what is free now: loading and generation leave holes of sizes that training lacks."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
