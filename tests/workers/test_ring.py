"""Full attention over a sequence that ranks share, gathered and around a ring: one rank's outputs and gradients."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from ranks import run_ranks
from sequences import Problem, full_alone, full_drawn, full_shared

from shoal.workers.mesh import Group
from shoal.workers.sequence import zigzag
from shoal.workers.volume import Shape, ring_volume


def _on_rank(rank: int, world: int, p: Problem, ring: bool) -> Any:
    import torch.distributed as dist

    group = Group(tuple(range(world)), rank, dist.group.WORLD if world > 1 else None)
    results, circle = full_shared(p, full_drawn(p), group, ring)
    return results, dict(circle.received)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("lengths", "ring"), [([128], True), ([128], False), ([30, 50, 1, 60, 3], False), ([3], False)]
)
def test_ranks_compute_what_one_rank_computes(world: int, lengths: list[int], ring: bool) -> None:
    p = Problem(tuple(accumulate(lengths, initial=0)), group=3)
    want = full_alone(p, full_drawn(p))
    results = run_ranks(world, _on_rank, p, ring)
    for rank, rows in enumerate(zigzag(p.cu[-1], world, 8)):
        for got, all_of_it in zip(results[rank][0], want, strict=True):
            torch.testing.assert_close(got, all_of_it[rows.indices()], rtol=1e-9, atol=1e-11)
        if ring and world > 1:
            assert results[rank][1] == ring_volume(p.cu[-1], world, Shape(p.kv, p.dims, 8, 8))


def test_a_ring_in_bfloat16() -> None:
    """On a CPU as well; scores and sums are in float32."""
    p = Problem((0, 256), group=3, dims=(32, 16), dtype=torch.bfloat16)
    want = full_alone(p, [x.double() for x in full_drawn(p)])
    results = run_ranks(2, _on_rank, p, True)
    for rank, rows in enumerate(zigzag(p.cu[-1], 2, 8)):
        for got, all_of_it in zip(results[rank][0], want, strict=True):
            assert got.dtype == torch.bfloat16
            own = all_of_it[rows.indices()]
            assert (got.double() - own).norm() <= 5e-3 * own.norm()
