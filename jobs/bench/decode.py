"""Decode steps of one model over two GPUs: in CUDA graphs, beside the same without, and beside one GPU alone; with
attention and experts on both GPUs, and on one each (``1A:1F``).

Random weights, and pages filled with random numbers, as ``shoal bench engine`` has them. Of a step the slowest rank's
time counts, from the agreement of all ranks to tokens on the host. ``python -m shoal.jobs.bench.decode --out FOLDER``
runs it without Ray; ``--device cpu`` runs it in small, over gloo.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.jobs.bench.cases import measure_each, run_cases
from shoal.jobs.bench.ending import cut_in_order, report, result_of
from shoal.jobs.bench.registry import Settings
from shoal.jobs.bench.result import Row, gpu_kind, time_row
from shoal.workers.errors import InvalidInput

WORLD = 2
GRAPHS, PLAIN, ALONE = "CUDA graphs", "no graphs", "one GPU"
Figures = list[dict[str, Any]]


@dataclass(frozen=True)
class Sizes:
    """What is measured. placements: none for colocated ranks and for half of them attention, half of them experts.
    at_once: requests in all, shared out evenly over ranks with attention. memory: of what is free, for an engine."""

    recipe: str = "deepseekmoe-2b"
    sets: tuple[str, ...] = ("model.heads=32", "model.kv_heads=2", "moe.experts=64")
    contexts: tuple[int, ...] = (4096, 16384)
    at_once: tuple[int, ...] = (1, 8, 32)
    kind: str = "nsa"
    steps: int | None = None
    memory: float = 0.6
    placements: tuple[str, ...] = ()

    def places(self, world: int) -> tuple[str, ...]:
        """The placements on so many ranks."""
        return self.placements or ("colocated", f"{world // 2}A:{world - world // 2}F")


@dataclass(frozen=True)
class Load:
    """A case: so many requests at once, whose contexts are nearly full. device: ``cuda`` or ``cpu``."""

    context: int
    at_once: int
    device: str
    sizes: Sizes

    def __str__(self) -> str:
        return f"{self.context} tokens, {self.at_once} at once"


def small() -> Sizes:
    """What a CPU computes in a moment."""
    return Sizes("tiny", ("attention.slc_count=4", "attention.window=64"), (256,), (1, 3), steps=2)


def run(settings: Settings, sizes: Sizes | None = None, device: str = "cuda", world: int = WORLD) -> Iterator[Row]:
    """Medians over steps. Raises InvalidInput where there are too few GPUs, or other ones."""
    import torch

    if device == "cuda" and torch.cuda.device_count() < world:
        raise InvalidInput(
            f"shoal bench decode needs {world} CUDA GPUs, and torch sees {torch.cuda.device_count()} here: run it on a "
            "machine with more, or `python -m shoal.jobs.bench.decode --device cpu` in small"
        )
    sizes = sizes or Sizes(steps=settings.steps)
    loads = [Load(context, at_once, device, sizes) for context in sizes.contexts for at_once in sizes.at_once]
    for load, figures in run_cases(on_rank, world, loads, settings.say):
        if not figures:
            raise InvalidInput(
                "shoal bench decode needs CUDA graphs of experts, and this is no Hopper GPU: run it on one"
            )
        yield from tell(figures, sizes, world)
        for f in figures:
            settings.say(f"{load}, {f['placement']}, {f['way']}: {f['ms']:.2f} ms a step")


def tell(figures: Figures, sizes: Sizes, world: int) -> list[Row]:
    """Of each placement and load two rows: beside steps without graphs, and beside one GPU."""
    ms = {(f["placement"], f["context"], f["at_once"], f["way"]): f["ms"] for f in figures}
    rows = []
    for placement, context, at_once, way in ms:
        if way != GRAPHS:
            continue
        load, own = (context, at_once), ms[placement, context, at_once, way]
        what = "a decode step over all ranks" if placement == "colocated" else f"a decode step over {placement}"
        facts = {"recipe": sizes.recipe, "attention": sizes.kind, "context": context, "at_once": at_once}
        facts |= {"ranks": world, "placement": placement, "tokens_per_second": 1000 * at_once / own}
        for baseline, beside in ((PLAIN, ms[placement, *load, PLAIN]), (ALONE, ms["", *load, ALONE])):
            rows.append(time_row(what, own, baseline, beside, **facts))
    return rows


def on_rank(rank: int, world: int, store: str, loads: list[Load], results: str) -> None:
    """Measures loads in turn; the first rank appends a line of JSON to ``results`` as each begins and ends."""
    import gc

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast wants rights that containers lack
    device = loads[0].device
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{store}", rank=rank, world_size=world)
    _measure(rank, world, place, loads, results)
    gc.collect()  # graphs go before what they exchange with
    dist.barrier()
    dist.destroy_process_group()


def _measure(rank: int, world: int, device: Any, loads: Sequence[Load], results: str) -> None:
    """Of each placement, load and way the milliseconds of a step; nothing where graphs cannot be had."""
    from shoal.jobs.bench.engine import _decode_ms

    sizes = loads[0].sizes
    engines = {place: _engine(rank, world, device, sizes, place) for place in sizes.places(world)}
    mesh = next(iter(engines.values())).model.mesh
    graphs = {place: engine.decode for place, engine in engines.items()}
    able = None not in graphs.values()
    if able and rank == 0:  # the others wait where all tell their time
        engines[""] = _engine(0, 1, device, sizes)
    ways = [(place, way) for place in graphs for way in (GRAPHS, PLAIN)] + [("", ALONE)]

    def figures_of(load: Load) -> Figures:
        figures = []
        for place, way in ways if able else ():
            ms, engine = 0.0, engines.get(place)
            if engine is not None:
                if place:
                    engine.decode = graphs[place] if way == GRAPHS else None
                ms = _decode_ms(engine, _share(engine, load.at_once), load.context, sizes.steps)
            slowest = max(microseconds for (microseconds,) in mesh.tell([round(1000 * ms)])) / 1000
            about = {"placement": place, "context": load.context, "at_once": load.at_once, "way": way}
            figures.append(about | {"ms": slowest})
        return figures

    measure_each(rank, results, loads, figures_of)


def _share(engine: Any, at_once: int) -> int:
    """The requests of this rank."""
    attention = engine.model.mesh.attention
    return 0 if attention is None else len(range(attention.index, at_once, attention.size))


def _engine(rank: int, world: int, device: Any, sizes: Sizes, placement: str = "colocated") -> Any:
    from shoal.jobs.bench.engine import _fill
    from shoal.jobs.recipe import load_recipe
    from shoal.workers.engine.engine import Engine
    from shoal.workers.engine.request import Limits
    from shoal.workers.machine import free_memory
    from shoal.workers.mesh import make_mesh
    from shoal.workers.model import Transformer
    from shoal.workers.placement import Placement

    gpu = device.type == "cuda"
    spread = [f"parallel.ranks={world}", f"parallel.placement={placement}", f"parallel.device={device.type}"]
    spread += ["parallel.expert=0", "parallel.context=1"]
    plain = [f"train.batch={world}", "train.accumulate=1", "train.sequence=64"]
    chosen = [f"model.context={max(sizes.contexts)}", f"attention.kind={sizes.kind}"]
    recipe = load_recipe(sizes.recipe, [*sizes.sets, *chosen, *spread, *plain])
    model = Transformer(recipe, make_mesh(Placement.of(recipe), rank, device), device).eval()
    most = -(-max(sizes.at_once) // len(model.mesh.placement.attention))
    limits = Limits(sequences=most, step=2048 if gpu else 512, prefix_cache=False)
    engine = Engine(
        model, limits, int(sizes.memory * free_memory("cuda")) if gpu else None, fixed=None if gpu else True
    )
    _fill(engine)
    return engine


@cut_in_order()
def main() -> None:
    """Runs the benchmark where Shoal's command line cannot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, default=WORLD)
    parser.add_argument("--placement", nargs="+", default=(), help="those that are measured: colocated, or nA:mF")
    parser.add_argument("--attention", choices=("nsa", "full"), default="nsa")
    parser.add_argument("--steps", type=int, help="that are timed")
    chosen = parser.parse_args()
    sizes = replace(
        small() if chosen.device == "cpu" else Sizes(), kind=chosen.attention, placements=tuple(chosen.placement)
    )
    if chosen.steps:
        sizes = replace(sizes, steps=chosen.steps)
    name = f"decode-{chosen.ranks}x{gpu_kind()}" if chosen.device == "cuda" else "decode-cpu"
    result = result_of(name, run(Settings(), sizes, chosen.device, chosen.ranks))
    report(result, chosen.out, lambda path: print(f"written to {path}"))


if __name__ == "__main__":
    main()
