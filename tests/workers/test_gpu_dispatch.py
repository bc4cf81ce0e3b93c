"""Two GPUs: experts spread over both compute what one GPU does, by all-to-all and by rows put into symmetric memory,
also where each process sees its own GPU alone; and who waits for a rank that died gives up.

Needs no Ray and no recipe: ``pytest tests/workers/test_gpu_dispatch.py`` on a machine with two GPUs.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from shoal.kernels.moe.backend import experts_backend
from shoal.kernels.moe.router import Router
from shoal.workers import slots, symmetric
from shoal.workers.dispatch import Dispatcher
from shoal.workers.mesh import Group
from shoal.workers.routed import Pass, RoutedFFN
from shoal.workers.slots import COUNTS

HIDDEN, INNER, EXPERTS, TOP_K, SHARED, CAPACITY = 256, 128, 16, 4, 2, 600
TOKENS = ((600, 600), (600, 411), (37, 600), (1, 1), (0, 600), (512, 512))
"""Of each rank, in passes that follow one another and share buffers."""


def problem(step: int, total: int, skew: bool, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """x, centroids, gate_up, down, the same of the shared experts, the gradient of the output; alike on all ranks."""
    generator = torch.Generator().manual_seed(step)
    shapes = [
        (total, HIDDEN), (EXPERTS, HIDDEN), (EXPERTS, HIDDEN, 2 * INNER), (EXPERTS, INNER, HIDDEN),
        (SHARED, HIDDEN, 2 * INNER), (SHARED, INNER, HIDDEN), (total, HIDDEN),
    ]  # fmt: skip
    drawn = [
        torch.randn(s, generator=generator) * (1.0 if len(s) == 2 and s[0] == total else s[-2] ** -0.5) for s in shapes
    ]
    if skew:  # nearly all tokens choose expert 0
        drawn[0][:, 0], drawn[1][:, 0], drawn[1][0, 0] = 12.0, 0.0, 1.0
    return [t.to(device, dtype) for t in drawn]


def layer(
    dispatcher: Dispatcher, kind: Any, tensors: list[Tensor], upstream: Tensor, grad: bool = True
) -> list[Tensor]:
    """Output and gradients; the output alone without ``grad``."""
    leaves = [t.detach().clone().requires_grad_(grad) for t in tensors]
    x, centroids, up, down, shared_up, shared_down = leaves
    passing = Pass(dispatcher, kind, (up, down), (shared_up, shared_down), 0, Router(centroids, TOP_K, False))
    if not grad:
        with torch.no_grad():
            passing.begin(x)
            return [passing.end()]
    out, sums, *_ = RoutedFFN.apply(passing, x, centroids, None, None, up, down, shared_up, shared_down)
    grads = torch.autograd.grad((out * upstream).sum() + sums.sum() * 0.01, leaves)
    return [out.detach(), *grads, passing.flight.expert_counts()]


def join(rank: int, port: int, alone: bool) -> torch.device:
    """alone: the process sees its own GPU only, as Ray's actors do."""
    if alone:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[rank] if seen else str(rank)
    device = torch.device("cuda", 0 if alone else rank)
    torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=120))
    dist.init_process_group("nccl", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    return device


def on_rank(rank: int, port: int, folder: str, path: str, room: int, alone: bool) -> None:
    """Leaves, for each pass, the relative errors against one GPU, or what went wrong."""
    device, dtype = join(rank, port, alone), torch.bfloat16
    slots.ROOM = room
    kind = experts_backend("auto", device, dtype)
    group = Group((0, 1), rank, dist.group.WORLD)
    box: symmetric.Inbox | None = None
    why = ""
    if path == "symmetric":
        try:
            box = symmetric.inbox(group, CAPACITY, HIDDEN, dtype, TOP_K, EXPERTS, device)
        except symmetric.OutOfReach as reason:
            why = str(reason)
    half = EXPERTS // 2
    spread = Dispatcher(group, (0,) * half + (1,) * half, device, kind.triton, box)
    one = Dispatcher(Group((0,), 0), (0,) * EXPERTS, device, kind.triton)
    results: dict[str, Any] = {"why": why, "errors": [], "same": True}
    own = slice(rank * half, rank * half + half)
    for step, tokens in enumerate(() if why else TOKENS):
        *whole, upstream = problem(step, sum(tokens), step == 2, device, dtype)
        want = layer(one, kind, whole, upstream)
        mine = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
        part = [whole[0][mine], whole[1], whole[2][own], whole[3][own], *whole[4:]]
        got = layer(spread, kind, part, upstream[mine])
        again = layer(spread, kind, part, upstream[mine])
        (without,) = layer(spread, kind, part, upstream[mine], grad=False)
        results["same"] &= all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
        results["same"] &= torch.equal(without, got[0])
        for i in (2, 5, 6):  # of weights that both ranks have
            dist.all_reduce(got[i])
        wanted = [want[0][mine], want[1][mine], want[2], want[3][own], want[4][own], *want[5:]]
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
            results["errors"].append((step, i, float(error)))
    results["reads"] = spread.reads.count
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(results))
    dist.barrier()
    torch.cuda.synchronize()
    dist.destroy_process_group()


def abandoned(rank: int, port: int, alone: bool) -> None:
    """The second rank is killed when both have put rows once; the first one waits for more."""
    device = join(rank, port, alone)
    symmetric.PATIENCE = timedelta(seconds=3)
    group = Group((0, 1), rank, dist.group.WORLD)
    box = symmetric.inbox(group, CAPACITY, HIDDEN, torch.bfloat16, TOP_K, EXPERTS, device)
    try:
        with box.patience():
            for _ in range(2):
                box.say(COUNTS, 1 - rank)
                box.hear(COUNTS)
                torch.cuda.synchronize()
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
    except symmetric.RowsMissing as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(3)  # nothing of CUDA can be taken down in good order


@pytest.mark.gpu
@pytest.mark.parametrize("alone", [False, True])
def test_a_rank_whose_other_one_is_killed_ends_and_says_what_it_waited_for(alone: bool, capfd: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=120), wait_for_workers=False)
    context = mp.get_context("spawn")
    ranks = [context.Process(target=abandoned, args=(rank, store.port, alone)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        ranks[1].join(100)
        ranks[0].join(15)
        assert [process.exitcode for process in ranks] == [3, -signal.SIGKILL]
    finally:
        for process in ranks:
            process.kill()
    assert "rank 0 waited 3 s for rank 1, which puts rows for experts into its memory" in capfd.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("path", "room", "alone"),
    [("all_to_all", 0, False), ("symmetric", 0, False), ("symmetric", 1 << 40, False), ("symmetric", 0, True)],
)
def test_two_gpus_equal_one(path: str, room: int, alone: bool) -> None:
    """In bf16, within 2 %: sums of a token's results are rounded once more for each rank. room: whether the host reads
    how many rows experts get (0), or buffers are as large as may be. alone: whether a rank sees its own GPU only."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=120), wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(on_rank, (store.port, folder, path, room, alone), nprocs=2, start_method="spawn")
        results = [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(2)]
    for result in results:
        if result["why"] == "GPUs do not reach each other":
            pytest.skip(result["why"])
        assert not result["why"]
        assert max(error for _, _, error in result["errors"]) < 0.02, result["errors"]
        assert result["same"], "the same input gives the same bits"
        passes = 3 * len(TOKENS)
        assert result["reads"] == (passes if path == "all_to_all" or not room else 0)
