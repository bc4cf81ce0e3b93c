"""One small case of each of NSA's ways on a GPU, for compute-sanitizer: each tensor is an allocation of its own, so
that what is read or written beside one is seen."""

from __future__ import annotations

import os
from typing import cast

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read when PyTorch first allocates

import torch

from shoal.kernels.nsa import BlockSizes, compress, compress_mean, make_layout
from shoal.kernels.nsa.attention import Tensors
from shoal.kernels.nsa.paged import decode_tables, make_cache
from shoal.kernels.nsa.triton_attention import nsa_triton
from shoal.kernels.nsa.triton_paged import triton_paged_decode, triton_paged_prefill

SIZES = BlockSizes(32, 16, 64, 4, 1, 2, 100)


def passes(device: str, dtype: torch.dtype, heads: int, kv: int, dims: tuple[int, int]) -> None:
    """Forward, and backward in either way, of three documents."""
    layout = make_layout((0, 401, 402, 512), SIZES, device)
    tokens, blocks = layout.tokens, layout.cmp_starts.numel()

    def leaf(rows: int, count: int, dim: int) -> torch.Tensor:
        return torch.randn(rows, count, dim, device=device, dtype=dtype, requires_grad=True)

    k_raw = leaf(tokens, kv, dims[0])
    keys = [leaf(rows, kv, dim) for rows in (blocks, tokens, tokens) for dim in dims]
    shapes = (32, dims[1]), (32 * dims[1], 2 * dims[1]), (2 * dims[1], dims[1])
    position, w1, w2 = (leaf(kv, *shape) for shape in shapes)
    gates = torch.rand(tokens, heads, 3, device=device, dtype=dtype, requires_grad=True)
    for deterministic in (False, True):
        means = compress_mean(k_raw, layout)
        values = compress(leaf(tokens, kv, dims[1]), position, w1, w2, layout)
        tensors = (leaf(tokens, heads, dims[0]), means, values, *keys[2:], gates)
        out = nsa_triton(*cast(Tensors, tensors), layout, dims[0] ** -0.5, deterministic=deterministic)
        out.sum().backward()
        assert out.isfinite().all()


@torch.no_grad()
def pages(device: str, dtype: torch.dtype, heads: int, kv: int, dims: tuple[int, int]) -> None:
    """Decode of sequences of 1, 500 and 64 tokens, and a chunk of the longest, over eight pages each."""
    count, page = 8, SIZES.slc_block
    cache = make_cache(3 * count, 3 * count, kv, dims, SIZES, dtype, torch.device(device))
    for pool in vars(cache).values():
        pool.normal_()
    far = torch.randperm(3 * count, device=device).view(3, count)
    at = torch.tensor([0, 499, 63], device=device)
    first = (at - SIZES.window + 1).clamp(min=0) // page * page
    q = torch.randn(40, heads, dims[0], device=device, dtype=dtype)
    gates, scale = torch.rand(40, heads, 3, device=device, dtype=dtype), dims[0] ** -0.5
    tables = decode_tables(at, far, far[:, :3], first, kv, SIZES)
    out = triton_paged_decode(q[:3], gates[:3], cache, tables, SIZES, scale)
    chunk = triton_paged_prefill(q, gates, cache, 460, far[1], far[1, :4], 320, SIZES, scale)
    assert out.isfinite().all() and chunk.isfinite().all()


if __name__ == "__main__":
    for heads, kv, dims in ((32, 2, (128, 128)), (4, 4, (192, 128))):
        passes("cuda", torch.bfloat16, heads, kv, dims)
        pages("cuda", torch.bfloat16, heads, kv, dims)
    torch.cuda.synchronize()
