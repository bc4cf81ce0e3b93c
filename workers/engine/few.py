"""A model's layers over few rows, in a third of the launches: what a decode step of one request takes long for.

The same layers as in :meth:`Transformer.stages`, cut at other places: what adds a layer's results to the residual
stream norms them for the next one, and chooses experts; projections are one product; and where a rank has all of a
layer's experts, its tokens' choices are computed where they stand, without sorting them. Layers whose experts lie on
several ranks exchange rows as ever.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shoal.kernels.few import add_norm
from shoal.kernels.moe.few import FewChoice, few_choices, few_experts
from shoal.kernels.nsa.paged import PagedCache, reads_in_place
from shoal.workers.config import Recipe
from shoal.workers.data.batch import PackedBatch
from shoal.workers.engine.cache import PagedAttention
from shoal.workers.model import Transformer
from shoal.workers.model.attention import NativeSparseAttention
from shoal.workers.model.feedforward import MoE, Stages
from shoal.workers.model.load import MoELoad


def by_triton(model: Transformer, caches: dict[nn.Module, PagedCache]) -> bool:
    """Whether this rank computes NSA, and Triton does it, in the pages: only then :func:`few_stages` gains anything."""
    recipe: Recipe = model.recipe
    if not caches or recipe.attention.kind != "nsa":
        return False
    q = model.vocabulary.new_empty(0, recipe.model.heads, recipe.model.head_dim)
    return reads_in_place(q, next(iter(caches.values())), recipe.attention.backend)


def few_stages(
    model: Transformer, batch: PackedBatch, load: MoELoad, attention: PagedAttention, triton: bool = True
) -> Stages:
    """What :meth:`Transformer.stages` computes, of up to ``MOST`` rows of a step of fixed shape, to rounding.

    triton: whether by Triton, or by the same steps in PyTorch's operations.
    """
    layers: list[Any] = list(model.layers)
    norms = [*(layer.attention_norm for layer in layers[1:]), model.norm]
    x = model.embedding(batch.tokens)
    normed = layers[0].attention_norm(x)
    for layer, norm in zip(layers, norms, strict=True):
        assert isinstance(layer.attention, NativeSparseAttention)
        parts, moe, gates = attention.few_nsa(layer.attention, normed, triton), layer.moe, None
        if moe is not None and moe.whole:
            x, normed, gates, chosen = _choices(moe, x, parts, layer.ffn_norm, load, triton)
            load.chosen.append(chosen)
            shared = (moe.shared.gate_up, moe.shared.down) if hasattr(moe, "shared") else None
            parts = few_experts(normed, chosen, moe.experts.gate_up, moe.experts.down, shared, triton)
        else:
            x, normed = add_norm(x, parts, layer.ffn_norm.weight, layer.ffn_norm.eps, triton)
            if moe is None:
                parts = layer.ffn(normed)[:, None]
            else:
                parts = (yield from moe.stages(normed, batch.tokens, load))[:, None]
        x, normed = add_norm(x, parts, norm.weight, norm.eps, triton, gates)
    return normed


def _choices(moe: MoE, x: Tensor, parts: Tensor, norm: nn.RMSNorm, load: MoELoad, triton: bool) -> FewChoice:
    """Who chooses is what the layer has; whose choices count, what the step says."""
    router = moe.router(load)
    assert router is not None and load.live is not None and norm.eps is not None
    return few_choices(x, parts, norm.weight, norm.eps, load.live.mask, router, triton)
