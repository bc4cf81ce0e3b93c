"""One rank of ``shoal bench scale``: measures layers and steps of training, each by what its own benchmark has."""

from __future__ import annotations

import os
import statistics
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shoal.jobs.bench import sequence_rank
from shoal.jobs.bench.cases import measure_each
from shoal.jobs.bench.dispatch_ranks import Bench, Sizes, release
from shoal.jobs.bench.result import Row
from shoal.jobs.bench.scale_cases import Case, Training
from shoal.workers.clock import Clock
from shoal.workers.dispatch import Dispatcher
from shoal.workers.machine import peak_flops, spare_collector
from shoal.workers.mesh import Group

SECONDS = 20.0
"""A training ends after so many, once it has ``WARM_UP`` + 2 steps."""
WARM_UP = 2
ROUNDS = 8  # passes of a layer in which waits for rows are measured
ATTENTION_BYTES = 24
"""What an attention layer takes with its inputs, bytes a token, head and dimension: 188 kB of 64 heads of 128, in bf16
(benchmarks/results/sequence-2xh100.json, 256k on one rank, and the inputs)."""


def rank_main(rank: int, ranks: int, store: str, cases: list[Case], results: str) -> None:
    """Measures cases in turn; the first rank appends a line of JSON to ``results`` as each begins and ends."""
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= ranks
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast wants rights that containers lack
    torch.set_num_threads(1)  # as ranks of training have them beside a GPU
    if cuda:
        torch.cuda.set_device(device)
    group = Group((0,), 0)
    if ranks > 1:
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, f"file://{store}", timedelta(minutes=3), ranks, rank)
        group = Group(tuple(range(ranks)), rank, dist.group.WORLD, dist.new_group())
        for each in (group, group.beside):
            each.all_reduce(torch.zeros(1, device=device))  # all ranks make their connections now
    dtype = torch.bfloat16 if cuda else torch.float32
    peak = peak_flops(device.type, str(dtype).removeprefix("torch."))

    def rows_of(case: Case) -> list[Row]:
        facts = _measure(case, group, device)
        return [facts | {"peak_flops": peak, "itemsize": dtype.itemsize}] if facts else []

    measure_each(rank, results, cases, rows_of, partial(release, device))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def _measure(case: Case, group: Group, device: torch.device) -> dict[str, Any]:
    """Facts of a case; nothing where it cannot be measured here. The same on every rank."""
    if isinstance(case.sizes, Sizes):
        return _moe(case.sizes, group, device)
    if isinstance(case.sizes, Training):
        return _train(case.sizes, group, device)
    layer = case.sizes
    assert isinstance(layer, sequence_rank.Case)
    need = ATTENTION_BYTES * layer.heads * layer.dim * layer.context // layer.ranks
    if device.type == "cuda" and need > torch.cuda.get_device_properties(device).total_memory:
        return {}
    whole = sequence_rank.measure(layer, group, device)[-1]
    facts = {key: whole[key] for key in ("ms", "bytes", "bytes_by_formula", "peak_bytes", "repeats")}
    return facts | {"dispatch_share": whole.get("wait_share")}


def _moe(sizes: Sizes, group: Group, device: torch.device) -> dict[str, Any]:
    """A layer's forward and backward pass. ``rows_received``: by the rank that gets most. ``bandwidth``: bytes a second
    that a rank receives when rows alone are exchanged. ``peak_bytes``: with inputs, weights, and slots of rows."""
    tokens, path = sizes.tokens[0], next(iter(sizes.paths), "")
    bench = Bench(group, device, sizes)
    name = f"layer, {path}" if path else "layer, one rank"
    sides = bench.layers(tokens)
    if name not in sides:
        return {}
    about, call = sides.pop(name)
    sides.clear()  # so that nothing of the other one is in memory
    held = sequence_rank.memory(device, reset=True)
    call()
    spare_collector()
    most = _most(group, device, sequence_rank.memory(device))
    dispatcher: Dispatcher | None = about.get("dispatcher")
    box = dispatcher.inbox if dispatcher else None  # PyTorch's allocator does not see it
    facts: dict[str, Any] = {"peak_bytes": most + (box.nbytes if box else 0), "activation_bytes": most - held}
    facts["ms"] = statistics.median(bench.ms(call) for _ in range(sizes.repeats))
    if dispatcher is None or group.size == 1:
        return facts
    facts["dispatch_share"] = _waits(dispatcher, call, group, device)
    if path == "all_to_all":
        exchange, rows = bench.exchanges(tokens)["exchange, row per rank"]
        facts["bytes_of_rows"] = exchange["bytes"]
        facts["bandwidth"] = _most(group, device, exchange["bytes"]) / bench.ms(rows) * 1e3
    return facts


def _waits(dispatcher: Dispatcher, call: Any, group: Group, device: torch.device) -> float:
    """Share of some passes' time for which the stream of the rank that waits longest waited for rows."""
    dispatcher.clock = clock = Clock(device)
    clock.on = True
    with clock.part("passes"):  # of the same passes: those timed before may have been faster
        for _ in range(ROUNDS):
            call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = clock.read()
    dispatcher.clock = None
    return _most(group, device, seconds.get("dispatch", 0.0) / seconds["passes"])


def _train(training: Training, group: Group, device: torch.device) -> dict[str, Any]:
    """Medians over the later half of the steps; ``losses`` of all of them. ``device_load``: of the rank with most rows
    for its experts, as a multiple of a fair share; ``device_loads`` of each step, ``settling`` of each pass before that
    evened out experts. ``rows_put``: into other ranks' memory."""
    from shoal.jobs.bench.context_rank import train

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = train(training.load(), Path(training.corpus), group.index, device, SECONDS, WARM_UP + 2)
    records = list(steps)
    later = records[max(min(WARM_UP, len(records) - 1), len(records) // 2) :]

    def of(key: str) -> float:
        return 1e3 * statistics.median(r[key] for r in later)

    parts = ("data", "forward", "backward", "reduce", "update")
    return {
        "ms": _most(group, device, of("wall_seconds")),
        **{f"{part}_ms": of(f"{part}_seconds") for part in parts},
        "dispatch_share": _most(group, device, statistics.median(map(_waited, later))),
        "peak_bytes": max(r["peak_bytes"] for r in records),
        "steps": len(records),
        "device_load": statistics.median(r["device_load"] for r in later),
        "device_loads": [r["device_load"] for r in records],
        "settling": records[0]["settling"],
        "rows_put": records[0]["rows_put"],
        "losses": [r["loss"] for r in records],
    }


def _waited(record: dict[str, Any]) -> float:
    """Share of a step for which this rank waited for rows of tokens, and for keys of a sequence that it shares."""
    return float((record["dispatch_seconds"] + record.get("exchange_seconds", 0.0)) / record["wall_seconds"])


def _most(group: Group, device: torch.device, value: float) -> float:
    """The largest of all ranks."""
    return float(group.all_gather(torch.tensor([value], dtype=torch.float64, device=device)).max())
