"""The language model of one rank: what of it this rank hosts, and the same forward pass on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import copy
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shoal.workers.config import ModelTable, Recipe
from shoal.workers.data.batch import PackedBatch
from shoal.workers.errors import InvalidInput
from shoal.workers.expert_plan import Homes, Plan
from shoal.workers.mesh import Mesh, make_mesh
from shoal.workers.model.attention import Attending, FullAttention, NativeSparseAttention
from shoal.workers.model.contexts import attention_context, own_part
from shoal.workers.model.feedforward import DenseFFN, MoE, Stages, named_views, run
from shoal.workers.model.load import Counted, MoELoad
from shoal.workers.model.loss import cross_entropy_sum
from shoal.workers.placement import Placement
from shoal.workers.profile import span

LOSS_CHUNK = 4096  # tokens whose logits exist at one time


class StepContext:
    """What all layers of one forward pass share. attention: what they attend to; None for the batch itself."""

    def __init__(
        self, model: Transformer, batch: PackedBatch, load: MoELoad | None = None, attention: Attending | None = None
    ) -> None:
        self.batch = batch
        self.load = load or MoELoad(max(1, len(batch.tokens)))
        self.attention = attention
        if attention is None and model.hosts_attention:
            self.attention = attention_context(model.recipe, batch, model.dtype, model.mesh.context)

    def counting_into(self, load: MoELoad) -> StepContext:
        """The same, but for where layers count their load."""
        other = copy(self)
        other.load = load
        return other


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with its residual. A rank without attention keeps the experts only."""

    def __init__(
        self, recipe: Recipe, layer: int, mesh: Mesh, device: torch.device, homes: Homes | None = None
    ) -> None:
        super().__init__()
        m = recipe.model
        self.hosts_attention = mesh.hosts_attention
        dense = layer < m.dense_layers or not recipe.moe.experts
        if mesh.hosts_attention:
            self.attention_norm = nn.RMSNorm(m.hidden, m.norm_eps)
            pull = recipe.parallel.context_fetch == "chosen"
            self.attention = (
                NativeSparseAttention(m, recipe.attention, pull) if recipe.attention.kind == "nsa" else FullAttention(m)
            )
            self.ffn_norm = nn.RMSNorm(m.hidden, m.norm_eps)
            if dense:
                self.ffn = DenseFFN(m.hidden, m.dense_hidden)
        self.moe = None if dense else MoE(recipe, mesh, device, compute_dtype(recipe, device), homes)

    def forward(self, x_TH: Tensor, context: StepContext, again: bool = False) -> Tensor:
        """``[T, hidden] -> [T, hidden]``. again: keep the input only, and compute the layer again backwards."""
        return recomputed(self, x_TH, context) if again else run(self.stages(x_TH, context))

    def stages(self, x_TH: Tensor, context: StepContext) -> Stages:
        """The same, with a pause while experts' results are on their way."""
        normed = x_TH
        if self.hosts_attention:
            with span("attention"):
                x_TH = x_TH + self.attention(self.attention_norm(x_TH), context.attention)
            normed = self.ffn_norm(x_TH)
            if self.moe is None:
                with span("feed-forward"):
                    return x_TH + self.ffn(normed)
        if self.moe is None:
            return x_TH
        with span("experts"):
            return x_TH + (yield from self.moe.stages(normed, context.batch.tokens, context.load))


def recomputed(layer: Block, x_TH: Tensor, context: StepContext) -> Tensor:
    """A layer that keeps its input only, and is computed again in the backward pass. Collective, as the layer is.
    Within a call of the layer: weights that are gathered for its backward pass then serve for both.

    Reentrant: the layer is one node of autograd, so that all ranks compute it again at the same place among their
    collectives, whatever tensors they would have saved. It counts its load both times, of which one is kept.
    """
    # Now: later on, other layers have counted. What is called again holds this, and not the context: the context's load
    # holds the losses of this call, whose node holds the call, and nobody would let go of either.
    apart = context.counting_into(context.load.apart())

    def part(x: Tensor) -> tuple[Tensor | None, ...]:
        load = apart.load.apart()
        out = run(layer.stages(x, apart.counting_into(load)))
        return (out, *(load.layers[0] if load.layers else ()))

    out, *counted = checkpoint(part, x_TH, use_reentrant=True, preserve_rng_state=False)
    if counted:
        context.load.layers.append(Counted(*counted))
    return out


class Transformer(nn.Module):
    """A decoder-only language model over packed batches.

    On a rank that hosts experts only, the same calls run with zero tokens; the residual stream there has no rows.
    """

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh | None = None,
        device: torch.device | str = "cpu",
        draw: bool = True,
        plan: Plan | None = None,
    ) -> None:
        """draw: give the weights their initial values; False for those that are to be loaded. plan: where the routed
        experts lie; None: in equal runs."""
        super().__init__()
        device = torch.device(device)
        mesh = mesh or make_mesh(Placement(1, (0,), (0,) if recipe.moe.experts else (), 1))
        self.recipe, self.mesh, self.hosts_attention = recipe, mesh, mesh.hosts_attention
        self.dtype = compute_dtype(recipe, device)
        m = recipe.model
        if recipe.attention.backend == "triton" and device.type == "cpu":
            raise InvalidInput(
                "attention.backend='triton' needs a GPU, and this rank computes on a CPU: set attention.backend='auto'"
            )
        with torch.device("meta"):  # in the order of use, which is that in which weights travel between replicas
            if mesh.hosts_attention:
                # not drawn: drawing without values imports PyTorch's compiler
                self.embedding = nn.Embedding.from_pretrained(torch.empty(m.vocab, m.hidden), freeze=False)
            first = m.layers - len(plan or ())
            homes = [None] * first + list(plan or ())
            self.layers = nn.ModuleList(Block(recipe, i, mesh, device, homes[i]) for i in range(m.layers))
            if mesh.hosts_attention:
                self.norm = nn.RMSNorm(m.hidden, m.norm_eps)
                if not m.tied_embeddings:
                    self.head = nn.Linear(m.hidden, m.vocab, bias=False)
        self.to(self.dtype)
        self.to_empty(device=device)
        if draw and device.type != "meta":  # sizes without values
            self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Each tensor from a generator seeded by the recipe's seed and its own name: any placement starts alike."""
        for name, parameter, index in named_views(self):
            draw(self.recipe, name, parameter if index is None else parameter[index])

    def forward(self, batch: PackedBatch, load: MoELoad | None = None, attention: Attending | None = None) -> Tensor:
        """Final hidden states ``[T, hidden]``, normed; ``[0, hidden]`` on a rank without an attention shard."""
        context = StepContext(self, batch, load, attention)
        x = self._embed(batch)
        again = self.recipe.train.recompute if torch.is_grad_enabled() else 0
        for i, layer in enumerate(self.layers):
            with span(f"layers.{i}"):
                x = layer(x, context, again=i < again)
        return self._ended(x, context)

    def stages(self, batch: PackedBatch, load: MoELoad, attention: Attending | None) -> Stages:
        """:meth:`forward`, with a pause while experts' results are on their way; hooks of layers do not see it."""
        context = StepContext(self, batch, load, attention)
        x = self._embed(batch)
        for layer in self.layers:
            assert isinstance(layer, Block)
            x = yield from layer.stages(x, context)
        return self._ended(x, context)

    def own_part(self, batch: PackedBatch) -> PackedBatch:
        """The tokens of a packed batch that this rank computes; the rest is with others of its context group."""
        return own_part(self.recipe, batch, self.mesh.context)

    def _embed(self, batch: PackedBatch) -> Tensor:
        if self.hosts_attention:
            return self.embedding(batch.tokens)
        device = batch.tokens.device
        return torch.zeros(0, self.recipe.model.hidden, dtype=self.dtype, device=device).requires_grad_()

    def _ended(self, x: Tensor, context: StepContext) -> Tensor:
        context.load.finish(self.mesh.world, self.mesh.dispatch)
        return self.norm(x) if self.hosts_attention else x

    @cached_property
    def moe_layers(self) -> list[MoE]:
        """Those with experts, in order."""
        return [block.moe for block in self.layers if isinstance(block.moe, MoE)]

    def nudge(self, counts: Sequence[Tensor]) -> None:
        """:meth:`MoE.nudge` of every layer. counts: as :class:`MoELoad` has them, of each layer."""
        for layer, own in zip(self.moe_layers, counts, strict=True):
            layer.nudge(own)

    def join_shared(self) -> int:
        """:meth:`MoE.join_shared` of every layer: the bytes that it allocated."""
        return sum(layer.join_shared() for layer in self.moe_layers)

    @property
    def vocabulary(self) -> Tensor:
        """``[vocab, hidden]``: what hidden states are multiplied with."""
        return self.embedding.weight if self.recipe.model.tied_embeddings else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """``[T, hidden] -> [T, vocab]`` in the model's dtype."""
        return F.linear(hidden, self.vocabulary)

    def loss_sum(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy summed over the targets, nats, at least float32. Without attention: 0, tied to the graph."""
        if not self.hosts_attention:
            return hidden.sum().to(torch.promote_types(self.dtype, torch.float32))
        return cross_entropy_sum(hidden, self.vocabulary, targets, LOSS_CHUNK)


def draw(recipe: Recipe, name: str, view: Tensor) -> None:
    """Gives a tensor of the model its initial value, which its name and the recipe's seed determine."""
    if name.endswith("norm.weight"):
        view.fill_(1.0)
        return
    seed = hashlib.sha256(f"{recipe.train.seed}/{name}".encode()).digest()[:7]
    generator = torch.Generator(view.device).manual_seed(int.from_bytes(seed))
    wide = torch.promote_types(view.dtype, torch.float32)
    std = _std(name, view, recipe.model)
    # drawn in float32 whatever the dtype, so that runs in other precisions start from the same numbers
    noise = torch.randn(view.shape, generator=generator, device=view.device, dtype=torch.float32)
    view.copy_(noise.to(wide) * std)


def compute_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations."""
    name = recipe.train.dtype
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[name]


def _std(name: str, view: Tensor, model: ModelTable) -> float:
    """The papers' init for all but φ, which keeps the scale of what it compresses, and embeddings of another one."""
    leaf = name.rpartition(".")[2]
    if ".compress_" in name and leaf in ("w1", "w2"):
        return float(view.shape[-2] ** -0.5)
    if name == "embedding.weight" and not model.tied_embeddings:  # of a head, logits would be as large
        return model.embedding_std or model.init_std
    return model.init_std
