"""One rank of ``shoal bench sequence``: times attention layers over a sequence that it shares with others."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.jobs.bench.cases import measure_each
from shoal.jobs.bench.result import Row
from shoal.kernels.nsa import BlockSizes, Layout, compress, make_layout, nsa_attention
from shoal.kernels.nsa.compress import OwnBlocks
from shoal.workers.clock import Clock
from shoal.workers.exchange import watched
from shoal.workers.mesh import Group
from shoal.workers.pull import Fetching, counted
from shoal.workers.ring import make_ring, ring_attention
from shoal.workers.sequence import make_sequence, sequence_attention, zigzag
from shoal.workers.volume import Shape, nsa_volume, ring_volume

SIZES = BlockSizes(cmp_block=32, cmp_stride=16, slc_block=64, slc_count=16, slc_initial=1, slc_local=2, window=512)
SECONDS = 4.0
"""How long a case is measured, about."""
WARM = 1 << 17
"""Tokens up to which full attention is called once before it is measured: half a minute of it need not be warm."""


@dataclass(frozen=True)
class Case:
    """One layer to measure: ``kind`` is ``nsa``, ``full`` or ``check``; heads and their dimension."""

    kind: str
    context: int
    ranks: int
    heads: int = 64
    kv_heads: int = 4
    dim: int = 128
    repeats: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.context}"

    @property
    def shape(self) -> Shape:
        itemsize = 2 if torch.cuda.is_available() else 4
        return Shape(self.kv_heads, (self.dim, self.dim), itemsize, itemsize if self.kind == "nsa" else 4)

    def model(self, rank: int) -> dict[str, int]:
        """Bytes that a rank receives, by phase, as the formula says."""
        if self.kind == "full":
            return ring_volume(self.context, self.ranks, self.shape)
        owned = zigzag(self.context, self.ranks, SIZES.slc_block)
        volume = nsa_volume((0, self.context), owned, rank, self.shape, SIZES)
        return {phase: sum(parts.values()) for phase, parts in volume.items()}


Layer = Callable[[list[Tensor]], Tensor]


def rank_main(rank: int, ranks: int, store: str, cases: list[Case], results: str) -> None:
    """Measures cases in turn; the first rank appends a line of JSON to ``results`` as each begins and ends."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    group = Group((0,), 0)
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    if ranks > 1:
        backend, wait = "nccl" if cuda else "gloo", timedelta(minutes=5)
        dist.init_process_group(backend, f"file://{store}", wait, ranks, rank)
        group = Group(tuple(range(ranks)), rank, dist.group.WORLD, dist.new_group())
        for each in (group, group.beside):
            each.all_reduce(torch.zeros(1, device=device))  # all ranks make their connections now

    def rows_of(case: Case) -> list[Row]:
        return _check(case, group, device) if case.kind == "check" else measure(case, group, device)

    measure_each(rank, results, cases, rows_of, torch.cuda.empty_cache)  # which does nothing without a GPU
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def _draw(case: Case, rows: Tensor | None, device: torch.device) -> list[Tensor]:
    """q, six keys and values, gates, six weights of φ, gradient of the output; rows: which of ``context`` tokens."""
    generator = torch.Generator(device).manual_seed(0)
    tokens = case.context if rows is None or case.kind == "check" else len(rows)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        x = torch.randn(*shape, generator=generator, device=device, dtype=dtype) * std
        return x if rows is None or case.kind != "check" or shape[0] != tokens else x[rows.to(device)]

    kv, dim = case.kv_heads, case.dim
    width = SIZES.cmp_block * dim
    out = [normal(tokens, case.heads, dim), *(normal(tokens, kv, dim) for _ in range(6))]
    out.append(normal(tokens, case.heads, 3).sigmoid())
    for _ in range(2):
        out += [normal(kv, SIZES.cmp_block, dim), normal(kv, width, 2 * dim, std=width**-0.5)]
        out += [normal(kv, 2 * dim, dim, std=(2 * dim) ** -0.5)]
    return [x.requires_grad_() for x in out] + [normal(tokens, case.heads, dim)]


def _layer(
    case: Case, group: Group, device: torch.device, fetching: Fetching | None = None
) -> tuple[Layer, Callable[[], int]]:
    """The layer, from the leaves of :func:`_draw`, and how many bytes have arrived; fetching as it takes it."""
    scale = case.dim**-0.5
    cu = (0, case.context)
    if case.kind == "full":
        ring = make_ring(group, torch.empty(0, device=device, dtype=torch.bfloat16 if device.type == "cuda" else None))
        if group.size == 1:
            return lambda x: _dense(x[0], x[3], x[4], scale), lambda: 0
        return lambda x: ring_attention(x[0], x[3], x[4], ring, scale), lambda: sum(ring.received.values())
    if group.size == 1:
        layout = make_layout(cu, SIZES, device)

        def alone(x: list[Tensor]) -> Tensor:
            q, k_raw, v_raw, k_slc, v_slc, k_win, v_win, gates = x[:8]
            k_cmp, v_cmp = _phi(x[8:11], layout)(k_raw), _phi(x[11:14], layout)(v_raw)
            return nsa_attention(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, layout, scale)

        return alone, lambda: 0
    sequence = make_sequence(cu, SIZES, group, device)

    def shared(x: list[Tensor]) -> Tensor:
        phi = (_phi(x[8:11], sequence.own), _phi(x[11:14], sequence.own))
        keys = ((x[1], x[2]), (x[3], x[4]), (x[5], x[6]))
        return sequence_attention(x[0], *keys, x[7], phi, sequence, scale, fetching=fetching)

    return shared, lambda: sum(sequence.received.values())


def _phi(weights: list[Tensor], blocks: Layout | OwnBlocks) -> Callable[[Tensor], Tensor]:
    position, w1, w2 = weights
    return lambda x: compress(x, position, w1, w2, blocks)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """PyTorch's dense attention of one rank, cuDNN's on a GPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    share = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, 1) for x in (k, v))
    bq, bk, bv = (x.transpose(0, 1)[None] for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if q.is_cuda else SDPBackend.MATH):
        return scaled_dot_product_attention(bq, bk, bv, is_causal=True, scale=scale)[0].transpose(0, 1)


@contextmanager
def _clock(device: torch.device, group: Group, marks: list[Any]) -> Iterator[Callable[[], None]]:
    """Yields what marks a moment; afterwards ``marks`` holds seconds between moments. All ranks begin together."""
    found: list[Any] = []
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # the host runs ahead meanwhile, as it does in training
    if group.size > 1:
        group.all_reduce(torch.zeros(1, device=device))

    def mark() -> None:
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            found.append(event)
        else:
            found.append(time.perf_counter())

    yield mark
    if device.type == "cuda":
        torch.cuda.synchronize()
        marks += [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(found)]
    else:
        marks += [b - a for a, b in itertools.pairwise(found)]


def measure(case: Case, group: Group, device: torch.device) -> list[dict[str, Any]]:
    """A row for each phase: the slowest rank's median, the most bytes received, and the highest peak."""
    rows = zigzag(case.context, group.size, SIZES.slc_block)[group.index].indices()
    *leaves, d_out = _draw(case, rows, device)
    used = [leaves[i] for i in (0, 3, 4)] if case.kind == "full" else leaves
    layer, received = _layer(case, group, device)

    def once() -> tuple[list[float], list[int]]:
        seconds: list[float] = []
        before = received()
        with _clock(device, group, seconds) as mark:
            mark()
            out = layer(leaves)
            middle = received()
            mark()
            torch.autograd.grad(out, used, d_out)
            mark()
        return seconds, [middle - before, received() - middle]

    if case.kind == "nsa" or case.context <= WARM:
        once()
    base = memory(device, reset=True)
    first, arrived = once()
    peak = memory(device) - base
    count = case.repeats or int(group.all_reduce(torch.tensor([SECONDS / sum(first)], device=device)) / group.size)
    times = [first, *(once()[0] for _ in range(max(1, min(count, 20)) - 1))]
    times = [[f, b, f + b] for f, b in times]
    mine = [statistics.median(phase) for phase in zip(*times, strict=True)]
    facts = torch.tensor(
        [*mine, *map(float, arrived), float(sum(arrived)), float(peak)], device=device, dtype=torch.float64
    )
    most = group.all_gather(facts).amax(0).tolist()
    volumes = [case.model(r) for r in range(group.size)]
    by_formula = [max(v["forward"] for v in volumes), max(v["backward"] for v in volumes)]
    by_formula.append(max(v["forward"] + v["backward"] for v in volumes))
    facts_of_nsa: dict[str, float] = {}
    if case.kind == "nsa" and group.size > 1:
        facts_of_nsa["coverage"] = _coverage(case, group, device, leaves)
        facts_of_nsa["wait_share"] = _waits(lambda: sum(once()[0]), group, device)
    return [
        {
            "phase": phase,
            "ms": 1e3 * most[i],
            "bytes": int(most[3 + i]),
            "bytes_by_formula": by_formula[i] if group.size > 1 else 0,
            "peak_bytes": int(most[6]),
            "repeats": len(times),
            **facts_of_nsa,
        }
        for i, phase in enumerate(("forward", "backward", "forward+backward"))
    ]


def _waits(call: Callable[[], float], group: Group, device: torch.device) -> float:
    """Share of a pass's time, which ``call`` returns, for which the rank that waits longest waits for keys or for
    gradients of them."""
    clock = Clock(device)
    clock.on = True
    with watched(clock):
        seconds = call()
    share = torch.tensor([clock.read().get("exchange", 0.0) / seconds], device=device, dtype=torch.float64)
    return float(group.all_gather(share).max())


@torch.no_grad()
def _coverage(case: Case, group: Group, device: torch.device, leaves: list[Tensor]) -> float:
    """The mean over ranks of the share of other ranks' pages that was chosen."""
    fetching = Fetching(count=True)
    _layer(case, group, device, fetching)[0](leaves)
    chosen, _, might, *_ = counted([fetching])[0].double()
    return float(group.all_reduce(chosen / might.clamp(min=1))) / group.size


def memory(device: torch.device, reset: bool = False) -> int:
    """Bytes allocated now, with ``reset``, or at most since then; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()


def _check(case: Case, group: Group, device: torch.device) -> list[dict[str, Any]]:
    """Relative errors of this group's outputs and gradients beside one rank's, NSA and full."""
    at = zigzag(case.context, group.size, SIZES.slc_block)[group.index].indices()
    rows = []
    for kind in ("nsa", "full"):
        found = []
        for ranks, some in ((group, at), (Group((0,), 0), None)):
            *leaves, d_out = _draw(case, some, device)
            used = [leaves[i] for i in (0, 3, 4)] if kind == "full" else leaves
            layer, _ = _layer(replace(case, kind=kind), ranks, device)
            out = layer(leaves)
            found.append([out.detach(), *torch.autograd.grad(out, used, d_out)])
        errors = []
        for mine, whole in zip(*found, strict=True):
            if whole.shape[0] == case.context:
                want, got = whole[at.to(device)], mine
            else:  # weights of φ: every rank has a part of their gradients
                want, got = whole, group.all_reduce(mine.float())
            pair = torch.stack([(got.double() - want.double()).square().sum(), want.double().square().sum()])
            if whole.shape[0] == case.context:
                group.all_reduce(pair)
            errors.append(float((pair[0] / pair[1]).sqrt()))
        rows += [{"check": kind, "output": errors[0], "gradients": max(errors[1:])}]
    return rows
