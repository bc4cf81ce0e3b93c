"""What this machine can do, what is missing, how to get it. torch is asked in a process of its own, not imported."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from shoal.workers.machine import cgroup, cores

GIB = 2**30
PROBE_SECONDS = 30  # torch imports in about 2 s; a cold disk may take ten times that
RAY_PORTS = {6379: "Ray's head (GCS)", 8265: "Ray's dashboard"}

_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda,
    "gpus": [{"name": gpu.name, "memory": gpu.total_memory} for gpu in gpus],
    "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
}))
"""


@dataclass(frozen=True)
class Check:
    """One line of ``shoal doctor``. ``required``: training on this machine is impossible while this is missing."""

    name: str
    status: Literal["ok", "warn", "missing"]
    found: str
    remedy: str = ""
    required: bool = False


def can_train(checks: list[Check]) -> bool:
    """Whether nothing that training needs is missing."""
    return not any(check.required and check.status == "missing" for check in checks)


def examine(runs_dir: Path) -> list[Check]:
    """All checks, in the order in which a person reads them. Takes about as long as importing torch."""
    probe = subprocess.Popen(
        [sys.executable, "-c", _PROBE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    machine = [
        *(_package(name, "training") for name in ("ray", "pyarrow", "tokenizers", "safetensors")),
        _triton(),
        _megablocks(),
        _serving(),
        _cores(),
        _memory(),
        _shared_memory(),
        _disk(runs_dir),
        _writable(runs_dir),
        _file_descriptors(),
        *(_port(port, whose) for port, whose in RAY_PORTS.items()),
        *(_program(name) for name in ("kubectl", "helm")),
    ]
    python = Check("python", "ok", f"{platform.python_version()}, {sys.executable}")
    return [python, *_torch(probe), *machine]


def _torch(probe: subprocess.Popen[bytes]) -> list[Check]:
    try:
        out, errors = probe.communicate(timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        probe.kill()
        probe.communicate()
        slow = f"not imported within {PROBE_SECONDS} s"
        return [Check("torch", "warn", slow, "run shoal doctor again; a slow disk or GPU driver may be the cause")]
    if probe.returncode:
        last = errors.decode(errors="replace").strip().rpartition("\n")[2] or f"exit code {probe.returncode}"
        return [Check("torch", "missing", last, "reinstall it: pip install --force-reinstall torch", required=True)]
    facts = json.loads(out)
    checks = [
        Check("torch", "ok", f"{facts['version']}, " + (f"CUDA {facts['cuda']}" if facts["cuda"] else "CPU only"))
    ]
    if not facts["gloo"]:
        checks.append(Check("gloo", "missing", "torch without it", "install torch's own wheel", required=True))
    names = [f"{gpu['name']}, {gpu['memory'] / GIB:.0f} GiB" for gpu in facts["gpus"]]
    if names:
        checks.append(Check("gpu", "ok", f"{len(names)}: {'; '.join(dict.fromkeys(names))}"))
    elif facts["cuda"]:
        checks.append(Check("gpu", "warn", "none that torch sees", "check nvidia-smi and CUDA_VISIBLE_DEVICES"))
    else:
        remedy = "small recipes train on the CPU; for a GPU: make clean install TORCH_INDEX=URL, of torch's CUDA builds"
        checks.append(Check("gpu", "warn", "none: torch is built for CPUs", remedy))
    return checks


def _package(name: str, needed_for: str) -> Check:
    try:
        return Check(name, "ok", version(name))
    except PackageNotFoundError:
        return Check(name, "missing", "not installed", f"needed for {needed_for}: pip install {name}", required=True)


def _triton() -> Check:
    try:
        return Check("triton", "ok", version("triton"))
    except PackageNotFoundError:
        return Check(
            "triton", "warn", "not installed", "on Linux: pip install triton; else the torch backends are used"
        )


def _serving() -> Check:
    missing = [name for name in ("fastapi", "uvicorn", "grpc_health", "grpc_reflection") if find_spec(name) is None]
    if not missing:
        return Check("serving", "ok", "installed")
    return Check("serving", "warn", f"without {', '.join(missing)}", "for shoal serve: pip install 'shoal[serve]'")


def _megablocks() -> Check:
    """Whether its products can be had: they are a library that has to fit torch and CUDA."""
    if find_spec("megablocks"):
        if find_spec("grouped_gemm") is None:
            return Check("megablocks", "warn", "without grouped_gemm", "on a CUDA machine: make megablocks")
        command = [sys.executable, "-c", "import torch, grouped_gemm.backend"]
        try:
            loaded = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            slow = f"grouped_gemm not imported within {PROBE_SECONDS} s"
            return Check("megablocks", "warn", slow, "run shoal doctor again; a slow disk may be the cause")
        if loaded.returncode:
            last = loaded.stderr.strip().rpartition("\n")[2] or f"exit code {loaded.returncode}"
            why = f"grouped_gemm cannot be loaded: {last}"
            return Check("megablocks", "warn", why, "for this torch, on a CUDA machine: make megablocks")
        try:
            return Check("megablocks", "ok", version("megablocks"))
        except PackageNotFoundError:  # a folder on the path
            return Check("megablocks", "ok", "installed")
    why = "only moe.backend='megablocks' needs it: make megablocks builds it, on a machine with CUDA's compiler"
    return Check("megablocks", "warn", "not installed", why)


def _cores() -> Check:
    found = cores()
    if found < 2:
        return Check("cores", "warn", "1", "two ranks will share it; give this machine or container 2 cores or more")
    return Check("cores", "ok", str(found))


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = cgroup("memory.max").strip()
    total = min(total, int(limit)) if limit.isdigit() else total
    found = f"{total / GIB:.1f} GiB"
    if total < 3 * GIB:
        return Check("memory", "warn", found, "two ranks of tiny want 3 GiB: free some, or take one rank (--workers 1)")
    return Check("memory", "ok", found)


def _shared_memory() -> Check:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return Check("/dev/shm", "warn", "not on this system", "Ray keeps its objects in /tmp instead, slower")
    if not os.access(shm, os.W_OK):
        return Check("/dev/shm", "warn", "not writable", "Ray falls back to /tmp, slower: mount it writable")
    size = shutil.disk_usage(shm).total
    if size < GIB:
        return Check(
            "/dev/shm", "warn", f"{size / GIB:.2f} GiB", "give a container --shm-size=2g; Ray falls back to /tmp"
        )
    return Check("/dev/shm", "ok", f"{size / GIB:.1f} GiB")


def _disk(runs_dir: Path) -> Check:
    free = shutil.disk_usage(_existing(runs_dir)).free
    found = f"{free / GIB:.1f} GiB free"
    if free < 2 * GIB:
        return Check("disk", "warn", found, f"checkpoints go to {runs_dir}: free some, or give another --runs-dir")
    return Check("disk", "ok", found)


def _writable(runs_dir: Path) -> Check:
    """Whether runs can be written: tried in the nearest folder that exists, without leaving anything behind."""
    nearest = _existing(runs_dir)
    try:
        with tempfile.TemporaryDirectory(prefix=".shoal-doctor-", dir=nearest):
            return Check(
                "runs folder", "ok", f"{runs_dir} is writable" if nearest == runs_dir else f"{runs_dir} can be made"
            )
    except OSError as error:
        remedy = "give another --runs-dir or set SHOAL_RUNS"
        return Check("runs folder", "missing", f"{nearest}: {error.strerror}", remedy, required=True)


def _existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def _file_descriptors() -> Check:
    try:
        import resource
    except ImportError:  # not a POSIX system
        return Check("open files", "warn", "unknown on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "no limit" if hard == resource.RLIM_INFINITY else str(hard)
    if soft != resource.RLIM_INFINITY and soft < 1024:
        return Check("open files", "warn", f"{soft} (at most {most})", "ulimit -n 65536 before the start")
    return Check("open files", "ok", f"{soft} (at most {most})")


def _port(port: int, whose: str) -> Check:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            busy = f"in use or refused ({error.strerror})"
            return Check(f"port {port}", "warn", busy, f"{whose} uses it: an embedded Ray takes another one")
    return Check(f"port {port}", "ok", "free")


def _program(name: str) -> Check:
    path = shutil.which(name)
    if path:
        return Check(name, "ok", path)
    return Check(name, "warn", "not found", f"needed to run on Kubernetes only: install {name}")
