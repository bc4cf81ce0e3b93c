"""A Ray of this machine's own, for the time of a block."""

from __future__ import annotations

import subprocess

import psutil
import ray

from shoal.cluster.local import ray_session

ORPHAN = "setsid sleep 300 >/dev/null 2>&1 & echo $!"


def test_no_process_outlives_its_session_with_or_without_a_parent() -> None:
    """Those without are such as Ray's dashboard was just starting when it was ended itself."""

    def start() -> int:
        return int(subprocess.run(["sh", "-c", ORPHAN], capture_output=True, text=True, check=True).stdout)

    with ray_session(1, dashboard=False):
        orphan = psutil.Process(ray.get(ray.remote(start).remote()))
        assert orphan.cmdline() == ["sleep", "300"]
    try:
        assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE  # as long as nobody reaps it
    finally:
        if orphan.is_running():
            orphan.kill()
