"""Full causal attention over a paged cache, in PyTorch operations; the pages are those of ``kernels.nsa.paged``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from shoal.kernels.full import varlen, varlen_fits
from shoal.kernels.nsa.paged import by_head, read_pages


def paged_full_decode(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, far: Tensor, scale: float) -> Tensor:
    """Single queries, each with pages of its own: ``[N, H, d_qk] -> [N, H, d_v]`` in q's dtype.

    k, v: ``[pages, KV, rows, D]``. positions: ``[N]`` int64. far: ``[N, KV, P]``, an index of ``by_head``, pages from
    the start of each sequence; unused places name any page, whose rows must be finite.
    """
    n, heads, dim = q.shape
    kv = k.shape[1]
    keys = read_pages(k, far).flatten(0, 1)
    rows = (q.to(keys.dtype) * scale).view(n * kv, heads // kv, dim)
    unseen = torch.arange(keys.shape[1], device=q.device) > positions[:, None]
    scores = torch.bmm(rows, keys.transpose(1, 2)).view(n, kv, heads // kv, -1)
    p = torch.softmax(scores.masked_fill_(unseen[:, None, None], -torch.inf), -1)
    return torch.bmm(p.flatten(0, 1), read_pages(v, far).flatten(0, 1)).view(n, heads, -1).to(q.dtype)


def paged_full_prefill(q: Tensor, k: Tensor, v: Tensor, position: int, far: Tensor, scale: float) -> Tensor:
    """Consecutive queries of one sequence from ``position`` on: ``[R, H, d_qk] -> [R, H, d_v]``. far: ``[P]``.

    On a GPU in half precision FlashAttention does it, else SDPA with a mask. In half precision on a GPU SDPA with a
    mask would hold all scores: 4 GB for 512 queries of 64 heads at 64k.
    """
    count, stop, kv = q.shape[0], position + q.shape[0], k.shape[1]
    width = max(q.shape[2], v.shape[3])
    if q.shape[2] == v.shape[3] and not width % 8 and varlen_fits(q, width):
        keys, values = (x.index_select(0, far).transpose(1, 2).flatten(0, 1)[:stop] for x in (k, v))
        return varlen(q, keys, values, (0, count), (0, stop), scale)
    index = by_head(far, kv)
    keys, values = (read_pages(x, index)[:, :stop].to(q.dtype) for x in (k, v))
    seen = torch.arange(stop, device=q.device) <= torch.arange(position, stop, device=q.device)[:, None]
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=seen,
        scale=scale,
        enable_gqa=q.shape[1] != kv,
    )
    return out[0].transpose(0, 1).reshape(count, q.shape[1], -1)
