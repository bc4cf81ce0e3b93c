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
