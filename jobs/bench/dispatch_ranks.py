"""What one rank of ``shoal bench dispatch`` measures: exchanges of token rows, and a layer over all ranks."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.jobs.bench.cases import measure_each
from shoal.kernels.moe import route
from shoal.kernels.moe.backend import experts_backend
from shoal.kernels.moe.fan import by_rank, expand
from shoal.kernels.moe.router import Router
from shoal.workers.dispatch import Dispatcher
from shoal.workers.machine import spare_collector
from shoal.workers.mesh import Group
from shoal.workers.routed import Pass, RoutedFFN
from shoal.workers.slots import BACK, OUT
from shoal.workers.symmetric import Inbox, OutOfReach, inbox


@dataclass(frozen=True)
class Sizes:
    """tokens: of each rank, in turn. window: ms of a measurement."""

    tokens: tuple[int, ...] = (4096, 16384, 65536)
    hidden: int = 2048
    inner: int = 1408
    experts: int = 64
    top_k: int = 6
    shared: int = 2
    repeats: int = 3
    window: float = 300.0
    paths: tuple[str, ...] = ("all_to_all", "symmetric")


KINDS = ("exchanges", "layers")


@dataclass(frozen=True)
class Case:
    """What is measured by turns: one of ``KINDS``, with so many tokens a rank. device: ``cuda`` or ``cpu``."""

    tokens: int
    kind: str
    device: str
    sizes: Sizes

    def __str__(self) -> str:
        return f"{self.kind} of {self.tokens} tokens"


Figures = list[dict[str, Any]]
"""Of each measurement its name, facts, the slowest rank's ``ms``, and ``bytes`` that leave a rank."""

Sides = dict[str, tuple[dict[str, Any], Callable[[], object]]]
"""What is measured by turns: facts, and a call."""


def rank_main(rank: int, world: int, store: str, cases: list[Case], results: str) -> None:
    """Measures cases in turn; the first rank appends a line of JSON to ``results`` as each begins and ends."""
    torch.set_num_threads(1)
    device = cases[0].device
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", f"file://{store}", world_size=world, rank=rank)
    bench = Bench(Group(tuple(range(world)), rank, dist.group.WORLD), place, cases[0].sizes)
    measure_each(rank, results, cases, bench.of)
    dist.barrier()
    dist.destroy_process_group()


class Bench:
    """The measurements of one rank; every rank takes part in each."""

    def __init__(self, group: Group, device: torch.device, sizes: Sizes) -> None:
        self.group, self.device, self.sizes = group, device, sizes
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.kind = experts_backend("auto", device, self.dtype)
        self.generator = torch.Generator(device).manual_seed(group.index)

    def of(self, case: Case) -> Figures:
        """All figures of a case."""
        return self._in_turns(self.exchanges if case.kind == KINDS[0] else self.layers, case.tokens)

    def _in_turns(self, made: Callable[[int], Sides], tokens: int) -> Figures:
        """Medians over rounds in which all sides take turns, and each round's milliseconds."""
        sides = made(tokens)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _, call in sides.values():
            call()
        spare_collector()  # as a run does once its first step has made what stays
        for _ in range(self.sizes.repeats):
            for name, (_, call) in sides.items():
                times[name].append(self.ms(call))
        figures = [
            {"name": name, "tokens": tokens, "ms": statistics.median(times[name]), "rounds": times[name]} | _told(facts)
            for name, (facts, _) in sides.items()
        ]
        del sides
        release(self.device)
        return figures

    def _draw(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).mul_(std).to(self.dtype)

    # -- exchanges ----------------------------------------------------------------------------------------------------

    def _dispatcher(self, path: str, tokens: int) -> Dispatcher | None:
        """None where a path cannot be had."""
        s, box = self.sizes, None
        owners = tuple(e * self.group.size // s.experts for e in range(s.experts))
        if path == "symmetric":
            try:
                box = inbox(self.group, tokens, s.hidden, self.dtype, s.top_k, s.experts, self.device)
            except OutOfReach:
                return None
        return Dispatcher(self.group, owners, self.device, self.kind.triton, box)

    def exchanges(self, tokens: int) -> Sides:
        """One direction, from tokens at home to rows where their experts are."""
        s, world, row = self.sizes, self.group.size, self.sizes.hidden * self.dtype.itemsize
        x, centroids = self._draw(tokens, s.hidden), self._draw(s.experts, s.hidden, std=s.hidden**-0.5)
        with torch.no_grad():
            routing = route(x, centroids, s.top_k)
        dispatcher = self._dispatcher("all_to_all", tokens)
        assert dispatcher is not None
        hosts = dispatcher.ways.hosts[dispatcher.ways.slots_of(routing.experts).long()]
        copies = torch.stack([(hosts == r).sum() for r in range(world)])
        copy_splits = self._splits(copies)
        everyone = torch.arange(world, device=self.device, dtype=torch.int32)
        fan, counts = by_rank(hosts, everyone)
        row_splits = self._splits(counts)
        by_copy = x.new_empty(tokens * s.top_k, s.hidden).normal_()
        packed = expand([x], fan, self.kind.triton)[: sum(row_splits[0])]
        gates = routing.gates.float()

        sides: Sides = {}
        for name, buffer, splits in (("row per copy", by_copy, copy_splits), ("row per rank", packed, row_splits)):
            away = sum(splits[0]) - splits[0][self.group.index]
            sides[f"exchange, {name}"] = (
                {"path": "all_to_all", "phase": f"exchange, one {name}", "bytes": away * row},
                (partial(self._all_to_all, buffer, *splits)),
            )
        away = sum(row_splits[0]) - row_splits[0][self.group.index]
        for path in s.paths:
            if (dispatcher := self._dispatcher(path, tokens)) is None:
                continue
            if dispatcher.inbox is not None:
                facts = {"path": path, "phase": "exchange, all rows put", "bytes": tokens * row * (world - 1)}
                sides["exchange, put"] = facts, partial(self._put, dispatcher.inbox, x)
                away = tokens * (world - 1)
            facts = {"path": path, "phase": "dispatch with choices, packing and sorting", "bytes": away * row}
            facts["dispatcher"] = dispatcher
            sides[f"dispatch, {path}"] = facts, partial(self._there_and_back, dispatcher, x, gates, routing.experts)
        return sides

    def _put(self, box: Inbox, x: Tensor) -> None:
        """Rows alone, to all others and from them."""
        for rank in box.others:
            box.put(OUT, rank, x)
            box.say(OUT, rank)
        box.hear(OUT)
        for rank in box.others:  # what came was used, before more is put there
            box.say(BACK, rank)
        box.hear(BACK)

    def _there_and_back(self, dispatcher: Dispatcher, x: Tensor, gates: Tensor, experts: Tensor) -> None:
        """From tokens at home to rows sorted by expert; and, where slots are used again, word that they may be."""
        flight = dispatcher.start(x, gates, experts)
        flight.send()
        flight.arrive(x, gates)
        if (box := dispatcher.inbox) is not None:
            for rank in box.others:
                box.say(BACK, rank)
            box.hear(BACK)

    def _splits(self, counts: Tensor) -> tuple[list[int], list[int]]:
        table = self.group.all_gather(counts).tolist()
        return table[self.group.index], [line[self.group.index] for line in table]

    def _all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        out = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(out, rows[: sum(send)], receive, send, group=self.group.handle)
        return out

    # -- a layer ------------------------------------------------------------------------------------------------------

    def layers(self, tokens: int) -> Sides:
        """Forward and backward, with all experts on every rank for itself, and with them spread over the ranks."""
        s, world, rank = self.sizes, self.group.size, self.group.index
        x, upstream = self._draw(tokens, s.hidden).requires_grad_(), self._draw(tokens, s.hidden)
        drawn = [
            self._draw(s.experts, s.hidden, std=s.hidden**-0.5),
            self._draw(s.experts, s.hidden, 2 * s.inner, std=s.hidden**-0.5),
            self._draw(s.experts, s.inner, s.hidden, std=s.inner**-0.5),
            self._draw(s.shared, s.hidden, 2 * s.inner, std=s.hidden**-0.5),
            self._draw(s.shared, s.inner, s.hidden, std=s.inner**-0.5),
        ]
        for tensor in drawn:
            if self.group.size > 1:
                self.group.broadcast(tensor, 0).wait()
        whole = [t.requires_grad_() for t in drawn]
        size = s.experts // world
        mine = [
            t if i not in (1, 2) else t.detach()[rank * size : (rank + 1) * size].clone().requires_grad_()
            for i, t in enumerate(whole)
        ]
        alone = Dispatcher(Group((0,), 0), (0,) * s.experts, self.device, self.kind.triton)
        both = "forward+backward"
        sides: Sides = {
            "layer, one rank": (
                {"path": "none", "phase": both, "bytes": 0},
                partial(self._both, alone, x, whole, upstream),
            )
        }
        for path in s.paths:
            if (dispatcher := self._dispatcher(path, tokens)) is None:
                continue
            facts: dict[str, Any] = {"path": path, "phase": both, "dispatcher": dispatcher}
            sides[f"layer, {path}"] = facts, partial(self._both, dispatcher, x, mine, upstream)
        return sides

    def _both(self, dispatcher: Dispatcher, x: Tensor, weights: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
        centroids, up, down, shared_up, shared_down = weights
        s = self.sizes
        if self.kind.triton and dispatcher.group.size == 1:
            from shoal.kernels.moe.layer import moe_layer

            out = moe_layer(x, centroids, up, down, (shared_up, shared_down), s.top_k, kind=self.kind).out
            return torch.autograd.grad(out, [x, *weights], upstream)
        router = Router(centroids, s.top_k, False) if self.kind.triton else None
        passing = Pass(dispatcher, self.kind, (up, down), (shared_up, shared_down), 0, router)
        given = None if router else route(x, centroids, s.top_k)
        choice = (given.gates, given.experts) if given else (None, None)
        inputs = (x, centroids if router else None, *choice, up, down, shared_up, shared_down)
        out, *_ = RoutedFFN.apply(passing, *inputs)
        return torch.autograd.grad(out, [x, *weights], upstream)

    # -- time ---------------------------------------------------------------------------------------------------------

    def ms(self, call: Callable[[], object]) -> float:
        """Of one call when many follow one another, of the slowest rank.

        As many come before that do not count: after a side that leaves a GPU idle, the first 300 ms of products are
        faster than those that follow, by a tenth, since its clocks fall with the power it has drawn.
        """
        once = self._loop(call, 2)
        count = max(2, min(200, int(self.sizes.window / max(once, 1e-3))))
        self._loop(call, count)
        return self._loop(call, count)

    def _loop(self, call: Callable[[], object], times: int) -> float:
        call()
        self._settle()
        began = time.perf_counter()
        for _ in range(times):
            call()
        self._settle(barrier=False)
        slowest = torch.tensor([(time.perf_counter() - began) * 1e3 / times], dtype=torch.float64, device=self.device)
        return float(self.group.all_gather(slowest).max())

    def _settle(self, barrier: bool = True) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if barrier:
            self.group.all_reduce(torch.zeros(1, device=self.device)).item()


def release(device: torch.device) -> None:
    """Lets go of the memory of what was measured."""
    inbox.cache_clear()
    gc.unfreeze()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _told(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts as JSON has them: of the sizes that the host read, how long it waited for those of a pass."""
    dispatcher: Dispatcher | None = facts.pop("dispatcher", None)
    if dispatcher is None or not dispatcher.reads.count:
        return facts
    reads = dispatcher.reads
    return facts | {"host_wait_ms": reads.seconds * 1e3 / reads.count}
