"""Token rows between ranks, beside one row for every chosen expert by NCCL; and a DeepSeekMoE-16B layer over two GPUs,
beside the same layer with all experts on each of them.

Needs torch and Triton only: ``python -m shoal.jobs.bench.dispatch --out FOLDER`` on a machine with two GPUs or more.
``--device cpu`` runs it in small, over gloo.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.jobs.bench.cases import run_cases
from shoal.jobs.bench.ending import cut_in_order, report, result_of
from shoal.jobs.bench.registry import Settings, numbers_of
from shoal.jobs.bench.result import Document, Row, gpu_kind, time_row
from shoal.workers.errors import InvalidInput

if TYPE_CHECKING:
    from shoal.jobs.bench.dispatch_ranks import Sizes

WORLD = 2
SLOWER = {4096: 1.15, 16384: 1.05, 65536: 1.05}
"""Of each number of tokens a rank: what the layer may take of its time with all experts on one GPU."""

BEST_MS = {4096: 0.083, 16384: 0.207, 65536: 0.719}
"""Of each number of tokens a rank: rows put into the other GPU's memory by copy engines, two H100s, hidden 2048."""

DISPATCH_SLOWER = 1.1
BASELINE = "all_to_all, one row per copy"


def run(settings: Settings, sizes: Sizes | None = None, device: str = "cuda", world: int = WORLD) -> Iterator[Row]:
    """Medians over rounds in which all take turns; of a time the slowest rank's counts.

    Raises InvalidInput where there are too few GPUs.
    """
    import torch

    from shoal.jobs.bench.dispatch_ranks import KINDS, Case, Sizes, rank_main

    if device == "cuda" and torch.cuda.device_count() < world:
        raise InvalidInput(
            f"shoal bench dispatch needs {world} CUDA GPUs, and torch sees {torch.cuda.device_count()} here: run it "
            "on a machine with more, or `python -m shoal.jobs.bench.dispatch --device cpu` in small"
        )
    sizes = sizes or Sizes()
    if settings.repeats:
        sizes = replace(sizes, repeats=settings.repeats)
    cases = [Case(tokens, kind, device, sizes) for tokens in sizes.tokens for kind in KINDS]
    for _, figures in run_cases(rank_main, world, cases, settings.say):
        yield from tell(figures, world)
        for figure in figures:
            settings.say(f"{figure['tokens']:>6} tokens, {figure['name']}: {figure['ms']:.3f} ms")


def tell(figures: list[dict[str, Any]], world: int) -> list[Row]:
    """Rows of figures: exchanges beside one row per copy, layers beside one rank alone."""
    found = {(f["tokens"], f["name"]): f["ms"] for f in figures}
    rows: list[Row] = []
    for figure in figures:
        tokens, name, ms = figure["tokens"], figure["name"], figure["ms"]
        facts = {key: value for key, value in figure.items() if key not in ("name", "ms")} | {"ranks": world}
        if name.startswith("layer, "):
            alone = found[tokens, "layer, one rank"]
            target = 1 / SLOWER[tokens] if tokens in SLOWER and name != "layer, one rank" else None
            rows.append(time_row(name, ms, "all experts on one rank", alone, target, **facts))
            continue
        rows.append(time_row(name, ms, BASELINE, found[tokens, "exchange, row per copy"], **facts))
        if tokens in BEST_MS and name in ("dispatch, symmetric", "exchange, put"):
            best = BEST_MS[tokens]
            rows.append(time_row(name, ms, "copy-engine put, rows alone", best, 1 / DISPATCH_SLOWER, **facts))
    return rows


def draw(result: Document, path: Path) -> bool:
    """Writes a PNG of the layer's time over one rank's, and of rows' one way; False where there is none. Raises
    OSError."""
    from shoal.jobs.bench import moe_plot

    return moe_plot.draw(moe_plot.dispatch_panels(result["rows"]), result, path)


@cut_in_order()
def main() -> None:
    """Runs the benchmark where Shoal's command line cannot: it needs neither Ray nor pydantic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, default=WORLD)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", default="", help="of each rank, with commas between")
    parser.add_argument("--paths", default="all_to_all,symmetric")
    chosen = parser.parse_args()
    from shoal.jobs.bench.dispatch_ranks import Sizes
    from shoal.jobs.bench.moe import show

    sizes = small() if chosen.device == "cpu" else Sizes()
    sizes = replace(sizes, repeats=chosen.repeats, paths=tuple(chosen.paths.split(",")))
    if chosen.tokens:
        sizes = replace(sizes, tokens=tuple(numbers_of(int, "--tokens", chosen.tokens)))
    name = f"dispatch-{chosen.ranks}x{gpu_kind()}" if chosen.device == "cuda" else "dispatch-cpu"
    result = result_of(name, run(Settings(), sizes, chosen.device, chosen.ranks))
    report(result, chosen.out, lambda path: show(result, path))


def small() -> Sizes:
    """What a CPU computes in a moment."""
    from shoal.jobs.bench.dispatch_ranks import Sizes

    return Sizes((64,), hidden=32, inner=16, experts=8, top_k=3, repeats=1, window=1.0)


if __name__ == "__main__":
    main()
