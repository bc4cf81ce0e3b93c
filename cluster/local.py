"""Joins a Ray cluster, or starts one inside this process tree, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shoal.workers.errors import ClusterRefused

OBJECT_STORE = 160 << 20  # bytes; Ray carries calls and records only, tensors never pass through it


@dataclass(frozen=True)
class RaySession:
    """A running Ray. ``dashboard`` is its address, or None; ``local`` says whether it lives and dies with this process."""

    dashboard: str | None
    local: bool
    cpus: int
    gpus: int


@contextmanager
def ray_session(ranks: int, dashboard: bool = True) -> Iterator[RaySession]:
    """Ray for the time of a ``with`` block.

    Inside a cluster (``RAY_ADDRESS`` is set) joins it. Elsewhere starts a local one with a temporary folder of its own, so
    that neither a crashed one's leftovers nor another user's Ray are in the way, and removes it at the end.
    """
    import ray

    if os.environ.get("RAY_ADDRESS"):
        info = _init(address="auto")
        try:
            yield _describe(info.dashboard_url, local=False)
        finally:
            ray.shutdown()
        return
    folder = tempfile.mkdtemp(prefix="shoal-ray-", dir=_short_folder())
    try:
        yield _describe(_start_local(folder, ranks, dashboard), local=True)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _start_local(folder: str, ranks: int, dashboard: bool) -> str | None:
    # a small /dev/shm (containers give 64 MiB) makes Ray warn or fail: use the folder on disk then, nothing large is stored
    shared = Path("/dev/shm")
    enough = shared.is_dir() and shutil.disk_usage(shared).free > 2 * OBJECT_STORE
    info = _init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, ranks),
        object_store_memory=OBJECT_STORE,
        include_dashboard=dashboard,
        _temp_dir=folder,
        _plasma_directory=None if enough else folder,
    )
    return info.dashboard_url or None


def _init(**options: object):  # type: ignore[no-untyped-def]
    import logging

    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        return ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as error:
        where = options["address"]
        raise ClusterRefused(
            f"Ray ({where}) did not start: {str(error).strip().splitlines()[0]}: run `shoal doctor` to see what is missing"
        ) from error


def _describe(dashboard: str | None, local: bool) -> RaySession:
    import ray

    resources = ray.cluster_resources()
    url = f"http://{dashboard}" if dashboard else None
    return RaySession(url, local, int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


def _short_folder() -> str | None:
    """Ray's sockets lie in its folder, and a socket's path has at most 107 characters: a long TMPDIR is passed over."""
    default = tempfile.gettempdir()
    return "/tmp" if len(default) > 30 and os.access("/tmp", os.W_OK) else None
