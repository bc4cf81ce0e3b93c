"""The picture of ``shoal bench nsa``: how many times as fast as dense attention, against the context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shoal.jobs.bench.result import Document, Row

DENSE = {"sdpa_flash": ("tab:blue", "FlashAttention-2"), "sdpa_cudnn": ("tab:orange", "cuDNN")}
COLOURS = ("tab:green", "tab:red", "tab:purple", "tab:brown")


@dataclass(frozen=True)
class Line:
    """Ratios by context, and their targets."""

    label: str
    colour: str
    rows: list[Row]


def draw(result: Document, path: Path) -> bool:
    """Writes a PNG with a panel for each phase that was measured; False where none was. Raises OSError."""
    panels = dict(panels_of(result["rows"]))
    if not panels:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        contexts = sorted({row["context"] for line in lines for row in line.rows})
        for line in lines:
            aims = [row for row in line.rows if "target" in row]
            panel.plot([r["context"] for r in line.rows], [r["ratio"] for r in line.rows], "o-", color=line.colour,
                       label=line.label)  # fmt: skip
            panel.plot([r["context"] for r in aims], [r["target"] for r in aims], "x:", color=line.colour,
                       label=f"target {line.label}")  # fmt: skip
        panel.set_xscale("log", base=2)
        panel.set_xticks(contexts, [f"{context >> 10}k" for context in contexts])
        panel.minorticks_off()
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set_title(title)
        panel.set_xlabel("context, tokens")
        panel.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True


def panels_of(rows: list[Row]) -> Iterator[tuple[str, list[Line]]]:
    """Title and lines of each panel that has any; passes begin before φ, as those with targets do."""
    from shoal.jobs.bench.nsa import WITH_PHI
    from shoal.jobs.bench.nsa_decode import DECODE

    for phase in ("forward", "backward"):
        mine = [row for row in rows if (row["what"], row["phase"], row["d_qk"]) == (WITH_PHI, phase, 128)]
        lines = [
            Line(f"over {label}", colour, found)
            for name, (colour, label) in DENSE.items()
            if (found := [row for row in mine if row.get("baseline") == name])
        ]
        if lines:
            yield f"{phase}, times as fast as dense attention", lines
    mine = [row for row in rows if row["what"] == DECODE and row.get("best") and "lengths" not in row]
    batches = sorted({row["batch"] for row in mine})
    if batches:
        yield (
            "decode, times as fast as the best dense",
            [
                Line(f"batch {batch}", colour, [row for row in mine if row["batch"] == batch])
                for batch, colour in zip(batches, COLOURS, strict=False)
            ],
        )
