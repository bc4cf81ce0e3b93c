"""The compression MLP φ (NSA eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.nsa.layout import Layout


def compress(x: Tensor, position: Tensor, w1: Tensor, w2: Tensor, layout: Layout) -> Tensor:
    """φ of every whole block of ``l`` keys, one every ``d``, within a document (NSA eq. 7).

    ``φ(block) = silu(flatten(block + position) @ w1) @ w2``, one set of weights per KV head. x: ``[T, KV, D]``, keys
    or values, keys *before* RoPE. position: ``[KV, l, D]``. w1: ``[KV, l*D, 2*D]``. w2: ``[KV, 2*D, D]``. Returns
    ``[C, KV, D]``, C as in ``layout.cmp_starts``; it may be 0.

    Blocks overlap, so the first product is taken once per chunk of ``d`` keys and added up over the chunks of a block:
    ``flatten(block) @ w1 = Σ_j chunk_j @ w1_j``. The position's share is the same for all blocks.
    """
    sizes = layout.sizes
    kv, dim = x.shape[1:]
    parts, width = sizes.cmp_block // sizes.cmp_stride, sizes.cmp_stride * dim
    blocks = layout.cmp_starts.numel()
    if not blocks:
        return x.new_zeros(0, kv, dim) + 0 * (x.sum() + position.sum() + w1.sum() + w2.sum())
    chunks = x.transpose(0, 1).index_select(1, layout.chunk_tokens).reshape(kv, -1, width)
    by_part = w1.view(kv, parts, width, -1).transpose(1, 2).reshape(kv, width, -1)
    products = torch.bmm(chunks, by_part).view(kv, -1, parts, w1.shape[-1])
    reach = products.shape[1] - parts + 1
    hidden = products[:, :reach, 0] + torch.bmm(position.reshape(kv, 1, -1), w1)
    for part in range(1, parts):
        hidden = hidden + products[:, part : part + reach, part]
    hidden = hidden.index_select(1, layout.cmp_chunks)
    return torch.bmm(torch.nn.functional.silu(hidden), w2).transpose(0, 1)
