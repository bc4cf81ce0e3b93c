"""TensorBoard events and plots, read back with TensorBoard's and matplotlib's own readers."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shoal.jobs.report import RunReport
from shoal.jobs.report.plots import LAYERS, load_figure, loss_figure, smoothed
from shoal.workers.records import spread


def console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def train(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss, "learning_rate": 1e-3, "time": 1.7e9 + step}


def bits(step: int) -> dict[str, Any]:
    more = {"unigram_bits_per_byte": 4.5, "gzip_bits_per_byte": 2.0}
    return {"kind": "eval", "step": step, "loss": 3.0, "bits_per_byte": 1.75, **more}


def load(step: int, layers: int = 2, experts: int = 8) -> dict[str, Any]:
    table = np.random.default_rng(step).dirichlet(np.ones(experts) * 4, layers) * experts
    return {"kind": "load", "step": step, "load": table.tolist()}


def scalars(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


# TensorBoard


def test_tensorboard_reads_the_values_that_were_reported(tmp_path: Path) -> None:
    losses = [4.0, 3.5, 3.25]
    with RunReport(tmp_path, 3, console()) as report:
        for step, loss in enumerate(losses, start=1):
            report.record(train(step, loss))
        report.record(bits(3))
        report.record({"kind": "load", "step": 3, "load": [[2.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]})
        by_layer = [[1.0, 1.0], [0.5, 1.5]]
        report.record({"kind": "load", "step": 3, "load": [], "devices": [0.5, 1.5], "layer_devices": by_layer})
        report.record({"kind": "gates", "step": 3, "gates": [[0.25, 0.5, 0.75]]})
        far = {"gather_bytes": [512], "pull_bytes": [128], "pulled": [False]}
        report.record({"kind": "coverage", "step": 3, "coverage": [[0.25, 0.75]], **far})
        report.record({"kind": "event", "step": 3, "event": "checkpoint", "text": "saved"})
    board = scalars(tmp_path)
    assert [(e.step, e.value, e.wall_time) for e in board.Scalars("train/loss")] == [
        (step, loss, 1.7e9 + step) for step, loss in enumerate(losses, start=1)
    ]
    assert board.Scalars("eval/bits_per_byte")[0].value == 1.75
    assert board.Scalars("expert_load/layer_0/max")[0].value == 2.0
    assert board.Scalars("expert_load/layer_0/min")[0].value == 0.0
    assert board.Scalars("expert_load/layer_1/entropy")[0].value == 1.0
    assert board.Scalars("device_load/1")[0].value == 1.5
    assert board.Scalars("device_load/layer_1/max")[0].value == 1.5
    assert board.Scalars("gate/layer_0/selected")[0].value == 0.5
    assert [board.Scalars(f"coverage/layer_0/{of}")[0].value for of in ("mean", "max")] == [0.5, 0.75]
    assert board.Scalars("coverage/layer_0/pull_bytes")[0].value == 128
    assert not {"train/step", "train/time", "event/step"} & set(board.Tags()["scalars"])


def test_tensorboard_forgets_what_a_rewind_took_back(tmp_path: Path) -> None:
    with RunReport(tmp_path, 6, console()) as report:
        for step in range(1, 6):
            report.record(train(step, 5.0))
        report.rewind(2)
        for step in range(3, 5):
            report.record(train(step, 4.0))
    assert [(e.step, e.value) for e in scalars(tmp_path).Scalars("train/loss")] == [(1, 5), (2, 5), (3, 4), (4, 4)]
    with RunReport(tmp_path, 6, console(), resume_step=3) as report:
        report.record(train(4, 3.0))
    assert [(e.step, e.value) for e in scalars(tmp_path).Scalars("train/loss")] == [(1, 5), (2, 5), (3, 4), (4, 3)]


def test_events_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    with RunReport(tmp_path, 6, console()) as report:
        report.record(train(1, 5.0))
        assert len(scalars(tmp_path).Scalars("train/loss")) == 1


def test_spread_of_a_load() -> None:
    assert spread([1.0, 1.0, 1.0, 1.0]) == {"max": 1.0, "min": 1.0, "entropy": pytest.approx(1.0)}
    assert spread([4.0, 0.0, 0.0, 0.0])["entropy"] == 0.0
    assert spread([2.0, 2.0, 0.0, 0.0])["entropy"] == pytest.approx(math.log(2) / math.log(4))
    assert spread([0.0, 0.0]) == {}


# plots


def colours(path: Path) -> int:
    """How many different colours a picture has: a blank one has one, axes alone have only greys."""
    picture = (imread(path)[..., :3] * 255).astype(np.int64)
    return len(np.unique(picture[..., 0] * 65536 + picture[..., 1] * 256 + picture[..., 2]))


def test_a_run_ends_with_both_pictures(tmp_path: Path) -> None:
    with RunReport(tmp_path, 50, console()) as report:
        for step in range(1, 51):
            report.record(train(step, 2 + 6 / step))
            if step % 10 == 0:
                report.record(load(step))
                report.record(bits(step))
    for name in ("loss.png", "expert_load.png"):
        assert imread(tmp_path / name).shape[0] > 300
        assert colours(tmp_path / name) > 50
    assert not list(tmp_path.glob("*.part"))


def test_pictures_are_drawn_again_while_a_run_goes_on(tmp_path: Path) -> None:
    now = [0.0]
    report = RunReport(tmp_path, 50, console(), plot_every=60, clock=lambda: now[0])
    report.record(train(1, 5.0))
    assert not (tmp_path / "loss.png").exists()
    now[0] = 61.0
    report.record(train(2, 5.0))
    assert (tmp_path / "loss.png").exists()
    report.close()


def test_a_run_that_failed_at_once_is_closed_without_a_picture(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RunReport(tmp_path, 50, console()):
        raise KeyboardInterrupt
    assert not list(tmp_path.glob("*.png"))


def test_a_picture_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "loss.png").mkdir()
    out = console()
    with RunReport(tmp_path, 50, out) as report:
        report.record(train(1, 5.0))
    assert isinstance(out.file, io.StringIO)
    assert "were not drawn" in out.file.getvalue()


def test_the_loss_figure_shows_the_reported_points() -> None:
    evals = [bits(10), bits(20)]
    figure = loss_figure([train(step, 10.0 - step / 10) for step in range(1, 21)], evals, "tiny-1")
    top, bottom = figure.axes
    lines = {str(line.get_label()): line for line in [*top.lines, *bottom.lines]}
    assert list(np.asarray(lines["training, each step"].get_ydata())) == [10.0 - s / 10 for s in range(1, 21)]
    assert list(np.asarray(lines["validation"].get_xdata())) == [10, 20]
    assert list(np.asarray(lines["model, now 1.75"].get_ydata())) == [1.75, 1.75]
    assert {"unigram, 4.50", "gzip, 2.00"} <= set(lines)
    assert (top.get_ylabel(), bottom.get_ylabel(), bottom.get_xlabel()) == ("nats per token", "bits per byte", "step")


@pytest.mark.parametrize(("layers", "panels"), [(1, 1), (3, 3), (5, 5), (27, LAYERS)])
def test_the_heat_map_has_a_panel_a_layer_up_to_a_limit(layers: int, panels: int) -> None:
    figure = load_figure([load(step, layers) for step in range(10, 60, 10)], "tiny-1")
    shown = [axis for axis in figure.axes if axis.get_visible() and axis.get_title()]
    assert len(shown) == panels
    first = np.asarray(shown[0].collections[0].get_array())
    assert np.allclose(first[:, 0], load(10, layers)["load"][0])


def test_a_long_run_is_averaged_into_columns_that_can_be_seen() -> None:
    figure = load_figure([load(step, 1) for step in range(1, 1001)], "tiny-1")
    values = np.asarray(figure.axes[0].collections[0].get_array())
    assert values.shape == (8, 334)
    assert np.allclose(values[:, 0], np.mean([load(s, 1)["load"][0] for s in (1, 2, 3)], axis=0))


def test_smoothing_follows_a_line_of_equal_values_from_its_first_one() -> None:
    assert np.allclose(smoothed(np.full(30, 2.5), 9), 2.5)
    noisy = 3 + np.random.default_rng(0).normal(0, 1, 2000)
    assert smoothed(noisy, 50)[200:].std() < 0.3
