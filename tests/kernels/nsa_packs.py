"""Block sizes and packs of documents that tests of NSA draw, and block sizes in the oracle's words. To be imported once
Triton was told whether to interpret."""

from __future__ import annotations

from hypothesis import strategies as st

from shoal.kernels.nsa import BlockSizes, oracle

LENGTHS = st.lists(st.integers(0, 40), max_size=4)
"""Of the documents of a pack."""


def hyper(s: BlockSizes) -> oracle.Hyper:
    return oracle.Hyper(s.cmp_block, s.cmp_stride, s.slc_block, s.slc_count, s.slc_initial, s.slc_local, s.window)


@st.composite
def compressing(draw: st.DrawFn) -> BlockSizes:
    """Any that compress alike: what is selected, and the window, matters not."""
    d, per_cmp = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return BlockSizes(per_cmp * d, d, 3 * d, 2, 0, 1, 5)
