"""NSA over a sequence that several ranks share: each holds an early and a late segment and fetches the keys it reads.

What moves, of one layer, between the ranks of a context group:

- ``raw``: the few tokens before a segment that its first compressed blocks reach back to, before φ;
- ``cmp``: compressed keys and values, made once, by the rank that holds a block's last token;
- ``near``: the window before each segment;
- ``far``: keys and values of the selected branch, for all blocks that a query might choose. They leave first, over a
  process group of their own, where they hold up none of the others, and are on their way while φ, compressed
  attention, the choice of blocks and the window are computed; they are not kept for the backward pass, which fetches
  them again, and whose gradients return while those of φ are computed. Or only the pages that were chosen, when that is
  known: less where queries agree, but nothing hides it.

Each query reads its own document, and no later token, so that less moves than all keys to all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.kernels.nsa.attention import Backend, Kept, Tensors, chosen_backend, nsa_backward, nsa_forward, unpacked
from shoal.kernels.nsa.compress import OwnBlocks, own_blocks
from shoal.kernels.nsa.layout import BlockSizes, Layout, make_layout
from shoal.kernels.nsa.rows import Rows, needs
from shoal.workers.exchange import Fetch, Give, Plan, fetch_rows
from shoal.workers.mesh import Group
from shoal.workers.placement import segments_of
from shoal.workers.pull import Fetching, Pages, Pull, PullFetch, PullGive

Pair = tuple[Tensor, Tensor]
Inputs = list[Tensor] | tuple[Tensor, ...]
"""Those of :data:`shoal.kernels.nsa.attention.Tensors`, keys of the selected branch being this rank's own."""
Compress = Callable[[Tensor], Tensor]


def zigzag(tokens: int, ranks: int, multiple: int) -> tuple[Rows, ...]:
    """The tokens of each of ``ranks`` ranks: of 2 · ranks equal segments the i-th and the i-th last.

    Early queries have few keys and late ones many: together every rank has as much to do.
    """
    segments = segments_of(tokens, ranks, multiple)
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
    far = Plan.of("far", group.beside, owned, reads, received, large=True)
    return Sequence(
        layout=layout,
        own=own_blocks(layout),
        raw=Plan.of("raw", group, owned, [n.raw for n in need], received),
        cmp=Plan.of("cmp", group, [n.own for n in need], [n.cmp for n in need], received, large=True),
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
    heads: int = 0,
) -> Tensor:
    """``nsa_attention`` for this rank's queries, from this rank's tokens. Every rank of the group calls it.

    q: ``[t, H, d_qk]``, gates: ``[t, H, 3]``; raw, slc, win: keys ``[t, KV, d_qk]`` and values ``[t, KV, d_v]`` of
    the three branches, rotated but for raw. compress: what makes keys and values of ``sequence.own`` blocks from raw
    tokens ``[raw, KV, D]``, keys rotated. wide: gradients of the selected branch travel in float32. fetching: how its
    keys are fetched; None: all that may be chosen. heads: of keys that are computed at a time, while the next ones' far
    keys travel; 0: all. Returns ``[t, H, d_v]``.
    """
    flight = _Flight(sequence, scale, backend, wide, fetching or Fetching(), _turns(slc[0].shape[1], heads))
    slc = _Deliver.apply(*slc, flight)
    keys, values = fetch_rows(sequence.raw, *raw)
    near = fetch_rows(sequence.near, *win)
    cmp = fetch_rows(sequence.cmp, *_Send.apply(compress[0](keys), compress[1](values), flight))
    out: Tensor = _Attend.apply(q, *cmp, *slc, *near, gates, flight)
    return out


def _turns(heads: int, at_once: int) -> list[slice]:
    step = at_once or heads
    return [slice(first, min(first + step, heads)) for first in range(0, heads, step)]


@dataclass
class _Flight:
    """What two nodes of autograd share: the second, which runs first backwards, leaves gradients under way.

    turns: heads of keys that are computed together, one after another. coming: far keys under way forwards. returned:
    sums of the gradients of the selected branch, of the first turns; returning: those of the turn before; held: those
    of the last one, not sent yet, since those of compressed rows, which φ's wait for, have the links first.
    """

    sequence: Sequence
    scale: float
    backend: Backend
    wide: bool
    fetching: Fetching
    turns: list[slice]
    coming: list[_Arrival] = field(default_factory=list)
    returned: list[tuple[Tensor, ...]] = field(default_factory=list)
    returning: Give | PullGive | None = None
    held: tuple[Plan | Pull, tuple[Tensor, ...], torch.dtype] | None = None

    def begin(self, turn: int, k: Tensor, v: Tensor) -> None:
        """Sends a turn's keys on their way, of this rank's rows of all heads; there is no turn after the last."""
        if turn < len(self.turns):
            k, v = k[:, self.turns[turn]], v[:, self.turns[turn]]
            self.coming.append(_Arrival(self, k, v, first=turn == 0))

    def give(self, source: Plan | Pull, grads: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        """Sends a turn's gradients on their way; those of the turn before have travelled during this one."""
        coming = source.give(*grads)
        if self.returning is not None:
            self.returned.append(self.returning.wait(dtype))
        self.returning = coming

    def send(self) -> None:
        """Sends the last turn's gradients on their way, if they are still here."""
        if self.held is not None:
            held, self.held = self.held, None
            self.give(*held)

    def take(self, dtype: torch.dtype) -> list[Tensor]:
        """All of them, of keys and of values."""
        self.send()
        assert self.returning is not None
        parts = [*self.returned, self.returning.wait(dtype)]
        self.returned, self.returning = [], None
        return [_joined(x) for x in zip(*parts, strict=True)]


class _Arrival:
    """The selected branch's keys and values of a turn on their way to ``buffers``; called when these are to be read.

    source: the plan that brings them, or what was asked for once blocks were chosen.
    """

    def __init__(self, flight: _Flight, k: Tensor, v: Tensor, first: bool) -> None:
        self.flight, self.kept, self.first, plan = flight, (k, v), first, flight.sequence.far
        self.source: Plan | Pull = plan
        self.fetch: Fetch | None = None
        if flight.fetching.pull:
            self.buffers = tuple(x.new_zeros(plan.needed, *x.shape[1:]) for x in (k, v))
        else:
            self.fetch = plan.fetch(k, v)
            self.buffers = self.fetch.buffers

    def __call__(self, read: Callable[[], Tensor]) -> None:
        fetching, pages = self.flight.fetching, self.flight.sequence.pages
        found = read() if fetching.pull or fetching.count else None
        if fetching.count and found is not None:
            fetching.keep(pages, found, self.first)
        if self.fetch is not None:
            self.fetch.wait()
        elif found is not None:
            self.source = pull = pages.ask(found)
            pull.fetch(*self.kept, into=self.buffers).wait()


class _Send(torch.autograd.Function):
    """Nothing forwards; backwards, when compressed rows' gradients are home, those of the selected branch are sent."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, flight: _Flight) -> Pair:
        ctx.flight = flight
        return k.view_as(k), v.view_as(v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.flight.send()
        return (*grads, None)


class _Deliver(torch.autograd.Function):
    """Forwards the first far keys leave; backwards the gradients of this rank's rows, which :class:`_Attend` has found.

    Made before the compression, so that keys travel while it is computed, and gradients while its own are.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, flight: _Flight) -> Pair:
        ctx.flight, ctx.dtype = flight, k.dtype
        flight.begin(0, k, v)
        return k.view_as(k), v.view_as(v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.flight.take(ctx.dtype), None)


class _Attend(torch.autograd.Function):
    """Attention over fetched keys; those of the selected branch are kept as this rank's rows only."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, flight = args
        outs, kept = [], []
        ctx.sources, ctx.choices = [], []
        for i, turn in enumerate(flight.turns):
            flight.begin(i + 1, *inputs[3:5])
            out, left, source = _forward_turn(inputs, turn, flight.coming.pop(0))
            outs.append(out)
            kept += left.tensors
            ctx.choices.append(left.choices)
            ctx.sources.append(source)
        ctx.save_for_backward(*inputs, *kept)
        ctx.flight = flight
        return _joined(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, kept = unpacked(ctx)
        flight: _Flight = ctx.flight
        turns, each = flight.turns, len(kept) // len(flight.turns)
        coming: list[Fetch | PullFetch] = []
        backs: list[tuple[Tensor, ...]] = []

        def begin(i: int) -> None:
            coming.append(ctx.sources[i].fetch(*(x[:, turns[i]] for x in inputs[3:5])))

        begin(0)
        for i, turn in enumerate(turns):
            if i + 1 < len(turns):
                begin(i + 1)
            left = Kept(kept[:each], ctx.choices[i])
            del kept[:each]  # a turn lets go of what it has read
            back, far = _backward_turn(grads[0], inputs, turn, left, coming.pop(0), flight)
            if i + 1 < len(turns):
                flight.give(ctx.sources[i], far, inputs[3].dtype)
            else:
                flight.held = ctx.sources[i], far, inputs[3].dtype
            backs.append(back)
            del far
        d_q, d_k_cmp, d_v_cmp, d_k_win, d_v_win, d_gates = (_joined(x) for x in zip(*backs, strict=True))
        # Only word that gradients are under way: what they come to has the rows of this rank.
        word = (x.new_zeros(()).expand_as(x) for x in inputs[3:5])
        return (d_q, d_k_cmp, d_v_cmp, *word, d_k_win, d_v_win, d_gates, None)


def _forward_turn(inputs: Inputs, turn: slice, arrival: _Arrival) -> tuple[Tensor, Kept, Plan | Pull]:
    """Output of the queries of some heads of keys, what is left for the backward pass, and where keys came from."""
    flight, tensors = arrival.flight, _of_heads(inputs, turn, arrival.buffers)
    layout = flight.sequence.layout
    backend = chosen_backend(tensors, layout, flight.backend)
    out, kept = nsa_forward(tensors, layout, flight.scale, backend, arrival)
    return out, kept, arrival.source


def _backward_turn(
    d_out: Tensor, inputs: Inputs, turn: slice, kept: Kept, fetch: Fetch | PullFetch, flight: _Flight
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Gradients of the inputs that belong to some heads of keys, and those of the far keys and values."""
    tensors, layout = _of_heads(inputs, turn, fetch.buffers), flight.sequence.layout
    backend = chosen_backend(tensors, layout, flight.backend)
    d_out = d_out[:, _queries(inputs, turn)]
    back = nsa_backward(d_out, tensors, kept, layout, flight.scale, backend, fetch.wait, flight.wide)
    return (*back[:3], *back[5:]), back[3:5]


def _queries(inputs: Inputs, turn: slice) -> slice:
    share = inputs[0].shape[1] // inputs[3].shape[1]
    return slice(turn.start * share, turn.stop * share)


def _of_heads(inputs: Inputs, turn: slice, far: tuple[Tensor, ...]) -> Tensors:
    q, k_cmp, v_cmp, _, _, k_win, v_win, gates = inputs
    k_far, v_far = far
    at = _queries(inputs, turn)
    return (q[:, at], k_cmp[:, turn], v_cmp[:, turn], k_far, v_far, k_win[:, turn], v_win[:, turn], gates[:, at])


def _joined(parts: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """``[rows, heads, …]`` of all turns."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
