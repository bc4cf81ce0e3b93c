"""Where tokens go and what goes with them, in Triton beside PyTorch bit for bit, and in PyTorch beside loops."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import triton_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_on_cpu import DEVICE, draw

triton_on_cpu.prepare()

from shoal.kernels.moe.plan import (  # noqa: E402
    Ways,
    address,
    gates_at_home,
    gates_of_rows,
    pack,
    plan,
    sort,
    words_of,
)


@dataclass(frozen=True)
class Case:
    """homes: the ranks that host each expert. only: all tokens choose expert 0 first."""

    homes: tuple[tuple[int, ...], ...]
    world: int
    own: int
    tokens: int
    top_k: int
    only: bool
    seed: int

    def hosted(self) -> list[tuple[int, int]]:
        """Rank and expert of each slot."""
        return sorted((rank, expert) for expert, ranks in enumerate(self.homes) for rank in ranks)

    def ways(self) -> Ways:
        hosted = self.hosted()
        slots = [[s for s, (_, e) in enumerate(hosted) if e == expert] for expert in range(len(self.homes))]
        most, others = max(map(len, slots)), sorted({rank for rank, _ in hosted} - {self.own})
        return Ways(
            table=_ints([s for each in slots for s in each + each[:1] * (most - len(each))]),
            copies=_ints([len(each) for each in slots]) if most > 1 else None,
            hosts=_ints([rank for rank, _ in hosted]),
            numbers=_ints(list(range(len(hosted)))),
            ranks=_ints(others),
            columns=_ints([others.index(r) if r in others else 0 for r in range(self.world)]),
            own=self.own,
        )

    def choices(self) -> tuple[Tensor, Tensor]:
        """Gates and experts of each token."""
        scores = draw(self.tokens, len(self.homes), dtype=torch.float32, seed=self.seed)
        if self.only:
            scores[:, 0] += 100
        gates, experts = scores.topk(self.top_k, dim=1)
        return gates, experts.int()


def _ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Ranks without experts, experts of several ranks, no tokens, and more choices than a rank has experts."""
    world, experts = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    place = st.lists(st.integers(0, world - 1), min_size=1, max_size=draw(st.sampled_from([1, 1, 3])), unique=True)
    return Case(
        homes=tuple(tuple(draw(place)) for _ in range(experts)),
        world=world,
        own=draw(st.integers(0, world - 1)),
        tokens=draw(st.sampled_from([0, 1, 15, 16, 17, 40])),
        top_k=draw(st.integers(1, min(experts, 6))),
        only=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=25)
@given(case=cases())
def test_rows_are_packed_as_operators_pack_them(case: Case) -> None:
    (gates, experts), ways, hidden = case.choices(), case.ways(), 12
    x = draw(case.tokens, hidden, dtype=torch.float32, seed=case.seed + 1)
    found = []
    for triton in (False, True):
        planned = plan(experts, gates, ways, triton)
        most = case.tokens * min(case.top_k, len(ways.ranks))
        buffer = torch.full((most, hidden + 2 * case.top_k + 3), -7, dtype=torch.int32, device=DEVICE)
        rows, words = buffer.view(torch.float32)[:, :hidden], buffer[:, -2 * case.top_k :]
        fan = pack(planned, x, gates, ways, triton, rows, words)
        going = int(planned.counts[len(ways.hosts) :].sum())
        assert len(fan.order) == most
        found.append([planned.slots, planned.counts, fan.rows, fan.order[:going], buffer[:going]])
    for want, got in zip(*found, strict=True):
        assert torch.equal(got, want)


@settings(max_examples=15)
@given(case=cases())
def test_what_goes_with_all_rows_is_planned_as_operators_plan_it(case: Case) -> None:
    (gates, experts), ways = case.choices(), case.ways()
    want, got = (plan(experts.long(), gates, ways, triton, case.tokens + 3) for triton in (False, True))
    for part in ("slots", "counts", "letter", "home"):
        assert torch.equal(getattr(got, part), getattr(want, part)), part
    others = [rank for rank in range(case.world) if rank != case.own]
    for d, rank in enumerate(ways.ranks.tolist()):
        first = others.index(rank) * (case.tokens + 3)
        assert got.home is not None
        assert got.home[:, d].tolist() == list(range(first, first + case.tokens))


@settings(max_examples=15)
@given(case=cases())
def test_counts_that_are_known_are_those_that_would_be_counted(case: Case) -> None:
    """Where slots are the experts in their order; of other slots they are counted all the same."""
    (gates, experts), ways = case.choices(), case.ways()
    alone = replace(case, homes=tuple(sorted(home[:1] for home in case.homes)))
    known = torch.bincount(experts.flatten().long(), minlength=len(case.homes)).int().to(DEVICE)
    for each in (ways, replace(alone.ways(), in_order=True)):
        want = plan(experts, gates, each, False, case.tokens + 3)
        got = plan(experts, gates, each, True, case.tokens + 3, known)
        for part in ("counts", "letter"):
            assert torch.equal(getattr(got, part), getattr(want, part)), part


@settings(max_examples=15)
@given(case=cases(), hidden=st.sampled_from([1, 12, 1030]))
def test_rows_for_all_ranks_are_addressed_as_operators_address_them(case: Case, hidden: int) -> None:
    (gates, experts), ways = case.choices(), case.ways()
    x = draw(case.tokens, hidden, dtype=torch.float32, seed=case.seed + 1)
    live = (draw(case.tokens, 1, dtype=torch.float32, seed=4)[:, 0] > 0).long()
    found = []
    for triton in (False, True):
        buffer = torch.full((case.tokens, hidden + 2 * case.top_k + 3), -7, dtype=torch.int32, device=DEVICE)
        rows, words = buffer.view(torch.float32)[:, :hidden], buffer[:, -2 * case.top_k :]
        address(x, gates, experts, live, ways, triton, rows, words)
        found.append(buffer)
    assert torch.equal(*found)
    slots = found[1][:, -case.top_k :]
    assert torch.equal(slots, torch.where(live[:, None] == 1, ways.slots_of(experts), -1))


@settings(max_examples=25)
@given(case=cases(), came=st.sampled_from([None, 0, 1, 30]), spare=st.integers(0, 20))
def test_what_came_is_sorted_as_operators_sort_it(case: Case, came: int | None, spare: int) -> None:
    (gates, experts), ways, hosted = case.choices(), case.ways(), case.hosted()
    slots = ways.slots_of(experts)
    words = None
    if came is not None:  # -1 where a slot of a rank's memory holds no token
        generator = torch.Generator().manual_seed(case.seed)
        theirs = torch.randint(-1, len(hosted), (came, case.top_k), generator=generator, dtype=torch.int32).to(DEVICE)
        apart = torch.full((came, 2 * case.top_k + 3), -7, dtype=torch.int32, device=DEVICE)
        words = apart[:, 3:]
        words[:, : case.top_k] = words_of(draw(came, case.top_k, dtype=torch.float32, seed=2))
        words[:, case.top_k :] = theirs
    first, local = sum(rank < case.own for rank, _ in hosted), sum(rank == case.own for rank, _ in hosted)
    everything = slots if words is None else torch.cat([slots, words[:, case.top_k :]])
    mine = int(((everything >= first) & (everything < first + local)).sum())
    places = min(mine + spare, everything.numel())
    want, got = (sort(slots, gates, words, first, local, places, triton) for triton in (False, True))
    assert torch.equal(got[0].view(torch.int32), want[0].view(torch.int32))
    assert torch.equal(got[1].rows, want[1].rows)
    assert torch.equal(got[1].order[:mine], want[1].order[:mine])
    assert len(got[1].order) == places
    assert not places or 0 <= int(got[1].order.min()) <= int(got[1].order.max()) < max(everything.numel(), 1)
    assert torch.equal(got[2], want[2])
    if words is not None and came == 30:  # in slots of three ranks, behind what else came
        slotted = torch.full((3, 5 + 10 * 2 * case.top_k), -7, dtype=torch.int32, device=DEVICE)
        of_ranks = slotted[:, 5:].unflatten(1, (10, -1))
        of_ranks.copy_(words.unflatten(0, (3, 10)))
        for triton, one in ((False, want), (True, got)):
            several = sort(slots, gates, of_ranks, first, local, places, triton)
            assert torch.equal(several[0].view(torch.int32), one[0].view(torch.int32))
            assert torch.equal(several[1].rows, one[1].rows)
            assert torch.equal(several[1].order[:mine], one[1].order[:mine])
            assert torch.equal(several[2], one[2])


@settings(max_examples=15)
@given(case=cases(), packed=st.booleans())
def test_gradients_of_gates_find_home(case: Case, packed: bool) -> None:
    """Beside a loop over choices as well."""
    (gates, experts), ways = case.choices(), case.ways()
    planned = plan(experts, gates, ways, False, 0 if packed else case.tokens + 2)
    home = planned.home if planned.fan is None else planned.fan.rows
    count = (case.world - 1) * (case.tokens + 2)
    apart = draw(count, case.top_k + 2, dtype=torch.float32, seed=3).view(torch.int32)
    if home is None:
        home = planned.slots.new_empty(case.tokens, 0)
    words = apart[:, 2:]
    want, got = (gates_at_home(gates, words, home, planned.slots, ways, triton) for triton in (False, True))
    assert torch.equal(got, want)
    theirs, others, hosts = words.clone().view(torch.float32).tolist(), ways.ranks.tolist(), ways.hosts.tolist()
    for t, row in enumerate(planned.slots.tolist()):
        for k, slot in enumerate(row):
            rank = hosts[slot]
            expected = float(gates[t, k]) if rank == case.own else theirs[int(home[t, others.index(rank)])][k]
            assert float(got[t, k]) == expected


@pytest.mark.parametrize("triton", [False, True])
def test_what_belongs_to_rows_comes_back_to_copies(triton: bool) -> None:
    rows = torch.tensor([[1, -1], [-1, 0]], dtype=torch.int32, device=DEVICE)
    values = torch.tensor([3.0, 4.0], device=DEVICE)
    assert gates_of_rows(values, rows, triton).tolist() == [[4.0, 0.0], [0.0, 3.0]]
    assert gates_of_rows(values[:0], rows * 0 - 1, triton).tolist() == [[0.0, 0.0], [0.0, 0.0]]
