"""Selections that are turned around in segments, some chunks of queries and some heads at a time: as if all at once."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import cast

import pytest
import torch
import triton_on_cpu
from triton_on_cpu import DEVICE, close

triton_on_cpu.prepare()

from test_nsa_triton_backward import NAMES, SCALE, SPAN, Inputs, inputs, passes  # noqa: E402

from shoal.kernels.nsa import BlockSizes, make_layout, oracle  # noqa: E402
from shoal.kernels.nsa import triton_inverse as inverse  # noqa: E402
from shoal.kernels.nsa.triton_attention import Tunings  # noqa: E402
from shoal.kernels.nsa.triton_backward import BackwardTuning  # noqa: E402
from shoal.kernels.nsa.triton_choose import ChooseTuning  # noqa: E402
from shoal.kernels.nsa.triton_forward import ForwardTuning  # noqa: E402
from shoal.kernels.nsa.triton_gather import Tuning  # noqa: E402
from shoal.kernels.nsa.triton_gather_grad import GatherGradTuning  # noqa: E402
from shoal.kernels.nsa.triton_span_grad import SpanGradTuning  # noqa: E402
from shoal.kernels.nsa.triton_tables import make_tables  # noqa: E402

SIZES = BlockSizes(4, 2, 4, 6, 1, 2, 7)  # three blocks are chosen
LENGTHS, KV = [2, 27], 2
FORWARD, BACKWARD = 12, 8  # queries of a chunk
TUNINGS: Tunings = (
    ForwardTuning(SPAN, SPAN, ChooseTuning(chunk=64, rows=16, blocks=16), Tuning(FORWARD, rows=16, steps=2, direct=1)),
    BackwardTuning(
        SpanGradTuning(rows=16, keys=16, chunk=24),
        SpanGradTuning(rows=16, keys=16, lap=13),
        GatherGradTuning(BACKWARD, item=4, rows=16),
    ),
)


def cut(group: int) -> tuple[int, int, int]:
    """Heads at a time and segments of the forward pass, and segments of the deterministic backward pass."""
    tokens, blocks, size = sum(LENGTHS), sum(map(SIZES.slc_blocks, LENGTHS)), 16 // group * 2
    heads = inverse.heads_within(KV, inverse.item_bytes(FORWARD, 1, 2, blocks, size))
    items = inverse.segments(tokens, FORWARD, inverse.item_bytes(FORWARD, heads, 2, blocks, size))
    lists = inverse.segments(tokens, BACKWARD, inverse.list_bytes(BACKWARD, KV, 6, blocks))
    return heads, len(items), len(lists)


@pytest.mark.parametrize(
    ("group", "table", "parts"),
    [(1, 1, (1, 3, 4)), pytest.param(2, 3000, (2, 2, 4), marks=pytest.mark.slow)],
    ids=["a chunk of a head", "two chunks"],
)
def test_as_in_one_segment_and_as_the_oracle(
    group: int, table: int, parts: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of the output and of deterministic gradients; those of other gradients may come in any order."""
    layout = make_layout(tuple(accumulate(LENGTHS, initial=0)), SIZES, DEVICE)
    args = inputs(layout, KV, group, (8, 4), torch.float32)
    assert cut(group) == (KV, 1, 1)
    whole, gradients_whole = passes(args, layout, SCALE, True, TUNINGS)
    monkeypatch.setattr(inverse, "TABLE", table)
    assert cut(group) == parts
    assert cut(group) > (KV, 1, 1) or cut(group)[0] < KV or cut(group)[2] > 1
    hyper = oracle.Hyper(
        *(SIZES.cmp_block, SIZES.cmp_stride, SIZES.slc_block, SIZES.slc_count),
        *(SIZES.slc_initial, SIZES.slc_local, SIZES.window),
    )
    exact = [x.cpu().double().requires_grad_() for x in args[:-1]]
    want = oracle.nsa(*cast(Inputs, exact), layout.cu_seqlens, hyper, SCALE)
    want.backward(args[-1].cpu().double())
    close(whole, want.detach(), torch.float32)
    for deterministic in (True, False):
        out, gradients = passes(args, layout, SCALE, deterministic, TUNINGS)
        assert torch.equal(out, whole)
        for name, mine, one, leaf in zip(NAMES, gradients, gradients_whole, exact, strict=True):
            assert mine is not None and one is not None and leaf.grad is not None, name
            assert not deterministic or torch.equal(mine, one), name
            close(mine, leaf.grad, torch.float32)


@pytest.mark.parametrize("per_segment", [1, 2, 4])
def test_segments_have_the_pairs_of_the_whole(per_segment: int) -> None:
    """In lists the same order, of items those of the same blocks; queries are numbered through."""
    tables = make_tables(make_layout((0, 37, 39, 89), SIZES, DEVICE))
    generator = torch.Generator().manual_seed(1)
    own = (torch.arange(89) - tables.starts.cpu()) // SIZES.slc_block
    blocks = torch.rand(89, 2, 3, generator=generator).mul((own + 1)[:, None, None]).floor().to(torch.int32)
    blocks[::5, :, 1] = -1
    blocks = blocks.to(DEVICE)
    parts = inverse.segments(89, 20, inverse.TABLE // per_segment)
    assert [x for part in parts for x in part] == list(range(5))

    def of_lists(part: range | None) -> dict[tuple[int, int, int], list[int]]:
        """By head, chunk and block, the pairs that are there."""
        pairs, first, chunks = inverse.lists_by_block(blocks, tables, 20, part)
        edges, before = first.tolist(), part.start if part else 0
        found = {}
        for at, (begin, end) in enumerate(pairwise(edges)):
            h, rest = divmod(at, chunks * tables.blocks)
            if begin < end:
                found[h, before + rest // tables.blocks, rest % tables.blocks] = pairs[begin:end].tolist()
        return found

    def of_items(part: range | None) -> dict[tuple[int, int, int], list[int]]:
        x = inverse.invert(blocks, tables, 20, 4, part)
        assert x.before == (part.start if part else 0)
        edges = x.first_items.tolist()
        found: dict[tuple[int, int, int], list[int]] = {}
        for at, (begin, end) in enumerate(pairwise(edges)):
            h, index = divmod(at, x.chunks)
            for block, pairs in zip(x.item_blocks[begin:end].tolist(), x.item_pairs[begin:end].tolist(), strict=True):
                found.setdefault((h, x.before + index, block), []).extend(pair for pair in pairs if pair >= 0)
        return {where: sorted(pairs) for where, pairs in found.items()}

    whole = of_lists(None)
    assert sum(map(len, whole.values())) == int((blocks >= 0).sum())
    for find in (of_lists, of_items):
        got = [find(part) for part in parts]
        assert {where: pairs for part in got for where, pairs in part.items()} == whole
        assert sum(map(len, got)) == len(whole)


@pytest.mark.parametrize(("tokens", "segments"), [(1 << 16, (1, 1, 1)), (1 << 17, (1, 1, 1)), (1 << 20, (5, 12, 5))])
def test_segments_of_four_heads_in_groups_of_16(tokens: int, segments: tuple[int, int, int]) -> None:
    """As kernels are tuned: those of the forward pass, and of the backward pass without and with a sort."""
    blocks, forward, backward = tokens // 64, Tuning(), GatherGradTuning()
    n, size = 13 - forward.read_directly(16, 13), forward.rows // 16 * forward.steps
    assert inverse.heads_within(4, inverse.item_bytes(forward.chunk, 1, n, blocks, size)) == 4
    got = (
        inverse.segments(tokens, forward.chunk, inverse.item_bytes(forward.chunk, 4, n, blocks, size)),
        inverse.segments(tokens, backward.chunk, inverse.item_bytes(backward.chunk, 4, 16, blocks, backward.item)),
        inverse.segments(tokens, backward.chunk, inverse.list_bytes(backward.chunk, 4, 16, blocks)),
    )
    assert tuple(map(len, got)) == segments
