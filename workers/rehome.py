"""Tensors that change their rank: whoever holds one sends it to whoever is to hold it from now on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.workers.mesh import Group


def rehome(group: Group, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Fills ``after`` with the tensors of the same names in ``before``, wherever in the group they are, bit by bit.

    Both are what this rank holds, before and after; a name means the same tensor on every rank, and several may hold
    it. They may lie in the same memory: all is copied out before anything is written. Collective over the group.
    """
    wanted = [name for name, tensor in after.items() if not _stays(before.get(name), tensor)]
    found: list[tuple[list[str], list[str]]] = group.all_gather_object((list(before), wanted))
    holders: dict[str, list[int]] = {}
    for rank, (held, _) in enumerate(found):
        for name in held:
            holders.setdefault(name, []).append(rank)

    def source(name: str, rank: int) -> int:
        """The nearest one: its own, or one of its dispatch group, whose ranks are neighbours."""
        return min(holders[name], key=lambda holder: (abs(holder - rank), holder))

    me = group.index
    give = [[before[n] for n in names if source(n, rank) == me] for rank, (_, names) in enumerate(found)]
    take = [[after[n] for n in wanted if source(n, me) == rank] for rank in range(group.size)]
    for tensor, data in zip((t for part in take for t in part), _exchange(group, give, take), strict=True):
        tensor.copy_(data.view(tensor.dtype).view(tensor.shape))


def _stays(old: Tensor | None, new: Tensor) -> bool:
    return old is not None and old.data_ptr() == new.data_ptr()


def _exchange(group: Group, give: list[list[Tensor]], take: list[list[Tensor]]) -> list[Tensor]:
    """The bytes of all tensors that are to be taken, in their order."""
    sent = [tensor for part in give for tensor in part]
    device = next((t.device for part in (*give, *take) for t in part), None)
    if device is None and group.handle is None:
        return []
    flat = [t.detach().contiguous().flatten().view(torch.uint8) for t in sent]
    device = device or torch.device("cuda" if dist.get_backend(group.handle) == "nccl" else "cpu")
    out = torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=device)
    sizes = [[sum(t.nbytes for t in part) for part in parts] for parts in (give, take)]
    if group.handle is not None:
        came = out.new_empty(sum(sizes[1]))
        dist.all_to_all_single(came, out, sizes[1], sizes[0], group=group.handle)
    else:
        came = out
    # each in memory of its own: a view as another dtype must begin where one of its elements may
    return [part.clone() for part in came.split([t.nbytes for part in take for t in part])]
