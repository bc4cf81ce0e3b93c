"""What attention layers of training attend to: a packed batch that is all here, or that several ranks share."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.full import full_attention
from shoal.kernels.nsa import make_layout, nsa_attention
from shoal.kernels.rope import rotate
from shoal.workers.config import Recipe
from shoal.workers.data.batch import PackedBatch
from shoal.workers.mesh import Group
from shoal.workers.model.attention import Attending, FullAttention, NativeSparseAttention, block_sizes, rotations
from shoal.workers.ring import gather_attention, key_plan, make_ring, ring_attention
from shoal.workers.sequence import make_sequence, sequence_attention, zigzag


def attention_context(recipe: Recipe, batch: PackedBatch, dtype: torch.dtype, group: Group | None) -> Attending:
    """For a batch of :func:`own_part`, or a whole one. group: the ranks that may share it."""
    if batch.rows is None:
        return AttentionContext(recipe, batch, dtype)
    assert group is not None
    return SharedContext(recipe, batch, dtype, group)


def own_part(recipe: Recipe, batch: PackedBatch, group: Group | None) -> PackedBatch:
    """The tokens of a packed batch that this rank of a context group computes, of two segments. No communication."""
    if group is None or group.size == 1 or not len(batch.tokens):
        return batch
    # pages of a single document stay whole; around a ring, segments must be of equal length
    multiple = recipe.attention.slc_block if recipe.attention.kind == "nsa" else 1
    return batch.part(zigzag(len(batch.tokens), group.size, multiple)[group.index])


class AttentionContext:
    """Attention within a packed batch: rotations, and NSA's block layout."""

    def __init__(self, recipe: Recipe, batch: PackedBatch, dtype: torch.dtype) -> None:
        self.cu_seqlens, self.backend = batch.cu_seqlens, recipe.attention.backend
        # A layer that is computed again runs without gradients first: both times it must be the same kernel.
        self.trained = torch.is_grad_enabled()
        self.rotation = rotations(recipe.model, batch.positions, dtype)
        if recipe.attention.kind == "nsa":
            self.layout = make_layout(batch.cu_seqlens, block_sizes(recipe.attention), batch.tokens.device)
            self.cmp_rotation = rotations(recipe.model, self.layout.cmp_positions, dtype)

    def full(self, layer: FullAttention, x_TH: Tensor) -> Tensor:
        q, k, v = layer.project(x_TH, self.rotation)
        return full_attention(q, k, v, self.cu_seqlens, layer.scale, self.trained)

    def nsa(self, layer: NativeSparseAttention, x_TH: Tensor) -> Tensor:
        p = layer.project(x_TH, self.rotation)
        k_cmp = rotate(layer.compress_k(p.k_cmp, self.layout, self.backend), *self.cmp_rotation)
        v_cmp = layer.compress_v(p.v_cmp, self.layout, self.backend)
        keys = (k_cmp, v_cmp, p.k_slc, p.v_slc, p.k_win, p.v_win)
        return nsa_attention(p.q, *keys, p.gates, self.layout, layer.scale, self.backend)


class SharedContext:
    """Attention within a packed batch that the ranks of a context group share. All of them call each layer."""

    def __init__(self, recipe: Recipe, batch: PackedBatch, dtype: torch.dtype, group: Group) -> None:
        assert batch.rows is not None
        self.cu_seqlens, self.rows, self.group = batch.cu_seqlens, batch.rows, group
        self.backend = recipe.attention.backend
        self.wide, self.heads = recipe.parallel.context_gradients == "float32", recipe.parallel.context_heads
        self.rotation = rotations(recipe.model, batch.positions, dtype)
        if recipe.attention.kind == "nsa":
            device = batch.tokens.device
            self.sequence = make_sequence(batch.cu_seqlens, block_sizes(recipe.attention), group, device)
            self.cmp_rotation = rotations(recipe.model, self.sequence.own.cmp_positions, dtype)

    def full(self, layer: FullAttention, x_TH: Tensor) -> Tensor:
        q, k, v = layer.project(x_TH, self.rotation)
        tokens, ranks = self.cu_seqlens[-1], self.group.size
        if len(self.cu_seqlens) == 2 and tokens % (2 * ranks) == 0:
            return ring_attention(q, k, v, make_ring(self.group, q), layer.scale)
        plan = key_plan(self.cu_seqlens, zigzag(tokens, ranks, 1), self.group)
        return gather_attention(q, k, v, self.cu_seqlens, self.rows, plan, layer.scale)

    def nsa(self, layer: NativeSparseAttention, x_TH: Tensor) -> Tensor:
        p = layer.project(x_TH, self.rotation)
        own = self.sequence.own
        compress = (
            lambda keys: rotate(layer.compress_k(keys, own, self.backend), *self.cmp_rotation),
            lambda values: layer.compress_v(values, own, self.backend),
        )
        branches = ((p.k_cmp, p.v_cmp), (p.k_slc, p.v_slc), (p.k_win, p.v_win))
        keys = (p.q, *branches, p.gates, compress)
        settings = (self.sequence, layer.scale, self.backend)
        return sequence_attention(*keys, *settings, wide=self.wide, fetching=layer.fetching, heads=self.heads)
