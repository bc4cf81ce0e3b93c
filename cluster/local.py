"""Joins a Ray cluster, or starts one inside this process tree, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.workers.errors import ClusterRefused

OBJECT_STORE = 160 << 20  # bytes; Ray carries calls and records only, tensors never pass through it
ANSWER_SECONDS = 10.0  # a cluster whose address does not accept a connection within this time is not there
# Seconds after which the driver gives up on a local GCS that is gone. When the driver itself is killed, the raylet and
# the ranks die with it at once; two small agents try to report their raylet's death for a minute
# (ray/_private/process_watcher.py), then they end too.
GCS_GONE_SECONDS = "10"
FOLDER = "shoal-ray-"
LONGEST = 20  # characters of the folder above it: 83 more follow in the paths of Ray's sockets, which end at 103 or 107

# Ray prints paragraphs to standard output, which may be JSON, whenever a rank or its node dies, and a traceback to
# standard error for a failed call whose result nobody asked for; the supervisor says it in a line. Ray reads this when
# imported.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX",
    "^(A worker died or was killed|Raylet is terminated|The node with node id|Task ServeController)",
)
if not os.environ.get("SHOAL_TRACEBACK"):
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")

# Who stops a job may signal all of its processes at once (a terminal, Slurm, systemd). Ray's must go on until the
# ranks have saved, so they are started deaf to these, and killed at the end; Ray itself makes them deaf to SIGINT.
STOP_SIGNALS = {signal.SIGTERM, signal.SIGHUP}
GRACE = 0.3  # seconds from the driver's leaving the cluster to the end of Ray's processes
LEAVE_SECONDS = 10.0  # a driver that takes longer to leave is not waited for


def heard() -> list[signal.Signals]:
    """The signals that stop a run, without those that whoever started it wants ignored (nohup)."""
    return [s for s in STOP_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]


@dataclass(frozen=True)
class RaySession:
    """A running Ray. ``dashboard``: its address or None; ``local``: whether it lives and dies with this process."""

    dashboard: str | None
    local: bool
    cpus: int
    gpus: int


@contextmanager
def ray_session(ranks: int, dashboard: bool = True) -> Iterator[RaySession]:
    """Ray for the time of a ``with`` block.

    Inside a cluster (``RAY_ADDRESS`` is set) joins it. Elsewhere starts a local one with a temporary folder of its own,
    so that neither a crashed one's leftovers nor another user's Ray are in the way, and removes it at the end.

    Raises: ClusterRefused when Ray cannot be joined or started.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        _refuse_silent(address)
        try:
            yield describe(_init(address=address).dashboard_url, local=False)
        finally:
            _shutdown()
        return
    with _folder() as folder:
        try:
            yield describe(_start_local(folder, ranks, dashboard), local=True)
        finally:
            _end_local(folder)


def _shutdown() -> None:
    import ray

    ray.shutdown()


def _end_local(folder: str) -> None:
    """Leaves the local cluster and ends all of its processes, those included that Ray would leave to themselves."""
    import ray

    processes = _processes_of(folder)

    def kill() -> None:
        # Ray would wait a second for each of them; what the driver has to tell them, it tells before
        until = time.monotonic() + LEAVE_SECONDS
        while ray.is_initialized() and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(GRACE)
        _kill([*processes, *_left_by(folder)])

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    _shutdown()
    killer.join()
    until = time.monotonic() + 2  # the end of a process takes a moment, in which it may still write to its folder
    while time.monotonic() < until and (left := [p for p in (*processes, *_left_by(folder)) if _runs(p)]):
        _kill(left)
        time.sleep(0.01)


def _processes_of(folder: str) -> list[Any]:
    """Ray's processes, which this one started for the session in ``folder``, and all that they started."""
    import psutil

    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(folder in word for word in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def _left_by(folder: str) -> list[Any]:
    """Processes that Ray's have started for the session, those too that came later or lost their parents: they have its
    folder for temporary files. It cannot be read of those that gave themselves a title, which ``_processes_of`` finds:
    the title lies where their environment was."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR") == folder:
                found.append(process)
    return found


def _kill(processes: list[Any]) -> None:
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _runs(process: Any) -> bool:
    import psutil

    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _refuse_silent(address: str) -> None:
    """Refuses an address that nobody answers at; Ray itself would try for minutes. Other forms are left to Ray."""
    match = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d{1,5})", address)
    if not match:
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ClusterRefused(
            f"RAY_ADDRESS={address} does not answer ({why}): correct it, or unset it to start Ray on this machine"
        ) from None


def _start_local(folder: str, ranks: int, dashboard: bool) -> str | None:
    # A small /dev/shm (containers give 64 MiB) makes Ray warn or fail: take the disk then, nothing large is stored.
    shared = Path("/dev/shm")
    enough = os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 2 * OBJECT_STORE
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", GCS_GONE_SECONDS)
    # Ray runs workers at niceness 15: whatever else wakes up on the machine then interrupts a rank in mid-step.
    os.environ.setdefault("RAY_worker_niceness", "0")
    temporary = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = folder  # what Ray's processes leave when they are killed goes with the folder
    try:
        info = _init(
            address="local",
            num_cpus=ranks,  # Ray starts as many workers at once; a rank needs one, whatever cores it uses
            object_store_memory=OBJECT_STORE,
            include_dashboard=None if dashboard else False,  # None: a dashboard that does not come up is done without
            _temp_dir=folder,
            _plasma_directory=None if enough else folder,
        )
    finally:
        os.environ.pop("TMPDIR")
        if temporary is not None:
            os.environ["TMPDIR"] = temporary
    return info.dashboard_url or None


def _init(**options: Any) -> Any:
    """Ray's init, with its handler of SIGTERM undone: whoever calls decides what a signal does."""
    import logging

    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    before = signal.getsignal(signal.SIGTERM)
    held = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # processes inherit it; ours arrive afterwards
    try:
        return ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[0][:300].rstrip(".") if lines else type(error).__name__
        raise ClusterRefused(
            f"Ray ({options['address']}) did not start: {why}: run `shoal doctor` to see what is missing"
        ) from error
    finally:
        with contextlib.suppress(ValueError):  # only the main thread may, and only there Ray has
            signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def describe(dashboard: str | None, local: bool) -> RaySession:
    """The Ray that this process has joined already. dashboard: HOST:PORT."""
    import ray

    resources = ray.cluster_resources()
    url = f"http://{dashboard}" if dashboard else None
    return RaySession(url, local, int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


# The folder of a local Ray


@contextmanager
def _folder() -> Iterator[str]:
    """A new temporary folder, removed at the end; those that killed processes left are removed now.

    Its owner holds a lock (flock) on it, which ends with the process.
    """
    parent = _short_folder() or tempfile.gettempdir()
    try:
        folder, lock = _locked_folder(parent)
    except OSError as error:
        raise ClusterRefused(
            f"Ray needs a folder in {parent}, which cannot be written ({error.strerror}): set TMPDIR to another one"
        ) from error
    try:
        _sweep(Path(parent))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked_folder(parent: str) -> tuple[str, int]:
    while True:
        folder = tempfile.mkdtemp(prefix=FOLDER, dir=parent)
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # somebody swept it before it was locked
            continue
        with contextlib.suppress(OSError):  # a file system may know no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if Path(folder).is_dir():
            return folder, lock
        os.close(lock)


def _sweep(parent: Path) -> None:
    """Removes the folders of this user whose owners are dead."""
    for folder in parent.glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid != os.getuid() or folder.is_symlink():
                continue
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _short_folder() -> str | None:
    """Ray's sockets lie in its folder, and their paths are bounded: a long TMPDIR is passed over."""
    default = tempfile.gettempdir()
    return "/tmp" if len(default) > LONGEST and os.access("/tmp", os.W_OK) else None
