"""Importance of blocks in Gluon against Triton's, which the oracle checks; on a Hopper GPU only."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from triton_on_cpu import DEVICE, ON_GPU, draw

if not ON_GPU or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a GPU of compute capability 9.0", allow_module_level=True)

from shoal.kernels.nsa import BlockSizes, make_layout
from shoal.kernels.nsa.gluon_importance import block_scores, supported
from shoal.kernels.nsa.triton_choose import ChooseTuning, score_blocks
from shoal.kernels.nsa.triton_span import span_attention
from shoal.kernels.nsa.triton_tables import Tables, chunk_tables, make_tables

SCALE = 0.2


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes",
    [BlockSizes(32, 16, 64, 6, 1, 2, 100), BlockSizes(16, 16, 16, 5, 1, 1, 64), BlockSizes(64, 16, 64, 1, 0, 1, 64)],
)
@pytest.mark.parametrize(
    ("kv", "group", "dim", "dtype"),
    [
        (2, 16, 128, torch.bfloat16),
        (1, 64, 64, torch.float16),
        (4, 8, 128, torch.bfloat16),
        (3, 32, 64, torch.bfloat16),
        (2, 16, 192, torch.bfloat16),
        (1, 64, 192, torch.float16),
    ],
)
@pytest.mark.parametrize("lengths", [[5000], [700, 1, 63, 64, 1900, 320], [6, 401]])
def test_scores_are_tritons(
    lengths: list[int], kv: int, group: int, dim: int, dtype: torch.dtype, sizes: BlockSizes
) -> None:
    """Also where a tile ends beyond the pack, has queries of several documents, or such that see no key yet beside some
    that have to choose; of a part of the queries."""
    layout = make_layout(tuple(accumulate(lengths, initial=0)), sizes, DEVICE)
    compare(make_tables(layout), layout.tokens, layout.cmp_starts.numel(), kv, group, dim, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("position", [1, 640])
def test_scores_of_a_sequence_that_goes_on(position: int) -> None:
    """Where a sequence begins before the queries, at whatever distance."""
    sizes, tokens = BlockSizes(32, 16, 64, 6, 1, 2, 100), 1100
    tables = chunk_tables(position, tokens, 0, sizes, torch.device(DEVICE))
    compare(tables, tokens, sizes.cmp_blocks(position + tokens), 2, 16, 128, torch.bfloat16)


def compare(tables: Tables, tokens: int, keys: int, kv: int, group: int, dim: int, dtype: torch.dtype) -> None:
    """Scores of most of the queries, those that are read."""
    sizes = tables.sizes
    q = draw(tokens, kv * group, dim, dtype=dtype, seed=1)
    k, v = (draw(keys, kv, dim, dtype=dtype, seed=seed) for seed in (2, 3))
    assert supported(q, k, sizes, wide=dim == 192)
    _, lse = span_attention(q, k, v, tables.cmp, SCALE)
    start, stop = tokens // 5, tokens - 3
    width = -(-tables.longest_within(0, tokens) // 16) * 16
    mine, theirs = (torch.full((2, kv, stop - start, width), -1.0, device=DEVICE) for _ in range(2))
    block_scores(q, k, lse, tables, SCALE, mine, start, stop)
    score_blocks(q, k, lse, tables, SCALE, theirs, start, stop, tile=4, tuning=ChooseTuning())
    t = torch.arange(start, stop, device=DEVICE)
    own = (t - tables.starts[start:stop]) // sizes.slc_block
    block = torch.arange(width, device=DEVICE)
    read = (own >= sizes.slc_count)[:, None] & (block[None, :] <= own[:, None] - sizes.slc_local)
    assert read.any()
    for a, b, mask in ((mine[0], theirs[0], read), (mine[1][..., :-1], theirs[1][..., :-1], read[:, 1:])):
        torch.testing.assert_close(a[:, mask], b[:, mask], rtol=1e-4, atol=1e-6)
        assert (a[:, mask] >= 0).all()
