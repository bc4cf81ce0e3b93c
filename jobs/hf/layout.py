"""Which tensors of DeepseekForCausalLM are which of ours, one unit after another, so that a few are in memory at once.

Theirs are stored as ``nn.Linear`` has them, ``[out, in]``. Ours are so outside feed-forward networks; there they are
``[in, out]``, with the gate and the up projection side by side. Shared experts are one network of theirs, as wide as
all of them. RoPE pairs ``(x[i], x[i + dim/2])`` in both, so that nothing is permuted. All of it only moves numbers:
bits stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shoal.workers.config import Recipe
from shoal.workers.model.attention import BRANCHES

Shapes = dict[str, tuple[int, ...]]
Read = Callable[[str], Tensor]
Named = Iterator[tuple[str, Tensor]]


class Unit(Protocol):
    """Tensors that are converted together. ``theirs``, ``ours``: their names and shapes on either side."""

    @property
    def theirs(self) -> Shapes: ...

    @property
    def ours(self) -> Shapes: ...

    def to_ours(self, read: Read) -> Named:
        """Our tensors, of theirs by name."""
        ...

    def to_theirs(self, read: Read) -> Named:
        """Their tensors, of ours by name."""
        ...


@dataclass(frozen=True)
class Same:
    """A tensor that both have alike. copies: ours is so many of theirs, one below another; only on the way in."""

    their_name: str
    our_name: str
    shape: tuple[int, ...]
    copies: int = 1

    @property
    def theirs(self) -> Shapes:
        return {self.their_name: self.shape}

    @property
    def ours(self) -> Shapes:
        return {self.our_name: (self.copies * self.shape[0], *self.shape[1:])}

    def to_ours(self, read: Read) -> Named:
        tensor = read(self.their_name)
        yield self.our_name, tensor if self.copies == 1 else torch.cat([tensor] * self.copies)

    def to_theirs(self, read: Read) -> Named:
        assert self.copies == 1
        yield self.their_name, read(self.our_name)


@dataclass(frozen=True)
class Network:
    """A feed-forward network of theirs, which is one of ours, or several side by side, each ``inner`` wide."""

    their_name: str
    our_names: tuple[str, ...]
    hidden: int
    inner: int

    @property
    def theirs(self) -> Shapes:
        wide = len(self.our_names) * self.inner
        gate, up, down = (f"{self.their_name}.{part}_proj.weight" for part in ("gate", "up", "down"))
        return {gate: (wide, self.hidden), up: (wide, self.hidden), down: (self.hidden, wide)}

    @property
    def ours(self) -> Shapes:
        sizes = {"gate_up": (self.hidden, 2 * self.inner), "down": (self.inner, self.hidden)}
        return {f"{name}.{part}": size for name in self.our_names for part, size in sizes.items()}

    def to_ours(self, read: Read) -> Named:
        gate, up, down = map(read, self.theirs)
        parts = (gate.split(self.inner), up.split(self.inner), down.split(self.inner, dim=1))
        for name, own_gate, own_up, own_down in zip(self.our_names, *parts, strict=True):
            yield f"{name}.gate_up", torch.cat((own_gate, own_up)).T.contiguous()
            yield f"{name}.down", own_down.T.contiguous()

    def to_theirs(self, read: Read) -> Named:
        gate, up, down = self.theirs
        both = [read(f"{name}.gate_up").T for name in self.our_names]
        yield gate, torch.cat([each[: self.inner] for each in both])
        yield up, torch.cat([each[self.inner :] for each in both])
        del both
        yield down, torch.cat([read(f"{name}.down") for name in self.our_names]).T.contiguous()


def units(recipe: Recipe) -> Iterator[Unit]:
    """All tensors of a recipe's model that the format has, in its order. With NSA, whose branches have keys and values
    of their own, each branch's are those of the format; what else NSA has is not among them."""
    m = recipe.model
    yield Same("model.embed_tokens.weight", "model.embedding.weight", (m.vocab, m.hidden))
    for layer in range(m.layers):
        yield from _layer(recipe, layer)
    yield Same("model.norm.weight", "model.norm.weight", (m.hidden,))
    if not m.tied_embeddings:
        yield Same("lm_head.weight", "model.head.weight", (m.vocab, m.hidden))


def _layer(recipe: Recipe, layer: int) -> Iterator[Unit]:
    m, moe = recipe.model, recipe.moe
    at = f"model.layers.{layer}"  # in both
    branches = BRANCHES if recipe.attention.kind == "nsa" else 1
    theirs, ours = f"{at}.self_attn", f"{at}.attention"
    yield Same(f"{theirs}.q_proj.weight", f"{ours}.wq.weight", (m.heads * m.head_dim, m.hidden))
    yield Same(f"{theirs}.k_proj.weight", f"{ours}.wk.weight", (m.kv_heads * m.head_dim, m.hidden), branches)
    yield Same(f"{theirs}.v_proj.weight", f"{ours}.wv.weight", (m.kv_heads * m.v_dim, m.hidden), branches)
    yield Same(f"{theirs}.o_proj.weight", f"{ours}.wo.weight", (m.hidden, m.heads * m.v_dim))
    if layer < m.dense_layers or not moe.experts:
        yield Network(f"{at}.mlp", (f"{at}.ffn",), m.hidden, m.dense_hidden)
    else:
        for expert in range(moe.experts):
            name = f"experts.{expert}"
            yield Network(f"{at}.mlp.{name}", (f"{at}.moe.{name}",), m.hidden, moe.expert_hidden)
        yield Same(f"{at}.mlp.gate.weight", f"{at}.moe.centroids", (moe.experts, m.hidden))
        if shared := tuple(f"{at}.moe.shared.{i}" for i in range(moe.shared_experts)):
            yield Network(f"{at}.mlp.shared_experts", shared, m.hidden, moe.expert_hidden)
    yield Same(f"{at}.input_layernorm.weight", f"{at}.attention_norm.weight", (m.hidden,))
    yield Same(f"{at}.post_attention_layernorm.weight", f"{at}.ffn_norm.weight", (m.hidden,))
