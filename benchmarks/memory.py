"""Peak memory of this process (Linux), as the kernel counts it."""

from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_gb() -> float:
    """Resident memory now, 10^9 bytes."""
    return _field("VmRSS")


def peak_gb() -> float:
    """The most resident memory since reset_peak, 10^9 bytes."""
    return _field("VmHWM")


def reset_peak() -> None:
    """Forget the peak so far."""
    CLEAR.write_text("5")


def _field(name: str) -> float:
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / 1e9
    raise RuntimeError(f"{STATUS} has no {name}; peak memory is measured on Linux only")
