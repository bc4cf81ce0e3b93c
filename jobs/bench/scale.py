"""Weak and strong scaling over ranks: a MoE layer, NSA over a shared sequence, training, and what is predicted of them.

Weak: each rank has as much to do, whatever their number. Strong: all of them together have. Efficiency is the time of
a rank's share of the work, as fast as one rank alone did it in the same run, over the time it took. A shared sequence
gets longer with the ranks, and each of its tokens costs more: its share is that of one rank with the whole sequence, by
the curve through shorter ones where that was not measured. ``peak_bytes`` is a rank's most, of an attention layer
beyond its inputs, of a server all that is in use on a GPU. ``dispatch_share`` is the share of the time for which the
rank that waits longest waits for rows or keys of others, ``exposed_share`` that of all that one rank alone would not
do for a rank's part of tokens and of the update: waits, packing, uneven loads. Beside each row stands what
``scale_model`` predicts, also for ranks that there are not (``"measured": false``); ``fitted`` rows are those that its
constants were fitted to.

``python -m shoal.jobs.bench.scale --out FOLDER`` needs no Ray but for ``--parts serve``; the parts ``moe`` and
``sequence`` need torch and Triton alone. ``--device cpu`` runs all of it in small, over gloo. JSON is written after
each case, as cut off (``scale-cut.json``) until the last; of other parts than the usual ones it is named after these,
``scale-moe.json``, and with ``--only`` ``scale-some.json``. Beside the rows it has what was measured as it was, as
``facts``: ``--gather FILE…`` measures nothing, and makes one ``scale.json`` of what several calls did, cut off or not,
on machines of one kind, where ranks of one call are compared with the single rank of another: its rows have the
``date`` of their call, and ``gathered`` says what calls there were, and of which commit. Trainings that began with
small embeddings stand beside none that did not: ``notes`` say which were left out.

Training is measured with new weights that hardly move, embeddings wide enough for routers to tell tokens apart, and
experts whose load biases evened out before the first step: as even as in a run that is past its first steps, not what
such a run was seen to have. ``device_load`` says how even ranks' rows were in the steps that count, ``device_loads`` in
each step, ``settling`` in each pass before, the first without biases; ``rows_put`` whether rows were put into the
memory of other ranks. Where a share of the peak's FLOPs is asked for, a row of its own has it as its ratio;
``flops_per_token`` are those of the formula, forward and backward, none of them twice.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.jobs.bench.cases import ENDLESS, Patience, run_cases
from shoal.jobs.bench.ending import CUT, as_far_as_it_came, cut_in_order, report_as_it_goes
from shoal.jobs.bench.registry import Settings, check_parts, numbers_of
from shoal.jobs.bench.result import Document, Row, document, value_row, write
from shoal.jobs.bench.scale_facts import ABOUT, calls_of, found_in, read, told, unsettled
from shoal.jobs.bench.scale_model import NVLINK, Curve, Link, fit
from shoal.jobs.bench.scale_rows import lone_row, scale_row, utilised_row
from shoal.workers.errors import InvalidInput, UsageError

if TYPE_CHECKING:
    from shoal.jobs.bench.scale_cases import Case, Facts, Line, Series

RANKS = (1, 2, 4, 8)
PARTS = ("moe", "sequence", "train", "serve")
USUAL = PARTS[:3]
NEEDS = ("pydantic", "pyarrow", "tokenizers")  # of training: recipes and corpora
CHARACTERS = 400_000  # of the small corpus
USUAL_PATIENCE = Patience(600.0)  # with a case, or a server


class Scale:
    """What is to be measured, and what was measured by now. ranks: how many there may be, smallest first."""

    def __init__(
        self,
        series: Sequence[Series],
        ranks: Sequence[int],
        say: Callable[[str], None] = print,
        data_dir: Path = Path("data"),
        wanted: Sequence[str] = (),
        patience: Patience = ENDLESS,
    ) -> None:
        """wanted: measure such lines alone as have one of these in their name; all, if there are none."""
        self.series, self.ranks, self._say, self.data_dir = list(series), sorted(set(ranks)), say, data_dir
        self.wanted, self.patience = tuple(wanted), patience
        self.found: dict[Case, Facts] = {}
        self.notes: list[str] = []

    def say(self, text: str) -> None:
        """Says it; what was left out is remembered."""
        if text.startswith("left out"):
            self.notes.append(text)
        self._say(text)

    def measure(self, after: Callable[[], object] = lambda: None) -> None:
        """All cases: of one rank, which all others are compared with, then of the most ranks, then of those between."""
        from shoal.jobs.bench.scale_rank import rank_main

        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as ranks of training have it

        def told(case: Case, rows: list[Row]) -> None:
            if not rows:
                self.say(f"left out, {case} on {case.ranks}: it cannot be had here (memory, or the way rows travel)")
                return
            self.found[case] = {**case.settings, **rows[0]}
            after()
            self._say(f"{case} on {case.ranks}: {rows[0]['ms']:.2f} ms")

        order = [*self.ranks[:1], *reversed(self.ranks[1:])]
        for ranks in order:
            if cases := [case for case in self.cases(ranks) if not _served(case)]:
                for case, rows in run_cases(rank_main, ranks, cases, self.say, self.patience):
                    told(case, rows)
        if served := [case for ranks in order for case in self.cases(ranks) if _served(case)]:
            from shoal.jobs.bench.scale_serve import serve_cases

            serve_cases(served, self.data_dir, self.say, told, self.patience)

    def cases(self, ranks: int) -> list[Case]:
        """In the order in which they are measured."""
        found: dict[Case, None] = {}
        for late in (False, True):
            for series in self.series:
                for line in series.lines():
                    asked = line.late == late and line.tried(ranks) and _named(line.what, self.wanted)
                    if asked and (case := _possible(series, line, ranks)):
                        found[case] = None
                if ranks == 1 and not late:
                    found |= dict.fromkeys(series.extra())
        return list(found)

    def rows(self) -> list[Row]:
        """Of every line, number of ranks and fitted constant."""
        return [row for series in self.series for row in self._rows_of(series)]

    def _rows_of(self, series: Series) -> list[Row]:
        ones = [*(line.case(1) for line in series.lines()), *series.extra()]
        alone = {case: self.found[case] for case in ones if case in self.found}
        if not alone:
            return self._alone(series)
        one = next(iter(alone.values()))
        curve = Curve.through({c.tokens: series.on_curve(f) for c, f in alone.items()}, series.powers)
        fitted, link, source = self._link(series, curve, one)
        rows: list[Row] = []
        for line in series.lines():
            for ranks in line.ranks or sorted({*RANKS, *self.ranks}):
                if (case := _possible(series, line, ranks)) is None:
                    continue
                facts = self.found.get(case)
                rows.append(scale_row(series, line, case, facts, curve, one, link, fitted=case in fitted))
                if line.utilisation and facts and facts["peak_flops"]:
                    rows.append(utilised_row(series, line, case, facts))
        if fitted and rows:
            constants = (
                ("bytes a second between ranks", link.bandwidth, "bytes/s", source),
                ("a byte that travels, beyond that", link.per_byte, "s", "fitted"),
                ("an exchange, whatever its size", link.per_travel, "s", "fitted"),
            )
            of = series.lines()[0].what
            rows += [value_row(w, v, unit, source=by, part=series.part, of=of) for w, v, unit, by in constants]
        return rows

    def _alone(self, series: Series) -> list[Row]:
        """Of a series without one rank's time, with which others could be compared: what was measured."""
        lines = [(line, line.case(n)) for line in series.lines() for n in line.ranks or self.ranks]
        return [lone_row(series, line, case, self.found[case]) for line, case in lines if case in self.found]

    def _link(self, series: Series, curve: Curve, one: Facts) -> tuple[set[Case], Link, str]:
        """The cases that constants were fitted to, those on the fewest ranks above one; the link; whose bandwidth."""
        several = [case for case in self.found if case.ranks > 1]
        speeds = [float(self.found[case]["bandwidth"]) for case in several if "bandwidth" in self.found[case]]
        bandwidth, source = (max(speeds), "measured") if speeds else (NVLINK, "given")
        mine = {line.case(n) for line in series.lines() for n in {case.ranks for case in several}} & set(several)
        least = min((case.ranks for case in mine), default=0)
        used = [case for case in mine if case.ranks == least]
        plans = [series.plan(case, curve, one) for case in used]
        return set(used), fit(plans, [self.found[case]["ms"] / 1e3 for case in used], bandwidth), source


def _named(what: str, wanted: Sequence[str]) -> bool:
    return not wanted or any(part in what for part in wanted)


def _served(case: Case) -> bool:
    from shoal.jobs.bench.scale_cases import Serving

    return isinstance(case.sizes, Serving)


def _possible(series: Series, line: Line, ranks: int) -> Case | None:
    """A line's case on so many ranks, where its recipe allows that."""
    try:
        case = line.case(ranks)
        series.flops(case)
    except InvalidInput:
        return None
    return case


def whole(settings: Settings) -> Document:
    """The usual parts on the GPUs at hand, as a result that can be gathered; without a GPU in small, over gloo on two
    ranks, which does not replace what GPUs did."""
    import torch

    gpus, before = torch.cuda.device_count(), os.getloadavg()[0]
    scale = prepared(USUAL, [n for n in RANKS if n <= (gpus or 2)], not gpus, settings)
    name = _title(not gpus, USUAL)
    return as_far_as_it_came(scale.measure, lambda: bool(scale.found), lambda: _document(scale, name, not gpus, before))


def _document(scale: Scale, name: str, small: bool, before: float) -> Document:
    result = document(name, scale.rows(), (before, os.getloadavg()[0]))
    return result | {"notes": scale.notes, "small": small, "facts": told(scale.found)}


def prepared(
    parts: Sequence[str],
    ranks: Sequence[int],
    small: bool,
    settings: Settings,
    only: str = "",
    patience: Patience = USUAL_PATIENCE,
) -> Scale:
    """Everything that is to be measured, the corpus for training made. only: of these parts, what has one of these in
    its name, with commas between. Raises UsageError for an unknown part, or where nothing is left."""
    check_parts(parts, PARTS)
    missing = [name for name in NEEDS if not find_spec(name)] if "train" in parts else []
    notes = []
    if missing:
        notes.append(f"left out, training: {', '.join(missing)} cannot be imported")
        parts = [part for part in parts if part != "train"]
    from shoal.jobs.bench.scale_series import TrainSeries

    series = series_of(parts, small, settings.steps)
    names = {each: {line.what: 0 for line in each.lines()} for each in series}
    wanted = [part for part in only.split(",") if part.strip()]
    series = [each for each in series if any(_named(what, wanted) for what in names[each])]
    if names and not series:
        raise UsageError(
            f"--only {only} is in no name of these: {'; '.join('; '.join(each) for each in names.values())}"
        )
    training = [each for each in series if isinstance(each, TrainSeries)]
    if training:
        from shoal.jobs.bench.context import long_document

        corpus = long_document(settings.data_dir, CHARACTERS if small else None).resolve()
        for each in training:
            each.corpus = str(corpus)
    scale = Scale(series, ranks, settings.say, settings.data_dir, wanted, patience)
    for note in notes:
        scale.say(note)
    return scale


def series_of(parts: Sequence[str], small: bool, steps: int | None = None) -> list[Series]:
    """All series of some parts."""
    from shoal.jobs.bench.scale_series import all_series

    series = [each for each in all_series(small, steps) if each.part in parts]
    if "serve" in parts:
        from shoal.jobs.bench.scale_serve import serve_series

        series += serve_series(small)
    return series


def draw(result: Document, path: Path) -> None:
    """Writes a PNG: efficiency and tokens/s over ranks, measured and predicted."""
    from shoal.jobs.bench.scale_plot import draw as draw_lines

    draw_lines(result, path)


@cut_in_order()
def main() -> None:
    """Measures, and writes JSON and picture as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON")
    parser.add_argument("--plots", type=Path, default=None, help="folder for the picture; default: that of the JSON")
    parser.add_argument("--only", default="", help="of these, what has this in its name, or this, with commas between")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", default=",".join(USUAL), help=f"of {', '.join(PARTS)}, with commas between")
    parser.add_argument(
        "--ranks", default="", help="with commas between; default: 1, 2, 4, 8, as far as there are GPUs"
    )
    parser.add_argument("--steps", type=int, default=None, help="of each training")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where prepared corpora lie")
    limit = "seconds that a case may take, or a server"
    parser.add_argument("--limit", type=float, default=USUAL_PATIENCE.case, help=limit)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after so many, what is left is left out")
    parser.add_argument("--gather", type=Path, nargs="+", default=[], help="results of other calls to make one of")
    chosen = parser.parse_args()
    (gather if chosen.gather else measure)(chosen)


def measure(chosen: argparse.Namespace) -> None:
    """What the options say."""
    import torch

    small = chosen.device == "cpu"
    gpus = 2 if small else torch.cuda.device_count()
    ranks = sorted({*numbers_of(int, "--ranks", chosen.ranks)}) or [n for n in RANKS if n <= gpus]
    if not small and (not gpus or ranks[-1] > gpus):
        raise UsageError(
            f"--ranks {ranks[-1] if ranks else 1} needs as many CUDA GPUs, and torch sees {gpus} here: ask for fewer, "
            "or for --device cpu"
        )
    if small:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the ranks
    before = os.getloadavg()[0]
    settings = Settings(chosen.data_dir, steps=chosen.steps)
    patience = Patience(chosen.limit, time.monotonic() + chosen.seconds)
    scale = prepared(chosen.parts.split(","), ranks, small, settings, chosen.only, patience)
    name = _title(small, chosen.parts.split(","), chosen.only)

    def result() -> Document:
        return _document(scale, name, small, before)

    report_as_it_goes(scale.measure, result, chosen.out, lambda path: _written(path, chosen))


def gather(chosen: argparse.Namespace) -> None:
    """One result of those that ``--gather`` names. Raises InvalidInput for what does not belong together."""
    documents = read(chosen.gather)
    small = documents[0]["small"]
    scale = Scale(series_of(PARTS, small), RANKS)
    scale.found = found_in(documents, {case: 0 for ranks in RANKS for case in scale.cases(ranks)})
    shared = {key: documents[-1][key] for key in ABOUT}
    notes = list(dict.fromkeys(note for each in documents for note in each["notes"] if note != CUT))
    for case in unsettled(scale.found):
        date = scale.found.pop(case)["date"]
        notes.append(f"left out, {case} on {case.ranks} of {date}: others of it were measured with wider embeddings")
    load = [max(each["load_average"][i] for each in documents) for i in (0, 1)]
    result = document("scale-cpu" if small else "scale", scale.rows(), load) | shared
    more = {"notes": notes, "small": small, "gathered": calls_of(documents), "facts": told(scale.found)}
    _written(write(result | more, chosen.out), chosen)


def _written(path: Path, chosen: argparse.Namespace) -> None:
    """Draws what was written, and says where it is."""
    picture = (chosen.plots or chosen.out) / f"{path.stem}.png"
    draw(json.loads(path.read_text()), picture)
    print(f"written to {path} and {picture}")


def _title(small: bool, parts: Sequence[str], only: str = "") -> str:
    """What a result is called: some series alone do not take the place of all of them."""
    alone = [part for part in PARTS if part in parts] if set(parts) != set(USUAL) else []
    return "-".join(("scale", *["cpu"] * small, *alone, *["some"] * bool(only)))


if __name__ == "__main__":
    main()
