"""Serving over ranks, colocated and apart, by ``shoal bench serve``'s own code; and what is predicted of it.

What is timed is a round: the time in which every request that runs gets a token, prompts of new ones included. Of one
rank it is a + b·c of c requests at once. N colocated ranks have c / N each. With attention and experts apart, n ranks
compute what is not of routed experts for c / n requests each, m ranks the routed experts' part, by FLOPs, of as many
rows as c / m requests have. On GPUs, in CUDA graphs, they work one after the other; elsewhere at the same time, and the
slower ones count.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from shoal.jobs.bench.cases import Patience, started
from shoal.jobs.bench.result import Row, gpu_figures
from shoal.jobs.bench.scale_cases import Case, Facts, Line, Series, Serving
from shoal.jobs.bench.scale_model import Curve, Plan, Travel, letter_bytes, rows_to_others
from shoal.jobs.bench.scale_model import Experts as Layer
from shoal.jobs.estimate import count_flops, count_parameters
from shoal.workers.errors import ShoalError, TimedOut
from shoal.workers.machine import known_peak, peak_flops

APART = ("1A:1F", "1A:3F", "2A:2F", "2A:6F", "4A:4F")
"""Placements beside the colocated one, each on as many ranks as it has."""
RUN = "scale"
FOREVER = 1e6  # seconds, that nobody waits


class ServeSeries(Series):
    """Rounds of a server under requests at once: ``weak`` so many a rank, ``strong`` so many in all."""

    part = "serve"
    powers = (0, 1)
    flat = True

    def __init__(self, serving: Serving, weak: int, strong: int) -> None:
        self.serving, self.weak, self.strong = serving, weak, strong

    def lines(self) -> list[Line]:
        """As the base class has it."""
        weak, strong = (lambda n: self._case(n, self.weak * n)), (lambda n: self._case(n, self.strong))
        lines = [Line("colocated", "weak", weak), Line("colocated", "strong", strong)]
        for placement in APART:
            ranks = sum(_sides(placement))
            lines.append(Line(placement, "weak", self._apart(placement), ranks=(ranks,)))
        return lines

    def _apart(self, placement: str) -> Callable[[int], Case]:
        return lambda ranks: self._case(ranks, self.weak * ranks, placement)

    def _case(self, ranks: int, requests: int, placement: str = "") -> Case:
        return Case(placement or "colocated", ranks, requests, replace(self.serving, placement=placement))

    def flops(self, case: Case) -> float:
        """As the base class has it: of prompts and answers, for each token answered."""
        from shoal.jobs.bench.load import parse_mix

        recipe, mix = self.serving.load(), parse_mix(self.serving.mix)
        prompts, answers = sum(s.weight * s.prompt for s in mix), sum(s.weight * s.output for s in mix)
        return case.tokens * count_flops(recipe, count_parameters(recipe)).forward * (prompts + answers) / answers

    def ideal(self, case: Case, mode: str, curve: Curve, one: Facts) -> float:
        """As the base class has it; a round of more requests takes longer, but not in proportion."""
        return curve(case.tokens // case.ranks) if mode == "weak" else curve(case.tokens) / case.ranks

    def plan(self, case: Case, curve: Curve, one: Facts) -> Plan:
        """As the base class has it. Bytes are those of the answers' tokens alone."""
        recipe = self.serving.load()
        m, moe = recipe.model, recipe.moe
        layers = m.layers - m.dense_layers
        layer = Layer(m.hidden, moe.expert_hidden, moe.experts, moe.top_k, moe.shared_experts, int(one["itemsize"]))
        assert isinstance(case.sizes, Serving)
        if case.sizes.placement:
            n, hosts = _sides(case.sizes.placement)
            routed = layers * layer.flops(1, moe.top_k) / count_flops(recipe, count_parameters(recipe)).forward
            sides = (1 - routed) * curve(case.tokens // n), routed * curve(max(1, case.tokens // hosts))
            compute = sum(sides) if "parallel.device=cuda" in self.serving.sets else max(sides)
            rows = case.tokens / n * _ranks_chosen(moe.experts, moe.top_k, hosts)
        else:
            compute = curve(max(1, case.tokens // case.ranks))
            rows = rows_to_others(case.tokens / case.ranks, case.ranks, moe.experts, moe.top_k)
        if case.ranks == 1:
            return Plan(compute)
        out, home = rows * letter_bytes(layer, 2 * moe.top_k), rows * m.hidden * layer.itemsize
        return Plan(compute, (Travel(out, count=layers), Travel(home, count=layers)))


def _ranks_chosen(experts: int, top_k: int, hosts: int) -> float:
    """Expert ranks that a token needs, all of them elsewhere."""
    others = rows_to_others(1, hosts, experts, top_k)  # of hosts - 1
    return others * hosts / (hosts - 1) if hosts > 1 else 1.0


def _sides(placement: str) -> tuple[int, int]:
    attention, experts = placement.removesuffix("F").split("A:")
    return int(attention), int(experts)


def serve_series(small: bool) -> list[Series]:
    """What is served. Groups of 16 heads share keys, as in the NSA paper; 72 experts divide over 1 to 4, 6 and 8."""
    if small:
        return [ServeSeries(Serving("tiny", (), "32:8", 2.0), 2, 4)]
    sets = (
        "parallel.device=cuda", "attention.kind=nsa", "model.heads=32", "model.kv_heads=2", "model.context=16384",
        "moe.experts=72", "serve.step_tokens=2048",
    )  # fmt: skip
    return [ServeSeries(Serving("deepseekmoe-2b", sets, "1024:64*3,8192:64*1", 8.0), 8, 32)]


def serve_cases(
    cases: Sequence[Case],
    data_dir: Path,
    say: Callable[[str], None],
    told: Callable[[Case, list[Row]], None],
    patience: Patience,
) -> None:
    """Measures cases, a server for all that differ in requests alone. told: called with each as it is measured.
    patience: of each server, to begin and to be measured."""
    by_server: dict[tuple[int, str], list[Case]] = {}
    for case in cases:
        assert isinstance(case.sizes, Serving)
        by_server.setdefault((case.ranks, case.sizes.placement), []).append(case)
    if not patience.left:
        say("left out, serving: no time was left")
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        if not _made(cases[0], Path(folder), data_dir, patience.left):
            say("left out, serving: the model to serve could not be made")
            return
        for (ranks, placement), mine in by_server.items():
            try:
                _measure(mine, ranks, placement, Path(folder), data_dir, say, told, patience.left)
            except Exception as error:  # whatever its server or a request met; the others are measured
                say(f"left out, serving {placement or 'colocated'} on {ranks}: {error}")


def _made(case: Case, runs: Path, data_dir: Path, seconds: float) -> bool:
    """Whether the run to serve is there; a process of its own draws its weights, so that the GPU is free again."""
    assert isinstance(case.sizes, Serving)
    arguments = (RUN, case.sizes.recipe, case.sizes.sets, runs, data_dir.resolve())
    with started(_make, 1, arguments) as processes:
        try:
            return processes.join(seconds if seconds < FOREVER else None)
        except Exception:  # it has said why
            return False


def _make(_rank: int, *arguments: object) -> None:
    from shoal.jobs.bench.untrained import make

    try:
        make(*arguments)  # type: ignore[arg-type]
    except ShoalError as error:
        sys.exit(str(error))


def _measure(
    cases: Sequence[Case],
    ranks: int,
    placement: str,
    runs: Path,
    data_dir: Path,
    say: Callable[[str], None],
    told: Callable[[Case, list[Row]], None],
    seconds: float,
) -> None:
    """All loads of one server, which has so many seconds to begin and to be measured. Raises ShoalError."""
    from shoal.jobs.bench.load import Limits, parse_mix
    from shoal.jobs.bench.serve import Level, ServeSettings, run

    serving = cases[0].sizes
    assert isinstance(serving, Serving)
    if not seconds:
        raise TimedOut("no time was left")
    options = (f"--workers={ranks}", *((f"--placement={placement}",) if placement else ()))
    measured = run(
        ServeSettings(
            data_dir=data_dir,
            say=say,
            run=str(runs / RUN),
            runs_dir=runs,
            levels=tuple(Level(case.tokens) for case in cases),
            mix=parse_mix(serving.mix),
            limits=Limits(seconds=serving.seconds),
            warmup=4,
            options=options,
            patience=seconds if seconds < FOREVER else None,
        )
    )
    cuda = "parallel.device=cuda" in serving.sets
    peak = known_peak(next(iter(gpu_figures("name")), "")) if cuda else peak_flops("cpu", "float32")
    for case, row in zip(cases, list(measured), strict=True):
        kept = {key: row[key] for key in ("ttft_ms", "tpot_ms", "failed") if key in row}
        facts = {"ms": row["ms"] * case.tokens, "peak_bytes": row.get("gpu_bytes", 0), "peak_flops": peak}
        facts["itemsize"] = 2 if cuda else 4
        told(case, [facts | kept])
