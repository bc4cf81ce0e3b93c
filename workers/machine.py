"""What this process may use of the machine. Importing this costs nothing."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """Cores that this process may use: those it is bound to, and no more than its container's share of time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        bound = min(bound, round(int(quota[0]) / int(quota[1])))
    return max(1, bound)


def cgroup(name: str) -> str:
    """A limit of the container that this runs in (cgroup v2), or an empty text."""
    try:
        return (CGROUP / name).read_text()
    except OSError:
        return ""


def free_memory(device: str) -> int:
    """Bytes that a process may still take: of the GPU it uses, or of this machine and its cgroup."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = cgroup("memory.max").strip(), cgroup("memory.current").strip()
    if limit and used and limit.isdigit() and used.isdigit():
        free = min(free, max(0, int(limit) - int(used)))
    return free
