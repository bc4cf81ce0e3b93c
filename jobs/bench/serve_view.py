"""What ``jobs/bench/serve.py`` found, as a table and as a picture. Drawing loads matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.jobs.bench.result import Document, Row
from shoal.jobs.cli.common import grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

# in the order of the table: name, unit, and milliseconds that it has
TIMES = {"ttft_ms": ("TTFT", "ms", 1.0), "tpot_ms": ("TPOT", "ms", 1.0), "request_ms": ("request", "s", 1e3)}
LOADS = {"concurrency": "requests at once", "rate": "requests a second"}


def table(result: Document) -> Table:
    """A line a load: requests, tokens/s and their ratio to the baseline's, and the median and 99th percentile of each
    time; what failed and ratios where there are any. Where there are two servers, the second one's lines follow a line
    with its name."""
    rows = result["rows"]
    told = [("requests", _requests), ("failed", _failed), ("tokens/s", _tokens), ("ratio", _ratio)]
    told = [(heading, tell) for heading, tell in told if any(map(tell, rows))]
    times = [f"{name}, {unit}\np50   p99" for name, unit, _ in TIMES.values()]
    out = grid("load", *(heading for heading, _ in told), *times, right=range(1, 1 + len(told) + len(times)))
    server = rows[0].get("server")
    for row in rows:
        if row.get("server", server) != server:
            server = row["server"]
            out.add_row(server)
        shown = [_spread(row.get(key, {}), scale) for key, (_, _, scale) in TIMES.items()]
        out.add_row(row["what"].removeprefix("an output token, "), *(tell(row) for _, tell in told), *shown)
    return out


def _requests(row: Row) -> str:
    return str(row["requests"])


def _failed(row: Row) -> str:
    return ", ".join(f"{count} x {error}" for error, count in row.get("errors", {}).items())


def _tokens(row: Row) -> str:
    return _digits(row["output_tokens_per_second"])


def _ratio(row: Row) -> str:
    return f"{row['ratio']:.2f}" if "ratio" in row else ""


def _spread(spread: Mapping[str, float], scale: float) -> str:
    """The median and the 99th percentile, of which the latter has five characters."""
    p50, p99 = (_digits(spread[p] / scale if p in spread else None) for p in ("p50", "p99"))
    return f"{p50} {p99:>5}".strip()


def _digits(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def draw(result: Document, path: Path) -> None:
    """Writes a PNG: tokens/s, TTFT and TPOT over the loads, a row of panels for each way to load. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    figure = _figure(result["rows"])
    FigureCanvasAgg(figure)
    try:
        figure.savefig(draft, format="png", dpi=120)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _figure(rows: Sequence[Row]) -> Figure:
    from matplotlib.figure import Figure

    about = next(row for row in rows if "server" in row)
    rows = [row for row in rows if row.get("server") == about["server"]]  # another one's are baselines of these
    kinds = [kind for kind in LOADS if any(kind in row for row in rows)]
    figure = Figure(figsize=(12, 0.8 + 3.4 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), 3, squeeze=False)
    for line, kind in zip(panels, kinds, strict=True):
        loads = sorted((row for row in rows if kind in row), key=lambda row: float(row[kind]))
        _throughput(line[0], kind, loads)
        for panel, key in zip(line[1:], ("ttft_ms", "tpot_ms"), strict=True):
            _times(panel, kind, loads, key)
    figure.suptitle(f"{about['server']}, prompt:output tokens {about['mix']}", fontsize=13, fontweight="bold")
    return figure


def _throughput(panel: Axes, kind: str, rows: Sequence[Row]) -> None:
    from shoal.jobs.report.plots import BLUE, GREY

    rates = [row["output_tokens_per_second"] for row in rows]
    panel.plot([row[kind] for row in rows], rates, "o-", color=BLUE, label="all requests together")
    if beside := [row for row in rows if "baseline_ms" in row]:
        others, name = [1e3 / row["baseline_ms"] for row in beside], beside[0]["baseline"]
        if len(set(others)) == 1:
            panel.axhline(others[0], color=GREY, linestyle="--", label=f"{name}, {others[0]:,.0f}")
        else:
            panel.plot([row[kind] for row in beside], others, "o--", color=GREY, label=name)
    _finish(panel, kind, rows, "Output tokens per second")


def _times(panel: Axes, kind: str, rows: Sequence[Row], key: str) -> None:
    from shoal.jobs.report.plots import BLUE, ORANGE

    known = [row for row in rows if row[key]]  # answers of one token have no TPOT
    for p, colour in (("p50", BLUE), ("p99", ORANGE)):
        panel.plot([row[kind] for row in known], [row[key][p] for row in known], "o-", color=colour, label=p)
    _finish(panel, kind, known, f"{TIMES[key][0]}, ms")


def _finish(panel: Axes, kind: str, rows: Sequence[Row], title: str) -> None:
    from matplotlib.ticker import NullLocator

    loads = [row[kind] for row in rows]
    if loads:
        panel.set_xscale("log", base=2)
        panel.set_xticks(loads, [f"{load:g}" for load in loads])
        panel.xaxis.set_minor_locator(NullLocator())
    panel.set_ylim(0, 1.3 * panel.get_ylim()[1])  # above what is drawn stands the legend, which may be wide
    panel.set_title(title, fontsize=11)
    panel.set_xlabel(LOADS[kind])
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=9, loc="upper left")
