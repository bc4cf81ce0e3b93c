"""Full attention over a sequence that ranks share, gathered and around a ring: one rank's outputs and gradients."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from shoal.kernels.full import full_attention
from shoal.workers.mesh import Group
from shoal.workers.ring import gather_attention, key_plan, make_ring, ring_attention
from shoal.workers.sequence import zigzag
from shoal.workers.volume import Shape, ring_volume

KV, GROUP, D_QK, D_V = 2, 3, 6, 4


def inputs(tokens: int) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    shapes = ((KV * GROUP, D_QK), (KV, D_QK), (KV, D_V), (KV * GROUP, D_V))
    return [torch.randn(tokens, *shape, generator=gen, dtype=torch.float64) for shape in shapes]


def _on_rank(rank: int, world: int, cu: tuple[int, ...], ring: bool) -> Any:
    import torch.distributed as dist

    group = Group(tuple(range(world)), rank, dist.group.WORLD if world > 1 else None)
    owned = zigzag(cu[-1], world, 8)
    at = owned[rank].indices()
    *args, upstream = (x[at] for x in inputs(cu[-1]))
    leaves = q, k, v = [x.requires_grad_() for x in args]
    circle = make_ring(group, q)
    if ring:
        out = ring_attention(q, k, v, circle, 0.5)
    else:
        plan = key_plan(cu, owned, group)
        out = gather_attention(q, k, v, cu, owned[rank], plan, 0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)], dict(circle.received)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    ("lengths", "ring"), [([128], True), ([128], False), ([30, 50, 1, 60, 3], False), ([3], False)]
)
def test_ranks_compute_what_one_rank_computes(world: int, lengths: list[int], ring: bool) -> None:
    cu = tuple(accumulate(lengths, initial=0))
    *args, upstream = inputs(cu[-1])
    leaves = q, k, v = [x.requires_grad_() for x in args]
    out = full_attention(q, k, v, cu, 0.5)
    want = [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
    results = run_ranks(world, _on_rank, cu, ring)
    for rank, rows in enumerate(zigzag(cu[-1], world, 8)):
        for got, all_of_it in zip(results[rank][0], want, strict=True):
            torch.testing.assert_close(got, all_of_it[rows.indices()], rtol=1e-9, atol=1e-11)
        if ring and world > 1:
            assert results[rank][1] == ring_volume(cu[-1], world, Shape(KV, (D_QK, D_V), 8, 8))
