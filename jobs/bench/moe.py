"""One layer of DeepSeekMoE-16B on a GPU, beside a chain of cuBLAS products with the same FLOPs, and other layers.

Needs torch and Triton only, so that it runs on a bare GPU machine too: ``python -m shoal.jobs.bench.moe --out FOLDER``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.jobs.bench.ending import cut_in_order, report
from shoal.jobs.bench.registry import Settings, measure, wants_gpu
from shoal.jobs.bench.result import Document, Row, time_row, value_row
from shoal.workers.errors import TrainingFailed

if TYPE_CHECKING:
    from shoal.jobs.bench.moe_layers import Layer, Problem

TARGETS = {4096: (0.70, 180), 16384: (0.85, 720), 65536: (0.90, 2900)}
"""Of each number of tokens: the share of the chain's speed forward and backward, and MiB kept, that are asked for."""

REPEATS, WINDOW_MS = 3, 300
FIRST_CALL_S = 60.0
SKEW, SKEW_SLOWER = 0.3, 1.15
CHAIN, PHASES = "cublas_chain", ("forward+backward", "forward")


def run(settings: Settings) -> Iterator[Row]:
    """Medians over rounds in which all take turns, so that a GPU that gets hot slows all of them down.

    Raises InvalidInput without a GPU.
    """
    import torch

    wants_gpu("moe")
    yield _first_call(settings)
    for tokens in TARGETS:
        yield from _rows_of(tokens, settings)
        torch.cuda.empty_cache()


def _rows_of(tokens: int, settings: Settings) -> list[Row]:
    from shoal.jobs.bench import moe_layers as layers

    problem = layers.problem(tokens)
    skewed = layers.problem(tokens, skew=SKEW)
    sides: dict[str, tuple[Layer, Problem]] = {
        name: (layer, problem)
        for name, layer in layers.LAYERS.items()
        if find_spec("megablocks") or not name.startswith("megablocks")
    }
    sides["triton, skewed"] = (layers.LAYERS["triton"], skewed)
    ms: dict[tuple[str, str], list[float]] = {}
    broken: set[str] = set()
    for repeat in range(settings.repeats or REPEATS):
        for name in [CHAIN, *sides]:
            if name in broken:
                continue
            try:
                for phase in PHASES:
                    call = layers.chain(tokens, phase) if name == CHAIN else _call(*sides[name], phase)
                    ms.setdefault((name, phase), []).append(_ms(call))
            except Exception as error:  # a layer of others that fails here is told of, and the rest measured
                if name in layers.OURS:
                    raise
                broken.add(name)
                settings.say(f"{name} failed: {type(error).__name__}: {str(error).splitlines()[:1]}")
        said = ", ".join(f"{name} {times[-1]:.2f}" for (name, phase), times in ms.items() if phase == PHASES[0])
        settings.say(f"{tokens} tokens, round {repeat + 1}, ms forward and backward: {said}")
    kept = {name: layers.kept(*sides[name]) for name in sides if name not in broken}
    return _tell(tokens, {key: statistics.median(times) for key, times in ms.items()}, kept)


def _tell(tokens: int, ms: dict[tuple[str, str], float], kept: dict[str, float]) -> list[Row]:
    from shoal.jobs.bench.moe_layers import flops

    share, mib = TARGETS[tokens]
    rows: list[Row] = []
    facts: dict[str, Any]
    for (name, phase), value in ms.items():
        if name == CHAIN or name.endswith("skewed"):
            continue
        facts = {"tokens": tokens, "backend": name, "phase": phase}
        target = share if name == "triton" and phase == PHASES[0] else None
        tflops = flops(tokens, phase) / value / 1e9
        rows.append(time_row("layer", value, CHAIN, ms[CHAIN, phase], target, **facts, tflops=tflops))
    for name, value in kept.items():
        facts = {"tokens": tokens, "backend": name}
        limit: tuple[Any, ...] = ("limit", mib, 1.0) if name == "triton" else ()
        rows.append(value_row("kept for the backward pass", value, "MiB", *limit, **facts))
    facts = {"tokens": tokens, "backend": "triton", "phase": PHASES[0], "share_of_one_expert": SKEW}
    slow, even = ms["triton, skewed", PHASES[0]], ms["triton", PHASES[0]]
    rows.append(time_row("layer, one expert has 30% of the tokens", slow, "uniform", even, 1 / SKEW_SLOWER, **facts))
    return rows


def _call(layer: Layer, problem: Problem, phase: str) -> Callable[[], object]:
    import torch

    from shoal.jobs.bench.moe_layers import both

    def forward() -> object:
        with torch.no_grad():
            return layer(problem)

    return forward if phase == "forward" else lambda: both(layer, problem)


def _ms(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=WINDOW_MS // 4, rep=WINDOW_MS, return_mode="median"))


def _first_call(settings: Settings) -> Row:
    """Seconds from the first call to its result, forward and backward, in a process whose compiler's cache is empty."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "shoal.jobs.bench.moe_layers", cache]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise TrainingFailed(f"the first call failed: {result.stderr.strip().splitlines()[-1:]}")
    seconds = float(result.stdout.split()[-1])
    settings.say(f"first call, from an empty cache: {seconds:.1f} s")
    return value_row("first call to first result, empty cache", seconds, "s", "limit", FIRST_CALL_S, 1.0, tokens=16384)


def draw(result: Document, path: Path) -> bool:
    """Writes a PNG of shares of the chain's speed and of memory kept; False where there is none. Raises OSError."""
    from shoal.jobs.bench import moe_plot

    return moe_plot.draw(moe_plot.layer_panels(result["rows"]), result, path)


@cut_in_order()
def main() -> None:
    """Runs the benchmark where Shoal's command line cannot: it needs neither Ray nor pydantic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for moe.json")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    chosen = parser.parse_args()
    result = measure("moe", Settings(repeats=chosen.repeats))
    report(result, chosen.out, lambda path: show(result, path))


def show(result: Document, path: Path) -> None:
    """Prints rows, and where they are written."""
    for row in result["rows"]:
        print(line(row))
    print(f"written to {path}")


def line(row: Row) -> str:
    """A row for a terminal."""
    facts = " ".join(f"{row[key]:>6}" if key == "tokens" else f"{row[key]:17}" for key in FACTS if key in row)
    figure = f"{row['ms']:9.3f} ms" if "ms" in row else f"{row['value']:9.1f} {row['unit']}"
    baseline = row.get("baseline_ms", row.get("baseline_value"))
    against = "" if baseline is None else f"  {row['baseline']} {baseline:.3f}, ratio {row['ratio']:.3f}"
    return f"{row['what'][:38]:38} {facts:42} {figure}{against}"


FACTS = ("tokens", "backend", "path", "phase")

if __name__ == "__main__":
    main()
