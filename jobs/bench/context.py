"""Steps of `nsa-64k-small` at 64k over sequences that GPUs share, NSA beside full attention around a ring; and of 512k.

A step is all of :class:`Trainer`'s, on a text that is one document, so that full attention can go around the ring. Its
time is that on the wall, until the GPU is done; the median over those after the first ones.

``python -m shoal.jobs.bench.context --out FOLDER`` writes JSON after each case, as cut off until the last, and beside
it the records of all steps, as a run's metrics.jsonl has them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.jobs.bench.cases import of, started
from shoal.jobs.bench.ending import cut_in_order, report_as_it_goes
from shoal.jobs.bench.result import Document, Row, document, gpu_kind, time_row

if TYPE_CHECKING:
    from shoal.jobs.bench.registry import Settings

TARGET = 2.5
"""Tokens/s of NSA over those of full attention, on two GPUs."""
STEPS, LONG_STEPS, WARM_UP = 12, 3, 2
SECONDS = 60.0
"""A case ends after so many, once it has ``WARM_UP`` + 2 steps."""
VOCABULARY = 512  # small: a text of 10 MB comes to millions of tokens
SMALLER_BATCH = ("train.batch=4", "train.accumulate=4")  # a step has half the sequences of the recipe's
LONG = (
    "model.context=524288", "model.rope_factor=64.0", "train.sequence=524288", "train.batch=1", "train.accumulate=1",
    "model.layers=4", "model.hidden=2048", "model.dense_hidden=5120", "train.recompute=4",
    "moe.experts=16", "moe.top_k=4", "moe.shared_experts=1", "moe.expert_hidden=1024",
)  # fmt: skip
SMALL = (
    "model.layers=2", "model.hidden=64", "model.heads=4", "model.head_dim=16", "model.dense_hidden=64", "moe.experts=4",
    "moe.top_k=2", "moe.expert_hidden=32", "model.vocab=512", "attention.window=64", "parallel.device=cpu",
    "data.shuffle_tokens=65536", "model.context=4096", "train.sequence=2048",
)  # fmt: skip
"""To try all of it on a CPU."""
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One training to measure: ``what`` is ``64k`` or ``512k``; kind of attention; settings over `nsa-64k-small`."""

    what: str
    kind: str
    ranks: int
    steps: int
    sets: tuple[str, ...]

    @property
    def settings(self) -> list[str]:
        """All of them, as ``--set`` takes them."""
        where = [f"attention.kind={self.kind}", f"parallel.ranks={self.ranks}", f"parallel.context={self.ranks}"]
        return [*self.sets, *where, f"train.steps={self.steps}", "train.warmup=0"]


def waves(ranks: int, steps: int | None, small: bool) -> list[list[Case]]:
    """Cases, those of one list side by side on devices of their own; what matters most comes first."""
    own = SMALL if small else ("parallel.device=cuda",)
    many, few = steps or STEPS, min(steps or LONG_STEPS, LONG_STEPS)
    shared = [[Case("64k", kind, ranks, many, (*SMALLER_BATCH, *own))] for kind in ("nsa", "full")]
    longer = (*LONG[:5], *own[:-2], "model.context=8192", "train.sequence=8192", "train.recompute=2")
    long = Case("512k", "nsa", ranks, few, longer if small else (*LONG, *own))
    # one GPU cannot keep what all layers leave for the backward pass
    again = "train.recompute=2" if small else "train.recompute=8"
    alone = [Case("64k", kind, 1, min(many, 6), (*SMALLER_BATCH, *own, again)) for kind in ("nsa", "full")]
    return [*shared, [long], *([alone] if ranks > 1 else [])]


def run(settings: Settings) -> Iterator[Row]:
    """Rows of all cases, on up to two GPUs; without one small ones over gloo."""
    import torch

    gpus = torch.cuda.device_count()
    found: dict[Case, Records] = {}
    try:
        measure(found, gpus and min(2, gpus), settings.steps, settings.data_dir, settings.say)
    finally:  # when it is cut off, too: cases stand beside those that come later
        yield from rows(found)


def measure(
    found: dict[Case, Records],
    gpus: int,
    steps: int | None,
    data_dir: Path,
    say: Callable[[str], None] = print,
    after: Callable[[], object] = lambda: None,
) -> None:
    """Adds records of each case's steps to ``found``. gpus: 0 for two ranks on the CPU. after: called as there is more.

    A case that ends its ranks (for want of memory, say) is left out; the others go on.
    """
    corpus = str(long_document(data_dir))
    for cases in waves(gpus or 2, steps, small=not gpus):
        names = ", ".join(f"{c.kind} at {c.what} on {of(c.ranks)}" for c in cases)
        say(names)
        try:
            found |= _run(cases, corpus)
        except Exception as error:  # whatever a rank raised, or what killed it
            say(f"left out, {names}: {str(error).strip().splitlines()[-1]}")
            continue
        after()


def long_document(data_dir: Path, characters: int | None = None) -> Path:
    """A corpus of one document, of all that Python's standard library holds, or of its first ``characters``: its rows
    are whole pieces of it."""
    from shoal.jobs.data.corpus import built_in
    from shoal.jobs.data.prepare import PrepareOptions, prepare
    from shoal.jobs.data.readers import TextSource
    from shoal.workers.data.manifest import is_corpus

    folder = data_dir / "-".join(["one-document", str(VOCABULARY), *([str(characters)] if characters else [])])
    if not is_corpus(folder):
        text = "\n".join(d.text for source in built_in("stdlib") for d in source.documents(Counter()))[:characters]
        options = PrepareOptions(vocabulary=VOCABULARY, val_fraction=0.0)
        prepare([TextSource("stdlib", [text])], folder, options)
    return folder


def _run(cases: list[Case], corpus: str) -> dict[Case, Records]:
    """Runs cases side by side, and reads what the first rank of each wrote."""
    from shoal.jobs.bench.context_rank import rank_main

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast wants rights that containers lack
    places = [(i, rank) for i, case in enumerate(cases) for rank in range(case.ranks)]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        arguments = [(case.settings, case.ranks, f"{folder}/store-{i}") for i, case in enumerate(cases)]
        with started(rank_main, len(places), (places, arguments, corpus, SECONDS, WARM_UP + 2, folder)) as processes:
            while not processes.join():
                pass
        return {
            case: [json.loads(line) for line in Path(folder, f"records-{i}").read_text().splitlines()]
            for i, case in enumerate(cases)
        }


def rows(found: dict[Case, Records]) -> list[Row]:
    """A row for each case, and for each beside which another one stands."""
    out = []
    at_64k = {(c.kind, c.ranks): c for c in found if c.what == "64k"}
    ranks = max((c.ranks for c in found), default=1)
    for case in found:
        beside: list[tuple[str, Case | None, float | None]] = []
        if case.what == "64k" and case.kind == "nsa" and ("full", case.ranks) in at_64k:
            target = TARGET if case.ranks > 1 and found[case][0]["context"] == 65536 else None
            beside.append(("full attention", at_64k["full", case.ranks], target))
        if case.what == "64k" and case.ranks == ranks > 1 and (case.kind, 1) in at_64k:
            beside.append(("one rank", at_64k[case.kind, 1], None))
        out += [_row(case, found, *other) for other in beside or [("", None, None)]]
    return out


def _row(case: Case, found: dict[Case, Records], name: str, other: Case | None, target: float | None) -> Row:
    records = found[case]
    first, tokens = records[0], records[0]["tokens"]
    ms = _ms(records)
    facts: Row = {
        "attention": case.kind,
        "context": first["context"],
        "ranks": case.ranks,
        "recompute": first["recompute"],
        "tokens_a_step": tokens,
        "tokens_per_second": tokens / ms * 1e3,
        "steps": len(records),
        "peak_bytes": max(r["peak_bytes"] for r in records),
        "losses": [r["loss"] for r in records],
    }
    baseline_ms = _ms(found[other]) if other else None
    what = f"a step at {first['context'] >> 10}k: {case.kind}, {of(case.ranks)}"
    return time_row(what, ms, name, baseline_ms, target, **facts)


def _ms(records: Records) -> float:
    """The median wall time of the steps after the first ones."""
    return 1e3 * statistics.median(r["wall_seconds"] for r in records[min(WARM_UP, len(records) - 1) :])


@cut_in_order()
def main() -> None:
    """Measures, and writes JSON as it goes."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON and the records")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--steps", type=int, default=None)
    args = parser.parse_args()
    gpus, before = min(2, torch.cuda.device_count()), os.getloadavg()[0]
    name = f"context-{gpus}x{gpu_kind()}" if gpus else "context"
    found: dict[Case, Records] = {}

    def measured(after: Callable[[], object]) -> None:
        measure(found, gpus, args.steps, args.data_dir, after=after)

    def result() -> Document:
        args.out.mkdir(parents=True, exist_ok=True)
        for case, records in found.items():
            file = args.out / f"{case.what}-{case.kind}-{case.ranks}.jsonl"
            file.write_text("".join(json.dumps(r) + "\n" for r in records))
        return document(name, rows(found), (before, os.getloadavg()[0]))

    def show(path: Path) -> None:
        for row in rows(found):
            print(json.dumps(row))
        print(f"written to {path}")

    report_as_it_goes(measured, result, args.out, show)
    if len(found) < sum(map(len, waves(gpus or 2, args.steps, not gpus))):
        sys.exit("some cases were left out")


if __name__ == "__main__":
    main()
