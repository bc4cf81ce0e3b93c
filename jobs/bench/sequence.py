"""Attention of one layer over a sequence that GPUs share: NSA beside full attention around a ring, on 1 GPU and on all.

A layer is everything from q, three pairs of keys and values and gates to the output, φ and all exchanges included;
linear projections, which no rank shares, are not. On one GPU nothing is exchanged, and full attention is cuDNN's. In a
shared sequence times are those of the slowest rank, bytes those of the rank that receives most.

``python -m shoal.jobs.bench.sequence --out FOLDER`` measures with torch and triton alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from shoal.jobs.bench.cases import of, run_cases
from shoal.jobs.bench.ending import cut_in_order, report, result_of
from shoal.jobs.bench.registry import Settings, numbers_of
from shoal.jobs.bench.result import Document, Row, gpu_kind, time_row, value_row
from shoal.jobs.bench.sequence_rank import SIZES, Case, rank_main
from shoal.workers.errors import UsageError
from shoal.workers.sequence import zigzag
from shoal.workers.volume import Shape, nsa_volume, ring_volume

CONTEXTS = (32768, 65536, 131072, 262144, 524288)
TARGETS = {65536: 1.85, 262144: 1.92}
"""The least ratio that two GPUs are asked for, NSA, forward and backward together."""
BEYOND = (1 << 20, (2, 4, 8, 16, 32, 64))
"""Tokens and ranks that the formula alone tells about."""
SMALL = {"heads": 4, "kv_heads": 2, "dim": 16, "repeats": 1}


def run(settings: Settings) -> Iterator[Row]:
    """Rows of all cases, as they are measured: with NCCL on the GPUs at hand, up to two; without one a small case with
    gloo on two ranks."""
    if not torch.cuda.is_available():
        return measure((2048,), 2, settings.repeats or 1, settings.say, SMALL)
    return measure(CONTEXTS, min(2, torch.cuda.device_count()), settings.repeats or 0, settings.say)


def measure(
    contexts: tuple[int, ...],
    ranks: int,
    repeats: int,
    say: Callable[[str], None] = print,
    options: dict[str, int] | None = None,
) -> Iterator[Row]:
    """Rows for each context, on one rank and on ``ranks``, and errors beside one rank; then bytes by formula.

    Raises UsageError for a context with less than a block for each segment.
    """
    least = 2 * ranks * SIZES.slc_block if ranks > 1 else 1
    if contexts and min(contexts) < least:
        raise UsageError(
            f"--contexts {min(contexts)} is too short for {ranks} ranks, whose {2 * ranks} segments of a sequence have "
            f"{SIZES.slc_block} tokens each at least: name {least} or more"
        )
    found: dict[Case, list[Row]] = {}
    for cases in waves(contexts, ranks, {**(options or {}), "repeats": repeats}):
        for case, measured in run_cases(rank_main, cases[0].ranks, cases, say):
            found[case] = measured
            yield from _checks(case, measured) if case.kind == "check" else _times(case, measured, found)
            say(f"measured on {of(case.ranks)}: {case}")
    yield from _by_formula()


def waves(contexts: tuple[int, ...], ranks: int, options: dict[str, int]) -> list[list[Case]]:
    """Cases, those of one list in processes of their own: contexts with targets on one rank and on ``ranks``, then the
    others, since it may be cut off. Ranks agree with one before any of theirs are timed."""
    found = []
    for some in ([n for n in contexts if n in TARGETS], [n for n in contexts if n not in TARGETS]):
        for count in sorted({1, ranks}) if some else ():
            found.append([Case(kind, n, count, **options) for n in some for kind in ("nsa", "full")])
    checked = next((cases for cases in found if cases[0].ranks > 1), [])
    if checked:
        checked.insert(0, Case("check", min(contexts), ranks, **options))
    return found


def _times(case: Case, measured: list[Row], found: dict[Case, list[Row]]) -> list[Row]:
    """Rows of a case, beside the same layer on one rank where that was measured."""
    one = Case(case.kind, case.context, 1, case.heads, case.kv_heads, case.dim, case.repeats)
    rows = []
    for i, facts in enumerate(measured):
        more = dict(facts)
        ms, phase = more.pop("ms"), more.pop("phase")
        more = {"attention": case.kind, "context": case.context, "ranks": case.ranks, "phase": phase, **more}
        baseline = found[one][i]["ms"] if case.ranks > 1 and one in found else None
        target = TARGETS.get(case.context) if case.kind == "nsa" and case.ranks == 2 and i == 2 else None
        name = "one rank" if baseline is not None else ""
        rows.append(time_row(f"{case.kind}, {of(case.ranks)}", ms, name, baseline, target, **more))
    return rows


def _checks(case: Case, measured: list[Row]) -> list[Row]:
    return [
        value_row(
            f"{facts['check']}, {of(case.ranks)} beside one: relative error of {what}",
            facts[what],
            "",
            attention=facts["check"],
            context=case.context,
            ranks=case.ranks,
        )
        for facts in measured
        for what in ("output", "gradients")
    ]


def _by_formula() -> list[Row]:
    """Bytes that the rank which receives most receives, of one layer of 4 KV heads of 128, forward and backward."""
    tokens, ranks = BEYOND
    rows = []
    for count in ranks:
        nsa, ring = Shape(4, (128, 128), 2, 2), Shape(4, (128, 128), 2, 4)
        owned = zigzag(tokens, count, SIZES.slc_block)
        volumes = [nsa_volume((0, tokens), owned, rank, nsa, SIZES) for rank in range(count)]
        most = max(sum(sum(phase.values()) for phase in volume.values()) for volume in volumes)
        facts: Row = {"context": tokens, "ranks": count}
        rows.append(value_row("bytes by formula", most, "bytes", attention="nsa", **facts))
        full = sum(ring_volume(tokens, count, ring).values())
        rows.append(value_row("bytes by formula", full, "bytes", attention="full", **facts))
    return rows


def draw(result: Document, path: Path) -> None:
    """Writes a PNG: time, bytes received and peak memory against the context, and bytes by formula against ranks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 4)
    timed = [row for row in result["rows"] if row.get("phase") == "forward+backward"]
    colours = {"nsa": "tab:blue", "full": "tab:orange"}
    titles = ("forward + backward, ms", "bytes received a rank", "peak bytes a rank, beyond the inputs")
    for panel, key, title in zip(panels, ("ms", "bytes", "peak_bytes"), titles, strict=False):
        for kind, ranks in sorted({(row["attention"], row["ranks"]) for row in timed}):
            rows = [row for row in timed if (row["attention"], row["ranks"]) == (kind, ranks) and row[key]]
            rows.sort(key=lambda row: int(row["context"]))
            if not rows:  # no memory is measured on a CPU
                continue
            style = "o-" if ranks > 1 else "o--"
            label = f"{kind}, {of(ranks)}"
            panel.plot([r["context"] for r in rows], [r[key] for r in rows], style, color=colours[kind], label=label)
            if key == "bytes":
                model = [row["bytes_by_formula"] for row in rows]
                panel.plot([r["context"] for r in rows], model, "k+", label=f"{kind}, formula")
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("context, tokens")
    for kind, colour in colours.items():
        rows = [r for r in result["rows"] if r["what"] == "bytes by formula" and r["attention"] == kind]
        if rows:
            panels[3].plot([r["ranks"] for r in rows], [r["value"] for r in rows], "o-", color=colour, label=kind)
    panels[3].set_title("bytes a rank by formula, 1M tokens", fontsize=9)
    panels[3].set_xlabel("ranks")
    for panel in panels:
        if not panel.has_data():
            continue
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


@cut_in_order()
def main() -> None:
    """Measures and writes JSON; needs neither Ray nor pydantic."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)), help="tokens, separated by commas")
    parser.add_argument("--repeats", type=int, default=0, help="0: about as many as fit into some seconds")
    args = parser.parse_args()
    options = {} if torch.cuda.is_available() else SMALL
    contexts = tuple(numbers_of(int, "--contexts", args.contexts))
    name = f"sequence-{args.ranks}x{gpu_kind() or 'cpu'}"
    result = result_of(name, measure(contexts, args.ranks, args.repeats, options=options))

    def show(path: Path) -> None:
        for row in result["rows"]:
            print(json.dumps(row))
        print(f"written to {path}")

    report(result, args.out, show)


if __name__ == "__main__":
    main()
