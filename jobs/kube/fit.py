"""Whether a recipe's ranks fit the GPUs and the memory that a job asks for; nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.jobs.kube.options import JobOptions
from shoal.jobs.kube.quantity import in_gib, to_bytes
from shoal.jobs.kube.work import Work
from shoal.jobs.memory import beyond, exchanging, gib, keys_that_fit, memory_of, of_process, on_cpu
from shoal.workers.config import Recipe
from shoal.workers.errors import InvalidInput

GIB = 1 << 30
OBJECT_STORE = GIB // 2  # bytes; it lies in /dev/shm, and tensors never pass through it
RAY = 3 * GIB // 2  # bytes of a node's raylet and agents
HOST = 4 * GIB  # bytes of a node's memory for the process of a GPU rank, before any tensor
UNKNOWN = 16 * GIB  # bytes of a node's memory for a rank of a model that is not known here
SHM_RANK = GIB // 2  # bytes of /dev/shm a rank, where ranks of one node exchange


@dataclass(frozen=True)
class Sizes:
    """What a node asks for. Bytes, but for ``cpus``."""

    ranks: int
    cpus: int
    memory: int
    shm: int


def sizes(work: Work, options: JobOptions) -> Sizes:
    """A node's ranks, cores, memory and /dev/shm; what was not asked for follows from the recipe.

    Raises InvalidInput, with what is needed and what was asked for, when the ranks do not fit.
    """
    ranks = check_gpus(work, options)
    cpus = options.cpus_per_node or (8 * options.gpus_per_node or max(ranks, 1))
    if cpus < ranks:
        raise InvalidInput(
            f"--cpus-per-node {cpus} does not fit {ranks} ranks a node: a rank takes a core, so raise it"
        )
    least = OBJECT_STORE + ranks * (SHM_RANK // 8)
    shm = to_bytes(options.shm, "--shm") if options.shm else GIB + max(ranks, 1) * SHM_RANK
    if shm < least:
        raise InvalidInput(f"--shm {options.shm} does not fit: Ray and {ranks} ranks need {gib(least)}: raise it")
    a_rank = _host_memory(work.recipe, options.gpus_per_node) if work.recipe else UNKNOWN
    others = RAY + shm
    memory = others + max(ranks, 1) * a_rank
    if options.memory_per_node:
        asked = to_bytes(options.memory_per_node, "--memory-per-node")
        if work.recipe and memory > asked:
            left = max(0, asked - others) // ranks
            raise InvalidInput(
                f"does not fit: needs {gib(a_rank)} of memory a rank, {gib(left)} asked ({options.memory_per_node} a "
                f"node, {gib(others)} of it for Ray and /dev/shm, over {ranks} ranks): raise --memory-per-node"
            )
        memory = asked
    else:
        memory = to_bytes(in_gib(memory + memory // 10), "memory")
    return Sizes(ranks, cpus, memory, shm)


def check_gpus(work: Work, options: JobOptions) -> int:
    """Ranks of a node. Raises InvalidInput when the GPUs asked for are too few or too many, or a rank does not fit."""
    gpus = options.nodes * options.gpus_per_node
    if work.recipe and work.recipe.parallel.device == "cpu" and gpus:
        raise InvalidInput(
            f"parallel.device='cpu', and the job asks for {gpus} GPU{'s' * (gpus > 1)}: add --gpus-per-node 0, or "
            f"--set parallel.device=cuda"
        )
    if work.recipe and work.recipe.parallel.device == "cuda" and not gpus:
        raise InvalidInput("parallel.device='cuda', and --gpus-per-node is 0: raise it")
    if gpus and work.ranks > gpus:
        raise InvalidInput(
            f"parallel.ranks={work.ranks} do not fit: {options.nodes} nodes of {options.gpus_per_node} GPUs host "
            f"{gpus} ranks: raise --nodes or --gpus-per-node, or lower parallel.ranks"
        )
    if gpus and work.ranks and work.ranks < gpus:
        raise InvalidInput(
            f"parallel.ranks={work.ranks} would leave {gpus - work.ranks} of {gpus} GPUs idle: lower --nodes or "
            f"--gpus-per-node, or leave parallel.ranks out"
        )
    if work.ranks == 0 and gpus > 1:
        raise InvalidInput(
            f"{work.kind} computes on one GPU, and would leave {gpus - 1} of {gpus} idle: add --nodes 1 "
            f"--gpus-per-node 1"
        )
    if work.recipe and gpus:
        _check_gpu(work.recipe, options, begun=work.run != work.name)
    return -(-work.ranks // options.nodes)


def _host_memory(recipe: Recipe, gpus: int) -> int:
    """Bytes of a node's memory that a rank needs: on a GPU, for the copy that a checkpoint is written from."""
    if recipe.parallel.device == "cpu" or not gpus:
        return max(map(of_process, memory_of(on_cpu(recipe)).values()))
    return max(kind.weights + kind.optimizer for kind in memory_of(recipe).values()) + HOST


def _check_gpu(recipe: Recipe, options: JobOptions, begun: bool) -> None:
    """begun: the run has a name apart from the job's, and so may exist."""
    asked = to_bytes(options.gpu_memory, "--gpu-memory")
    if options.gpus_per_node < recipe.parallel.expert_ranks:
        recipe = exchanging(recipe)
    for kind, needed in beyond(memory_of(recipe), asked).items():
        which = "" if kind == "colocated" else f"{kind} "
        keys = keys_that_fit(recipe, lambda ranks: not beyond(ranks, asked), begun)
        remedy = f"{keys}, or nodes or GPUs" if keys else "nodes or GPUs, or lower train.batch or the model"
        raise InvalidInput(
            f"does not fit: needs {gib(needed)} a {which}rank, {gib(asked)} asked (--gpu-memory): add {remedy}"
        )
