"""Which pages chosen blocks lie in: by Triton, by PyTorch, and key by key."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
import triton_on_cpu
from hypothesis import given
from hypothesis import strategies as st
from nsa_packs import LENGTHS
from torch import Tensor
from triton_on_cpu import DEVICE

triton_on_cpu.prepare()

from shoal.kernels.nsa import BlockSizes, make_layout  # noqa: E402
from shoal.kernels.nsa.attention import _pages_read  # noqa: E402
from shoal.kernels.nsa.layout import Layout, Tile  # noqa: E402
from shoal.kernels.nsa.rows import Rows  # noqa: E402
from shoal.kernels.nsa.triton_read import pages_read  # noqa: E402
from shoal.kernels.nsa.triton_tables import make_tables  # noqa: E402


def places(layout: Layout) -> list[tuple[int, int]]:
    """Of each query the first token of its document, and its position there."""
    firsts = [max(x for x in layout.cu_seqlens if x <= t) for t in layout.queries.indices().tolist()]
    return [(first, t - first) for first, t in zip(firsts, layout.queries.indices().tolist(), strict=True)]


def drawn_blocks(layout: Layout, kv: int, seed: int) -> Tensor:
    """``[T, KV, n]`` int32: all blocks up to a query's own where there is room for them, and -1; else its own and some
    before it. In any order."""
    generator, n = torch.Generator().manual_seed(seed), layout.sizes.slc_count
    blocks = torch.full((layout.queries.count, kv, n), -1, dtype=torch.int32)
    for t, (_, position) in enumerate(places(layout)):
        own = position // layout.sizes.slc_block
        for h in range(kv):
            chosen = torch.cat([torch.randperm(own, generator=generator)[: n - 1], torch.tensor([own])])
            blocks[t, h, torch.randperm(n, generator=generator)[: len(chosen)]] = chosen.to(torch.int32)
    return blocks


def key_by_key(layout: Layout, blocks: Tensor) -> Tensor:
    size = layout.sizes.slc_block
    read = torch.zeros(blocks.shape[1], -(-layout.tokens // size), dtype=torch.bool)
    for (first, position), heads in zip(places(layout), blocks.tolist(), strict=True):
        for h, chosen in enumerate(heads):
            for key in range(position + 1):
                if key // size in chosen:
                    read[h, (first + key) // size] = True
    return read


def of_tile(tile: Tile, layout: Layout, blocks: Tensor) -> Tensor | None:
    """What PyTorch's path would keep of such a choice: nothing, where all is chosen; a mask; or indices to gather."""
    if not tile.blocks:
        return None
    mine = blocks[tile.start : tile.stop].transpose(0, 1).long()
    index = torch.where(mine >= 0, mine, tile.blocks)
    if tile.last - tile.first > layout.dense_keys:
        return index.sort(-1).values
    return torch.zeros(*mine.shape[:2], tile.blocks + 1, dtype=torch.bool).scatter_(2, index, True)[..., :-1]


@given(
    lengths=LENGTHS,
    cuts=st.lists(st.integers(0, 160), max_size=4),
    block=st.sampled_from([2, 3, 8]),
    count=st.integers(1, 5),
    kv=st.integers(1, 3),
    tile=st.sampled_from([1, 8, 64]),
    dense=st.sampled_from([0, 10**6]),
    seed=st.integers(0, 100),
)
def test_pages_are_those_of_the_keys(
    lengths: list[int], cuts: list[int], block: int, count: int, kv: int, tile: int, dense: int, seed: int
) -> None:
    """Of all queries, and of every other piece of a pack that is cut anywhere: documents begin, and pieces end, within
    pages."""
    cu = tuple(accumulate(lengths, initial=0))
    edges = sorted({0, cu[-1], *(cut for cut in cuts if cut < cu[-1])})
    pieces = list(pairwise(edges))
    sizes = BlockSizes(1, 1, block, count, 0, 1, 5)
    for queries in (None, Rows.of(pieces[::2]), Rows.of(pieces[1::2])):
        layout = make_layout(cu, sizes, "cpu", tile, dense, queries)
        blocks = drawn_blocks(layout, kv, seed)
        want = key_by_key(layout, blocks)
        choices = tuple(of_tile(each, layout, blocks) for each in layout.tiles)
        assert torch.equal(_pages_read(choices, layout, kv), want)
        tables = make_tables(make_layout(cu, sizes, DEVICE, queries=queries))
        got = pages_read(blocks.to(DEVICE), tables)
        assert got.dtype == torch.bool
        assert torch.equal(got.cpu(), want)


def test_choices_may_be_a_part_of_a_table() -> None:
    """Of some heads, and some of the places."""
    layout = make_layout((0, 50, 83), BlockSizes(1, 1, 4, 5, 0, 1, 5), "cpu")
    blocks = drawn_blocks(layout, 3, 1)[:, 1:, 2:]
    got = pages_read(blocks.to(DEVICE), make_tables(make_layout(layout.cu_seqlens, layout.sizes, DEVICE)))
    assert torch.equal(got.cpu(), key_by_key(layout, blocks))
