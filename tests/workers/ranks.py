"""Real ranks for tests: processes with a gloo process group between them, or one of NCCL on GPUs.

Put the functions that run on the ranks at the top level of the test's module (a new process imports them by name)::

    def _sum_of_ranks(rank: int, world: int) -> int:
        ...

    def test_sum() -> None:
        assert run_ranks(4, _sum_of_ranks) == [6, 6, 6, 6]
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A server process imports what ranks need once and forks them: a rank starts in milliseconds, not seconds. It takes the
# environment variables of the first run_ranks of a test session.
multiprocessing.set_forkserver_preload(
    # not "small", which this process would not find; layers that are computed again, and shards, import torch._dynamo
    [
        *("pytest", "hypothesis", "torch._dynamo"),
        *("shoal.jobs.data.prepare", "shoal.workers.trainer", "shoal.workers.checkpoint"),
    ]
)
TIMEOUT = timedelta(seconds=120)
GRACE = 2.0
"""For how many seconds the others of a rank that failed may still raise what they know of it."""


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, device: str = "cpu") -> list[Any]:
    """``[fn(rank, world, *args) for each rank]``, each in a process of its own with the default process group up.

    Args:
        world: number of ranks, 1 or more.
        fn: a function at the top level of a module. It, ``args`` and its result are pickled.
        args: the same on all ranks.
        device: ``cpu``, with gloo between ranks, or ``cuda``: a GPU for each, and NCCL.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised. The message holds the tracebacks of all that did,
            the first one first, and where those were that had to be ended.
        torch.multiprocessing.ProcessExitedException: a rank died of a signal, as NCCL's watchdog ends it, or raised
            beside a GPU. The message ends alike.
    """
    with start_ranks(world, fn, *args, device=device) as (context, folder):
        try:
            while not context.join(grace_period=GRACE):
                pass
        except mp.ProcessRaisedException as error:
            # a rank that lost its peer may be heard before the one that failed
            raise mp.ProcessRaisedException(_told(folder, world), error.error_index, error.error_pid) from None
        except mp.ProcessExitedException as error:
            told = f"{error}\n{_told(folder, world)}"
            raise mp.ProcessExitedException(
                told, error.error_index, error.error_pid, error.exit_code, error.signal_name
            ) from None
        return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(world)]


def asked_for(request: pytest.FixtureRequest, **values: Any) -> list[dict[str, Any]]:
    """Parameters of those tests of a module that were asked for, where they have these values: for fixtures that
    compute for all tests in one go, and need not for the others."""
    items = [item for item in request.session.items if item.path == request.path]
    found = [item.callspec.params for item in items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    return [parameters for parameters in found if parameters.items() >= values.items()]


@contextlib.contextmanager
def start_ranks(
    world: int, fn: Callable[..., Any], *args: Any, device: str = "cpu"
) -> Iterator[tuple[mp.ProcessContext, Path]]:
    """As ``run_ranks``, without waiting, for tests that kill ranks.

    Yields:
        The context, whose ``processes`` are the ranks, and the folder where each rank leaves its result, pickled, as a
        file named after its number. Ranks that still run at the end are killed.
    """
    # The store lives here, on a port that the system picks: no two tests can meet, and any rank may die.
    store = dist.TCPStore("127.0.0.1", 0, None, True, TIMEOUT, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        # what a fork server has imported may have looked at GPUs, which no fork may use afterwards
        method = "forkserver" if device == "cpu" else "spawn"
        arguments = (world, store.port, folder, fn, args, device)
        context = mp.start_processes(_rank, arguments, nprocs=world, join=False, start_method=method)
        try:
            yield context, Path(folder)
        finally:
            for process in context.processes:
                process.kill()
                process.join()


def _told(folder: Path, world: int) -> str:
    """What ranks raised, in that order, and where others were when they were ended."""
    parts = [path.read_text() for path in [folder / "error"] if path.exists()]
    for rank in range(world):
        place = folder / f"ended-{rank}"
        if place.exists() and (stack := place.read_text()):
            parts.append(f"rank {rank} was ended here:\n{stack}")
    return "\n".join(parts)


def _rank(
    rank: int, world: int, port: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...], device: str
) -> None:
    gc.freeze()  # what was imported before the fork is no garbage: to look through it would copy all of its memory
    torch.set_num_threads(1)
    with (Path(folder) / f"ended-{rank}").open("w") as ended:
        # whoever is ended because another rank failed says where it was, also in the midst of a call of NCCL's
        faulthandler.register(signal.SIGTERM, ended, chain=True)
        try:
            _join(rank, world, port, device)
            result = fn(rank, world, *args)
            (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))
            dist.barrier()  # nobody takes the group down under another's last collective
        except Exception:
            with (Path(folder) / "error").open("ab", buffering=0) as errors:  # one write: those of others stay apart
                errors.write(f"rank {rank}:\n{traceback.format_exc()}".encode())
            if device == "cuda":
                os._exit(1)  # else NCCL would wait for what this rank's peers never send
            if dist.is_initialized():
                dist.destroy_process_group()
            raise
        finally:
            faulthandler.unregister(signal.SIGTERM)
        dist.destroy_process_group()


def _join(rank: int, world: int, port: int, device: str) -> None:
    """Makes the default process group."""
    if device == "cuda":
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast wants rights that containers lack
        torch.cuda.set_device(rank)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine whose name does not resolve runs the tests too
    store = dist.TCPStore("127.0.0.1", port, None, False, TIMEOUT)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"  # as a run has them
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
