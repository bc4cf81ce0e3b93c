"""Compression of blocks (NSA eq. 7): the MLP φ, and the plain mean."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shoal.kernels.nsa.attention import Backend
from shoal.kernels.nsa.layout import BlockSizes, ChunkInverse, Layout


@dataclass(frozen=True)
class OwnBlocks:
    """The compression blocks that end with one of a layout's queries, and where their tokens stand among
    ``layout.needs.raw``.

    tokens: T, the rows of x. chunk_tokens: ``[n*d]`` int64, among them. cmp_chunks: ``[C]`` int64, the first chunk of
    each block. cmp_positions: ``[C]`` int64, of its first key in the document.
    """

    sizes: BlockSizes
    tokens: int
    chunk_tokens: Tensor
    cmp_chunks: Tensor
    cmp_positions: Tensor

    @cached_property
    def inverse(self) -> ChunkInverse:
        """As :attr:`Layout.inverse`."""
        return ChunkInverse.of(self.tokens, self.chunk_tokens, self.sizes.cmp_stride, self.cmp_chunks)


def own_blocks(layout: Layout) -> OwnBlocks:
    """Those of a layout."""
    needs, stride = layout.needs, layout.sizes.cmp_stride
    own, chunks = (rows.indices(layout.device) for rows in (needs.own, needs.chunks))
    return OwnBlocks(
        layout.sizes,
        needs.raw.count,
        needs.raw.places(layout.chunk_tokens.view(-1, stride)[chunks].flatten()),
        needs.chunks.places(layout.cmp_chunks[own]),
        layout.cmp_positions[own],
    )


def compress(
    x: Tensor, position: Tensor, w1: Tensor, w2: Tensor, layout: Layout | OwnBlocks, backend: Backend = "auto"
) -> Tensor:
    """φ of every whole block of ``l`` keys, one every ``d``, within a document (NSA eq. 7).

    ``φ(block) = silu(flatten(block + position) @ w1) @ w2``, one set of weights per KV head. x: ``[T, KV, D]``, keys
    or values, keys *before* RoPE. position: ``[KV, l, D]``. w1: ``[KV, l*D, 2*D]``. w2: ``[KV, 2*D, D]``. Returns
    ``[C, KV, D]``, C as in ``layout.cmp_chunks``; it may be 0.

    Blocks overlap, so the first product is taken once per chunk of ``d`` keys and added up over the chunks of a block:
    ``flatten(block) @ w1 = Σ_j chunk_j @ w1_j``. The position's share is the same for all blocks. backend: auto takes
    Triton in 16 bits on a GPU. Raises ValueError when Triton is asked for without a GPU, or for float64.
    """
    in_triton, sizes = _in_triton(x, backend), layout.sizes
    kv, dim = x.shape[1:]
    parts, width = sizes.cmp_block // sizes.cmp_stride, sizes.cmp_stride * dim
    if not layout.cmp_chunks.numel():
        return x.new_zeros(0, kv, dim) + 0 * (x.sum() + position.sum() + w1.sum() + w2.sum())
    if in_triton:
        # Imported here: Triton is not there on every system.
        from shoal.kernels.nsa.triton_phi_grad import triton_compress

        return triton_compress(x, position, w1, w2, layout)
    chunks = x.transpose(0, 1).index_select(1, layout.chunk_tokens).reshape(kv, -1, width)
    by_part = w1.view(kv, parts, width, -1).transpose(1, 2).reshape(kv, width, -1)
    products = torch.bmm(chunks, by_part).view(kv, -1, parts, w1.shape[-1])
    reach = products.shape[1] - parts + 1
    hidden = products[:, :reach, 0] + torch.bmm(position.reshape(kv, 1, -1), w1)
    for part in range(1, parts):
        hidden = hidden + products[:, part : part + reach, part]
    hidden = hidden.index_select(1, layout.cmp_chunks)
    return torch.bmm(torch.nn.functional.silu(hidden), w2).transpose(0, 1)


def compress_mean(x: Tensor, layout: Layout | OwnBlocks, backend: Backend = "auto") -> Tensor:
    """The mean of every whole block of ``l`` keys, one every ``d``, within a document: φ without weights.

    x: ``[T, KV, D]``, keys or values, keys *before* RoPE, as :func:`compress` takes them. Returns ``[C, KV, D]`` in x's
    dtype, summed in float32 or x's float64 and rounded once; C may be 0. backend: auto takes Triton in 16 bits on a
    GPU. Raises ValueError when Triton is asked for without a GPU, or for float64.
    """
    if _in_triton(x, backend):
        # Imported here: Triton is not there on every system.
        from shoal.kernels.nsa.triton_mean import triton_compress_mean

        return triton_compress_mean(x, layout)
    sizes = layout.sizes
    kv, dim = x.shape[1:]
    if not layout.cmp_chunks.numel():
        return x.new_zeros(0, kv, dim) + 0 * x.sum()
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = wide.index_select(0, layout.chunk_tokens).view(-1, sizes.cmp_stride, kv, dim).sum(1)
    blocks = sums.unfold(0, sizes.cmp_block // sizes.cmp_stride, 1).sum(-1) / sizes.cmp_block
    return blocks.index_select(0, layout.cmp_chunks).to(x.dtype)


def _in_triton(x: Tensor, backend: Backend) -> bool:
    """Whether Triton compresses. Raises ValueError when it is asked for, and cannot."""
    if backend == "triton" and (not x.is_cuda or x.dtype == torch.float64):
        raise ValueError(
            f"backend='triton' takes float32 and 16 bits on a GPU, and x is {x.dtype} on {x.device}: take 'auto'"
        )
    in_16_bits = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and torch.version.hip is None
    return backend == "triton" or (backend == "auto" and in_16_bits)
