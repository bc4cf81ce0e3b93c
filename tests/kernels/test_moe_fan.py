"""Rows that fan out and sums that come back, in PyTorch and in Triton, beside loops over tokens."""

from __future__ import annotations

import pytest
import torch
import triton_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_on_cpu import DEVICE, draw

triton_on_cpu.prepare()

from shoal.kernels.moe.fan import by_expert, by_rank, combine, expand  # noqa: E402


@given(
    tokens=st.integers(0, 40), copies=st.integers(1, 6), experts=st.integers(1, 9), seed=st.integers(0, 99),
    spare=st.integers(0, 5),
)  # fmt: skip
def test_copies_stand_by_expert_then_by_token(tokens: int, copies: int, experts: int, seed: int, spare: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    choices = torch.randint(-1, experts, (tokens, copies), generator=generator, dtype=torch.int32)
    going = [(int(e), t * copies + k) for t, row in enumerate(choices) for k, e in enumerate(row) if e >= 0]
    fan, ends = by_expert(choices.to(DEVICE), experts, min(len(going) + spare, choices.numel()))
    wanted = [copy for _, copy in sorted(going)]
    assert fan.order.tolist()[: len(wanted)] == wanted
    assert ends.tolist() == [sum(e <= expert for e, _ in going) for expert in range(experts)]
    places = {copy: place for place, copy in enumerate(wanted)}
    assert fan.rows.flatten().tolist() == [places.get(i, -1) for i in range(choices.numel())]


@given(tokens=st.integers(0, 40), copies=st.integers(1, 6), ranks=st.integers(1, 5), seed=st.integers(0, 99))
def test_a_token_goes_to_a_rank_once(tokens: int, copies: int, ranks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hosts = torch.randint(0, ranks, (tokens, copies), generator=generator, dtype=torch.int32)
    others = torch.arange(1, ranks, dtype=torch.int32)
    fan, counts = by_rank(hosts.to(DEVICE), others.to(DEVICE))
    wanted = [(r, t) for r in range(1, ranks) for t in range(tokens) if r in hosts[t]]
    assert counts.tolist() == [sum(r == rank for r, _ in wanted) for rank in range(1, ranks)]
    assert [(i % (ranks - 1) + 1, i // (ranks - 1)) for i in fan.order.tolist()[: len(wanted)]] == wanted
    places = {pair: place for place, pair in enumerate(wanted)}
    assert fan.rows.tolist() == [[places.get((r, t), -1) for r in range(1, ranks)] for t in range(tokens)]


@pytest.mark.parametrize("triton", [False, True])
@settings(max_examples=16)
@given(
    tokens=st.sampled_from([(0, 0), (9, 0), (5, 21)]), copies=st.integers(1, 4), gated=st.booleans(),
    based=st.booleans(), more=st.one_of(st.none(), st.tuples(st.integers(0, 3), st.integers(0, 4))),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_rows_go_out_and_sums_come_back(
    triton: bool,
    tokens: tuple[int, int],
    copies: int,
    gated: bool,
    based: bool,
    more: tuple[int, int] | None,
    seed: int,
) -> None:
    """Rows may lie apart, as they do with words behind each."""
    total, hidden, experts = sum(tokens), 24, 3
    generator = torch.Generator().manual_seed(seed)
    choices = torch.randint(-1, experts, (total, copies), generator=generator, dtype=torch.int32).to(DEVICE)
    going = int((choices >= 0).sum())
    fan, _ = by_expert(choices, experts, going)
    wide = draw(total, hidden + 8, dtype=torch.float32, seed=seed)
    x = wide[:, :hidden]
    out = expand([x[: tokens[0]].contiguous(), x[tokens[0] :]], fan, triton)
    assert torch.equal(out, x[fan.order.long() // copies])
    gates = draw(total, copies, dtype=torch.float32, seed=1) if gated else None
    base = draw(total, hidden, dtype=torch.float32, seed=2) if based else None
    target = torch.full((total, hidden + 8), 7.0, device=DEVICE)
    others = None
    if more:
        came, columns = more
        places = torch.randint(-1, came, (total, columns), generator=generator, dtype=torch.int32).to(DEVICE)
        others = draw(came, hidden + 4, dtype=torch.float32, seed=3)[:, :hidden], places
    got = combine(out, fan.rows, triton, gates, base, out=target[:, :hidden], more=others)
    want = torch.zeros(total, hidden, dtype=torch.float64, device=DEVICE) if base is None else base.double()
    for t in range(total):
        for k in range(copies):
            if choices[t, k] >= 0:
                want[t] += x[t].double() * (1.0 if gates is None else gates[t, k].double())
        if others:
            want[t] += others[0][[place for place in others[1][t].tolist() if place >= 0]].double().sum(0)
    assert (got.double() - want).abs().max().item() < 1e-5 if total else got.shape == want.shape
    assert (target[:, hidden:] == 7.0).all()
