"""Full attention over a sequence that several ranks share: keys gathered, or handed on around a ring.

Ranks hold the zigzag segments of :mod:`shoal.workers.sequence`. Then, of the keys of an earlier rank of the ring, all
queries see the early half and none the late one; of a later rank's keys the late half of the queries sees all. So each
step is one dense product of half the size, the first one is causal, and every rank has as much to do.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.kernels.full import full_attention_of
from shoal.kernels.nsa.rows import Rows, runs
from shoal.workers.exchange import Plan, fetch_rows
from shoal.workers.mesh import Group


def gather_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], queries: Rows, plan: Plan, scale: float
) -> Tensor:
    """``full_attention`` of this rank's queries, from this rank's tokens: what they may see is fetched at once.

    q: ``[t, H, d_qk]``, k: ``[t, KV, d_qk]``, v: ``[t, KV, d_v]``. queries: this rank's tokens. plan: of
    :func:`key_plan`. Returns ``[t, H, d_v]``. Every rank of the group calls it.
    """
    keys, values = fetch_rows(plan, k, v)
    return full_attention_of(q, keys, values, cu_seqlens, queries, _keys(cu_seqlens, queries), scale)


def key_plan(cu_seqlens: tuple[int, ...], owned: tuple[Rows, ...], group: Group) -> Plan:
    """Of each rank the tokens whose keys its queries see; the last few are remembered."""
    return _key_plan(cu_seqlens, owned, group)


@lru_cache(maxsize=8)
def _key_plan(cu_seqlens: tuple[int, ...], owned: tuple[Rows, ...], group: Group) -> Plan:
    return Plan.of("keys", group, owned, [_keys(cu_seqlens, rows) for rows in owned], large=True)


def _keys(cu_seqlens: tuple[int, ...], queries: Rows) -> Rows:
    return Rows.of((cu_seqlens[run.document], run.stop) for run in runs(cu_seqlens, queries))


class Dense(Protocol):
    """Attention over one piece of the keys; heads in front, one head of keys for each of queries."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """``[H, t, d_v]`` and log-sum-exps ``[H, t]`` float32 (or float64) of q ``[H, t, d_qk]``."""
        ...

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v for the output and log-sum-exps over all keys, of which these are some."""
        ...


class PlainDense:
    """In PyTorch operations, for CPUs and for tests: scores of one piece exist at a time, in float32 at least."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = _wide(q, k, v)
        scores = self._scores(q, k, causal, scale)
        lse = scores.logsumexp(-1)
        return (scores - lse[..., None]).exp() @ v, lse

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_out, q, k, v, out = _wide(d_out, q, k, v, out)
        p = (self._scores(q, k, causal, scale) - lse[..., None]).exp()
        d_s = p * (d_out @ v.transpose(1, 2) - (d_out * out).sum(-1, keepdim=True)) * scale
        return d_s @ k, d_s.transpose(1, 2) @ q, p.transpose(1, 2) @ d_out

    def _scores(self, q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        scores = scale * q @ k.transpose(1, 2)
        if causal:
            later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        return scores


def _wide(*xs: Tensor) -> list[Tensor]:
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in xs]


class CudnnDense:
    """cuDNN's attention, in 16 bits on a GPU."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q[None], k[None], v[None], None, True, 0.0, causal, False, scale=scale
        )
        return out[0], lse.reshape(lse.shape[1:3])

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        unused = torch.zeros((), dtype=torch.int64, device=q.device)  # of the generator: nothing is dropped out
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(d_out[None], q[None], k[None], v[None], out[None], lse[None, :, :, None].contiguous()),
            *(unused, unused, None, None, None, q.shape[1], k.shape[1], 0.0, causal),
            scale=scale,
        )
        d_q, d_k, d_v = (g[0] for g in grads)
        return d_q, d_k, d_v


@dataclass
class Ring:
    """Ranks in a circle, and what computes a step. received: bytes that arrived here, by phase."""

    group: Group
    dense: Dense
    received: Counter[str] = field(default_factory=Counter)

    def hand_on(self, tensors: list[Tensor], phase: str) -> tuple[list[Tensor], list[Any]]:
        """Sends tensors to the next rank; what comes from the one before, complete once the works are waited for."""
        group = self.group
        into = [torch.empty_like(x) for x in tensors]
        following, before = (group.ranks[(group.index + step) % group.size] for step in (1, -1))
        ops = [dist.P2POp(dist.isend, x, following, group.handle) for x in tensors]
        ops += [dist.P2POp(dist.irecv, x, before, group.handle) for x in into]
        self.received[phase] += sum(x.nbytes for x in into)
        return into, dist.batch_isend_irecv(ops)


def make_ring(group: Group, q: Tensor) -> Ring:
    """A ring for queries like these: cuDNN in 16 bits on a GPU, else PyTorch operations."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return Ring(group, CudnnDense() if q.is_cuda and half else PlainDense())


def ring_attention(q: Tensor, k: Tensor, v: Tensor, ring: Ring, scale: float) -> Tensor:
    """Causal attention within one document, in zigzag segments of equal length over the ring's ranks.

    q: ``[t, H, d_qk]``, k: ``[t, KV, d_qk]``, v: ``[t, KV, d_v]``, this rank's, t even. Returns ``[t, H, d_v]``.
    """
    out: Tensor = _Ring.apply(q, k, v, ring, scale)
    return out


def _by_head(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()


def _groups(heads: Tensor, share: int) -> list[slice]:
    """The query heads of each head of keys: they are computed together, and the next ones after them."""
    return [slice(h, h + share) for h in range(0, heads.shape[0], share)]


def _step(q: Tensor, k: Tensor, me: int, source: int) -> tuple[slice, slice]:
    """The queries that see keys of the rank ``source``, and those keys; rows of both."""
    everything, half = slice(0, q.shape[1]), q.shape[1] // 2
    if source == me:
        return everything, everything
    return (everything, slice(0, half)) if source < me else (slice(half, q.shape[1]), everything)


class _Ring(torch.autograd.Function):
    """Forward keeps q, this rank's keys and values, the output and its log-sum-exps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring, scale: float) -> Tensor:
        heads, group = _by_head(q), ring.group
        share = q.shape[1] // k.shape[1]
        wide = torch.promote_types(q.dtype, torch.float32)
        keys = [_by_head(k), _by_head(v)]
        total = heads.new_zeros(*heads.shape[:2], v.shape[2], dtype=wide)
        lse = heads.new_full(heads.shape[:2], -torch.inf, dtype=wide)
        for step in range(group.size):
            source = (group.index - step) % group.size
            following, works = ring.hand_on(keys, "forward") if step + 1 < group.size else (keys, [])
            rows, seen = _step(heads, keys[0], group.index, source)
            for h, of in enumerate(_groups(heads, share)):
                k_h, v_h = (x[h, seen].expand(share, -1, -1).contiguous() for x in keys)
                part, part_lse = ring.dense.forward(heads[of, rows], k_h, v_h, source == group.index, scale)
                both = torch.logaddexp(lse[of, rows], part_lse.to(wide))
                fade, weight = (lse[of, rows] - both).exp(), (part_lse - both).exp()
                total[of, rows] = total[of, rows] * fade[..., None] + part * weight[..., None]
                lse[of, rows] = both
            for work in works:
                work.wait()
            keys = following
        out = total.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.scale = ring, scale
        return out.transpose(0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        ring: Ring = ctx.ring
        group, share = ring.group, q.shape[1] // k.shape[1]
        heads, d_out, keys = _by_head(q), _by_head(grads[0]), [_by_head(k), _by_head(v)]
        wide = torch.promote_types(q.dtype, torch.float32)
        d_q = torch.zeros_like(heads, dtype=wide)
        sums = [torch.zeros_like(x, dtype=wide) for x in keys]  # gradients of the keys at hand, which they go with
        for step in range(group.size):
            source = (group.index - step) % group.size
            following, works = ring.hand_on(keys, "backward") if step + 1 < group.size else (keys, [])
            rows, seen = _step(heads, keys[0], group.index, source)
            for h, of in enumerate(_groups(heads, share)):
                shared = (x[h, seen].expand(share, -1, -1) for x in keys)
                args = (d_out[of, rows], heads[of, rows], *shared, out[of, rows], lse[of, rows])
                b_do, b_q, b_k, b_v, b_out, b_lse = (x.contiguous() for x in args)
                causal = source == group.index
                part = ring.dense.backward(b_do, b_q, b_k, b_v, b_out, b_lse, causal, ctx.scale)
                d_q[of, rows] += part[0]
                for total, grad in zip(sums, part[1:], strict=True):
                    total[h, seen] += grad.sum(0, dtype=wide)
            for work in works:
                work.wait()
            keys = following
            if group.size > 1:
                sums, works = ring.hand_on(sums, "backward")
                for work in works:
                    work.wait()
        back = (x.transpose(0, 1).to(q.dtype) for x in (d_q, *sums))
        return (*back, None, None)
