"""Attention layers, NSA and full; what they attend to stands in :mod:`shoal.workers.model.contexts`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.kernels.nsa import BlockSizes, Layout, compress
from shoal.kernels.nsa.attention import Backend
from shoal.kernels.nsa.compress import OwnBlocks
from shoal.kernels.nsa.paged_store import Heads
from shoal.kernels.rope import Yarn, rope_rates, rope_tables, rotate
from shoal.workers.config import AttentionTable, ModelTable
from shoal.workers.pull import Fetching

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


def rotations(model: ModelTable, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """RoPE's cosines and sines at ``positions [T]``, each ``[T, d_qk/2]``, for activations of ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    return rope_tables(positions, model.head_dim, model.rope_base, wide, _yarn(model))


def rotation_rates(model: ModelTable, device: torch.device) -> Tensor:
    """``[d_qk/2 + 1]`` float64: RoPE's angles a token, and the factor on its cosines and sines."""
    rates, size = rope_rates(model.head_dim, model.rope_base, device, _yarn(model))
    return torch.cat((rates, rates.new_full((1,), size)))


def _yarn(model: ModelTable) -> Yarn | None:
    return Yarn(model.rope_factor, model.rope_original) if model.rope_scaling == "yarn" else None


@dataclass(frozen=True)
class Projected:
    """Queries, keys, values and gates of a packed batch, as an NSA layer makes them of its input.

    q: ``[T, H, d_qk]``, rotated. k_cmp, v_cmp: ``[T, KV, D]``, what φ takes: not rotated. k_slc, k_win: rotated. gates:
    ``[T, H, 3]``, after the sigmoid.
    """

    q: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    gates: Tensor


class Attending(Protocol):
    """What the attention layers of one forward pass share, and what they attend to: the batch itself, or a cache."""

    def full(self, layer: FullAttention, x_TH: Tensor) -> Tensor:
        """``[T, H, d_v]``, before the output projection."""
        ...

    def nsa(self, layer: NativeSparseAttention, x_TH: Tensor) -> Tensor:
        """``[T, H, d_v]``, before the output projection."""
        ...


class FullAttention(nn.Module):
    """Causal attention with grouped queries and RoPE."""

    def __init__(self, model: ModelTable) -> None:
        super().__init__()
        self.model = model
        self.wq = nn.Linear(model.hidden, model.heads * model.head_dim, bias=False)
        self.wk = nn.Linear(model.hidden, model.kv_heads * model.head_dim, bias=False)
        self.wv = nn.Linear(model.hidden, model.kv_heads * model.v_dim, bias=False)
        self.wo = nn.Linear(model.heads * model.v_dim, model.hidden, bias=False)

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return float(self.model.head_dim**-0.5)

    def project(self, x_TH: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[T, H, d_qk]``, k ``[T, KV, d_qk]``, v ``[T, KV, d_v]`` of ``[T, hidden]``; q and k rotated."""
        m, tokens = self.model, len(x_TH)
        q = rotate(self.wq(x_TH).view(tokens, m.heads, m.head_dim), *rotation)
        k = rotate(self.wk(x_TH).view(tokens, m.kv_heads, m.head_dim), *rotation)
        return q, k, self.wv(x_TH).view(tokens, m.kv_heads, m.v_dim)

    def forward(self, x_TH: Tensor, context: Attending) -> Tensor:
        """``[T, hidden] -> [T, hidden]``."""
        return self.wo(context.full(self, x_TH).flatten(1))


class Compression(nn.Module):
    """φ: a block of l keys (or values) of one KV head to one, by an MLP with intra-block positions (NSA eq. 7)."""

    def __init__(self, kv_heads: int, block: int, dim: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(kv_heads, block, dim))
        self.w1 = nn.Parameter(torch.empty(kv_heads, block * dim, 2 * dim))
        self.w2 = nn.Parameter(torch.empty(kv_heads, 2 * dim, dim))

    def forward(self, x: Tensor, layout: Layout | OwnBlocks, backend: Backend = "auto") -> Tensor:
        """``[T, KV, D] -> [C, KV, D]``."""
        return compress(x, self.position, self.w1, self.w2, layout, backend)


class NativeSparseAttention(nn.Module):
    """NSA: three branches with their own keys and values, mixed by a sigmoid gate per head (NSA eq. 5).

    φ works on keys before RoPE, so that it sees the same block wherever the block stands; a compressed key is rotated
    at the position of its block's first key. pull: whether, where ranks share sequences, only chosen pages are fetched.
    """

    def __init__(self, model: ModelTable, table: AttentionTable, pull: bool = False) -> None:
        super().__init__()
        self.model, self.fetching = model, Fetching(pull)
        self.wq = nn.Linear(model.hidden, model.heads * model.head_dim, bias=False)
        self.wk = nn.Linear(model.hidden, BRANCHES * model.kv_heads * model.head_dim, bias=False)
        self.wv = nn.Linear(model.hidden, BRANCHES * model.kv_heads * model.v_dim, bias=False)
        self.wo = nn.Linear(model.heads * model.v_dim, model.hidden, bias=False)
        self.compress_k = Compression(model.kv_heads, table.cmp_block, model.head_dim)
        self.compress_v = Compression(model.kv_heads, table.cmp_block, model.v_dim)
        self.gate_in = nn.Linear(model.hidden, GATE_HIDDEN, bias=False)
        self.gate_out = nn.Linear(GATE_HIDDEN, BRANCHES * model.heads, bias=False)
        self.gate = nn.Sigmoid()  # a module, so that who watches gates hears what attention uses

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return float(self.model.head_dim**-0.5)

    def heads(self, x_TH: Tensor) -> Heads:
        """Queries, keys and values of ``[T, hidden]``, not rotated."""
        return self.split(self.wq(x_TH), self.wk(x_TH), self.wv(x_TH))

    def split(self, q: Tensor, k: Tensor, v: Tensor) -> Heads:
        """Products with the three weights, ``[T, …]``, by heads."""
        m, tokens = self.model, len(q)
        q = q.view(tokens, m.heads, m.head_dim)
        k = k.view(tokens, BRANCHES, m.kv_heads, m.head_dim)
        return Heads(q, k, v.view(tokens, BRANCHES, m.kv_heads, m.v_dim))

    def gates(self, x_TH: Tensor) -> Tensor:
        """``[T, hidden] -> [T, H, 3]``, after the sigmoid."""
        return self.gate(self.gate_out(F.silu(self.gate_in(x_TH)))).view(len(x_TH), self.model.heads, BRANCHES)

    def project(self, x_TH: Tensor, rotation: tuple[Tensor, Tensor]) -> Projected:
        """What the branches read, of ``[T, hidden]``."""
        heads, kv = self.heads(x_TH), self.model.kv_heads
        k_cmp, others = heads.k.split((1, BRANCHES - 1), dim=1)
        k_slc, k_win = rotate(others.flatten(1, 2), *rotation).split(kv, dim=1)
        v_cmp, v_slc, v_win = heads.v.flatten(1, 2).split(kv, dim=1)
        q = rotate(heads.q, *rotation)
        return Projected(q, k_cmp[:, 0], v_cmp, k_slc, v_slc, k_win, v_win, self.gates(x_TH))

    def forward(self, x_TH: Tensor, context: Attending) -> Tensor:
        """``[T, hidden] -> [T, hidden]``."""
        return self.wo(context.nsa(self, x_TH).flatten(1))
