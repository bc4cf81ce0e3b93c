"""NSA with the paper's own heads, d_qk = 192 and d_v = 128, at 64k: Gluon's kernels beside Triton's, and their parts.

Both ways are measured in one process on the same tensors; what the Gluon way has of Triton's kernels shows a ratio of
1. An output or gradient that differs between the two is told: a figure of a wrong kernel is worth nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.jobs.bench.nsa import (
    CONTEXTS,
    WIDE_TARGETS,
    Problem,
    backward_parts,
    dense_calls,
    forward_parts,
)
from shoal.jobs.bench.registry import Settings, wants_gpu
from shoal.jobs.bench.result import Row, time_row, value_row
from shoal.jobs.bench.turns import Call, medians

if TYPE_CHECKING:
    from shoal.kernels.nsa.triton_attention import Tunings

DIMS = (192, 128)


@dataclass(frozen=True)
class Found:
    """Milliseconds of a phase, and of its parts by their names; the output, or the gradients."""

    ms: dict[str, float]
    parts: dict[tuple[str, str], float]
    results: tuple[Tensor, ...]


def run(settings: Settings) -> Iterator[Row]:
    """Rows of both ways, as they are measured, and how far apart their results are.

    Raises InvalidInput without a GPU.
    """
    wants_gpu("nsa-wide")
    from shoal.kernels.nsa.triton_attention import narrow_tunings
    from shoal.kernels.nsa.triton_backward import BackwardTuning
    from shoal.kernels.nsa.triton_forward import ForwardTuning

    torch.manual_seed(0)
    problem = Problem.draw(CONTEXTS[-1], DIMS)
    settings.say(f"context {problem.context}, d_qk {DIMS[0]}, d_v {DIMS[1]}: dense attention")
    dense = medians(dense_calls(problem))
    settings.say("NSA, Triton")
    triton = _measure(problem, narrow_tunings())
    yield from _whole("NSA, whole, Triton", triton, dense, problem)
    settings.say("NSA, Gluon where it can")
    gluon = _measure(problem, (ForwardTuning(), BackwardTuning()))
    yield from _whole("NSA, whole, Gluon", gluon, dense, problem)
    for (phase, part), ms in gluon.parts.items():
        yield time_row(part, ms, "Triton", triton.parts[phase, part], phase=phase, **problem.facts)
    for name, mine, other in zip(("output", "gradients of q"), gluon.results, triton.results, strict=True):
        apart = ((mine.float() - other.float()).norm() / other.float().norm()).item()
        yield value_row(f"{name}, Gluon from Triton, relative", apart, "", **problem.facts)


def _whole(name: str, found: Found, dense: dict[tuple[str, str], float], problem: Problem) -> Iterator[Row]:
    """A row for each phase, beside dense attention."""
    for phase, target in WIDE_TARGETS.items():
        beside = ("sdpa_cudnn", dense.get(("sdpa_cudnn", phase)))
        yield time_row(name, found.ms[phase], *beside, target, phase=phase, **problem.facts)


def _measure(problem: Problem, tunings: Tunings) -> Found:
    from shoal.kernels.nsa.triton_attention import nsa_triton

    leaves = tuple(x.detach().requires_grad_() for x in problem.inputs)

    def forward() -> Tensor:
        return nsa_triton(*leaves, problem.layout, problem.scale, tunings=tunings)  # type: ignore[call-arg, arg-type, misc]

    def back(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, problem.d_out, retain_graph=True)

    out = forward()
    d_q = back(out)[0]
    calls: dict[str, Call] = {"forward": forward, "backward": lambda: back(out)}
    rows = forward_parts(problem, tunings[0]) + backward_parts(problem, tunings[1])
    return Found(medians(calls), {(row["phase"], row["what"]): row["ms"] for row in rows}, (out.detach(), d_q))
