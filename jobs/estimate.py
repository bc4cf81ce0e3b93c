"""What a recipe costs, by arithmetic alone: parameters, FLOPs a token, memory a rank. Nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.jobs.activations import BRANCHES, GATE_HIDDEN, dispatched_on_a_rank, of_a_pass, sizes_of, width_of
from shoal.workers.slots import may_put, slot_bytes

if TYPE_CHECKING:
    from shoal.kernels.nsa import BlockSizes
    from shoal.workers.config import AttentionTable, ModelTable, Recipe


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
    """Bytes on each rank of one kind, as PyTorch allocates them, and ``slots`` beside that.

    gradients: all there are when the backward passes of a step end. activations: what a forward pass keeps. step:
    the most that there is at a time of both, and of what passes take meanwhile: activations go as gradients come.
    slots: where other ranks put rows, if they may.
    """

    ranks: int
    weights: int
    optimizer: int
    gradients: int
    activations: int
    step: int
    slots: int

    @property
    def total(self) -> int:
        """The most that there is at a time."""
        return self.weights + self.optimizer + self.step + self.slots


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
    """Bytes a rank. Attention shards are replicated, routed experts are divided over the expert ranks. Where rows
    cannot be put, on several nodes or on CPUs, a rank has no slots: it takes less than is said here."""
    p, moe = recipe.parallel, recipe.moe
    sent = dispatched_on_a_rank(recipe)
    each = parameters.shared_experts // moe.shared_experts if sent else 0
    attention = parameters.total - parameters.routed_experts - each * moe.shared_experts
    experts = parameters.routed_experts // (p.expert_ranks if moe.experts else 1) + sent * each
    if p.split:
        return {
            "attention": _memory(recipe, parameters, p.split[0], attention, 0),
            "expert": _memory(recipe, parameters, p.split[1], 0, experts),
        }
    put = may_put(recipe, width_of(recipe))
    return {"colocated": _memory(recipe, parameters, p.ranks, attention, experts, put)}


def _memory(
    recipe: Recipe, parameters: Parameters, ranks: int, attention: int, experts: int, put: bool = False
) -> RankMemory:
    """Of ranks of one kind that each host so many parameters of attention shards and of experts. put: whether rows of
    other ranks' tokens are put into slots.

    Weights have ``train.dtype``; AdamW keeps two moments of at least float32, and where weights are shorter, float32
    masters. Those are shared out among the ranks that hold the same weights, tensor by tensor. A gradient is float32
    from the moment that a backward pass has made it, and stays until the update: over several micro-batches all are
    there already. With ``parallel.shard_dense`` there are parts of weights and gradients, and whole ones of what is
    computed.
    """
    p, m, width = recipe.parallel, recipe.model, width_of(recipe)
    wide = max(width, 4)
    short = width < wide
    table = m.vocab * m.hidden if attention else 0
    part, sharded = -(-attention // p.attention_ranks), p.shard_dense and p.attention_ranks > 1 and attention > 0
    updated = (part if sharded else max(part, table)) + -(-experts // max(1, ranks // p.expert_ranks))
    whole = min(attention, _gathered(recipe, parameters)) if sharded else attention
    weights = (whole + experts) * width + (part * width if sharded and not short else 0)
    buffers = whole * (width + wide) if sharded else 0  # gradients of what is whole, before they are summed and cut
    gradients = ((part if sharded else attention) + experts) * wide
    of_head = 0 if sharded else table * wide
    sizes = sizes_of(recipe, attention > 0, experts > 0, put)
    if recipe.train.accumulate > 1:
        kept, most = of_a_pass(recipe, sizes, 0, 0)
        most += gradients
    else:
        kept, most = of_a_pass(recipe, sizes, (gradients - of_head) // m.layers, of_head)
    joined = attention * wide if ranks > 1 and not sharded else 0  # copies of those that travel together
    return RankMemory(
        ranks=ranks,
        weights=weights,
        optimizer=updated * (2 * wide + (wide if short else 0)),
        gradients=gradients + buffers,
        activations=kept,
        step=buffers + max(most, gradients + joined),
        slots=slot_bytes(recipe, width) if put else 0,
    )


def _gathered(recipe: Recipe, parameters: Parameters) -> int:
    """Sharded parameters that are whole at one time: those outside blocks, a block, and one fetched ahead."""
    m, moe = recipe.model, recipe.moe
    dense, sparse = (m.dense_layers, m.layers - m.dense_layers) if moe.experts else (m.layers, 0)
    local = parameters.router + (parameters.shared_experts if moe.shared == "local" else 0)
    ffn = max(parameters.dense_ffn // max(1, dense), local // max(1, sparse))
    block = (parameters.attention + parameters.compression) // m.layers + 2 * m.hidden + ffn
    return parameters.embedding + m.hidden + 2 * block
