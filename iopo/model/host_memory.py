"""Memory of the host: how much there is, and how the C library hands it out."""

import ctypes
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc
MIB = 2**20


def tune_malloc() -> None:
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


def trim_malloc() -> None:
    """Return what is free now: loading and generation leave holes of sizes that training lacks."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_ram(root: Path = Path("/")) -> int:
    """Bytes that this machine, or the container that this process is in, can still give.

    root: of the file system, for tests.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    free = int(found["MemAvailable"].split()[0]) * 1024
    for folder, limit, used in (
        (root / "sys/fs/cgroup", "memory.max", "memory.current"),
        (root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        if (folder / limit).is_file() and (folder / limit).read_text().strip() != "max":
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # read files that are kept in memory count as used, but are given up first
            taken = int((folder / used).read_text()) - int(stat["inactive_file"])
            free = min(free, int((folder / limit).read_text()) - taken)
    return free
