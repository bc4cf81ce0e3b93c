"""The picture of ``shoal bench scale``: efficiency and tokens/s over ranks, measured and predicted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shoal.jobs.bench.result import Document, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "moe": "MoE layer, forward + backward",
    "sequence": "NSA of one layer, forward + backward",
    "train": "training",
    "serve": "serving",
}
MARKS = {"weak": ("o", "-"), "strong": ("s", "--")}
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink")


def draw(result: Document, path: Path) -> None:
    """Writes a PNG, a column for each part. Marks are measured, filled ones where constants were fitted to them; lines
    are predicted; crosses are targets."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if "mode" in row]
    parts = [part for part in TITLES if any(row["part"] == part for row in rows)]
    figure = Figure(figsize=(max(1, len(parts)) * 4.8, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, max(1, len(parts)), sharex=True, squeeze=False)
    for column, part in enumerate(parts):
        mine = [row for row in rows if row["part"] == part]
        _panel(panels[0][column], mine, "efficiency")
        _panel(panels[1][column], mine, "tokens_per_second")
        for row in mine:
            if "target" in row:
                panels[0][column].plot(row["ranks"], row["target"], "kx", markersize=7)
        panels[0][column].set_title(TITLES[part], fontsize=10)
        panels[0][column].set_ylim(0, 1.1)
        panels[1][column].set_yscale("log")
        panels[1][column].set_xlabel("ranks")
        panels[1][column].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.18))
    panels[0][0].set_ylabel("efficiency")
    panels[1][0].set_ylabel("tokens/s")
    title = f"{result['benchmark']}, {result['device']}: marks measured, lines predicted, x targets"
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _panel(panel: Axes, rows: list[Row], key: str) -> None:
    """A line for each thing and mode: predicted, with marks where it was measured."""
    from matplotlib.ticker import NullFormatter, NullLocator

    names = list(dict.fromkeys(row["what"] for row in rows))
    for what, mode in dict.fromkeys((row["what"], row["mode"]) for row in rows):
        line = sorted((r for r in rows if (r["what"], r["mode"]) == (what, mode)), key=lambda row: int(row["ranks"]))
        colour, (mark, style) = COLOURS[names.index(what) % len(COLOURS)], MARKS[mode]
        foreseen = [row for row in line if row.get(f"predicted_{key}") is not None]
        panel.plot(
            [r["ranks"] for r in foreseen],
            [r[f"predicted_{key}"] for r in foreseen],
            f"+{style}",  # of a placement on one number of ranks the cross is all there is
            color=colour,
            linewidth=1.2,
            label=f"{what}, {mode}",
        )
        for fitted, fill in ((True, colour), (False, "none")):
            some = [row for row in line if row.get(key) is not None and bool(row.get("fitted")) == fitted]
            panel.plot([r["ranks"] for r in some], [r[key] for r in some], mark, color=colour, markerfacecolor=fill)
    panel.set_xscale("log", base=2)
    ranks = sorted({row["ranks"] for row in rows})
    panel.set_xticks(ranks, [str(n) for n in ranks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
