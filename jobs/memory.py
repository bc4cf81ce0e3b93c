"""Refuses, before anything starts, a run whose ranks this machine's memory cannot hold."""

from __future__ import annotations

import os
from pathlib import Path

from shoal.jobs.estimate import count_memory, count_parameters
from shoal.workers.config import Recipe
from shoal.workers.errors import ClusterRefused

PROCESS = 400 << 20  # bytes of a rank's process before any tensor: Python, torch, Ray


def refuse_what_does_not_fit(recipe: Recipe) -> None:
    """Compares the recipe's estimate with the free memory; the memory of GPUs and clusters answers for itself.

    Raises ClusterRefused when the ranks need more than there is, or GPUs and there are none.
    """
    if os.environ.get("RAY_ADDRESS", "local") not in ("", "local"):
        return
    gpus, device = any(Path("/dev").glob("nvidia[0-9]*")), recipe.parallel.device
    if device == "cuda" and not gpus:
        raise ClusterRefused(
            "parallel.device='cuda', and this machine has no NVIDIA GPU: set parallel.device to cpu or auto, "
            "or name a cluster by RAY_ADDRESS"
        )
    if device == "cuda" or (gpus and device == "auto"):
        return
    here = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"device": "cpu"})})
    kinds = count_memory(here, count_parameters(here)).values()
    needed = sum(kind.ranks * (kind.total + PROCESS) for kind in kinds)
    free = available_memory()
    if free and needed > free:
        raise ClusterRefused(
            f"parallel.ranks={recipe.parallel.ranks} of this recipe need about {gib(needed)} in all, and this machine "
            f"has {gib(free)} of memory free: lower parallel.ranks, train.batch or the model, or use a cluster"
        )


def available_memory() -> int:
    """Bytes that new processes can take, the container's limit included; 0 when that cannot be told."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 0
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cache = int(stat["inactive_file"]) + int(stat["active_file"])  # the kernel gives it back when asked
    except (OSError, ValueError, KeyError):
        return free
    return min(free, max(0, limit - used + cache))


def gib(size: int) -> str:
    """``3.4 GiB``."""
    return f"{size / (1 << 30):.1f} GiB"
