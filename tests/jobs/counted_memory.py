"""What a training step takes of a GPU's memory, counted without a GPU.

The model's own code runs on tensors that have sizes and no contents (PyTorch's meta device), on the paths that a GPU
takes in bfloat16; kernels are not launched, and nothing is sent. What PyTorch has for GPUs alone (attention, RMSNorm,
grouped products) stands here as what it allocates and keeps.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from shoal.kernels.moe.triton_gemms import TritonGemms
from shoal.kernels.nsa import layout, triton_tables
from shoal.kernels.triton_rope import triton_rotate
from shoal.workers import sequence
from shoal.workers.config import Recipe
from shoal.workers.data.batch import PackedBatch, empty_batch
from shoal.workers.mesh import make_mesh
from shoal.workers.model import Transformer
from shoal.workers.model.load import MoELoad
from shoal.workers.placement import Placement
from shoal.workers.ring import Ring
from shoal.workers.slots import needed

META = torch.device("meta")


class Counted(TorchDispatchMode):
    """Bytes of all tensors on a device that exist, and the most that did at a time."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.now, self.most = device, 0, 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.device == self.device:
                self.add(x)
        return out

    def add(self, x: Tensor) -> None:
        """A tensor that was there before."""
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


class GpuGemms(TritonGemms):
    """Products that allocate what those on a GPU do."""

    def __init__(self, ends: Tensor | None) -> None:
        self.ends = ends

    def rows_by_weight(self, rows: Tensor, weight: Tensor) -> Tensor:
        return rows.new_empty(len(rows), weight.shape[-1])

    def rows_by_rows(self, left: Tensor, right: Tensor) -> Tensor:
        groups = () if self.ends is None else (len(self.ends),)
        return left.new_empty(*groups, left.shape[-1], right.shape[-1])


class Norm(torch.autograd.Function):
    """RMSNorm as PyTorch fuses it on a GPU: keeps its input, and a float32 of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class Attention(torch.autograd.Function):
    """``[N, heads, L, D]`` as cuDNN has it: keeps its inputs, its output and log-sum-exps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, heads, length, _ = q.shape
        out = q.new_empty(n, length, heads, v.shape[3]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(n, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """With keys repeated for each head: `nsa-64k-small` with full attention was measured to take as much."""
    heads = q.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) if x.shape[1] < heads else x for x in (k, v))
    out: Tensor = Attention.apply(q, k, v)
    return out


class RingStep:
    """As cuDNN has it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.float32)

    def backward(self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class Sent:
    """A transfer that is over."""

    def wait(self) -> None:
        pass


def _even_load(recipe: Recipe) -> Callable[..., list[list[int]]]:
    """What the host reads of the sizes of a dispatch, where all experts have as many tokens."""
    p, t, moe = recipe.parallel, recipe.train, recipe.moe
    tokens, hosts = t.batch // t.accumulate * t.sequence // p.attention_ranks, p.expert_ranks
    always = moe.shared_experts if moe.shared == "dispatched" else 0
    routed = [tokens * moe.top_k // moe.experts] * (moe.experts // hosts) if moe.experts else []
    of_slots = [n for place in range(hosts) for n in routed + [tokens] * len(range(place, always, hosts))]
    first = p.split[0] if p.split else 0  # of the ranks that host experts

    def read(_self: Any, table: Tensor, _there: Any) -> list[list[int]]:
        ranks, away = table.shape[0], int(tokens * max(needed(recipe)))
        rows = [of_slots + [away * (to >= first and to != rank) for to in range(ranks)] for rank in range(ranks)]
        return [row if rank < first or not p.split else [0] * len(row) for rank, row in enumerate(rows)]

    return read


def _nothing(*_: Any, **__: Any) -> Sent:
    return Sent()


@contextmanager
def as_on_a_gpu(recipe: Recipe) -> Iterator[None]:
    """Within it, tensors on the meta device take a GPU's paths in 16 bits."""
    calls = ("all_to_all_single", "all_reduce", "P2POp", "new_group")
    with ExitStack() as stack:
        for name in calls:
            stack.enter_context(mock.patch.object(torch.distributed, name, _nothing))
        for target, put in {
            "torch.distributed.batch_isend_irecv": lambda ops: [],
            "shoal.workers.mesh.all_gather_single": _nothing,
            "shoal.workers.transfer.all_gather_single": _nothing,
            "shoal.workers.model.feedforward.experts_backend": lambda *_: GpuGemms,
            "shoal.workers.model.attention.rotate": triton_rotate,
            "shoal.workers.model.contexts.rotate": triton_rotate,
            "shoal.workers.model.contexts.make_ring": lambda group, q: Ring(group, RingStep()),
            "shoal.workers.transfer.HostReads.of": _even_load(recipe),
            "torch.nn.functional.rms_norm": lambda x, shape, weight, eps: Norm.apply(x, weight),
            "torch.nn.functional.scaled_dot_product_attention": attention,
        }.items():
            stack.enter_context(mock.patch(target, put))
        stack.enter_context(
            mock.patch.object(sys.modules["shoal.kernels.nsa.attention"], "takes_triton", lambda *_: True)
        )
        stack.enter_context(mock.patch.object(JITFunction, "run", _nothing))
        stack.enter_context(mock.patch.object(InterpretedFunction, "__getitem__", lambda *_: _nothing, create=True))
        yield


@dataclass
class Pass:
    """Bytes of a forward and a backward pass beyond weights. kept: when the forward pass ends. most: at a time, with
    gradients of weights."""

    kept: int
    most: int


def count(recipe: Recipe, rank: int = 0) -> Pass:
    """Of a micro-batch in bfloat16 on a GPU, on one rank of several, whose sequences are a document each."""
    with as_on_a_gpu(recipe):
        mesh = make_mesh(Placement.of(recipe), rank)
        return _count(recipe, Transformer(recipe, mesh, META), META)


def count_on_cpu(recipe: Recipe) -> Pass:
    """The same on a CPU, with one rank; nothing there is put in its place."""
    return _count(recipe, Transformer(recipe), torch.device("cpu"))


def _count(recipe: Recipe, model: Transformer, device: torch.device) -> Pass:
    for tables in (sequence._make_sequence, layout._make_layout, triton_tables._make_tables):
        tables.cache_clear()  # those of an earlier pass would not be counted
    counted = Counted(device)
    for weights in model.parameters():
        counted.add(weights)
    batch = model.own_part(_batch(recipe)) if model.hosts_attention else empty_batch()
    before = counted.now
    with counted:
        batch = batch.to(device)
        length = recipe.train.sequence
        sequences = torch.arange(len(batch.tokens), device=device) // length, batch.cu_seqlens[-1] // length
        load = MoELoad(recipe.train.batch * length, sequences=sequences if recipe.balance.sequence else None)
        hidden = model(batch, load)
        kept = counted.now - before
        loss = model.loss_sum(hidden, batch.targets)
        del hidden
        balance = load.loss(recipe.balance)
        (loss if balance is None else loss + balance).backward()
    return Pass(kept, counted.most - before)


def _batch(recipe: Recipe) -> PackedBatch:
    t, p = recipe.train, recipe.parallel
    rows = t.batch // t.accumulate * p.context // p.attention_ranks
    tokens = torch.zeros(rows * t.sequence, dtype=torch.int64)
    positions = torch.arange(t.sequence).repeat(rows)
    return PackedBatch(tokens, tokens, positions, tuple(range(0, len(tokens) + 1, t.sequence)))
