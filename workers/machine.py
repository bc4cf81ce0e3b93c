"""What this process may use of the machine. Importing this costs nothing."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")

# FLOP/s of dense products in 16 bits, as NVIDIA says of each: the first name that the device's own begins with, after
# "NVIDIA ". An H100's figure is that of its SXM form; PCIe and NVL have their own.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def cores() -> int:
    """Cores that this process may use: those it is bound to, and no more than its container's share of time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        bound = min(bound, round(int(quota[0]) / int(quota[1])))
    return max(1, bound)


def spare_collector() -> None:
    """Python's garbage collector need not look again through all that there is by now. Of a process with PyTorch that
    takes 0.1 to 0.2 s, whenever it comes to it, and all ranks that exchange rows with this one wait meanwhile."""
    gc.collect()
    gc.freeze()


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


def known_peak(gpu: str) -> float:
    """FLOP/s in 16 bits of a GPU with this name, by its maker; 0 where that is not known."""
    return next((peak for known, peak in PEAKS.items() if gpu.removeprefix("NVIDIA ").startswith(known)), 0.0)


def peak_flops(device: str, dtype: str) -> float:
    """FLOP/s that a rank's device could do at most in a dtype: its maker's figure for 16 bits, where known, else what a
    product of matrices comes to here (20 ms on a core)."""
    import torch

    if device == "cuda" and dtype in ("bfloat16", "float16") and (known := known_peak(torch.cuda.get_device_name(0))):
        return known
    size = 8192 if device == "cuda" else 512
    a = torch.randn(size, size, dtype=getattr(torch, dtype), device=device)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(a, a)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return float(2 * size**3 / best)
