"""NSA at 64k with groups of 1 to 16 query heads beside 4 KV heads, whole; the selected branch alone at a group of 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from shoal.jobs.bench.nsa import CONTEXTS, KV_HEADS, WHOLE, Passes, Problem, dense_calls, forward_parts
from shoal.jobs.bench.result import Row, time_row
from shoal.jobs.bench.turns import medians

if TYPE_CHECKING:
    from shoal.jobs.bench.registry import Settings

GROUPS = (1, 2, 4, 8, 16)
DENSE = "sdpa_cudnn"
SELECTED = "selected branch, alone"
LIMIT_MS = 4.0  # of it, forward, at a group of 1
OF_SELECTED = ("selected, forced", "selected, others, and gates")


def run(settings: Settings) -> Iterator[Row]:
    """Rows of both phases for every group, beside dense attention of as many heads; of the selected branch at 1."""
    for group in GROUPS:
        settings.say(f"context {CONTEXTS[-1]}, groups of {group}")
        problem = Problem.draw(CONTEXTS[-1], (128, 128), group * KV_HEADS)
        passes = Passes.of(problem)
        most = passes.peak_bytes()
        ms = medians({**passes.calls(), **dense_calls(problem, (DENSE,))})
        for phase in ("forward", "backward"):
            facts = {"phase": phase, **problem.facts, "peak_bytes": most}
            yield time_row(f"{WHOLE}, by groups", ms[WHOLE, phase], DENSE, ms.get((DENSE, phase)), **facts)
        if group == 1:
            yield from selected_rows(forward_parts(problem))
        del problem, passes
        torch.cuda.empty_cache()


def selected_rows(parts: list[Row]) -> list[Row]:
    """The selected branch's parts among those of a forward pass, and before them their sum beside its limit."""
    mine = [row for row in parts if row["what"] in OF_SELECTED]
    facts = {key: value for key, value in mine[0].items() if key not in ("what", "ms")}
    return [time_row(SELECTED, sum(row["ms"] for row in mine), "limit", LIMIT_MS, 1.0, **facts), *mine]
