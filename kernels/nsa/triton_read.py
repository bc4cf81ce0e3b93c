"""Which pages of a pack chosen blocks lie in, marked in one launch: in PyTorch's operations it is a hundred."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import launch, power_of_2, tiles
from shoal.kernels.nsa.triton_tables import PackTables

TILE = 64  # queries of a program


def pages_read(blocks: Tensor, tables: PackTables) -> Tensor:
    """``[KV, pages]`` bool, as ``attention.nsa_forward`` tells of them: pages with a key of a chosen block, none of a
    key behind the query that chose it.

    blocks: ``[T, KV, n]`` int32, of ``choose_blocks``; its last dimension is contiguous.
    """
    tokens, kv, n = blocks.shape
    read = torch.zeros(kv, tables.pages, dtype=torch.uint8, device=blocks.device)
    if tokens:
        launch(
            _read_kernel,
            (tiles(tokens, TILE), kv),
            *(blocks, tables.starts, tables.firsts, read, tokens, tables.pages, blocks.stride(0), blocks.stride(1)),
            N=n,
            NP=power_of_2(n),
            BLOCK=tables.sizes.slc_block,
            TILE=TILE,
        )
    return read.view(torch.bool)


@triton.jit(do_not_specialize=["tokens", "pages"])
def _read_kernel(
    blocks,
    starts,
    firsts,
    read,
    tokens,
    pages,
    stride_t,
    stride_h,
    N: tl.constexpr,
    NP: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of queries and a KV head. Many write to one byte, all of them the same."""
    t = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    h = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, NP)
    there = t < tokens
    inside = there[:, None] & (i < N)[None, :]
    block = tl.load(blocks + (t * stride_t + h * stride_h)[:, None] + i[None, :], mask=inside, other=-1)
    document = tl.load(firsts + t, mask=there, other=0).to(tl.int64)
    query = document + t - tl.load(starts + t, mask=there, other=0)
    first = document[:, None] + block * BLOCK
    last = tl.minimum(first + BLOCK - 1, query[:, None])
    # A block is no longer than a page, which begin where documents need not: it lies in one page, or in two.
    tl.store(read + h * pages + first // BLOCK, 1, mask=block >= 0)
    tl.store(read + h * pages + last // BLOCK, 1, mask=(block >= 0) & (last // BLOCK > first // BLOCK))
