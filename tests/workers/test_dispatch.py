"""Experts spread over real ranks compute what all of them on one would, whatever tokens choose: results, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import triton_on_cpu
from ranks import run_ranks
from spread_layers import BY_TRITON, CASES, HIDDEN, INNER, SHARED, Case, check, on_ranks
from torch import Tensor

from shoal.kernels.moe.gemms import Gemms
from shoal.kernels.moe.oracle import ffn
from shoal.kernels.moe.router import Router
from shoal.workers.dispatch import Dispatcher
from shoal.workers.mesh import Group
from shoal.workers.routed import Pass, RoutedFFN


@pytest.mark.parametrize("name", CASES)
def test_many_ranks_equal_the_equations(name: str) -> None:
    """In float64 to some 1e-15: a token's results are added up rank by rank, so not in the order of its choices."""
    case = CASES[name]
    results = run_ranks(len(case.tokens), on_ranks, case, torch.float64)
    check(case, results, 2e-15)
    experts, _ = case.experts_gates()
    first = 0
    for rank, (count, result) in enumerate(zip(case.tokens, results, strict=True)):
        hosts = [{case.owners[e] for e in row} - {rank} for row in experts[first : first + count].tolist()]
        assert result["sent"] == sum(map(len, hosts)), "one row for each token and other rank"
        first += count


@pytest.mark.parametrize("name", ["more choices than ranks", "dispatched shared experts"])
def test_one_rank_equals_the_equations(name: str) -> None:
    case = CASES[name]
    alone = Case((sum(case.tokens),), (0,) * len(case.owners), case.top_k, case.only, case.always, case.seed)
    check(alone, [on_ranks(0, 1, alone, torch.float64)], 2e-15)


@pytest.mark.parametrize("name", ["uneven tokens, and none", "more choices than ranks"])
def test_float32_agrees_to_rounding_and_repeats_its_bits(name: str) -> None:
    case = CASES[name]
    first, second = (run_ranks(len(case.tokens), on_ranks, case, torch.float32) for _ in range(2))
    check(case, first, 1e-6)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("out", "x", "gates"))
        assert all(torch.equal(g, h) for e in a["own"] for g, h in zip(a["own"][e], b["own"][e], strict=True))


@pytest.mark.parametrize("name", BY_TRITON)
def test_triton_equals_the_equations(name: str) -> None:
    """In the interpreter, with the kernels that copy rows and add them up."""
    case = CASES[name]
    check(case, run_ranks(len(case.tokens), on_ranks, case, torch.float32, True), 1e-6)


def routed_by_triton(rank: int, world: int, layers: dict[str, Any]) -> list[Tensor]:
    """Output, gradients and counts of a whole layer whose router is part of the pass; on one rank the layer in one
    piece (``moe_layer``)."""
    triton_on_cpu.prepare()
    from shoal.kernels.moe.layer import moe_layer
    from shoal.kernels.moe.triton_gemms import TritonGemms

    generator = torch.Generator().manual_seed(3)
    shapes = [(40, HIDDEN), (8, HIDDEN), (8, HIDDEN, 2 * INNER), (8, INNER, HIDDEN), (SHARED, HIDDEN, 2 * INNER)]
    drawn = [torch.randn(s, generator=generator) * 0.5 for s in [*shapes, (SHARED, INNER, HIDDEN), (40, HIDDEN)]]
    *leaves, upstream = drawn
    d_sums = torch.linspace(-1, 1, 8)
    if world == 1:
        x, centroids, up, down, *shared = leaves = [t.requires_grad_() for t in leaves]
        whole = moe_layer(x, centroids, up, down, (shared[0], shared[1]), 3, **layers, kind=TritonGemms)
        out, counts, sums = whole.out, whole.counts.long(), whole.sums
    else:
        share = slice(rank * 25, rank * 25 + (25 if rank == 0 else 15)), slice(rank * 4, rank * 4 + 4)
        leaves = [leaves[0][share[0]], leaves[1], *(t[share[1]] for t in leaves[2:4]), *leaves[4:]]
        leaves, upstream = [t.clone().requires_grad_() for t in leaves], upstream[share[0]]
        owners = tuple(e // 4 for e in range(8))
        dispatcher = Dispatcher(Group((0, 1), rank, dist.group.WORLD), owners, torch.device("cpu"), True)
        router = Router(leaves[1], 3, **layers)
        passing = Pass(dispatcher, TritonGemms, (leaves[2], leaves[3]), (leaves[4], leaves[5]), 0, router)
        out, sums, *_ = RoutedFFN.apply(passing, leaves[0], leaves[1], None, None, *leaves[2:])
        counts = passing.flight.expert_counts()
    grads = torch.autograd.grad((out * upstream).sum() + (sums * d_sums).sum(), leaves)
    return [out.detach(), *grads, counts]


@pytest.mark.parametrize("normalize", [False, True])
def test_a_router_in_the_pass_is_that_of_the_layer_in_one_piece(normalize: bool) -> None:
    (one,) = run_ranks(1, routed_by_triton, {"normalize": normalize})
    first, second = run_ranks(2, routed_by_triton, {"normalize": normalize})
    halves = list(zip(first, second, strict=True))
    joined = [torch.cat(pair) for pair in halves[:2]] + [a + b for a, b in halves[2:]]
    joined[2:5] = [halves[2][0] + halves[2][1], torch.cat(halves[3]), torch.cat(halves[4])]
    for i, (got, want) in enumerate(zip(joined[:-1], one[:-1], strict=True)):
        assert (got - want).norm() <= 2e-6 * want.norm(), i
    assert torch.equal(first[-1], one[-1])
    assert torch.equal(second[-1], one[-1])


def _copied(rank: int, world: int, case: Case, homes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor, Tensor]:
    """What a rank computes where experts have copies: output, counts of experts, and of their copies."""
    experts, gates = case.experts_gates()
    mine = slice(sum(case.tokens[:rank]), sum(case.tokens[: rank + 1]))
    x, up, down, *_ = case.tensors()
    dispatcher = Dispatcher(Group(tuple(range(world)), rank, dist.group.WORLD), homes, torch.device("cpu"))
    local = list(dispatcher.local)
    passing = Pass(dispatcher, Gemms, (up[local], down[local]) if local else (None, None), (None, None), case.always)
    routed = slice(0, case.top_k)
    with torch.no_grad():
        passing.begin(x[mine], gates[mine, routed], experts[mine, routed])
        return passing.end(), passing.flight.expert_counts(), passing.flight._slot_counts()


@pytest.mark.parametrize("always", [0, 1])
def test_copies_of_an_expert_take_turns(always: int) -> None:
    """The same results, and as many tokens to each copy, or one more for a rank."""
    homes = ((0, 1, 2), (0,), (1, 2), (2,), (1,))
    case = Case((13, 0, 22), (0,) * 5, 2, only=0, always=always)
    experts, gates = case.experts_gates()
    x, up, down, *_ = case.tensors()
    want = torch.stack(
        [
            torch.stack([g * ffn(token, up[e], down[e]) for g, e in zip(gates[t], experts[t].tolist(), strict=True)])
            for t, token in enumerate(x)
        ]
    ).sum(1)
    found = run_ranks(3, _copied, case, homes)
    torch.testing.assert_close(torch.cat([out for out, _, _ in found]), want, rtol=1e-10, atol=1e-12)
    for _, counts, by_slot in found:
        assert counts.tolist() == torch.bincount(experts.flatten(), minlength=5).tolist()
        hosted = sorted((place, e) for e, own in enumerate(homes) for place in own)
        of_first = [int(n) for n, (_, e) in zip(by_slot, hosted, strict=True) if e == 0]
        assert sum(of_first) == 35
        assert max(of_first) - min(of_first) <= 2
