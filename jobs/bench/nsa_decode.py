"""A decode step of one NSA layer over the paged cache, beside the best dense decode that PyTorch has.

In a figure is everything from queries, keys and values of this step's tokens, not yet rotated, and gates to the output:
tokens are written to their pages, then attention reads pages, by the functions that the serving engine calls. Rows that
say so also compress the rows that end, with φ, as often as the engine does: in every step of more than ``BOTH``
sequences, else in one of ``cmp_stride``. What the layers of a step share, tables of pages, is made before.

Calls are captured in a CUDA graph, for as many layers as together read far more than an L2 cache holds, each over
pages of its own, again and again where these are few, and a figure is the graph's time over the number of calls:
nothing that is read was in a cache, and what a graph costs to start is shared as in a model. ``bound_ms`` is the time
in which the GPU's memory hands over what is read, ``baseline_bound_ms`` the same of dense attention.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shoal.jobs.bench.nsa import CONTEXTS, HEADS, KV_HEADS, SIZES, median_ms, peak_bytes
from shoal.jobs.bench.result import Row, time_row
from shoal.kernels.nsa import BlockSizes
from shoal.kernels.nsa.paged import DecodeTables, PagedCache, decode_tables, make_cache, paged_decode, row_index
from shoal.kernels.nsa.paged_store import Compressed, Heads, Phi, store_compressed, store_tokens
from shoal.kernels.rope import rope_tables
from shoal.workers.engine.decode import BOTH
from shoal.workers.engine.tables import SINGLE

if TYPE_CHECKING:
    from shoal.jobs.bench.registry import Settings

BATCHES = (1, 16, 64)
TARGETS = {(65536, 1): 3.5, (65536, 16): 8.5, (65536, 64): 10.0}  # over the best dense decode, by (context, batch)
DECODE = "NSA, decode"
COLD = 1 << 28  # bytes that the layers of a graph read together, at least
CALLS = 24  # of a graph, at least; a model has as many layers
BASE = 10000.0  # of the rotation


@dataclass(frozen=True)
class Case:
    """Sequences of one step. lengths: in tokens, the new one included, each at least one compression block."""

    lengths: tuple[int, ...]
    heads: int = HEADS
    kv_heads: int = KV_HEADS
    dim: int = 128
    sizes: BlockSizes = SIZES
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    @property
    def context(self) -> int:
        return max(self.lengths)

    @property
    def ragged(self) -> bool:
        return len(set(self.lengths)) > 1

    @property
    def scale(self) -> float:
        return float(self.dim**-0.5)

    @property
    def row_bytes(self) -> int:
        """Of a token's keys and values of one branch."""
        return 2 * self.kv_heads * self.dim * self.dtype.itemsize

    @property
    def dense_bytes(self) -> int:
        """What dense attention reads of one layer's keys and values."""
        return sum(self.lengths) * self.row_bytes

    @property
    def nsa_bytes(self) -> int:
        """The same of NSA's three branches."""
        s = self.sizes
        rows = (n // s.cmp_stride + min(n, s.slc_count * s.slc_block) + min(n, s.window) for n in self.lengths)
        return sum(rows) * self.row_bytes

    @property
    def layers(self) -> int:
        """How many a graph holds, of NSA and of dense attention."""
        return -(-COLD // self.nsa_bytes)

    @property
    def facts(self) -> dict[str, Any]:
        heads = {"heads": self.heads, "kv_heads": self.kv_heads, "group": self.heads // self.kv_heads}
        ragged = {"lengths": f"{min(self.lengths)} to {self.context}", "tokens": sum(self.lengths)}
        dims = {"d_qk": self.dim, "d_v": self.dim, "batch": len(self.lengths), "layers": self.layers}
        return {"phase": "decode", "context": self.context, **(ragged if self.ragged else {}), **heads, **dims}

    def normal(self, *shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(*shape, device=self.device, dtype=self.dtype)


def cases() -> list[Case]:
    """Equal lengths, the batches of each context; then one batch of very different ones."""
    equal = [Case((context,) * batch) for context in CONTEXTS for batch in BATCHES]
    return [*equal, Case(tuple(CONTEXTS[-1] * (i + 1) // 16 for i in range(16)))]


class Step:
    """What the layers of a step share, as the engine's ``RowTables``: pages lie anywhere, and tables have room for as
    many near pages as there."""

    def __init__(self, case: Case) -> None:
        s, kv, page = case.sizes, case.kv_heads, case.sizes.slc_block
        per, back = page // s.cmp_stride, max(s.window - 1, s.cmp_block - 1, 1)
        t = torch.tensor(case.lengths) - 1
        near_start = (t - back).clamp(min=0) // page
        self.far_pages, self.near_pages = (t // page + 1).tolist(), (t // page - near_start + 1).tolist()
        far = _scattered(self.far_pages, max(self.far_pages)).to(case.device)
        near = _scattered(self.near_pages, (back + SINGLE) // page + 2).to(case.device)
        t, near_start = t.to(case.device), near_start.to(case.device)
        own, at = (t // page)[:, None], t % page
        self.rotation = rope_tables(t, case.dim, BASE)
        self.far = row_index(far.gather(1, own)[:, 0], at, kv, page)
        self.near = row_index(near.gather(1, own - near_start[:, None])[:, 0], at, kv, page)
        self.tables: DecodeTables = decode_tables(t, far, near, near_start * page, kv, s)
        ended = (t + 1) // s.cmp_stride - 1  # the last compressed row
        keys = ((ended + 1) * s.cmp_stride - s.cmp_block)[:, None] + torch.arange(s.cmp_block, device=case.device)
        self.compressed = Compressed(
            row_index(far.gather(1, (ended // per)[:, None])[:, 0], ended % per, kv, per),
            near.gather(1, keys // page - near_start[:, None]),
            keys % page,
            rope_tables(keys[:, 0], case.dim, BASE),
        )


def _scattered(counts: Sequence[int], width: int) -> Tensor:
    """Pages of sequences that need so many, ``[N, width]`` int64; places that are left name a sequence's first."""
    pages = torch.randperm(sum(counts)).split(list(counts))
    return torch.stack([torch.cat((x, x[:1].expand(width - len(x)))) for x in pages])


class Layer:
    """One layer with its cache full of random numbers, and this step's tokens. What it does are the engine's calls."""

    def __init__(self, case: Case, step: Step) -> None:
        self.case, self.step = case, step
        n, kv, dim, device = len(case.lengths), case.kv_heads, case.dim, torch.device(case.device)
        pages = sum(step.far_pages), sum(step.near_pages)
        self.cache: PagedCache = make_cache(*pages, kv, (dim, dim), case.sizes, case.dtype, device)
        for field in fields(self.cache):
            getattr(self.cache, field.name).normal_()
        self.heads = Heads(case.normal(n, case.heads, dim), case.normal(n, 3, kv, dim), case.normal(n, 3, kv, dim))
        self.gates, self.q = case.normal(n, case.heads, 3).sigmoid(), case.normal(n, case.heads, dim)

    @cached_property
    def phi(self) -> tuple[Phi, Phi]:
        """Of keys and of values."""
        kv, dim, width = self.case.kv_heads, self.case.dim, self.case.sizes.cmp_block * self.case.dim

        def one() -> Phi:
            w1 = self.case.normal(kv, width, 2 * dim, size=width**-0.5)
            w2 = self.case.normal(kv, 2 * dim, dim, size=(2 * dim) ** -0.5)
            return Phi(self.case.normal(kv, self.case.sizes.cmp_block, dim), w1, w2)

        return one(), one()

    def write(self) -> Tensor:
        """This step's tokens to their pages; their queries, rotated."""
        return store_tokens(self.heads, self.step.rotation, self.cache, self.step.far, self.step.near, triton=True)

    def compress(self) -> None:
        store_compressed(self.step.compressed, self.cache, self.phi, triton=True)

    def attend(self, q: Tensor) -> Tensor:
        case = self.case
        return paged_decode(q, self.gates, self.cache, self.step.tables, case.sizes, case.scale, "triton")

    def decode(self) -> Tensor:
        """``[N, H, d_v]``."""
        return self.attend(self.write())

    def decode_compressed(self) -> Tensor:
        """The same in a step in which rows are compressed."""
        q = self.write()
        self.compress()
        return self.attend(q)


def run(settings: Settings, chosen: Sequence[Case] | None = None) -> Iterator[Row]:
    """Rows of every case."""
    for case in chosen or cases():
        settings.say(f"decode, context {case.context}, batch {len(case.lengths)}" + ", ragged" * case.ragged)
        yield from rows_of(case, settings.say)


@torch.no_grad()
def rows_of(case: Case, say: Callable[[str], None]) -> list[Row]:
    """NSA beside each dense decode, the best of which has the target; with compression beside the best; and parts."""
    from shoal.jobs.bench.nsa_dense import dense_ms

    ms, most = nsa_ms(case)
    dense = dense_ms(case, say)
    best = min(dense, key=lambda name: dense[name][1], default="")
    target = None if case.ragged else TARGETS.get((case.context, len(case.lengths)))
    read = {"bytes_read": case.nsa_bytes, **_bound("bound_ms", case.nsa_bytes, case)}
    dense_read = {"baseline_bytes_read": case.dense_bytes, **_bound("baseline_bound_ms", case.dense_bytes, case)}
    facts = {**case.facts, **read, "peak_bytes": most}
    rows = [
        time_row(DECODE, ms["decode"], name, taken, target if name == best else None,
                 **facts, **dense_read, dense=how, best=name == best)
        for name, (how, taken) in dense.items()
    ]  # fmt: skip
    every = 1 if len(case.lengths) > BOTH else case.sizes.cmp_stride
    whole = (ms["decode_compressed"] + (every - 1) * ms["decode"]) / every
    how, taken = dense.get(best, ("", None))
    more = {**dense_read, "dense": how, "best": True} if best else {}
    what = f"{DECODE}, with compression"
    rows.append(time_row(what, whole, best, taken, target, **facts, **more, compressed_every=every))
    parts = {
        "write": "tokens, written",
        "compress": "rows that end, compressed",
        "attend": "attention over pages",
    }
    return rows + [time_row(name, ms[key], **case.facts) for key, name in parts.items()]


def nsa_ms(case: Case) -> tuple[dict[str, float], int]:
    """Milliseconds of a layer's calls by their names, and the most memory that a step of one layer allocates."""
    step = Step(case)
    layers = [Layer(case, step) for _ in range(case.layers)]
    calls: dict[str, Callable[[Layer], object]] = {
        "decode": Layer.decode,
        "decode_compressed": Layer.decode_compressed,
        "write": Layer.write,
        "compress": Layer.compress,
        "attend": lambda layer: layer.attend(layer.q),
    }
    ms = {name: replayed_ms(call, layers) for name, call in calls.items()}
    most = peak_bytes(layers[0].decode) if case.device == "cuda" else 0
    del layers
    if case.device == "cuda":
        torch.cuda.empty_cache()
    return ms, most


def replayed_ms(call: Callable[[Any], object], layers: Sequence[Any]) -> float:
    """Median time of one layer's call in a graph of all layers. On a CPU, where there are no graphs, of one turn.

    layers: of NSA or of dense attention; their ``case`` says which device it is.
    """
    if layers[0].case.device == "cpu":
        start = time.perf_counter()
        for layer in layers:
            call(layer)
        return 1e3 * (time.perf_counter() - start) / len(layers)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    calls = list(layers) * -(-CALLS // len(layers))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for layer in layers:
            call(layer)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        for layer in calls:
            call(layer)
    return median_ms(graph.replay, rep=40) / len(calls)


def _bound(name: str, size: int, case: Case) -> dict[str, float]:
    """Milliseconds in which the GPU's memory hands over so many bytes, by its clock and width; nothing on a CPU."""
    if case.device != "cuda":
        return {}
    from triton.testing import get_dram_gbps

    return {name: size / get_dram_gbps() / 1e6}
