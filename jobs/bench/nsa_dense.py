"""Dense decode in the ways that PyTorch has, each over contiguous keys and values: what NSA's decode is compared with.

A figure has this step's keys and values copied into the cache, in one launch for both, and attention of one query a
sequence. All ways read keys and values once for all heads of a group, by ``enable_gqa`` or because the heads of a group
are handed over as that many queries. A way whose output is not that of the definition is left out, and so is one that
refuses the shapes; both are told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from shoal.jobs.bench.nsa import CONTEXTS
from shoal.jobs.bench.nsa_decode import Case, replayed_ms

GQA, ROWS = "enable_gqa", "heads of a group as queries"
BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TOLERANCE = 0.02  # of an output's relative error: twice what weights in bfloat16 cost

Way = Callable[["Layer"], Tensor]


@dataclass(frozen=True)
class Layer:
    """q: ``[N, H, 1, D]``. kv: keys and values ``[2, N, KV, S, D]``; of different lengths ``[2, N, S, KV, D]``, so that
    rows of all sequences are those of one pack. new: ``[2, N, KV, D]``, this step's. at: ``[N]``, their rows in it."""

    case: Case
    q: Tensor
    kv: Tensor
    new: Tensor
    at: Tensor

    @classmethod
    def draw(cls, case: Case) -> Layer:
        n, kv, dim = len(case.lengths), case.kv_heads, case.dim
        shape = (case.context, kv) if case.ragged else (kv, case.context)
        keys = torch.empty(2, n, *shape, dim, device=case.device, dtype=case.dtype).normal_()
        at = torch.tensor([i * case.context + length - 1 for i, length in enumerate(case.lengths)], device=case.device)
        return cls(case, case.normal(n, case.heads, 1, dim), keys, case.normal(2, n, kv, dim), at)

    def write(self) -> None:
        if self.case.ragged:
            self.kv.flatten(1, 2).index_copy_(1, self.at, self.new)
        else:
            self.kv[:, :, :, -1] = self.new

    @property
    def rows(self) -> Tensor:
        """The queries ``[N, KV, G, D]``."""
        n, heads, _, dim = self.q.shape
        return self.q.view(n, self.case.kv_heads, heads // self.case.kv_heads, dim)

    @property
    def by_head(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[N, KV, S, D]``, where they lie."""
        k, v = self.kv.transpose(2, 3) if self.case.ragged else self.kv
        return k, v


def dense_ms(case: Case, say: Callable[[str], None]) -> dict[str, tuple[str, float]]:
    """How each baseline is fastest, and its milliseconds, by its name."""
    layers = [Layer.draw(case) for _ in range(case.layers)]
    found: dict[str, tuple[str, float]] = {}
    want = defined(layers[0])
    for (name, how), way in ways(case).items():

        def step(layer: Layer, way: Way = way) -> Tensor:
            layer.write()
            return way(layer)

        try:
            out = step(layers[0]).reshape(want.shape)
            error = ((out.float() - want).norm() / want.norm()).item()
            if not error < TOLERANCE:
                say(f"left out, {name}, {how}: its output is off by {error:.3f}")
                continue
            ms = replayed_ms(step, layers)
        except RuntimeError as refusal:
            say(f"left out, {name}, {how}: {str(refusal).strip().splitlines()[0][:200]}")
            continue
        if name not in found or ms < found[name][1]:
            found[name] = how, ms
    del layers
    if case.device == "cuda":
        torch.cuda.empty_cache()
    return found


def ways(case: Case) -> dict[tuple[str, str], Way]:
    """By baseline and how it reads keys once. Below the longest context SDPA alone: the others compile, or are slow."""
    longest = case.context == CONTEXTS[-1]
    flex = {("flex_attention", GQA): flexible(case)} if longest else {}
    if case.ragged:
        return {("sdpa_flash", "packed, enable_gqa"): packed(case), **flex}
    found: dict[tuple[str, str], Way] = {}
    for name, backend in BACKENDS.items():
        if longest or name != "sdpa_efficient":
            found |= {(name, GQA): sdpa(backend, fold=False), (name, ROWS): sdpa(backend, fold=True)}
    return {**found, **({("matmul", "two products and a softmax"): products} if longest else {}), **flex}


def defined(layer: Layer) -> Tensor:
    """``[N, H, D]``, float32, of the cache with this step's rows: the definition, a sequence at a time."""
    layer.write()
    outs = []
    for i, length in enumerate(layer.case.lengths):
        k, v = (x[i, :, :length] for x in layer.by_head)
        scores = (layer.rows[i] @ k.transpose(1, 2)).float() * layer.case.scale
        outs.append((torch.softmax(scores, -1).to(v.dtype) @ v).float().flatten(0, 1))
    return torch.stack(outs)


def sdpa(backend: SDPBackend, fold: bool) -> Way:
    """Over equal lengths."""

    def way(layer: Layer) -> Tensor:
        k, v = layer.kv
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(layer.rows if fold else layer.q, k, v, enable_gqa=not fold)

    return way


def products(layer: Layer) -> Tensor:
    """Over equal lengths, by cuBLAS."""
    k, v = layer.kv
    weights = torch.softmax((layer.rows * layer.case.scale) @ k.transpose(2, 3), -1, dtype=torch.float32)
    return weights.to(v.dtype) @ v


def packed(case: Case) -> Way:
    """Over different lengths, by FlashAttention's kernel for packs, which is told how much of each place is filled."""
    n, device = len(case.lengths), case.device
    at_q = torch.arange(n + 1, dtype=torch.int32, device=device)
    at_k, used = at_q * case.context, torch.tensor(case.lengths, dtype=torch.int32, device=device)

    def way(layer: Layer) -> Tensor:
        k, v = layer.kv.flatten(1, 2)
        sizes = (at_q, at_k, 1, case.context)
        out: Tensor = torch.ops.aten._flash_attention_forward(
            layer.q[:, :, 0], k, v, *sizes, 0.0, False, False, scale=case.scale, seqused_k=used
        )[0]
        return out

    return way


def flexible(case: Case) -> Way:
    """By flex_attention, whose kernel for few queries Inductor compiles."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    used, mask = torch.tensor(case.lengths, device=case.device), None
    if case.ragged:

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return k < used[b]

        mask = create_block_mask(seen, len(case.lengths), None, 1, case.context, device=case.device)
    call: Any = flex_attention
    if case.device == "cuda":
        torch._dynamo.reset()  # or the eighth shape would no longer be compiled
        call = torch.compile(flex_attention, dynamic=False)

    def way(layer: Layer) -> Tensor:
        out: Tensor = call(layer.q, *layer.by_head, block_mask=mask, enable_gqa=True)
        return out

    return way
