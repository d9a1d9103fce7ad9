"""The peak memory of a process."""

from __future__ import annotations

from pathlib import Path


def peak_mib(pid: int | str = "self") -> float:
    """MiB that a process has held at most (Linux). `resource.getrusage` says more for a process
    whose parent was larger when it started it: a program begins with its parent's peak."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
