"""Rows that go to all ranks, with what their tokens chose behind them: one launch, whatever the number of ranks."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.moe.plan import Ways
from shoal.kernels.moe.triton_fan import slot_of


def address(x: Tensor, gates: Tensor, experts: Tensor, live: Tensor, ways: Ways, rows: Tensor, words: Tensor) -> None:
    """As :func:`shoal.kernels.moe.plan.address`."""
    (tokens, hidden), choices = x.shape, experts.shape[1]
    tile, width = 4, min(1024, triton.next_power_of_2(hidden))
    if tokens:
        _address_kernel[(triton.cdiv(tokens, tile), triton.cdiv(hidden, width))](
            x,
            gates.contiguous(),
            experts.contiguous(),
            live,
            ways.table,
            ways.table if ways.copies is None else ways.copies,
            rows,
            words,
            tokens,
            H=hidden,
            K=choices,
            Y=rows.stride(0),
            B=words.stride(0),
            MOST=1 if ways.copies is None else len(ways.table) // len(ways.copies),
            OWN=ways.own,
            TILE=tile,
            BH=width,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["tokens"])
def _address_kernel(
    x,
    gates,
    experts,
    live,
    table,
    copies,
    rows,
    words,
    tokens,
    H: tl.constexpr,
    K: tl.constexpr,
    Y: tl.constexpr,
    B: tl.constexpr,
    MOST: tl.constexpr,
    OWN: tl.constexpr,
    TILE: tl.constexpr,
    BH: tl.constexpr,
):
    """A tile of rows and columns; those of the first columns write the words of their tokens too."""
    t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    there = t < tokens
    inside = there[:, None] & (h[None, :] < H)
    at = t.to(tl.int64)[:, None]
    tl.store(rows + at * Y + h[None, :], tl.load(x + at * H + h[None, :], mask=inside, other=0.0), mask=inside)
    if tl.program_id(1) == 0:
        counts = tl.load(live + t, mask=there, other=0) > 0
        for i in tl.static_range(K):
            expert = tl.load(experts + t * K + i, mask=there, other=0).to(tl.int32)
            slot = slot_of(table, copies, expert, t, there, MOST, OWN)
            gate = tl.load(gates + t * K + i, mask=there, other=0.0).to(tl.int32, bitcast=True)
            tl.store(words + t * B + i, gate, mask=there)
            tl.store(words + t * B + K + i, tl.where(counts, slot, -1), mask=there)
