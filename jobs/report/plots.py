"""loss.png and expert_load.png, drawn from metrics.jsonl. Importing this loads matplotlib (0.4 to 2 s)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from shoal.jobs.report.journal import Record, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh

BLUE, ORANGE, GREY, GREEN = "#1f5fa8", "#d9601a", "#7a7a7a", "#2e7d4f"
LAYERS, COLUMNS = 16, 400  # most panels, and most columns of a heat map: more cannot be seen


def draw(run_dir: Path) -> list[Path]:
    """Draws what ``run_dir/metrics.jsonl`` has data for, and returns the files written. Raises OSError."""
    records: dict[str, list[Record]] = {"train": [], "eval": [], "load": []}
    for record in read_records(run_dir / "metrics.jsonl"):
        if record.get("kind") in records:
            records[record["kind"]].append(record)
    drawn = []
    if records["train"] or records["eval"]:
        figure = loss_figure(records["train"], records["eval"], run_dir.name)
        drawn.append(_save(figure, run_dir / "loss.png"))
    if records["load"]:
        drawn.append(_save(load_figure(records["load"], run_dir.name), run_dir / "expert_load.png"))
    return drawn


def loss_figure(train: list[Record], evals: list[Record], name: str) -> Figure:
    """Training and validation loss over steps; below it, where there were validations, bits per byte."""
    figure = Figure(figsize=(9, 8 if evals else 4.8), layout="constrained")
    axes = figure.subplots(2 if evals else 1, 1, sharex=True, squeeze=False)[:, 0]
    figure.suptitle(f"{name}: loss", fontsize=14, fontweight="bold")
    _loss_panel(axes[0], train, evals)
    if evals:
        _bits_panel(axes[1], evals)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure


def load_figure(loads: list[Record], name: str) -> Figure:
    """One heat map a MoE layer, experts over steps; white is a fair share, red more, blue less."""
    layers = len(loads[0]["load"])
    shown = np.unique(np.linspace(0, layers - 1, min(layers, LAYERS)).round().astype(int))
    stride = math.ceil(len(loads) / COLUMNS)
    steps = np.array([record["step"] for record in loads[::stride]], dtype=float)
    # [steps, layers shown, experts]; a column is the mean of `stride` records
    load = np.array([[record["load"][layer] for layer in shown] for record in loads], dtype=float)
    load = np.stack([load[i : i + stride].mean(0) for i in range(0, len(loads), stride)])
    across = 1 if len(shown) <= 3 else 2 if len(shown) <= 8 else 4
    down = math.ceil(len(shown) / across)
    figure = Figure(figsize=(max(9, 3.6 * across), 1.4 + 2.4 * down), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=max(2.0, float(np.percentile(load, 99.5))))
    for place, panel in enumerate(panels):
        if place >= len(shown):
            panel.set_visible(False)
            continue
        mesh = _heat_panel(panel, steps, load[:, place], norm)
        panel.set_title(f"MoE layer {shown[place]}", fontsize=10)
    figure.supxlabel("step")
    figure.supylabel("expert")
    some = f" ({len(shown)} of {layers} layers)" if len(shown) < layers else ""
    figure.suptitle(f"{name}: expert load{some}", fontsize=14, fontweight="bold")
    bar = figure.colorbar(
        mesh, ax=panels.tolist(), extend="max", aspect=40, label="tokens, as a multiple of a fair share (1.0)"
    )
    bar.set_ticks([0.0, 0.25, 0.5, 0.75, 1.0, *_above_one(norm.vmax or 2.0)])
    return figure


def smoothed(values: NDArray[np.float64], span: float) -> NDArray[np.float64]:
    """Exponential moving mean over about ``span`` values, without the pull of its first one (bias-corrected)."""
    keep = 1 - 2 / (span + 1)
    mean, weight, out = 0.0, 0.0, np.empty_like(values)
    for i, value in enumerate(values):
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out[i] = mean / weight
    return out


def _loss_panel(axis: Axes, train: list[Record], evals: list[Record]) -> None:
    steps, losses = _series(train, "loss")
    if len(losses):
        axis.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=1, label="training, each step")
        curve = smoothed(losses, max(5.0, len(losses) / 60))
        axis.plot(steps, curve, color=BLUE, linewidth=2, label="training, smoothed")
    steps, losses = _series(evals, "loss")
    if len(losses):
        axis.plot(steps, losses, "o-", color=ORANGE, markersize=5, linewidth=1.2, label="validation")
    axis.set_title("Next-token loss", fontsize=11)
    axis.set_ylabel("nats per token")
    _finish(axis)


def _bits_panel(axis: Axes, evals: list[Record]) -> None:
    steps, bits = _series(evals, "bits_per_byte")
    if len(bits):
        axis.plot(steps, bits, "o-", color=ORANGE, markersize=5, label=f"model, now {bits[-1]:.2f}")
    for key, label, colour in (("unigram_bits_per_byte", "unigram", GREY), ("gzip_bits_per_byte", "gzip", GREEN)):
        _, values = _series(evals, key)
        if len(values):
            axis.axhline(values[-1], color=colour, linestyle="--", label=f"{label}, {values[-1]:.2f}")
    axis.set_title("Validation text, compressed (lower is better)", fontsize=11)
    axis.set_ylabel("bits per byte")
    axis.set_ylim(bottom=0)
    _finish(axis)


def _heat_panel(axis: Axes, steps: NDArray[np.float64], load: NDArray[np.float64], norm: TwoSlopeNorm) -> QuadMesh:
    """load: ``[steps, experts]``. A column reaches half-way to its neighbours, however unevenly they were recorded."""
    if len(steps) > 1:
        middles = (steps[1:] + steps[:-1]) / 2
        edges = np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])
    else:
        edges = np.array([steps[0] - 0.5, steps[0] + 0.5])
    experts = np.arange(load.shape[1] + 1) - 0.5
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    return axis.pcolormesh(edges, experts, load.T, cmap="RdBu_r", norm=norm, rasterized=True)


def _series(records: list[Record], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    table = np.array(points, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _above_one(top: float) -> list[float]:
    step = max(0.5, round((top - 1) / 4 * 2) / 2)
    return [float(value) for value in np.arange(1 + step, top + 1e-6, step)]


def _finish(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)


def _save(figure: Figure, path: Path) -> Path:
    """Writes the PNG beside its place and moves it there, so that nobody opens half of one."""
    draft = path.with_name(path.name + ".part")
    FigureCanvasAgg(figure)
    try:
        figure.savefig(draft, format="png", dpi=120)
        return draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
