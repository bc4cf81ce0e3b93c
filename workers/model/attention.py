"""Attention layers over a packed batch: NSA and full."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.kernels.full import full_attention
from shoal.kernels.nsa import BlockSizes, Layout, compress, make_layout, nsa_attention
from shoal.kernels.rope import rope_tables, rotate
from shoal.workers.config import AttentionTable, ModelTable, Recipe
from shoal.workers.data.batch import PackedBatch

GATE_HIDDEN = 64
BRANCHES = 3  # compressed, selected, window: the order everywhere


def block_sizes(table: AttentionTable) -> BlockSizes:
    """NSA's block sizes as the kernels take them."""
    return BlockSizes(
        cmp_block=table.cmp_block,
        cmp_stride=table.cmp_stride,
        slc_block=table.slc_block,
        slc_count=table.slc_count,
        slc_initial=table.slc_initial,
        slc_local=table.slc_local,
        window=table.window,
    )


class AttentionContext:
    """What every attention layer of a step shares: rotations, and NSA's block layout of the batch."""

    def __init__(self, recipe: Recipe, batch: PackedBatch, dtype: torch.dtype) -> None:
        model = recipe.model
        self.cu_seqlens = batch.cu_seqlens
        tables = torch.promote_types(dtype, torch.float32)
        self.rotation = rope_tables(batch.positions, model.head_dim, model.rope_base, dtype=tables)
        if recipe.attention.kind == "nsa":
            self.layout: Layout = make_layout(batch.cu_seqlens, block_sizes(recipe.attention), batch.tokens.device)
            self.cmp_rotation = rope_tables(self.layout.cmp_positions, model.head_dim, model.rope_base, dtype=tables)


class FullAttention(nn.Module):
    """Causal attention with grouped queries and RoPE."""

    def __init__(self, model: ModelTable) -> None:
        super().__init__()
        self.model = model
        self.wq = nn.Linear(model.hidden, model.heads * model.head_dim, bias=False)
        self.wk = nn.Linear(model.hidden, model.kv_heads * model.head_dim, bias=False)
        self.wv = nn.Linear(model.hidden, model.kv_heads * model.v_dim, bias=False)
        self.wo = nn.Linear(model.heads * model.v_dim, model.hidden, bias=False)

    def forward(self, x_TH: Tensor, context: AttentionContext) -> Tensor:
        """``[T, hidden] -> [T, hidden]``."""
        m, tokens = self.model, len(x_TH)
        q = rotate(self.wq(x_TH).view(tokens, m.heads, m.head_dim), *context.rotation)
        k = rotate(self.wk(x_TH).view(tokens, m.kv_heads, m.head_dim), *context.rotation)
        v = self.wv(x_TH).view(tokens, m.kv_heads, m.v_dim)
        out = full_attention(q, k, v, context.cu_seqlens, m.head_dim**-0.5)
        return self.wo(out.reshape(tokens, m.heads * m.v_dim))


class Compression(nn.Module):
    """φ: a block of l keys (or values) of one KV head to one, by an MLP with intra-block positions (NSA eq. 7)."""

    def __init__(self, kv_heads: int, block: int, dim: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(kv_heads, block, dim))
        self.w1 = nn.Parameter(torch.empty(kv_heads, block * dim, 2 * dim))
        self.w2 = nn.Parameter(torch.empty(kv_heads, 2 * dim, dim))

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """``[T, KV, D] -> [C, KV, D]``."""
        return compress(x, self.position, self.w1, self.w2, layout)


class NativeSparseAttention(nn.Module):
    """NSA: three branches with their own keys and values, mixed by a sigmoid gate per head (NSA eq. 5).

    φ works on keys before RoPE, so that it sees the same block wherever the block stands; a compressed key is rotated
    at the position of its block's first key.
    """

    def __init__(self, model: ModelTable, table: AttentionTable) -> None:
        super().__init__()
        self.model = model
        self.wq = nn.Linear(model.hidden, model.heads * model.head_dim, bias=False)
        self.wk = nn.Linear(model.hidden, BRANCHES * model.kv_heads * model.head_dim, bias=False)
        self.wv = nn.Linear(model.hidden, BRANCHES * model.kv_heads * model.v_dim, bias=False)
        self.wo = nn.Linear(model.heads * model.v_dim, model.hidden, bias=False)
        self.compress_k = Compression(model.kv_heads, table.cmp_block, model.head_dim)
        self.compress_v = Compression(model.kv_heads, table.cmp_block, model.v_dim)
        self.gate_in = nn.Linear(model.hidden, GATE_HIDDEN, bias=False)
        self.gate_out = nn.Linear(GATE_HIDDEN, BRANCHES * model.heads, bias=False)

    def forward(self, x_TH: Tensor, context: AttentionContext) -> Tensor:
        """``[T, hidden] -> [T, hidden]``."""
        m, tokens, layout = self.model, len(x_TH), context.layout
        q = rotate(self.wq(x_TH).view(tokens, m.heads, m.head_dim), *context.rotation)
        keys = self.wk(x_TH).view(tokens, BRANCHES * m.kv_heads, m.head_dim).split(m.kv_heads, dim=1)
        values = self.wv(x_TH).view(tokens, BRANCHES * m.kv_heads, m.v_dim).split(m.kv_heads, dim=1)
        k_cmp = rotate(self.compress_k(keys[0], layout), *context.cmp_rotation)
        v_cmp = self.compress_v(values[0], layout)
        k_slc, k_win = (rotate(k, *context.rotation) for k in keys[1:])
        gates = torch.sigmoid(self.gate_out(F.silu(self.gate_in(x_TH)))).view(tokens, m.heads, BRANCHES)
        scale = m.head_dim**-0.5
        out = nsa_attention(q, k_cmp, v_cmp, k_slc, values[1], k_win, values[2], gates, layout, scale)
        return self.wo(out.reshape(tokens, m.heads * m.v_dim))
