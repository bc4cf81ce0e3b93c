"""The benchmarks there are. A benchmark is a module with ``run(settings) -> rows``; it is imported when it runs.

One that takes long yields its rows as it goes: those that it has when it is cut off are a result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TypeVar

from shoal.jobs.bench import leave
from shoal.jobs.bench.cases import minded
from shoal.jobs.bench.ending import result_of
from shoal.jobs.bench.result import Document, gpu_kind
from shoal.jobs.interrupt import handled
from shoal.workers.errors import InvalidInput, UsageError

Number = TypeVar("Number", int, float)

BENCHMARKS = {
    "train": ("shoal.jobs.bench.train", "Tokens/s of tiny under Ray, beside the same training without Ray."),
    "startup": ("shoal.jobs.bench.startup", "Time from the command to the first step, and its parts."),
    "memory": ("shoal.jobs.bench.memory", "Peak memory of a training run, over all its processes."),
    "engine": (
        "shoal.jobs.bench.engine",
        "What batching brings to generation; NSA beside full attention and transformers.",
    ),
    "serve": ("shoal.jobs.bench.serve", "Latencies and tokens/s of a server, under one load after another."),
    "nsa": ("shoal.jobs.bench.nsa", "NSA's kernels on a GPU, decode too, beside PyTorch's dense attention."),
    "nsa-wide": ("shoal.jobs.bench.nsa_wide", "NSA's kernels for d_qk 192 and d_v 128 on a GPU: Gluon beside Triton."),
    "sequence": ("shoal.jobs.bench.sequence", "Attention over a sequence that GPUs share: NSA beside ring attention."),
    "context": ("shoal.jobs.bench.context", "Training at 64k over two GPUs, NSA beside ring attention; 512k."),
    "moe": ("shoal.jobs.bench.moe", "A DeepSeekMoE layer on a GPU, beside cuBLAS products with the same FLOPs."),
    "dispatch": ("shoal.jobs.bench.dispatch", "Token rows between two GPUs, and a DeepSeekMoE layer over both."),
    "scale": ("shoal.jobs.bench.scale", "Weak and strong scaling over 1 to 8 GPUs, measured and predicted."),
    "decode": ("shoal.jobs.bench.decode", "A decode step over two GPUs, in CUDA graphs, without, and on one GPU."),
    "cli": ("shoal.jobs.bench.cli", "Time that shoal --help takes."),
}

ON_GPUS = {"nsa": "", "nsa-wide": "", "moe": "", "sequence": "2x", "context": "2x", "dispatch": "2x", "decode": "2x"}
"""Those that need GPUs, and how many, as the name of a result says it."""


PARTS = {"nsa": ("passes", "wide", "decode", "groups")}
"""What some of them can be asked for alone."""


@dataclass(frozen=True)
class Settings:
    """How to measure. None: the benchmark's own number of repeats or steps. ``say`` tells how far it is.

    parts: of ``PARTS``, in that order; none: all of them.
    """

    data_dir: Path = Path("data")
    repeats: int | None = None
    steps: int | None = None
    say: Callable[[str], None] = print
    parts: tuple[str, ...] = ()


def parts_of(name: str, text: str) -> tuple[str, ...]:
    """The parts of a benchmark that ``text`` names, with commas between them; of all, none. Raises UsageError."""
    asked, known = {part.strip() for part in text.split(",")} - {""}, PARTS.get(name, ())
    if asked and not known:
        raise UsageError(f"--parts {text}: shoal bench {name} has no parts, leave the option out")
    check_parts(asked, known)
    return () if asked == set(known) else tuple(part for part in known if part in asked)


def check_parts(asked: Collection[str], known: Sequence[str]) -> None:
    """Raises UsageError where one that is asked for is not known."""
    if unknown := sorted(set(asked) - set(known)):
        raise UsageError(f"--parts {unknown[0]} is none of {', '.join(known)}: name some of these, with commas between")


def numbers_of(kind: type[Number], option: str, text: str) -> list[Number]:
    """The numbers above 0 that ``text`` holds, with commas between them. Raises UsageError."""
    try:
        found = [kind(part) for part in text.split(",") if text]
    except ValueError:
        found = [kind(0)]
    if not all(0 < number < float("inf") for number in found):
        whole = "whole " * (kind is int)
        raise UsageError(f"{option} {text!r} is no list of {whole}numbers above 0: write it like 1,4,16")
    return found


def wants_gpu(name: str) -> None:
    """Raises InvalidInput where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise InvalidInput(
            f"shoal bench {name} needs a CUDA GPU, and torch sees none here: run it on a machine with one"
        )


def measure(name: str, settings: Settings) -> Document:
    """Runs a benchmark and returns its result. Raises ShoalError for what it cannot do.

    One that needs GPUs is named after them as well: ``nsa-h100``, ``dispatch-2xh100``. One with a ``whole(settings)``
    makes the result by itself.
    Where there are parts, ``parts`` of the result lists what was asked for, and some alone are named after them,
    ``nsa-h100-decode``: they do not replace the whole, and what was not measured has no rows.
    One that is cut off once it has yielded rows is told with these, named ``nsa-h100-cut``: see ``ending.py``. Raises
    KeyboardInterrupt where it has none.
    """
    with handled(minded(), leave):
        module = import_module(BENCHMARKS[name][0])
    whole: Callable[[Settings], Document] | None = getattr(module, "whole", None)
    if whole:
        return whole(settings)
    kind = gpu_kind() if name in ON_GPUS else ""
    title = "-".join((f"{name}-{ON_GPUS[name]}{kind}" if kind else name, *settings.parts))
    result = result_of(title, module.run(settings))
    return result | {"parts": list(settings.parts or PARTS[name])} if name in PARTS else result


def draw(name: str, result: Document, folder: Path) -> Path | None:
    """Draws a result as ``folder/BENCHMARK.png``, where its benchmark has a ``draw(result, path)``. Raises OSError.

    None where there is nothing to draw, which a ``draw`` says by returning False.
    """
    drawing: Callable[[Document, Path], bool | None] | None = getattr(import_module(BENCHMARKS[name][0]), "draw", None)
    if drawing is None:
        return None
    path = folder / f"{result['benchmark']}.png"
    return None if drawing(result, path) is False else path
