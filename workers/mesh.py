"""The process groups of one rank, laid out as its placement says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.workers.placement import Placement

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for others in a collective until it gives up: then it fails, and the driver ends them all."""

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""torch 2.13 calls it the first, and warns of the second, which is what older ones call it."""


@dataclass(frozen=True)
class Group:
    """Ranks that take part in a collective. ``handle`` is None for a group of one, where all but ``reduce`` and
    ``broadcast``, which are of several, are no-ops. other: a second group of the same ranks, if there is one."""

    ranks: tuple[int, ...]
    index: int
    handle: dist.ProcessGroup | None = None
    other: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def beside(self) -> Group:
        """The same ranks over their second group, or this one. Exchanges of one group follow one another; what takes
        long, and is not wanted soon, holds nothing up there."""
        return self if self.other is None else Group(self.ranks, self.index, self.other)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the group, in place."""
        if self.handle is not None:
            dist.all_reduce(tensor, group=self.handle)
        return tensor

    def reduce(self, tensor: Tensor, place: int) -> dist.Work:
        """Begins a sum over a group of several, in place at the rank of that place; elsewhere the tensor is of no use
        afterwards. What is launched after ``wait()`` of the work comes after it."""
        work: dist.Work = dist.reduce(tensor, self.ranks[place], group=self.handle, async_op=True)
        return work

    def broadcast(self, tensor: Tensor, place: int) -> dist.Work:
        """Begins to give every rank of a group of several, in place, what the rank of that place has."""
        work: dist.Work = dist.broadcast(tensor, self.ranks[place], group=self.handle, async_op=True)
        return work

    def all_gather(self, tensor: Tensor) -> Tensor:
        """``[…] -> [size, …]``."""
        if self.handle is None:
            return tensor[None]
        out = tensor.new_empty(self.size, *tensor.shape)
        all_gather_single(out.view(-1), tensor.contiguous().view(-1), group=self.handle)
        return out

    def all_gather_object(self, own: Any) -> list[Any]:
        """What every rank has, which is pickled: for what happens once."""
        if self.handle is None:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, group=self.handle)
        return found

    def reason(self, own: str) -> str:
        """The first reason that a rank has, told to all of them; "" where none has one."""
        return next(filter(None, self.all_gather_object(own)), "")


@dataclass(frozen=True)
class Mesh:
    """One rank's view of all groups. Groups that the rank is not in are None."""

    placement: Placement
    rank: int
    world: Group
    dispatch: Group
    attention: Group | None
    replicas: Group | None
    context: Group | None
    checkpoint: dist.ProcessGroup | None

    @property
    def hosts_attention(self) -> bool:
        """Whether this rank hosts an attention shard."""
        return self.attention is not None

    def tell(self, numbers: Sequence[int]) -> list[list[int]]:
        """As many numbers of each rank, told to all of them, on the host whatever the device; collective."""
        if self.checkpoint is None:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.int64)
        table = own.new_empty(self.world.size * len(own))
        all_gather_single(table, own, group=self.checkpoint)
        found: list[list[int]] = table.view(self.world.size, len(own)).tolist()
        return found

    @property
    def hosts_experts(self) -> bool:
        """Whether this rank hosts an expert shard."""
        return self.replicas is not None


def make_mesh(placement: Placement, rank: int = 0, device: torch.device | str = "cpu") -> Mesh:
    """Builds the groups; every rank calls this after ``init_process_group``. One rank alone needs none of it."""
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"

    def join(groups: Sequence[tuple[int, ...]], twice: bool = False) -> Group | None:
        mine = None
        for ranks in groups:
            # new_group is collective over all ranks, members or not
            handles: list[dist.ProcessGroup] = []
            if placement.ranks > 1 and len(ranks) > 1:
                handles = [
                    dist.new_group(list(ranks), timeout=COLLECTIVE_TIMEOUT, backend=backend) for _ in range(1 + twice)
                ]
            if rank in ranks:
                mine = Group(ranks, ranks.index(rank), *handles)
        return mine

    everyone = tuple(range(placement.ranks))
    world, dispatch = join([everyone]), join(placement.dispatch_groups())
    assert world is not None and dispatch is not None
    context, attention = join(placement.context_groups(), twice=True), join([placement.attention])
    replicas = join(placement.replica_groups())
    for group in (context, attention, replicas) if backend == "nccl" else ():
        # The first call of a group makes its connections, and must be one of all its ranks: who exchanges rows depends
        # on the documents, and gradients first travel in the midst of a backward pass.
        for each in dict.fromkeys((group, group.beside)) if group is not None else ():
            each.all_reduce(torch.zeros(1, device=device))
    return Mesh(
        placement=placement,
        rank=rank,
        world=world,
        dispatch=dispatch,
        attention=attention,
        replicas=replicas,
        context=context,
        # half an hour, as PyTorch has it for gloo: the others wait here for the rank whose disk is slowest
        checkpoint=dist.new_group(list(everyone), backend="gloo") if placement.ranks > 1 else None,
    )
