"""Refuses, before anything starts, a run whose ranks this machine's memory cannot hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shoal.jobs.estimate import RankMemory, count_memory, count_parameters
from shoal.workers.config import Recipe
from shoal.workers.errors import ClusterRefused

PROCESS = 400 << 20  # bytes of a rank's process before any tensor: Python, torch, Ray
CUDA = 3 << 29  # bytes of a GPU that its context and NCCL's buffers take
PIECES = 32  # PyTorch's allocator may hold a 32nd more than is allocated, in pieces between what is (an allowance)


def refuse_what_does_not_fit(recipe: Recipe, begun: bool = False) -> None:
    """Compares the recipe's estimate with the free memory; the memory of GPUs and clusters answers for itself. begun: a
    run of this recipe exists.

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
    here = on_cpu(recipe)
    free = available_memory()
    needed = _in_all(memory_of(here))
    if free and needed > free:
        keys = keys_that_fit(here, lambda ranks: _in_all(ranks) <= free, begun)
        raise ClusterRefused(
            f"parallel.ranks={recipe.parallel.ranks} of this recipe need about {gib(needed)} in all, and this machine "
            f"has {gib(free)} of memory free: "
            + (f"add {keys}" if keys else "lower parallel.ranks, train.batch or the model, or use a cluster")
        )


def on_cpu(recipe: Recipe) -> Recipe:
    """The same on CPUs, which compute in float32."""
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"device": "cpu"})})


def exchanging(recipe: Recipe) -> Recipe:
    """The same where ranks do not reach one another's memory, unless it wants rows to be put at any rate."""
    if recipe.parallel.dispatch == "put":
        return recipe
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"dispatch": "exchanged"})})


def memory_of(recipe: Recipe) -> dict[str, RankMemory]:
    """The recipe's estimate for each kind of rank, in bytes."""
    return count_memory(recipe, count_parameters(recipe))


def beyond(ranks: dict[str, RankMemory], gpu: int) -> dict[str, int]:
    """Kinds of ranks that a GPU of so many bytes cannot hold, with the bytes that they need."""
    needed = {kind: memory.total + memory.total // PIECES + CUDA for kind, memory in ranks.items()}
    return {kind: size for kind, size in needed.items() if size > gpu}


def keys_that_fit(recipe: Recipe, fits: Callable[[dict[str, RankMemory]], bool], begun: bool = False) -> str:
    """``--set`` of keys that let ranks keep less, and train the same: more micro-batches, layers computed again, dense
    weights in shards. The first and least of them that ``fits``; "" where none does. begun: only those that a run
    which exists may change."""
    for keys in _smaller(recipe, begun):
        tables = recipe.model_dump()
        for key, value in keys.items():
            table, name = key.split(".")
            tables[table][name] = value
        try:
            smaller = Recipe.model_validate(tables)
        except ValidationError:  # not with these ranks
            continue
        if fits(memory_of(smaller)):
            return " ".join(f"--set {key}={str(value).lower()}" for key, value in keys.items())
    return ""


def _smaller(recipe: Recipe, begun: bool) -> Iterator[dict[str, Any]]:
    """Keys that cost less time first."""
    train = recipe.train
    sequences = train.batch // train.accumulate // (recipe.parallel.attention_ranks // recipe.parallel.context)
    if begun or recipe.balance.over != "global_batch":  # micro-batches then have losses of their own
        sequences = 1
    most = train.accumulate * sequences  # one sequence a rank, or a group that shares it, at a time
    again = range(train.recompute + 1, recipe.model.layers + 1)
    yield from ({"train.accumulate": train.accumulate * n} for n in range(2, sequences + 1) if sequences % n == 0)
    yield from ({"train.recompute": n} for n in again)
    parts: dict[str, Any] = {"train.accumulate": most} if sequences > 1 else {}
    for sharded in ({}, {"parallel.shard_dense": True}):
        yield from ({**parts, "train.recompute": n, **sharded} for n in again)


def of_process(rank: RankMemory) -> int:
    """Bytes of a rank's process on a CPU, with the copy that a checkpoint is written from."""
    return rank.total + rank.weights + rank.optimizer + PROCESS


def _in_all(ranks: dict[str, RankMemory]) -> int:
    return sum(rank.ranks * of_process(rank) for rank in ranks.values())


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
