"""Experts spread over real ranks compute what all of them on one would, whatever tokens choose: results, gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import triton_on_cpu
from ranks import run_ranks
from shared_inbox import SharedInbox
from torch import Tensor

from shoal.kernels.moe.gemms import Gemms
from shoal.kernels.moe.oracle import ffn
from shoal.kernels.moe.router import Router
from shoal.workers import slots
from shoal.workers.dispatch import Dispatcher
from shoal.workers.flight import PackedFlight
from shoal.workers.gathered import ApartFlight, GatheredFlight, Live
from shoal.workers.mesh import Group
from shoal.workers.routed import Pass, RoutedFFN
from shoal.workers.symmetric import Inbox

HIDDEN, INNER, SHARED = 16, 8, 2
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """tokens: of each rank. owners: the rank of each expert. only: the one expert that all choose first."""

    tokens: tuple[int, ...]
    owners: tuple[int, ...]
    top_k: int
    only: int | None = None
    always: int = 0
    """Last experts that every token chooses with gate 1: shared ones, dispatched."""
    seed: int = field(default=0)

    def experts_gates(self) -> tuple[Tensor, Tensor]:
        """Of all ranks' tokens; float64."""
        generator = torch.Generator().manual_seed(self.seed)
        total, routed = sum(self.tokens), len(self.owners) - self.always
        scores = torch.rand(total, routed, generator=generator, dtype=torch.float64)
        if self.only is not None:
            scores[:, self.only] += 1
        gates, experts = scores.topk(self.top_k, dim=1)
        last = torch.arange(routed, len(self.owners)).expand(total, -1)
        return torch.cat([experts, last], 1), torch.cat([gates, gates.new_ones(total, self.always)], 1)

    def tensors(self) -> list[Tensor]:
        """x, gate_up, down, the same of the shared experts, and the gradient of the output; float64."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        count, total = len(self.owners), sum(self.tokens)
        shapes = [
            (total, HIDDEN), (count, HIDDEN, 2 * INNER), (count, INNER, HIDDEN),
            (SHARED, HIDDEN, 2 * INNER), (SHARED, INNER, HIDDEN), (total, HIDDEN),
        ]  # fmt: skip
        return [torch.randn(s, generator=generator, dtype=torch.float64) * s[-1] ** -0.5 for s in shapes]


CASES = {
    "even": Case((12, 12), (0, 0, 0, 1, 1, 1), 2),
    "uneven tokens, and none": Case((3, 0, 21), (0, 1, 2, 0, 1, 2), 3),
    "a rank without experts": Case((6, 7, 8), (0, 0, 2, 2), 2),
    "experts on one rank only": Case((6, 7), (1, 1, 1), 2),
    "tokens on one rank only": Case((0, 9, 0), (0, 0, 2, 2), 2),
    "all to one expert": Case((9, 11), (0, 0, 1, 1), 1, only=3),
    "more choices than ranks": Case((10, 5), (0, 1, 0, 1, 1, 0, 1, 0), 6),
    "dispatched shared experts": Case((7, 4, 6), (0, 0, 1, 1, 2, 2, 0, 1), 2, always=2),
    "no tokens at all": Case((0, 0), (0, 1), 1),
}
APART = {
    "one and one": Case((9, 0), (1, 1, 1, 1), 2),
    "two and one, copies of shared experts": Case((3, 8, 0), (2, 2, 2, 2, 2), 2, always=2),
    "one and two": Case((7, 0, 0), (2, 1, 1, 2, 2, 1), 3),
    "two and three": Case((2, 5, 0, 0, 0), (2, 3, 4, 2, 3, 4), 2, only=3),
    "experts in between": Case((0, 4, 0, 6), (2, 0, 2, 0), 2),
}
"""Tokens and experts on different ranks, in steps of one shape."""
BY_TRITON = ("uneven tokens, and none", "a rank without experts", "dispatched shared experts")
"""The interpreter takes long."""


def on_ranks(
    rank: int, world: int, case: Case, dtype: torch.dtype, triton: bool = False, folder: str = "", passes: int = 1
) -> dict[str, Any]:
    """What one rank computes of the case: its output, its gradients, and how many rows it sent.

    folder: for shared memory; without it, rows are exchanged. passes: how often, of which the last one counts.
    """
    kind: type[Gemms] = Gemms
    if triton:
        triton_on_cpu.prepare()
        from shoal.kernels.moe.triton_gemms import TritonGemms

        kind = TritonGemms
    experts, gates = case.experts_gates()
    mine = slice(sum(case.tokens[:rank]), sum(case.tokens[: rank + 1]))
    x, up, down, shared_up, shared_down, upstream = (t.to(dtype) for t in case.tensors())
    handle = dist.group.WORLD if world > 1 else None
    group, device = Group(tuple(range(world)), rank, handle), torch.device("cpu")
    box = None
    if folder:
        sizes = (max(case.tokens) + 3, HIDDEN, dtype, experts.shape[1], len(case.owners), device)
        box = SharedInbox(folder, group, *sizes)
    dispatcher = Dispatcher(group, case.owners, device, triton, box)
    local = list(dispatcher.local)
    leaves = [t.clone().requires_grad_() for t in (x[mine], gates[mine].to(dtype), shared_up, shared_down)]
    own = [t[local].requires_grad_() for t in (up, down)] if local else [None, None]
    for _ in range(passes):
        for leaf in (*leaves, *own):
            if leaf is not None:
                leaf.grad = None
        passing = Pass(dispatcher, kind, (own[0], own[1]), (leaves[2], leaves[3]))
        out, *_ = RoutedFFN.apply(passing, leaves[0], None, leaves[1], experts[mine], *own, *leaves[2:])
        counts = passing.flight.expert_counts()
        if folder:
            kept = [t for t in vars(passing.flight).values() if isinstance(t, Tensor)]
            assert all(t.nbytes == t.untyped_storage().nbytes() for t in kept), "a part of a letter keeps all of it"
        (out * upstream[mine]).sum().backward()
    for other in turns(dispatcher, kind, [leaves[0], leaves[1], *own, *leaves[2:]], experts[mine], 1 if folder else 2):
        assert torch.equal(other, out)
    for message in [] if box is None else box.said:  # one that is let go of before it was heard is lost
        message.wait()
    sent = sum(passing.flight.out) if isinstance(passing.flight, PackedFlight) else 0
    grads = [t.grad for t in leaves]
    result = {"out": out.detach(), "x": grads[0], "gates": grads[1], "shared": grads[2:], "counts": counts}
    stacks = [t.grad for t in own if t is not None and t.grad is not None]
    return result | {"own": {e: [stack[i] for stack in stacks] for i, e in enumerate(local)}, "sent": sent}


def turns(dispatcher: Dispatcher, kind: type[Gemms], leaves: list[Any], experts: Tensor, count: int) -> list[Tensor]:
    """Outputs of so many passes by turns, without gradients, as a step in halves is computed."""
    x, gates, up, down, shared_up, shared_down = leaves
    with torch.no_grad():
        passes = [Pass(dispatcher, kind, (up, down), (shared_up, shared_down)) for _ in range(count)]
        for one in passes:
            one.begin(x, gates, experts)
        return [one.end() for one in passes]


def oracle(case: Case) -> dict[str, Any]:
    """The same token by token and expert by expert, in float64."""
    experts, gates = case.experts_gates()
    x, up, down, shared_up, shared_down, upstream = case.tensors()
    leaves = [t.requires_grad_() for t in (x, gates, up, down, shared_up, shared_down)]
    rows = []
    for t in range(len(x)):
        row = sum((ffn(x[t], u, d) for u, d in zip(shared_up, shared_down, strict=True)), x.new_zeros(HIDDEN))
        for k, e in enumerate(experts[t].tolist()):
            row = row + gates[t, k] * ffn(x[t], up[e], down[e])
        rows.append(row)
    out = torch.stack(rows) if rows else x * 0
    grads = torch.autograd.grad((out * upstream).sum(), leaves, allow_unused=True, materialize_grads=True)
    counts = torch.bincount(experts.flatten(), minlength=len(case.owners))
    return {
        "out": out.detach(),
        "x": grads[0],
        "gates": grads[1],
        "own": grads[2:4],
        "shared": grads[4:],
        "counts": counts,
    }


def check(case: Case, results: list[dict[str, Any]], tolerance: float) -> None:
    want = oracle(case)
    error = 0.0

    def compare(got: Tensor, exact: Tensor) -> None:
        nonlocal error
        assert got.shape == exact.shape
        assert not got.isnan().any()
        error = max(error, float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)) if len(exact) else 0.0)

    for key in ("out", "x", "gates"):
        compare(torch.cat([r[key] for r in results]), want[key])
    for i in range(2):
        compare(sum(r["shared"][i].double() for r in results), want["shared"][i])
        own = {e: grads[i] for r in results for e, grads in r["own"].items()}
        compare(torch.stack([own[e] for e in range(len(case.owners))]), want["own"][i])
    assert error <= tolerance, error
    assert all(torch.equal(r["counts"], want["counts"]) for r in results)


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


@pytest.mark.parametrize(("room", "tallied"), [(0, False), (0, True), (1 << 40, False)])
@pytest.mark.parametrize("name", ["uneven tokens, and none", "all to one expert", "dispatched shared experts"])
def test_rows_put_into_shared_memory_equal_the_equations(name: str, room: int, tallied: bool, tmp_path: Path) -> None:
    """The way of two GPUs of one node, through memory that processes of this machine share; slots are used again.

    room: whether the host reads how many rows experts get (0), or asks for as many as there may be. tallied: whether
    hosts tell each other.
    """
    case = CASES[name]
    results = run_ranks(len(case.tokens), in_room, (room, tallied), case, torch.float32, False, str(tmp_path), 3)
    check(case, results, 1e-6)


@pytest.mark.parametrize("name", ["a rank without experts", "experts on one rank only"])
def test_rows_put_into_shared_memory_by_triton_equal_the_equations(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    results = run_ranks(len(case.tokens), in_room, (1 << 40, False), case, torch.float32, True, str(tmp_path), 2)
    check(case, results, 1e-6)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_at_each_turn_a_rank_is_put_to_by_one_other(ranks: int) -> None:
    boxes = [Unshared(Group(tuple(range(ranks)), rank), 4, HIDDEN, torch.float32, 2, 8, CPU) for rank in range(ranks)]
    assert all(sorted(box.turns) == box.others for box in boxes)
    for turn in zip(*(box.turns for box in boxes), strict=True):
        assert sorted(turn) == list(range(ranks))


class Unshared(Inbox):
    """An inbox that no other rank reaches."""

    def _share(self, words: int, device: torch.device) -> list[Tensor]:
        return [torch.zeros(words, dtype=torch.int32, device=device) for _ in self.group.ranks]


def in_room(rank: int, world: int, how: tuple[int, bool], *rest: Any) -> dict[str, Any]:
    slots.ROOM, SharedInbox.tallied = how
    return on_ranks(rank, world, *rest)


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


def _of_one_shape(rank: int, world: int, case: Case, triton: bool, apart: bool) -> tuple[Tensor, Tensor]:
    """Output and chosen experts of a pass in which each rank has as many rows as the one with most tokens; apart: those
    without experts."""
    kind: type[Gemms] = Gemms
    if triton:
        triton_on_cpu.prepare()
        from shoal.kernels.moe.triton_gemms import TritonGemms

        kind = TritonGemms
    experts, gates = case.experts_gates()
    mine, most = slice(sum(case.tokens[:rank]), sum(case.tokens[: rank + 1])), max(case.tokens)
    sources = [r for r in range(world) if r not in case.owners] if apart else None
    count = most if sources is None or rank in sources else 0
    x, up, down, shared_up, shared_down, _ = (t.float() if triton else t for t in case.tensors())
    x, experts, gates = (
        torch.cat([t[mine], t.new_full((count - case.tokens[rank], t.shape[1]), 1)]) for t in (x, experts, gates)
    )
    group = Group(tuple(range(world)), rank, dist.group.WORLD)
    dispatcher = Dispatcher(group, case.owners, x.device, triton, sources=sources)
    own, live = list(dispatcher.local), Live((torch.arange(count) < case.tokens[rank]).long(), most)
    weights = (up[own], down[own]) if own else (None, None)
    passing = Pass(dispatcher, kind, weights, (shared_up, shared_down), case.always, live=live)
    routed = slice(0, case.top_k)
    with torch.no_grad():
        passing.begin(x, gates[:, routed].to(x.dtype), experts[:, routed].contiguous())
        out = passing.end()
    assert type(passing.flight) is (ApartFlight if apart else GatheredFlight)
    return out[: case.tokens[rank]], passing.flight.chosen()


@pytest.mark.parametrize(
    ("name", "triton"), [(n, False) for n in CASES if any(CASES[n].tokens)] + [(n, True) for n in BY_TRITON]
)
def test_rows_of_one_shape_equal_the_equations(name: str, triton: bool) -> None:
    """Those of each rank's own tokens; other rows, whatever stands in them, choose no expert."""
    case = CASES[name]
    found = run_ranks(len(case.tokens), _of_one_shape, case, triton, False)
    got, want = torch.cat([out for out, _ in found]).double(), oracle(case)["out"]
    assert (got - want).norm() <= (1e-6 if triton else 2e-15) * want.norm()
    rows = torch.arange(max(case.tokens))[None] < torch.tensor(case.tokens)[:, None]
    for _, chosen in found:
        assert (chosen[~rows.flatten()] == -1).all()
        assert torch.equal(chosen[rows.flatten()].long(), case.experts_gates()[0])


@pytest.mark.parametrize(("name", "triton"), [(n, False) for n in APART] + [("two and three", True)])
def test_rows_of_one_shape_cross_to_ranks_of_experts(name: str, triton: bool) -> None:
    """All of which know what all tokens chose; ranks without tokens have no results."""
    case = APART[name]
    found = run_ranks(len(case.tokens), _of_one_shape, case, triton, True)
    got, want = torch.cat([out for out, _ in found]).double(), oracle(case)["out"]
    assert (got - want).norm() <= (1e-6 if triton else 2e-15) * want.norm()
    sources = [rank for rank in range(len(found)) if rank not in case.owners]
    counts = torch.tensor([case.tokens[rank] for rank in sources])
    rows = (torch.arange(max(case.tokens))[None] < counts[:, None]).flatten()
    for rank, (_, chosen) in enumerate(found):
        if rank in sources:
            assert not len(chosen)
        else:
            assert (chosen[~rows] == -1).all()
            assert torch.equal(chosen[rows].long(), case.experts_gates()[0])


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
