"""What a recipe costs, by arithmetic alone: parameters, FLOPs a token, memory a rank. Nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.kernels.nsa import BlockSizes
    from shoal.workers.config import AttentionTable, ModelTable, Recipe

GATE_HIDDEN = 64  # hidden size of NSA's gate MLP: hidden -> 64 -> 3 * heads
BRANCHES = 3  # compression, selection, window: each with K and V projections of its own
LOSS_CHUNK = 4096  # tokens whose logits exist at one time


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters. ``active``: all but the routed experts that a token does not use."""

    embedding: int
    attention: int
    compression: int
    dense_ffn: int
    routed_experts: int
    shared_experts: int
    router: int
    norms: int
    unused: int

    @property
    def total(self) -> int:
        """All parameters."""
        return (
            self.embedding + self.attention + self.compression + self.dense_ffn
            + self.routed_experts + self.shared_experts + self.router + self.norms
        )  # fmt: skip

    @property
    def active(self) -> int:
        """Parameters that one token uses, its embedding table and the output layer counted whole."""
        return self.total - self.unused


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token's forward pass; a multiplication and an addition are two. Training takes three times it.

    projections: products with weights. attention: scores and weighted values, over the keys that are really read, in
    the mean over a document of ``train.sequence`` tokens. compression: NSA's block MLPs.
    """

    projections: float
    attention: float
    compression: float

    @property
    def forward(self) -> float:
        """All of it."""
        return self.projections + self.attention + self.compression

    @property
    def training(self) -> float:
        """Forward and backward."""
        return 3 * self.forward


@dataclass(frozen=True)
class RankMemory:
    """Bytes on each rank of one kind. ``activations`` is rough: what an unfused backward pass keeps."""

    ranks: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Estimate:
    """What ``shoal config show`` prints. ``memory`` has the key ``colocated``, or ``attention`` and ``expert``."""

    parameters: Parameters
    flops: Flops
    memory: dict[str, RankMemory]


def estimate(recipe: Recipe) -> Estimate:
    """Parameters, FLOPs a token and memory a rank of a recipe."""
    parameters = count_parameters(recipe)
    return Estimate(parameters, count_flops(recipe, parameters), count_memory(recipe, parameters))


def count_parameters(recipe: Recipe) -> Parameters:
    """Sizes of the weights, all without bias."""
    m, moe = recipe.model, recipe.moe
    moe_layers = m.layers - m.dense_layers if moe.experts else 0
    expert = 3 * m.hidden * moe.expert_hidden
    return Parameters(
        embedding=m.vocab * m.hidden * (1 if m.tied_embeddings else 2),
        attention=m.layers * _attention(m, recipe.attention),
        compression=m.layers * _compression(m, recipe.attention),
        dense_ffn=(m.layers - moe_layers) * 3 * m.hidden * m.dense_hidden,
        routed_experts=moe_layers * moe.experts * expert,
        shared_experts=moe_layers * moe.shared_experts * expert,
        router=moe_layers * moe.experts * m.hidden if moe.router != "hash" else 0,
        norms=(2 * m.layers + 1) * m.hidden,
        unused=moe_layers * (moe.experts - moe.top_k) * expert,
    )


def _attention(m: ModelTable, a: AttentionTable) -> int:
    """Q, K, V and output projections of a layer, and NSA's gate."""
    q_and_out = m.hidden * m.heads * (m.head_dim + m.v_dim)
    k_and_v = m.hidden * m.kv_heads * (m.head_dim + m.v_dim)
    if a.kind == "full":
        return q_and_out + k_and_v
    return q_and_out + BRANCHES * k_and_v + GATE_HIDDEN * (m.hidden + BRANCHES * m.heads)


def _compression(m: ModelTable, a: AttentionTable) -> int:
    """phi of a layer, for K and for V: positions ``[kv, l, dim]`` and an MLP l*dim -> 2*dim -> dim per KV head."""
    if a.kind == "full":
        return 0
    return sum(m.kv_heads * (a.cmp_block * dim + _mlp(a, dim)) for dim in (m.head_dim, m.v_dim))


def _mlp(a: AttentionTable | BlockSizes, dim: int) -> int:
    return (a.cmp_block * dim) * (2 * dim) + (2 * dim) * dim


def count_flops(recipe: Recipe, parameters: Parameters) -> Flops:
    """Forward FLOPs of a token, in the mean over a document of ``train.sequence`` tokens."""
    m, a, length = recipe.model, recipe.attention, recipe.train.sequence
    table = m.vocab * m.hidden  # looked up, not multiplied; tied, the same table is the output layer
    multiplied = parameters.active - parameters.norms - parameters.compression
    multiplied -= 0 if m.tied_embeddings else table
    each = attention_flops(a, length, m.heads, m.kv_heads, (m.head_dim, m.v_dim))
    compression = each.pop("phi", 0.0)
    return Flops(
        projections=2.0 * multiplied,
        attention=m.layers * sum(each.values()),
        compression=m.layers * compression,
    )


def attention_flops(
    a: AttentionTable | BlockSizes, length: int, heads: int, kv_heads: int, dims: tuple[int, int]
) -> dict[str, float]:
    """FLOPs of a token in one layer's attention, forward, in the mean over a document of ``length`` tokens.

    Of each branch, as :func:`keys_read` names them, and of NSA's φ (``phi``). dims: d_qk and d_v.
    """
    flops = {branch: 2.0 * heads * sum(dims) * keys / length for branch, keys in keys_read(a, length).items()}
    if "full" not in flops:
        phi = kv_heads * sum(_mlp(a, dim) for dim in dims)
        flops["phi"] = 2.0 * phi * _compressed_blocks(a, length) / length
    return flops


def keys_read(a: AttentionTable | BlockSizes, length: int) -> dict[str, int]:
    """Keys that all queries of a document of ``length`` tokens read, per branch (a compressed block counts as one).

    cmp: blocks that end at or before the query (NSA eq. 7). slc: n blocks of l' keys, the query's own one up to the
    query (NSA eq. 11-12). win: the last w keys, the query's own included.
    """
    if getattr(a, "kind", "nsa") == "full":  # block sizes alone are of NSA
        return {"full": _up_to(length, length)}
    blocks, rest = divmod(length, a.slc_block)
    ends = blocks * _up_to(a.slc_block, a.slc_block) + _up_to(rest, rest)  # the query's own block, up to the query
    full = a.slc_block * (a.slc_block * _clipped(blocks, a.slc_count - 1) + rest * min(blocks, a.slc_count - 1))
    return {"cmp": _visible_blocks(a, length), "slc": full + ends, "win": _up_to(length, a.window)}


def _up_to(queries: int, limit: int) -> int:
    """Sum of min(t, limit) for t = 1 … queries."""
    short = min(queries, limit)
    return short * (short + 1) // 2 + (queries - short) * limit


def _clipped(blocks: int, limit: int) -> int:
    """Sum of min(i, limit) for i = 0 … blocks - 1."""
    return _up_to(blocks - 1, limit) if blocks else 0


def _compressed_blocks(a: AttentionTable | BlockSizes, length: int) -> int:
    """How many blocks of l keys, one every d, lie in a document."""
    return (length - a.cmp_block) // a.cmp_stride + 1 if length >= a.cmp_block else 0


def _visible_blocks(a: AttentionTable | BlockSizes, length: int) -> int:
    """Sum over all queries of the blocks that have ended: block i is seen by length - (i*d + l) + 1 queries."""
    count = _compressed_blocks(a, length)
    return count * (length - a.cmp_block + 1) - a.cmp_stride * (count * (count - 1) // 2)


def count_memory(recipe: Recipe, parameters: Parameters) -> dict[str, RankMemory]:
    """Bytes a rank. Attention shards are replicated, routed experts are divided over the expert ranks.

    Weights and gradients have ``train.dtype``; AdamW keeps two moments of at least float32. Where the weights are
    shorter than that, there is a float32 master copy of them, and float32 gradients beside the short ones. Moments and
    masters are shared out among the ranks that hold the same weights, tensor by tensor. With ``parallel.shard_dense``
    attention ranks keep parts of their weights and gradients, and whole ones of what is computed (:func:`_gathered`).
    """
    p, moe = recipe.parallel, recipe.moe
    shared = parameters.shared_experts
    everywhere = parameters.total - parameters.routed_experts - shared
    dispatched = moe.shared == "dispatched"
    experts = (parameters.routed_experts + (shared if dispatched else 0)) // (p.expert_ranks if moe.experts else 1)
    attention = everywhere + (0 if dispatched else shared)
    tokens = recipe.train.batch // recipe.train.accumulate * recipe.train.sequence
    kept = _attention_activations(recipe, tokens // p.attention_ranks)
    rows = _expert_activations(recipe, tokens)
    part, parts = -(-attention // p.attention_ranks), 0
    updated = max(part, recipe.model.vocab * recipe.model.hidden)
    if p.shard_dense and p.attention_ranks > 1:
        attention, updated, parts = min(attention, _gathered(recipe, parameters)), part, part
    if p.split:
        return {
            "attention": _memory(recipe, p.split[0], attention, updated, kept, parts),
            "expert": _memory(recipe, p.split[1], experts, experts, rows // p.split[1]),
        }
    updated += -(-experts // (p.ranks // p.expert_ranks))
    return {"colocated": _memory(recipe, p.ranks, attention + experts, updated, kept + rows // p.ranks, parts)}


def _gathered(recipe: Recipe, parameters: Parameters) -> int:
    """Sharded parameters that are whole at one time: those outside blocks, a block, and one fetched ahead."""
    m, moe = recipe.model, recipe.moe
    dense, sparse = (m.dense_layers, m.layers - m.dense_layers) if moe.experts else (m.layers, 0)
    local = parameters.router + (parameters.shared_experts if moe.shared == "local" else 0)
    ffn = max(parameters.dense_ffn // max(1, dense), local // max(1, sparse))
    block = (parameters.attention + parameters.compression) // m.layers + 2 * m.hidden + ffn
    return parameters.embedding + m.hidden + 2 * block


def _memory(recipe: Recipe, ranks: int, parameters: int, updated: int, activations: int, parts: int = 0) -> RankMemory:
    """parameters: those that are whole on the rank. updated: how many have their masters and moments there. parts: how
    many it keeps beside them of sharded ones, as masters, with gradients as long."""
    width = _bytes_of(recipe)
    state = max(width, 4)
    master = state if width < state else 0
    return RankMemory(
        ranks=ranks,
        weights=parameters * width + (0 if master else parts * width),
        gradients=parameters * (width + master) + parts * state,
        optimizer=updated * (2 * state + master),
        activations=activations,
    )


def _bytes_of(recipe: Recipe) -> int:
    """Bytes of a weight. ``auto`` counts as bfloat16 unless the recipe is for a CPU."""
    dtype = recipe.train.dtype
    if dtype == "auto":
        dtype = "float32" if recipe.parallel.device == "cpu" else "bfloat16"
    return {"bfloat16": 2, "float32": 4, "float64": 8}[dtype]


def _kept_layers(recipe: Recipe) -> tuple[int, int]:
    """Dense and MoE layers whose activations exist at one time: all but those computed again, one of which does."""
    m, again = recipe.model, recipe.train.recompute
    dense = m.dense_layers if recipe.moe.experts else m.layers
    gone_dense, gone_moe = min(again, dense), max(0, again - dense)
    return dense - gone_dense + (gone_dense > 0 and not gone_moe), m.layers - dense - gone_moe + (gone_moe > 0)


def _attention_activations(recipe: Recipe, tokens: int) -> int:
    """Bytes kept for the backward pass by all that stands on an attention rank.

    A layer keeps its two inputs and their norms, Q, K, V and the branches' outputs, and the dense or shared FFN's
    gate, up and product; one that is computed again its input. The head keeps float32 logits and their gradient, of a
    few thousand tokens at a time.
    """
    m, moe = recipe.model, recipe.moe
    branches = BRANCHES if recipe.attention.kind == "nsa" else 1
    mixed = m.heads * (m.head_dim + (branches + 1) * m.v_dim) + branches * m.kv_heads * (m.head_dim + m.v_dim)
    dense_layers, moe_layers = _kept_layers(recipe)
    local = moe.shared_experts * moe.expert_hidden if moe.shared == "local" else 0
    ffn = 3 * (dense_layers * m.dense_hidden + moe_layers * local)
    elements = (dense_layers + moe_layers) * (4 * m.hidden + mixed) + ffn + recipe.train.recompute * m.hidden
    return tokens * elements * _bytes_of(recipe) + min(tokens, LOSS_CHUNK) * 2 * 4 * m.vocab


def _expert_activations(recipe: Recipe, tokens: int) -> int:
    """Bytes kept by all expert ranks together: rows in, gate, up, product, rows out, evenly balanced."""
    m, moe = recipe.model, recipe.moe
    if not moe.experts:
        return 0
    chosen = moe.top_k + (moe.shared_experts if moe.shared == "dispatched" else 0)
    return _kept_layers(recipe)[1] * tokens * chosen * (2 * m.hidden + 3 * moe.expert_hidden) * _bytes_of(recipe)
