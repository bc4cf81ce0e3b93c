"""Counts of the pages that were chosen at other ranks, token by token."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from sequences import SIZES

from shoal.workers.mesh import Group
from shoal.workers.pull import Fetching, Pages, counted
from shoal.workers.sequence import make_sequence, zigzag

PAGE, CPU = SIZES.slc_block, torch.device("cpu")


def by_tokens(cu: tuple[int, ...], read: torch.Tensor, rank: int, world: int) -> list[int]:
    """Of ``read [heads, pages]``: pages at other ranks, tokens of them that a rank may read; of all that it may read
    the same; all pages."""
    mine = set(zigzag(cu[-1], world, PAGE)[rank].indices().tolist())
    might = [s for a, b in pairwise(cu) for s in range(a, b) if s not in mine and any(s < t < b for t in mine)]
    heads, pages = read.shape
    rows = [(h, s) for h in range(heads) for s in might if read[h, s // PAGE]]
    chosen, all_pages = {(h, s // PAGE) for h, s in rows}, {s // PAGE for s in might}
    return [len(chosen), len(rows), heads * len(all_pages), heads * len(might), heads * pages]


@given(
    lengths=st.lists(st.integers(1, 120), max_size=4),
    world=st.integers(1, 4),
    turns=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    layers=st.integers(1, 3),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_counts_of_all_layers_are_those_of_each(
    lengths: list[int], world: int, turns: list[int], layers: int, share: float
) -> None:
    """Whatever heads are computed in turns; of a layer that is computed again, those of the last time."""
    cu = tuple(accumulate(lengths, initial=0))
    generator = torch.Generator().manual_seed(0)
    for rank in range(world):
        pages: Pages = make_sequence(cu, SIZES, Group(tuple(range(world)), rank), CPU).pages
        every = torch.rand(layers, sum(turns), -(-cu[-1] // PAGE), generator=generator) < share
        fetchings = [Fetching(count=True) for _ in range(layers)]
        for again in (True, False):
            for fetching, read in zip(fetchings, every, strict=True):
                for i, part in enumerate(read.split(turns)):
                    fetching.keep(pages, ~part if again else part, first=i == 0)
        got = counted(fetchings)
        assert got.dtype == torch.int64
        assert got.tolist() == [by_tokens(cu, read, rank, world) for read in every]
        for read, counts in zip(every, got, strict=True):
            assert torch.equal(pages.count(read), counts)
            assert pages.wanted(read).sum() == counts[0]
