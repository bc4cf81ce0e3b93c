"""Full attention over a sequence that ranks share, gathered and around a ring: one rank's outputs and gradients, of the
layer and of a model, in whose ranks no more keys arrive at a time than are one rank's share."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from sequences import Problem, full_alone, full_drawn, full_shared
from small import small_recipe
from test_model import packed
from test_sequence import allocated, straight
from torch import Tensor

from shoal.workers.config import Recipe
from shoal.workers.exchange import Plan
from shoal.workers.mesh import Group, make_mesh
from shoal.workers.model import Transformer
from shoal.workers.model.feedforward import named_views
from shoal.workers.placement import Placement
from shoal.workers.ring import key_plan
from shoal.workers.sequence import zigzag
from shoal.workers.volume import Shape, ring_volume


def _on_rank(rank: int, world: int, p: Problem, ring: bool) -> Any:
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


def _gathering(rank: int, world: int, tokens: int) -> tuple[int, int]:
    """Bytes at the peak while keys and values are gathered, and of these themselves."""
    straight()
    group = Group(tuple(range(world)), rank, dist.group.WORLD)
    plan = key_plan((0, tokens), zigzag(tokens, world, 8), group)
    k, v = (torch.randn(plan.owned, 2, width) for width in (16, 8))
    with allocated() as sizes:
        gathered = plan.fetch(k, v).wait()
    return max(accumulate(sizes)), sum(x.nbytes for x in gathered)


def test_keys_of_long_sequences_are_in_memory_once_while_they_are_gathered() -> None:
    for most, gathered in run_ranks(4, _gathering, 4096):
        assert most < 1.1 * gathered


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


@dataclass
class Passed:
    """What a rank of a model computed. hidden: of its tokens. gradients: its part of each weight's. arrived: bytes of
    keys, values and their gradients that each exchange brought."""

    hidden: Tensor
    gradients: dict[str, Tensor]
    arrived: list[int]


def _model_on_rank(rank: int, world: int, tables: dict[str, Any], lengths: list[int]) -> Passed:
    """A forward and a backward pass of documents of such lengths, which the ranks share."""
    recipe = Recipe.model_validate(tables)
    model = Transformer(recipe, make_mesh(Placement.of(recipe), rank))
    batch = model.own_part(packed(lengths))
    arrived: list[int] = []
    exchange = dist.batch_isend_irecv

    def watched(ops: list[dist.P2POp]) -> list[dist.Work]:
        arrived.append(sum(op.tensor.nbytes for op in ops if op.op is dist.irecv))
        return exchange(ops)

    trade = Plan.trade

    def packed_watched(plan: Plan, out: Tensor, into: Tensor, *sides: Any) -> list[Any]:
        arrived.append(into.nbytes)
        return trade(plan, out, into, *sides)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", watched)
        patch.setattr(Plan, "trade", packed_watched)
        hidden = model(batch)
        model.loss_sum(hidden, batch.targets).backward()
    found = {}
    for name, parameter, part in named_views(model):
        assert parameter.grad is not None
        found[name] = parameter.grad if part is None else parameter.grad[part]
    return Passed(hidden.detach(), found, arrived)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("lengths", "ring"), [([128], True), ([127], False), ([70, 58], False)])
def test_a_model_of_one_document_goes_around_the_ring(world: int, lengths: list[int], ring: bool) -> None:
    """Hidden states and gradients are one rank's. Around the ring an exchange brings keys of a rank's tokens at most,
    however many the document has; where keys are gathered, as of several documents, they all come at once."""
    sizes = {"attention__kind": "full", "model__context": 128, "train__sequence": 128}
    alone = _model_on_rank(0, 1, small_recipe(**sizes), lengths)
    assert alone.arrived == []
    tables = small_recipe(**sizes, parallel__ranks=world, parallel__context=world)
    results: list[Passed] = run_ranks(world, _model_on_rank, tables, lengths)
    tokens, m = sum(lengths), Recipe.model_validate(tables).model
    for result, rows in zip(results, zigzag(tokens, world, 1), strict=True):
        torch.testing.assert_close(result.hidden, alone.hidden[rows.indices()], rtol=1e-9, atol=1e-11)
    for name, want in alone.gradients.items():
        got = sum(result.gradients[name] for result in results if name in result.gradients)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    shape = Shape(m.kv_heads, (m.head_dim, m.v_dim), 8, 8)
    volume = ring_volume(tokens, world, shape)
    share = tokens / world * shape.kv_heads * sum(shape.dims) * 8
    for result in results:
        around = set(result.arrived) == {share} and sum(result.arrived) == m.layers * sum(volume.values())
        assert around == ring, result.arrived
    if not ring and world > 2:
        assert max(max(result.arrived) for result in results) > share
