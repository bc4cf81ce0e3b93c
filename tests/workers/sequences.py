"""Attention over a sequence, NSA and full, on one rank and on ranks that share it: for tests on CPUs and on GPUs.

Results are lists: the output, then the gradients of the leaves in their order. The first ``TOKENS`` leaves have a row
for each token, of which a rank has its own; what follows are weights, of whose gradients a rank has a part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shoal.kernels.full import full_attention
from shoal.kernels.nsa import BlockSizes, Layout, compress, make_layout, nsa_attention
from shoal.kernels.nsa.compress import OwnBlocks
from shoal.workers.mesh import Group
from shoal.workers.pull import Fetching, counted
from shoal.workers.ring import Ring, gather_attention, key_plan, make_ring, ring_attention
from shoal.workers.sequence import Sequence, make_sequence, sequence_attention, zigzag

SIZES = BlockSizes(8, 4, 8, 4, 1, 2, 12)
NSA_NAMES = (
    *("out", "q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates"),
    *("position of k", "w1 of k", "w2 of k", "position of v", "w1 of v", "w2 of v"),
)
FULL_NAMES = ("out", "q", "k", "v")
TOKENS = 8


@dataclass(frozen=True)
class Problem:
    """One layer's attention. dims: d_qk and d_v. phi: dtype of φ, where it differs from the others'."""

    cu: tuple[int, ...]
    sizes: BlockSizes = SIZES
    kv: int = 2
    group: int = 2
    dims: tuple[int, int] = (6, 4)
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    phi: torch.dtype | None = None

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return 1.5 * self.dims[0] ** -0.5


def drawn(p: Problem) -> list[Tensor]:
    """q, raw, selected and window keys and values, gates, φ of keys and of values, gradient of the output."""
    device, (d_qk, d_v), heads = torch.device(p.device), p.dims, p.kv * p.group
    gen = torch.Generator(device).manual_seed(0)
    wide = torch.float64 if device.type == "cpu" else torch.float32

    def make(*shape: int, std: float = 1.0, dtype: torch.dtype = p.dtype) -> Tensor:
        return (std * torch.randn(*shape, generator=gen, dtype=wide, device=device)).to(dtype)

    def phi(dim: int) -> list[Tensor]:
        width, draw = p.sizes.cmp_block * dim, partial(make, dtype=p.phi or p.dtype)
        first, second = draw(p.kv, width, 2 * dim, std=width**-0.5), draw(p.kv, 2 * dim, dim, std=dim**-0.5)
        return [draw(p.kv, p.sizes.cmp_block, dim), first, second]

    q = make(p.cu[-1], heads, d_qk)
    keys = [make(p.cu[-1], p.kv, dim) for _ in range(3) for dim in p.dims]
    return [q, *keys, make(p.cu[-1], heads, 3).sigmoid(), *phi(d_qk), *phi(d_v), make(p.cu[-1], heads, d_v)]


def _phi(weights: list[Tensor], blocks: Layout | OwnBlocks, x: Tensor) -> Tensor:
    position, w1, w2 = weights
    return compress(x.to(w1.dtype), position, w1, w2, blocks).to(x.dtype)


def nsa_alone(p: Problem, args: list[Tensor]) -> list[Tensor]:
    """One rank's results, of :func:`drawn` or the like."""
    leaves = [x.detach().clone().requires_grad_() for x in args[:-1]]
    q, k_raw, v_raw, k_slc, v_slc, k_win, v_win, gates, *phi = leaves
    layout = make_layout(p.cu, p.sizes, q.device)
    keys, values = _phi(phi[:3], layout, k_raw), _phi(phi[3:], layout, v_raw)
    out = nsa_attention(q, keys, values, k_slc, v_slc, k_win, v_win, gates, layout, p.scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, args[-1])]


@dataclass
class Shared:
    """What a rank of several computed. forward, total: bytes it had received after the forward pass, and at last.
    counts: of the pages that were chosen. turns: heads of keys that were computed together, one turn after another."""

    results: list[Tensor]
    forward: dict[str, int]
    total: dict[str, int]
    buffers: dict[str, int]
    counts: list[int]
    turns: list[int]

    @property
    def coverage(self) -> float:
        """The share of the pages at other ranks that this one reads, of all that it might."""
        return self.counts[0] / max(1, self.counts[2])


def nsa_shared(
    p: Problem,
    args: list[Tensor],
    group: Group,
    tile: int | None = None,
    dense: int | None = None,
    pull: bool = False,
    wide: bool = False,
    heads: int = 0,
) -> Shared:
    """This rank's results, of what one rank would be given."""
    *leaves, upstream = rank_part(p, args, group, TOKENS)
    sequence = make_sequence(p.cu, p.sizes, group, torch.device(p.device), tile, dense)
    sequence.received.clear()
    fetching = Fetching(pull, count=True)
    out = nsa_of(p, leaves, sequence, fetching, wide, heads)
    forward = dict(sequence.received)
    results = [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
    counts, turns = counted([fetching])[0].tolist(), [len(read) for read in fetching.read]
    return Shared(results, forward, dict(sequence.received), _buffers(sequence), counts, turns)


def nsa_of(
    p: Problem,
    leaves: list[Tensor],
    sequence: Sequence,
    fetching: Fetching | None = None,
    wide: bool = False,
    heads: int = 0,
) -> Tensor:
    """The output of this rank, from its leaves."""
    q, k_raw, v_raw, k_slc, v_slc, k_win, v_win, gates, *phi = leaves
    compressing = (partial(_phi, phi[:3], sequence.own), partial(_phi, phi[3:], sequence.own))
    pairs = ((k_raw, v_raw), (k_slc, v_slc), (k_win, v_win))
    args = (q, *pairs, gates, compressing, sequence, p.scale)
    return sequence_attention(*args, wide=wide, fetching=fetching, heads=heads)


def _buffers(sequence: Sequence) -> dict[str, int]:
    """Rows of each buffer of fetched keys."""
    return {plan.name: plan.needed for plan in (sequence.raw, sequence.cmp, sequence.near, sequence.far)}


def own_rows(p: Problem, group: Group) -> Tensor:
    """The tokens of this rank, on the problem's device."""
    return zigzag(p.cu[-1], group.size, p.sizes.slc_block)[group.index].indices().to(p.device)


def rank_part(p: Problem, args: list[Tensor], group: Group, tokens: int) -> list[Tensor]:
    """Leaves of this rank, and its part of the gradient of the output. tokens: how many leaves have a row for each."""
    at = own_rows(p, group)
    *leaves, upstream = (x[at] if i < tokens or i == len(args) - 1 else x for i, x in enumerate(args))
    return [*(x.detach().clone().requires_grad_() for x in leaves), upstream]


def full_drawn(p: Problem) -> list[Tensor]:
    """q, keys, values, gradient of the output."""
    args = drawn(p)
    return [args[0], args[1], args[2], args[-1]]


def full_alone(p: Problem, args: list[Tensor]) -> list[Tensor]:
    """One rank's results."""
    leaves = q, k, v = [x.detach().clone().requires_grad_() for x in args[:-1]]
    out = full_attention(q, k, v, p.cu, p.scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, args[-1])]


def full_shared(p: Problem, args: list[Tensor], group: Group, ring: bool) -> tuple[list[Tensor], Ring]:
    """This rank's results, around a ring or of gathered keys."""
    owned = zigzag(p.cu[-1], group.size, p.sizes.slc_block)
    *leaves, upstream = rank_part(p, args, group, 3)
    q, k, v = leaves
    circle = make_ring(group, q)
    if ring:
        out = ring_attention(q, k, v, circle, p.scale)
    else:
        plan = key_plan(p.cu, owned, group)
        out = gather_attention(q, k, v, p.cu, owned[group.index], plan, p.scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)], circle
