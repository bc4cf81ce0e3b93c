"""What a layer keeps for its backward pass, and takes in it, in bytes: a formula for each kind of layer.

In 16 bits on a GPU a layer keeps what its kernels ask for, and computes the rest again. Elsewhere PyTorch's operators
keep a little more. ``tests/jobs/test_activations.py`` holds the formulas against the tensors that the model's own code
keeps, and all of the estimate against peaks measured on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.workers.slots import capacity, has_room, needed, rows_at_most, sent_shared
from shoal.workers.volume import PACKED

if TYPE_CHECKING:
    from shoal.workers.config import Recipe

GATE_HIDDEN = 64  # hidden size of NSA's gate MLP: hidden -> 64 -> 3 * heads
BRANCHES = 3  # compression, selection, window: each with K and V projections of its own
LOSS_CHUNK = 4096  # tokens whose logits exist at one time
GRADIENT_CHUNK = 3072  # queries whose parts of gradients exist at one time (kernels/nsa/triton_gather_grad.py)
UNEVEN = 1.5
"""Rows of the busiest of several ranks over its fair share. Four measured runs with fresh routers, over 2 and 4 ranks,
come to 1.1 to 1.6; balance losses even it later."""


@dataclass(frozen=True)
class Layer:
    """Bytes. input: what a layer that is computed again keeps. kept: from its forward to its backward pass, the input
    among it. most: the most that there is of it at a time, in its backward pass, what it keeps among it."""

    input: int
    kept: int
    most: int


@dataclass(frozen=True)
class Sizes:
    """Of one rank and micro-batch. width: bytes of an activation; wide: of what is computed in float32 at least; fused:
    whether kernels for 16 bits on a GPU compute. tokens: that it attends with; rows: of its routed (and dispatched
    shared) experts; arrived: tokens that came from other ranks for those."""

    width: int
    wide: int
    fused: bool
    tokens: int
    rows: int
    arrived: int


def width_of(recipe: Recipe) -> int:
    """Bytes of a weight and of an activation. ``auto`` counts as bfloat16 unless the recipe is for a CPU."""
    dtype = recipe.train.dtype
    if dtype == "auto":
        dtype = "float32" if recipe.parallel.device == "cpu" else "bfloat16"
    return {"bfloat16": 2, "float32": 4, "float64": 8}[dtype]


def sizes_of(recipe: Recipe, attends: bool, hosts_experts: bool, put: bool = False) -> Sizes:
    """Of a rank that hosts an attention shard, an expert shard, or both; with as many rows as the busiest one. put:
    whether rows of all tokens come, needed or not."""
    p, t, moe = recipe.parallel, recipe.train, recipe.moe
    width = width_of(recipe)
    of_all = t.batch // t.accumulate * t.sequence
    tokens = of_all // p.attention_ranks if attends else 0
    rows = arrived = 0
    if moe.experts and hosts_experts:
        hosts = p.expert_ranks
        of_set = of_all if p.split else of_all // p.ranks * hosts
        share = min(1.0, UNEVEN / hosts) if hosts > 1 else 1.0
        rows = int(of_set * (moe.top_k * share + dispatched_on_a_rank(recipe)))
        if put:
            rows = max(rows, rows_asked_for(recipe, width))
        arrived = int((of_set - tokens) * (1.0 if put else max(needed(recipe))))
    return Sizes(width, max(width, 4), width == 2 and p.device != "cpu", tokens, rows, arrived)


def rows_asked_for(recipe: Recipe, width: int) -> int:
    """Rows of a rank's experts for which there is memory whether they come or not, where rows are put; 0 where their
    number is read."""
    moe, ranks = recipe.moe, recipe.parallel.expert_ranks
    choices, local = moe.top_k + sent_shared(recipe), moe.experts // ranks + dispatched_on_a_rank(recipe)
    most = rows_at_most(capacity(recipe), ranks, choices, local)
    return most if has_room(most, recipe.model.hidden * width) else 0


def dispatched_on_a_rank(recipe: Recipe) -> int:
    """How many of the shared experts, which every token goes to, a rank hosts at most."""
    return -(-sent_shared(recipe) // recipe.parallel.expert_ranks)


def layers(recipe: Recipe, s: Sizes) -> list[Layer]:
    """All of them, in order."""
    m, moe = recipe.model, recipe.moe
    attention, ffn, experts = _attention(recipe, s), _dense(recipe, s), _experts(recipe, s)
    dense = m.dense_layers if moe.experts else m.layers
    return [_block(recipe, s, attention, ffn if i < dense else experts) for i in range(m.layers)]


def _block(recipe: Recipe, s: Sizes, attention: Layer, ffn: Layer) -> Layer:
    """A layer of both, with its residual stream."""
    stream = s.tokens * recipe.model.hidden * s.width
    norms = 2 * (stream + _norm(recipe, s))
    kept = norms + attention.kept + ffn.kept
    flowing = 2 * stream  # gradients of the stream, and of what a norm gave
    most = max(kept + ffn.most - ffn.kept, norms + attention.most) + flowing
    return Layer(stream, kept, most)


def _norm(recipe: Recipe, s: Sizes) -> int:
    """What a norm gives, and a number of each row; without a kernel of its own what it scales instead, and its input
    as float32."""
    hidden = recipe.model.hidden
    beside = 4 if s.fused else hidden * (s.wide if s.width == s.wide else 2 * s.wide)
    return s.tokens * (hidden * s.width + beside)


def _attention(recipe: Recipe, s: Sizes) -> Layer:
    if not s.tokens:
        return Layer(0, 0, 0)
    return _sparse_attention(recipe, s) if recipe.attention.kind == "nsa" else _full_attention(recipe, s)


def _full_attention(recipe: Recipe, s: Sizes) -> Layer:
    """Q, K, V, the output and its log-sum-exps, as FlashAttention and cuDNN want them. Keys are there once for each
    head, since cuDNN repeats them, and heads are padded to one size. Where ranks share sequences, they are not
    repeated, but there may be those of all ranks, and the output is there twice, in two orders."""
    m, context = recipe.model, recipe.parallel.context
    dim, heads = max(m.head_dim, m.v_dim), m.heads
    keys = heads if context == 1 else m.kv_heads * context
    outputs = 1 + (context > 1 or m.v_dim < dim)
    kept = s.tokens * ((heads * dim * (1 + outputs) + 2 * keys * dim) * s.width + 4 * heads)
    # gradients of all of these, those of queries in float32 while they are added up
    return Layer(0, kept, kept + s.tokens * ((2 * heads + 2 * keys) * dim * s.width + 4 * heads * dim))


def _sparse_attention(recipe: Recipe, s: Sizes) -> Layer:
    """Inputs of the kernels, the branches' outputs with their log-sum-exps, their sum, and the chosen blocks."""
    m, a, context = recipe.model, recipe.attention, recipe.parallel.context
    dims, q, out = m.head_dim + m.v_dim, m.heads * m.head_dim, m.heads * m.v_dim
    projected = q + m.kv_heads * (2 * m.head_dim + BRANCHES * m.v_dim)  # keys of the compression are copied below
    gates = 2 * GATE_HIDDEN + BRANCHES * m.heads
    # φ: the keys that it takes, and of each block its hidden layer before and after silu, and what comes of it
    phi = m.kv_heads * dims + m.kv_heads * (4 * dims + dims * context) / a.cmp_stride
    fetched = m.kv_heads * dims if context > 1 else 0  # keys of the windows
    elements = projected + gates + phi + fetched + out
    branches = BRANCHES * out * (s.width if s.fused else s.wide)
    numbers = BRANCHES * m.heads + m.kv_heads * a.slc_count
    weights = 2 * m.kv_heads * a.cmp_block * (m.head_dim**2 + m.v_dim**2)  # φ's, in the order of its product
    kept = s.tokens * (elements * s.width + branches + 4 * numbers) + weights * s.width
    # The branches' outputs go as soon as the gradients of the gates are known; that of their sum takes its place. Then
    # there are gradients of queries, in float32 and rounded, and of keys, and for each row what the kernels read of it.
    gone = s.tokens * (branches + 4 * BRANCHES * m.heads)
    if context > 1:
        meanwhile = _shared_backward(recipe, s, gone)
    else:
        keys, row = m.kv_heads * dims, 8 * BRANCHES * m.heads
        gradients = 4 * q + keys * ((BRANCHES + 2) * s.width + 4) + 8 * m.kv_heads * a.slc_count
        # Parts of the queries' gradients are gone by the time these are rounded.
        beside = max(s.tokens, min(s.tokens, GRADIENT_CHUNK) * a.slc_count) * q * s.width
        meanwhile = s.tokens * row + max(0, s.tokens * gradients - gone + beside)
    return Layer(0, int(kept), int(kept + meanwhile))


def _shared_backward(recipe: Recipe, s: Sizes, gone: float) -> float:
    """The most that there is at a time of attention's backward pass over a shared sequence, beyond what is kept, of
    which the branches' outputs have ``gone``.

    It takes turns of ``parallel.context_heads`` heads of keys. Each reads far keys, of all ranks' tokens where a rank
    has the first segment and so the last one, and adds up their gradients in float32. Rounded, they go home during the
    next turn, whose keys have come during this one.
    """
    m, a, p = recipe.model, recipe.attention, recipe.parallel
    kv = min(p.context_heads or m.kv_heads, m.kv_heads)
    turns, group = -(-m.kv_heads // kv), kv * m.heads // m.kv_heads
    q, own = group * m.head_dim, kv * (m.head_dim + m.v_dim)  # of a turn and a token
    far, goes = p.context * own, s.wide if p.context_gradients == "float32" else s.width
    left = (q + own * (1 + p.context / a.cmp_stride)) * s.width  # gradients of queries, windows, compressed keys
    sums = 4 * (q + far) + 8 * BRANCHES * group  # and what the kernels read of each row
    parts = min(s.tokens, GRADIENT_CHUNK) * a.slc_count * q * s.width + s.tokens * 8 * kv * a.slc_count
    copies = (q + group * m.v_dim + own) * s.width if turns > 1 else 0  # of the turn's heads alone
    of_turn = s.tokens * (far * s.width + sums + left + copies) + max(parts, s.tokens * far * goes)
    # packed, rows that travel are there twice: with the first segment most come, and half as many leave
    copied = own if p.context * s.tokens * own * s.width > PACKED else (far - own) * 3 // 2
    most = 0.0
    for i in range(turns):
        coming = (far + copied) * s.width if i + 1 < turns else 0  # and what is sent for them
        going = (2 * far - own) * goes + i * own * s.width if i else 0  # and what comes of other ranks, and its sums
        most = max(most, of_turn + s.tokens * (coming + going + i * left) - (i + 1) * gone / turns)
    return most


def _dense(recipe: Recipe, s: Sizes) -> Layer:
    """Gate and up, silu of the gate, and their product; gradients of two of these at a time."""
    each = s.tokens * recipe.model.dense_hidden * s.width
    return Layer(0, 4 * each, 6 * each)


def _experts(recipe: Recipe, s: Sizes) -> Layer:
    """The output of the first product of routed and shared experts, and the routing; rows of tokens are copied again.

    Over several ranks also the tokens that came, with gates and choices behind each.
    """
    m, moe, p = recipe.model, recipe.moe, recipe.parallel
    if not moe.experts:
        return Layer(0, 0, 0)
    inner, hidden = moe.expert_hidden, m.hidden
    local = moe.shared_experts if moe.shared == "local" else 0
    choices = moe.top_k + moe.shared_experts - local
    whole = p.expert_ranks == 1 and not p.split and choices == moe.top_k and moe.router != "hash"
    kept = (s.rows + s.tokens * local) * 2 * inner * s.width
    # Of each token its scores, gates, experts, and places of its rows; what losses of balance want.
    scores = moe.experts * (1 + bool(recipe.balance.sequence)) if moe.router != "hash" else 0
    routing = scores + 3 * moe.top_k + choices + bool(recipe.balance.z_loss)
    if not whole:  # places for other ranks; gates and places of all tokens for this rank's experts; tokens that came
        others = p.expert_ranks - (not p.split)
        routing += others + min(choices, others)
        kept += (s.tokens + s.arrived) * 8 * choices + s.rows * 4
        kept += s.arrived * (hidden * s.width + 8 * choices)
    kept += s.tokens * 4 * routing
    # Gradients: of rows and of their first product, beside the rows once more, or before that with the activation
    # and its gradient; of the experts' weights.
    meanwhile = s.rows * max(2 * hidden + 2 * inner, hidden + 4 * inner)
    held = moe.experts // p.expert_ranks + dispatched_on_a_rank(recipe) if s.rows else 0
    weights = held * 3 * hidden * inner
    return Layer(0, kept, kept + (meanwhile + weights + 2 * s.arrived * hidden) * s.width)


def shared_by_layers(recipe: Recipe, s: Sizes) -> int:
    """What a forward pass keeps once: RoPE's tables, tokens, NSA's index tables, and what the last norm takes and
    gives."""
    m = recipe.model
    tables = 24 + m.head_dim * s.wide + (200 if recipe.attention.kind == "nsa" else 0)
    return s.tokens * (tables + m.hidden * s.width) + _norm(recipe, s)


def loss(recipe: Recipe, s: Sizes) -> int:
    """Gradients of the final hidden states and of the head, and two float32 copies of a part's logits."""
    m = recipe.model
    gradients = (s.tokens + m.vocab) * m.hidden * s.width
    return (gradients + min(s.tokens, LOSS_CHUNK) * 2 * s.wide * m.vocab) if s.tokens else 0


def of_a_pass(recipe: Recipe, s: Sizes, of_layer: int, of_head: int) -> tuple[int, int]:
    """Bytes kept when a forward pass ends, and the most that there is at a time from then until its backward pass ends,
    gradients of weights that it makes among it: of_layer bytes in each layer, of_head in the output layer.

    A backward pass lets go of a layer's tensors when it has its gradients; a layer that is computed again has them only
    then.
    """
    found, again = layers(recipe, s), recipe.train.recompute
    held = [layer.input if i < again else layer.kept for i, layer in enumerate(found)]
    kept = before = shared_by_layers(recipe, s) + sum(held)
    most, gradients = kept + loss(recipe, s), of_head
    for layer, own in zip(reversed(found), reversed(held), strict=True):
        most = max(most, before - own + layer.most + gradients)
        before -= own
        gradients += of_layer
    return kept, max(most, before + gradients)
