"""The schema of a recipe: one table a component, read by whoever computes from it.

A recipe is checked as a whole before any work starts. Every refusal is one sentence that names the key, its value and
the remedy. This module imports neither torch nor Ray, so that a command line can check a recipe in milliseconds.
"""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shoal.workers.config_checks import check


class Table(BaseModel):
    """A table of a recipe: unknown keys are refused, values never change after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelTable(Table):
    """Sizes of the transformer. ``head_dim`` is d_qk, ``value_dim`` d_v (0: the same as ``head_dim``)."""

    vocab: int = Field(ge=16, description="vocabulary size, in tokens")
    layers: int = Field(ge=1)
    hidden: int = Field(ge=8)
    heads: int = Field(ge=1, description="query heads")
    kv_heads: int = Field(ge=1, description="key/value heads (GQA groups)")
    head_dim: int = Field(ge=2, description="query and key dimension of a head, d_qk")
    value_dim: int = Field(default=0, ge=0, description="value dimension of a head, d_v; 0: head_dim")
    dense_layers: int = Field(default=0, ge=0, description="first layers with a dense FFN instead of experts")
    dense_hidden: int = Field(default=0, ge=0, description="hidden size of that dense FFN")
    context: int = Field(ge=2, description="longest sequence, in tokens")
    rope_base: float = Field(default=10000.0, gt=1)
    rope_scaling: Literal["none", "yarn"] = Field(default="none", description="for a context longer than trained on")
    rope_factor: float = Field(default=1.0, ge=1, description="yarn: context over rope_original")
    rope_original: int = Field(default=0, ge=0, description="yarn: the context trained on first, in tokens")
    norm_eps: float = Field(default=1e-6, gt=0)
    tied_embeddings: bool = False
    init_std: float = Field(default=0.006, gt=0)
    embedding_std: float = Field(
        default=1.0,
        ge=0,
        description="init_std of embeddings: at 1 they outweigh what attention adds, so that new routers tell tokens "
        "apart; 0, and where they are the head too: that of the other weights",
    )

    @property
    def v_dim(self) -> int:
        """d_v, resolved."""
        return self.value_dim or self.head_dim


class AttentionTable(Table):
    """NSA's block sizes (reference: NSA section 3.3), or full attention. ``slc_count`` counts the forced blocks."""

    kind: Literal["nsa", "full"] = "nsa"
    backend: Literal["auto", "torch", "triton"] = "auto"
    cmp_block: int = Field(default=32, ge=1, description="l: keys in a compression block")
    cmp_stride: int = Field(default=16, ge=1, description="d: keys between two compression blocks")
    slc_block: int = Field(default=64, ge=1, description="l': keys in a selection block")
    slc_count: int = Field(default=16, ge=1, description="n: selected blocks a query, forced ones counted")
    slc_initial: int = Field(default=1, ge=0, description="forced blocks at the start of the document")
    slc_local: int = Field(default=2, ge=0, description="forced blocks that end with the query's own")
    window: int = Field(default=512, ge=1, description="w: keys of the sliding window, the query's own included")


class MoETable(Table):
    """DeepSeekMoE's feed-forward layers, and the baselines of its paper. ``experts = 0``: a dense model."""

    experts: int = Field(default=0, ge=0, description="routed experts, N'")
    top_k: int = Field(default=0, ge=0, description="routed experts a token, K'")
    shared_experts: int = Field(default=0, ge=0, description="K_s: experts that every token uses")
    expert_hidden: int = Field(default=0, ge=0, description="hidden size of one expert")
    router: Literal["softmax", "sigmoid", "hash"] = Field(
        default="softmax", description="scores of experts, or a fixed hash of the token in their place"
    )
    normalize_gates: bool = Field(default=False, description="divide the chosen gates by their sum (GShard)")
    shared: Literal["local", "dispatched"] = "local"
    backend: Literal["auto", "torch", "triton", "megablocks"] = Field(
        default="auto", description="who computes the experts; auto: triton for bfloat16 on a GPU, else torch"
    )


class RouteTable(Table):
    """Limits on where a token goes."""

    max_devices: int = Field(
        default=0,
        ge=0,
        description="M: groups (balance.device_groups) that a token's experts may lie in; 0: all. Groups, not ranks, "
        "so that a model does not depend on how many train it: where each rank hosts whole groups, a token goes to M "
        "ranks at most",
    )


class BalanceTable(Table):
    """Load-balance losses (DeepSeekMoE eq. 12-17, DeepSeek-V3's of each sequence, ST-MoE's z-loss), and a bias."""

    expert: float = Field(default=0.0, ge=0, description="alpha_1, the expert-level factor")
    device: float = Field(default=0.0, ge=0, description="alpha_2, the device-level factor")
    sequence: float = Field(default=0.0, ge=0, description="factor of the expert-level loss within each sequence")
    z_loss: float = Field(
        default=0.0, ge=0, description="factor of the mean squared log-sum-exp of the router's logits"
    )
    bias_rate: float = Field(
        default=0.0, ge=0, description="step of a bias per expert for the choice alone, towards even load; 0: no bias"
    )
    device_groups: int = Field(
        default=1, ge=1, description="D: groups of experts in the device-level loss and for route.max_devices"
    )
    over: Literal["global_batch", "micro_batch"] = Field(
        default="global_batch",
        description="what f and P are summed over; with accumulation, global_batch costs one more forward pass",
    )


class DataTable(Table):
    """What is trained on: a built-in corpus (``stdlib``, ``shakespeare``) or a folder of ``shoal data prepare``."""

    corpus: str = "stdlib"
    shuffle_groups: int = Field(default=8, ge=1, description="Parquet row groups whose documents are shuffled together")
    shuffle_tokens: int = Field(default=1 << 20, ge=1, description="tokens whose rows are shuffled together")


class TrainTable(Table):
    """The optimisation. ``batch`` is in sequences of ``sequence`` tokens, over all ranks and accumulation steps."""

    steps: int = Field(ge=1)
    batch: int = Field(ge=1, description="sequences of the global batch")
    sequence: int = Field(ge=2, description="tokens a sequence")
    accumulate: int = Field(default=1, ge=1, description="micro-batches that a global batch is cut into")
    learning_rate: float = Field(gt=0, description="peak")
    schedule: Literal["step", "cosine", "wsd"] = "step"
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    final_lr: float = Field(default=0.1, ge=0, le=1, description="cosine, wsd: last rate as a share of the peak")
    decay_from: float = Field(default=0.8, ge=0, le=1, description="wsd: share of the steps where the decay begins")
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, ge=0, description="largest norm of the gradient; 0: no clipping")
    seed: int = Field(default=0, ge=0)
    initial: str = Field(default="", description="run, or checkpoint of one, whose weights training begins with")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        default="auto", description="of weights and activations; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    deterministic: bool = Field(default=False, description="bit-equal runs on a GPU too (a CPU always is)")
    recompute: int = Field(
        default=0, ge=0, description="first layers that are computed again backwards, and keep their input only"
    )
    eval_every: int = Field(default=0, ge=0, description="steps between validations; 0: only at the end")
    eval_tokens: int = Field(default=131072, ge=1, description="validation tokens, in whole documents")
    log_every: int = Field(default=1, ge=1, description="steps between lines of metrics.jsonl")
    profile_at: int = Field(
        default=0, ge=0, description="first step of which each rank writes a trace, to profile/ of the run; 0: none"
    )
    profile_steps: int = Field(default=2, ge=1, description="steps that are traced from there on")


class ParallelTable(Table):
    """Ranks and what each of them hosts. Data parallelism is what expert and context parallelism leave over."""

    ranks: int = Field(default=1, ge=1)
    placement: str = Field(default="colocated", description="colocated, or nA:mF (n attention, m expert ranks)")
    expert: int = Field(default=0, ge=0, description="ranks that share one set of experts; 0: all expert ranks")
    rebalance_every: int = Field(
        default=0,
        ge=0,
        description="steps after which experts move to even out what was measured of ranks' load; 0: never",
    )
    context: int = Field(default=1, ge=1, description="attention ranks that share a packed batch")
    context_fetch: Literal["auto", "all", "chosen"] = Field(
        default="auto",
        description="keys of NSA's selected branch that these ranks fetch of one another: all that may be chosen, "
        "hidden behind other work; pages that were chosen, which nothing hides; auto: layer by layer the latter while, "
        "as last measured, it moves less than half the bytes. What is computed is the same",
    )
    context_heads: int = Field(
        default=0,
        ge=0,
        description="KV heads of NSA that a rank which shares sequences computes at a time, while the next ones' keys "
        "of other ranks are on their way: of those no more than twice so many are in memory; 0: all at once",
    )
    context_gradients: Literal["short", "float32"] = Field(
        default="short", description="dtype in which gradients of those keys return: train.dtype, or float32 at least"
    )
    dispatch: Literal["auto", "exchanged", "put"] = Field(
        default="auto",
        description="how rows reach the experts of other ranks: those that are needed by all-to-all; or all of them by "
        "copy engines, into the memory of a node's other GPUs; auto: put where nearly all are needed, and can be",
    )
    shard_dense: bool = Field(
        default=False,
        description="weights outside experts, and their gradients, in parts over the attention ranks (FSDP2)",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(
        default=0,
        ge=0,
        description="CPU threads of a rank (the last bits depend on them); 0: cores over the ranks of a machine, one "
        "beside a GPU",
    )
    max_failures: int = Field(
        default=3, ge=0, description="failures in a row, without a new checkpoint between them, that end a run"
    )
    replace_seconds: float = Field(
        default=1800.0,
        ge=0,
        le=1e6,
        description="seconds a run waits for room for its ranks after one was lost: a node may have to be replaced",
    )

    @property
    def split(self) -> tuple[int, int] | None:
        """``(attention ranks, expert ranks)`` of a disaggregated placement, None when colocated."""
        match = re.fullmatch(r"(\d+)A:(\d+)F", self.placement)
        return (int(match[1]), int(match[2])) if match else None

    @property
    def attention_ranks(self) -> int:
        """How many ranks host an attention shard."""
        return self.split[0] if self.split else self.ranks

    @property
    def expert_ranks(self) -> int:
        """How many ranks share one set of experts."""
        return self.split[1] if self.split else (self.expert or self.ranks)


class CheckpointTable(Table):
    """When checkpoints are written and how many are kept."""

    every: int = Field(default=100, ge=1, description="steps between checkpoints; one more is written at the end")
    keep: int = Field(default=3, ge=1, description="newest checkpoints kept")


class ServeTable(Table):
    """What an engine takes on, a rank with an attention shard each."""

    sequences: int = Field(default=32, ge=1, description="requests computed together")
    step_tokens: int = Field(
        default=0,
        ge=0,
        description="tokens of one step; longer prompts are cut into chunks; 0: 512 on a CPU, 4,096 on a GPU",
    )
    waiting: int = Field(default=256, ge=1, description="requests in the queue; more are refused")
    pages: int = Field(
        default=0,
        ge=0,
        description="cache pages of slc_block tokens; 0: what all sequences need; memory may allow fewer",
    )
    memory: float = Field(
        default=0.8, gt=0, le=1, description="share of the memory that is free once the weights are loaded"
    )
    speculate: int = Field(default=0, ge=0, le=32, description="n-gram guesses a sequence and step; 0: none")
    expert_copies: int = Field(
        default=0,
        ge=0,
        description="experts that a rank hosts beyond its share, at most: copies of the busiest, first those of "
        "training, which stay with their group where route.max_devices bounds the ranks that a token goes to",
    )
    rebalance_seconds: float = Field(
        default=300.0,
        ge=0,
        le=1e6,
        description="with expert_copies, seconds between two looks at what experts had to do, after which they move "
        "where that evens out the load of ranks; 0: they stay",
    )
    prefix_cache: bool = True
    cuda_graphs: bool = Field(default=True, description="decode steps in CUDA graphs, on Hopper GPUs")


class Recipe(Table):
    """A whole recipe. ``Recipe.model_validate(dict)`` checks every key and every combination of keys."""

    name: str = Field(default="unnamed", pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str = ""
    model: ModelTable
    attention: AttentionTable = AttentionTable()
    moe: MoETable = MoETable()
    route: RouteTable = RouteTable()
    balance: BalanceTable = BalanceTable()
    data: DataTable = DataTable()
    train: TrainTable
    parallel: ParallelTable = ParallelTable()
    checkpoint: CheckpointTable = CheckpointTable()
    serve: ServeTable = ServeTable()

    @property
    def bound_groups(self) -> int:
        """The groups of experts with which copies of experts stay, so that a token reaches no more ranks than
        ``route.max_devices`` lets it reach without copies; 0 where that may be all of them."""
        groups, ranks = self.balance.device_groups, self.parallel.expert_ranks
        if not self.route.max_devices or not self.moe.experts:
            return 0
        size, each = self.moe.experts // groups, self.moe.experts // ranks
        widest = max(((g + 1) * size - 1) // each - g * size // each + 1 for g in range(groups))
        # neighbouring groups share a rank where the two do not divide: what M groups reach is not known then
        divide = groups % ranks == 0 or ranks % groups == 0
        anywhere = self.route.max_devices * widest >= ranks and divide
        return 0 if anywhere or self.route.max_devices == groups else groups

    @property
    def counts_first(self) -> bool:
        """Whether a step counts experts' load in a forward pass of its own, since its losses are over all parts."""
        b = self.balance
        return self.train.accumulate > 1 and b.over == "global_batch" and bool(b.expert or b.device)

    @model_validator(mode="before")
    @classmethod
    def _ranks_of_the_placement(cls, values: Any) -> Any:
        """A disaggregated placement says how many ranks there are: fill ``ranks`` in when it is not given."""
        parallel = values.get("parallel") if isinstance(values, dict) else None
        if isinstance(parallel, dict) and "ranks" not in parallel:
            match = re.fullmatch(r"(\d+)A:(\d+)F", str(parallel.get("placement", "")))
            if match:
                filled = {**parallel, "ranks": int(match[1]) + int(match[2])}
                return {**values, "parallel": filled}
        return values

    @model_validator(mode="after")
    def _possible(self) -> Self:
        check(self)
        return self
