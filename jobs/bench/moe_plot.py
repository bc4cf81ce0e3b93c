"""The pictures of ``shoal bench moe`` and ``dispatch``: lines over tokens, crosses for what is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shoal.jobs.bench.result import Document, Row

Points = list[tuple[int, float]]
"""Of so many tokens a figure."""

ONE_WAY = ("exchange, ", "dispatch, ")
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


@dataclass
class Panel:
    """Lines by name, and what is asked for. scale: of the figures, ``linear`` or ``log``."""

    title: str
    scale: str
    lines: dict[str, Points] = field(default_factory=dict)
    asked: Points = field(default_factory=list)

    def add(self, name: str, tokens: int, figure: float) -> None:
        """One point of a line."""
        self.lines.setdefault(name, []).append((tokens, figure))


def layer_panels(rows: Sequence[Row]) -> list[Panel]:
    """Of a layer on one GPU: its share of the cuBLAS chain's speed, both phases, and what it keeps."""
    phases = "forward+backward", "forward"
    panels = {phase: Panel(f"{phase}, share of the cuBLAS chain", "linear") for phase in phases}
    kept = Panel("MiB kept for the backward pass", "log")
    for row in rows:
        if row["what"] == "layer":
            panel = panels[row["phase"]]
            panel.add(row["backend"], row["tokens"], row["ratio"])
            if "target" in row:
                panel.asked.append((row["tokens"], row["target"]))
        elif row.get("unit") == "MiB" and not row["backend"].endswith("skewed"):
            kept.add(row["backend"], row["tokens"], row["value"])
            if "target" in row:
                kept.asked.append((row["tokens"], row["baseline_value"] / row["target"]))
    return [*panels.values(), kept]


def dispatch_panels(rows: Sequence[Row]) -> list[Panel]:
    """Of ranks that share experts: a layer's time over one rank's, and the time of rows one way."""
    layers, one_way = Panel("layer, forward+backward, times one rank's", "linear"), Panel("one way, ms", "log")
    for row in rows:
        tokens, aim = row["tokens"], row.get("target")
        if row["what"].startswith("layer, ") and row["path"] != "none":
            layers.add(row["path"], tokens, 1 / row["ratio"])
            if aim and (tokens, 1 / aim) not in layers.asked:
                layers.asked.append((tokens, 1 / aim))
        elif row["what"].startswith(ONE_WAY):
            if aim is None:
                one_way.add(row["what"], tokens, row["ms"])
            elif (tokens, row["baseline_ms"] / aim) not in one_way.asked:
                one_way.asked.append((tokens, row["baseline_ms"] / aim))
    return [layers, one_way]


def draw(panels: Sequence[Panel], result: Document, path: Path) -> bool:
    """Writes a PNG; False where there is nothing to draw. Raises OSError."""
    panels = [panel for panel in panels if panel.lines]
    if not panels:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        tokens = sorted({n for line in panel.lines.values() for n, _ in line})
        for colour, (name, line) in zip(COLOURS, panel.lines.items(), strict=False):
            axes.plot(*zip(*line, strict=True), "o-", color=colour, label=name)
        if panel.asked:
            axes.plot(*zip(*panel.asked, strict=True), "kx", label="asked for")
        axes.set_xscale("log", base=2)
        axes.set_yscale(panel.scale)
        axes.set_xticks(tokens, [f"{n:,}" for n in tokens])
        axes.minorticks_off()
        if panel.scale == "linear":
            axes.set_ylim(bottom=0)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel("tokens a GPU")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{result['benchmark']}, {result['device']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True
