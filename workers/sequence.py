"""NSA over a sequence that several ranks share: each holds an early and a late segment and fetches the keys it reads.

What moves, of one layer, between the ranks of a context group:

- ``raw``: the few tokens before a segment that its first compressed blocks reach back to, before φ;
- ``cmp``: compressed keys and values, made once, by the rank that holds a block's last token;
- ``near``: the window before each segment;
- ``far``: keys and values of the selected branch, for all blocks that a query might choose. They are on their way
  while compressed attention, the choice of blocks and the window are computed; they are not kept for the backward
  pass, which fetches them again, and whose gradients return while those of the compression are computed. Or only the
  pages that were chosen, when that is known: less where queries agree, but nothing hides it.

Each query reads its own document, and no later token, so that less moves than all keys to all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.kernels.nsa.attention import Backend, Kept, chosen_backend, nsa_backward, nsa_forward, unpacked
from shoal.kernels.nsa.compress import OwnBlocks, own_blocks
from shoal.kernels.nsa.layout import BlockSizes, Layout, make_layout
from shoal.kernels.nsa.rows import Rows, needs
from shoal.workers.exchange import Fetch, Give, Plan, fetch_rows
from shoal.workers.mesh import Group
from shoal.workers.pull import Fetching, Pages, Pull, PullGive

Pair = tuple[Tensor, Tensor]
Compress = Callable[[Tensor], Tensor]


def zigzag(tokens: int, ranks: int, multiple: int) -> tuple[Rows, ...]:
    """The tokens of each of ``ranks`` ranks: of 2 · ranks equal segments the i-th and the i-th last.

    Early queries have few keys and late ones many: together every rank has as much to do. Segments begin at multiples
    of ``multiple``, and where tokens do not divide they differ by one such.
    """
    count = 2 * ranks
    edges = [min(tokens, round(i * tokens / count / multiple) * multiple) for i in range(count)] + [tokens]
    segments = list(pairwise(edges))
    return tuple(Rows.of([segments[i], segments[-1 - i]]) for i in range(ranks))


@dataclass(frozen=True)
class Sequence:
    """A packed batch on one rank of a context group: where its tokens, keys and compressed blocks are.

    layout: of this rank's queries. own: the compressed blocks that it makes. pages: of the far keys. received: bytes
    that arrived, by plan.
    """

    layout: Layout
    own: OwnBlocks
    raw: Plan
    cmp: Plan
    near: Plan
    far: Plan
    pages: Pages
    received: Counter[str]


def make_sequence(
    cu_seqlens: tuple[int, ...],
    sizes: BlockSizes,
    group: Group,
    device: torch.device,
    tile: int | None = None,
    dense_keys: int | None = None,
) -> Sequence:
    """The plans of a packed batch in zigzag segments over a group; the last few are remembered."""
    return _make_sequence(tuple(cu_seqlens), sizes, group, device, tile, dense_keys)


@lru_cache(maxsize=8)
def _make_sequence(
    cu_seqlens: tuple[int, ...],
    sizes: BlockSizes,
    group: Group,
    device: torch.device,
    tile: int | None,
    dense_keys: int | None,
) -> Sequence:
    owned = zigzag(cu_seqlens[-1], group.size, sizes.slc_block)
    need = [needs(cu_seqlens, sizes, rows) for rows in owned]
    layout = make_layout(cu_seqlens, sizes, device, tile, dense_keys, owned[group.index])
    received: Counter[str] = Counter()
    reads = tuple(n.far for n in need)
    far = Plan.of("far", group, owned, reads, received)
    return Sequence(
        layout=layout,
        own=own_blocks(layout),
        raw=Plan.of("raw", group, owned, [n.raw for n in need], received),
        cmp=Plan.of("cmp", group, [n.own for n in need], [n.cmp for n in need], received),
        near=Plan.of("near", group, owned, [n.near for n in need], received),
        far=far,
        pages=Pages(far, owned, reads, cu_seqlens[-1], sizes.slc_block),
        received=received,
    )


def sequence_attention(
    q: Tensor,
    raw: Pair,
    slc: Pair,
    win: Pair,
    gates: Tensor,
    compress: tuple[Compress, Compress],
    sequence: Sequence,
    scale: float,
    backend: Backend = "auto",
    wide: bool = False,
    fetching: Fetching | None = None,
) -> Tensor:
    """``nsa_attention`` for this rank's queries, from this rank's tokens. Every rank of the group calls it.

    q: ``[t, H, d_qk]``, gates: ``[t, H, 3]``; raw, slc, win: keys ``[t, KV, d_qk]`` and values ``[t, KV, d_v]`` of
    the three branches, rotated but for raw. compress: what makes keys and values of ``sequence.own`` blocks from raw
    tokens ``[raw, KV, D]``, keys rotated. wide: gradients of the selected branch travel in float32. fetching: how its
    keys are fetched; None: all that may be chosen. Returns ``[t, H, d_v]``.
    """
    flight = _Flight(sequence, scale, backend, wide, fetching or Fetching())
    slc = _Deliver.apply(*slc, flight)
    keys, values = fetch_rows(sequence.raw, *raw)
    near = fetch_rows(sequence.near, *win)
    cmp = fetch_rows(sequence.cmp, compress[0](keys), compress[1](values))
    out: Tensor = _Attend.apply(q, *cmp, *slc, *near, gates, flight)
    return out


@dataclass
class _Flight:
    """What two nodes of autograd share: the second, which runs first backwards, leaves gradients under way."""

    sequence: Sequence
    scale: float
    backend: Backend
    wide: bool
    fetching: Fetching
    returning: Give | PullGive | None = None


class _Arrival:
    """The selected branch's keys and values on their way to ``buffers``; called when they are about to be read.

    source: the plan that brings them, or what was asked for once blocks were chosen.
    """

    def __init__(self, flight: _Flight, k: Tensor, v: Tensor) -> None:
        self.flight, self.kept, plan = flight, (k, v), flight.sequence.far
        self.source: Plan | Pull = plan
        self.fetch: Fetch | None = None
        if flight.fetching.pull:
            self.buffers = tuple(x.new_zeros(plan.needed, *x.shape[1:]) for x in (k, v))
        else:
            self.fetch = plan.fetch(k, v)
            self.buffers = self.fetch.buffers

    def __call__(self, read: Callable[[], Tensor]) -> None:
        fetching, pages = self.flight.fetching, self.flight.sequence.pages
        rows = read() if fetching.pull or fetching.count else None
        if fetching.count and rows is not None:
            fetching.counts = pages.count(rows)
        if self.fetch is not None:
            self.fetch.wait()
        elif rows is not None:
            self.source = pull = pages.ask(rows)
            pull.fetch(*self.kept, into=self.buffers).wait()


class _Deliver(torch.autograd.Function):
    """Nothing forwards; backwards the gradients of this rank's rows, which :class:`_Attend` has sent on their way.

    Made before the compression, so that the gradients travel while its own are computed.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, flight: _Flight) -> Pair:
        ctx.flight, ctx.dtype = flight, k.dtype
        return k.view_as(k), v.view_as(v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flight: _Flight = ctx.flight
        assert flight.returning is not None
        sums = flight.returning.wait(ctx.dtype)
        flight.returning = None
        return (*sums, None)


class _Attend(torch.autograd.Function):
    """Attention over fetched keys; those of the selected branch are kept as this rank's rows only."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, flight = args
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = inputs
        sequence: Sequence = flight.sequence
        arrival = _Arrival(flight, k_slc, v_slc)
        k_far, v_far = arrival.buffers
        tensors = (q, k_cmp, v_cmp, k_far, v_far, k_win, v_win, gates)
        backend = chosen_backend(tensors, sequence.layout, flight.backend)
        out, kept = nsa_forward(tensors, sequence.layout, flight.scale, backend, arrival)
        ctx.save_for_backward(*inputs, *kept.tensors)
        ctx.flight, ctx.backend, ctx.choices, ctx.source = flight, backend, kept.choices, arrival.source
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates), kept = unpacked(ctx)
        flight: _Flight = ctx.flight
        sequence = flight.sequence
        source: Plan | Pull = ctx.source
        fetch = source.fetch(k_slc, v_slc)
        k_far, v_far = fetch.buffers
        tensors = (q, k_cmp, v_cmp, k_far, v_far, k_win, v_win, gates)
        settings = (sequence.layout, flight.scale, ctx.backend, fetch.wait, flight.wide)
        back = nsa_backward(grads[0], tensors, Kept(kept, ctx.choices), *settings)
        flight.returning = source.give(*back[3:5])
        # Only word that gradients are under way: what they come to has the rows of this rank.
        word = (x.new_zeros(()).expand_as(x) for x in (k_slc, v_slc))
        return (*back[:3], *word, *back[5:], None)
