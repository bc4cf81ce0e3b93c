"""Full causal attention on packed documents, and its oracle."""

from __future__ import annotations

import inspect
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from shoal.kernels.host import numbers_on
from shoal.kernels.nsa.rows import Rows, runs


def full_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], scale: float, trained: bool = False
) -> Tensor:
    """``softmax(scale · q kᵀ) v``, causal, within each document of the pack.

    q: ``[T, H, Dqk]``. k: ``[T, KV, Dqk]``. v: ``[T, KV, Dv]``, H a multiple of KV. cu_seqlens: N+1 offsets on the
    host, ``0 … T``; T may be 0. scale: factor on the scores. trained: whether this is part of a training step, also
    where gradients are off for now, as when a layer will be computed again. Returns ``[T, H, Dv]`` in q's dtype.

    On a GPU in half precision one variable-length FlashAttention call does it, or, where all documents are as long as
    each other and ``trained``, cuDNN, which is faster then; elsewhere SDPA, once for each length that documents
    have. All want equal d_qk and d_v: the smaller is padded with zeros, which changes no result.
    """
    if not q.shape[0]:
        return q.new_zeros(0, q.shape[1], v.shape[2]) + 0 * (q.sum() + k.sum() + v.sum())
    width = v.shape[2]
    most = max(q.shape[2], width)
    fast = varlen_fits(q, most)
    if fast:
        most = -(-most // 8) * 8
    q, k, v = (functional.pad(x, (0, most - x.shape[2])) if x.shape[2] < most else x for x in (q, k, v))
    if not fast:
        return _by_length(q, k, v, cu_seqlens, scale)[..., :width]
    # cuDNN plans anew for each shape, which is worth its time where shapes come again, as in training. Its gradients
    # are not the same bits in every run.
    lengths = {stop - start for start, stop in pairwise(cu_seqlens)} - {0}
    if trained and len(lengths) == 1 and not torch.are_deterministic_algorithms_enabled():
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            return _by_length(q, k, v, cu_seqlens, scale)[..., :width]
    return varlen(q, k, v, cu_seqlens, cu_seqlens, scale)[..., :width]


def varlen_fits(q: Tensor, dim: int) -> bool:
    """Whether :func:`varlen` takes queries like these and heads of ``dim``."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and dim <= 256


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: tuple[int, ...], cu_keys: tuple[int, ...], scale: float
) -> Tensor:
    """One FlashAttention call over a pack of ``[T, heads, D]``, D alike and a multiple of 8. A document may have more
    keys than queries: its queries are then its last ones.

    The arguments changed names between torch 2.10 and 2.12.
    """
    from torch.nn.attention.varlen import varlen_attn  # brings PyTorch's compiler along, which no CPU needs

    most_q, most_k = (max(stop - start for start, stop in pairwise(x)) for x in (cu_queries, cu_keys))
    at_q, at_k = (_offsets(x, q.device) for x in (cu_queries, cu_keys))
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = varlen_attn(q, k, v, at_q, at_k, most_q, most_k, scale=scale, **options)
    assert isinstance(out, Tensor)
    return out


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what a prompt leaves behind may serve a step of training, which saves it
def _offsets(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 on the device, once for all layers."""
    return numbers_on(device, cu_seqlens, torch.int32)


def full_attention_of(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], queries: Rows, keys: Rows, scale: float
) -> Tensor:
    """:func:`full_attention` of some queries of a pack, over keys that hold all that they may see.

    q: ``[t, H, Dqk]``, the tokens ``queries``. k: ``[s, KV, Dqk]``, v: ``[s, KV, Dv]``, the tokens ``keys``. Returns
    ``[t, H, Dv]``. A call for each range of queries in 16 bits on a GPU, elsewhere one for each document in each.
    """
    width, most = v.shape[2], max(q.shape[2], v.shape[2])
    fast = varlen_fits(q, most)
    if fast:
        most = -(-most // 8) * 8
    q, k, v = (functional.pad(x, (0, most - x.shape[2])) if x.shape[2] < most else x for x in (q, k, v))
    outs, at = [q[:0] + 0 * (k.sum() + v.sum())], 0
    pieces = runs(cu_seqlens, queries)
    for start, stop in queries.ranges:
        here = [run for run in pieces if start <= run.start < stop]
        # Of the first document there may be more keys than queries, which are its last ones then.
        first = keys.at(cu_seqlens[here[0].document])
        part, k_part, v_part = q[at : at + stop - start], *(x[first : keys.at(stop - 1) + 1] for x in (k, v))
        at += stop - start
        cu_q = (0, *(run.stop - start for run in here))
        cu_k = (0, *(keys.at(run.stop - 1) + 1 - first for run in here))
        if fast:
            outs.append(varlen(part, k_part, v_part, cu_q, cu_k, scale))
            continue
        for (q_low, q_high), (k_low, k_high) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
            outs.append(_last_queries(part[q_low:q_high], k_part[k_low:k_high], v_part[k_low:k_high], scale))
    return torch.cat(outs)[..., :width]


def _last_queries(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of the last queries of a document, in one piece."""
    count, total = q.shape[0], k.shape[0]
    seen = torch.ones(count, total, dtype=torch.bool, device=q.device).tril(total - count)
    bq, bk, bv = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = functional.scaled_dot_product_attention(
        bq, bk, bv, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


def _by_length(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], scale: float) -> Tensor:
    """SDPA over all documents of one length together."""
    groups: dict[int, list[int]] = {}
    for start, stop in pairwise(cu_seqlens):
        if stop > start:
            groups.setdefault(stop - start, []).append(start)
    order: Tensor | None = None
    if [start for starts in groups.values() for start in starts] != sorted(set(cu_seqlens[:-1]) - {cu_seqlens[-1]}):
        found = [(numbers_on(q.device, x)[:, None], torch.arange(n, device=q.device)) for n, x in groups.items()]
        order = torch.cat([(first + each).flatten() for first, each in found])
        q, k, v = q[order], k[order], v[order]
    outs, gqa = [], q.shape[1] != k.shape[1]
    sizes = [len(starts) * length for length, starts in groups.items()]
    parts = zip(*(x.split(sizes) if len(sizes) > 1 else (x,) for x in (q, k, v)), strict=True)
    for length, part in zip(groups, parts, strict=True):
        bq, bk, bv = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in part)
        out = functional.scaled_dot_product_attention(bq, bk, bv, is_causal=True, scale=scale, enable_gqa=gqa)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    joined = outs[0] if len(outs) == 1 else torch.cat(outs)
    return joined if order is None else joined[order.argsort()]


def full_attention_oracle(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], scale: float) -> Tensor:
    """:func:`full_attention`, query by query and head by head, as it is defined."""
    heads, groups = q.shape[1], k.shape[1]
    rows = []
    for start, stop in pairwise(cu_seqlens):
        for t in range(start, stop):
            for head in range(heads):
                g = head // (heads // groups)
                weights = torch.softmax(scale * (k[start : t + 1, g] @ q[t, head]), dim=0)
                rows.append(weights @ v[start : t + 1, g])
    return torch.stack(rows).view(q.shape[0], heads, -1) if rows else q.new_zeros(0, heads, v.shape[2])
