"""What ``shoal bench moe`` compares and tells; the measuring itself needs a GPU."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shoal.jobs.bench import moe, moe_layers, moe_plot
from shoal.jobs.bench.ending import CUT
from shoal.jobs.bench.registry import Settings, draw
from shoal.jobs.bench.result import Row, value_row
from shoal.kernels.moe import route
from shoal.workers.errors import INTERRUPTED, InvalidInput


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HIDDEN": 64, "INNER": 24, "EXPERTS": 16}.items():
        monkeypatch.setattr(moe_layers, name, value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(InvalidInput, match="needs a CUDA GPU"):
        next(moe.run(Settings()))


def test_without_the_command_line_it_says_that_it_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(settings: Settings) -> Iterator[Row]:
        yield value_row("kept for the backward pass", 1.0, "MiB", tokens=4096, backend="triton")
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(moe, "run", run)
    monkeypatch.setattr(sys, "argv", ["moe", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        moe.main()
    assert ended.value.code == INTERRUPTED
    (written,) = tmp_path.iterdir()
    assert written.stem.endswith("-cut") and json.loads(written.read_text())["notes"] == [CUT]
    told = capsys.readouterr()
    assert "1.0 MiB" in told.out and CUT in told.err


def test_all_layers_compute_the_same() -> None:
    p = moe_layers.problem(100, device="cpu")
    ours, inputs = moe_layers.torch_layer(p)
    up, down = moe_layers._wide(p)
    plain = moe_layers._plain(p.x, p.centroids, p.gate_up, p.down, up, down)
    assert (ours - plain).float().norm() < 2e-2 * plain.float().norm()
    grads = moe_layers.both(moe_layers.torch_layer, p)
    assert [g.shape for g in grads] == [t.shape for t in inputs]


def test_a_skewed_problem_gives_one_expert_its_share_of_the_tokens() -> None:
    p = moe_layers.problem(2000, skew=0.3, device="cpu")
    experts = route(p.x, p.centroids, moe_layers.TOP_K).experts
    share = (experts == 0).any(1).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.03)


def test_the_flops_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """34.5 ms at 790 TFLOP/s for 65,536 tokens of DeepSeekMoE-16B, forward and backward."""
    monkeypatch.undo()
    assert moe_layers.flops(65536, "forward+backward") == pytest.approx(34.5e-3 * 790e12, rel=2e-3)


def test_rows_compare_with_the_chain_and_with_the_limits() -> None:
    ms = {(moe.CHAIN, phase): 10.0 for phase in moe.PHASES}
    ms |= {(name, phase): 12.5 for name in ("triton", "triton, skewed") for phase in moe.PHASES}
    rows = moe._tell(16384, ms, {"triton": 719.0})
    layer, forward, kept, skewed = rows
    assert (layer["ratio"], layer["target"], layer["baseline"]) == (0.8, 0.85, "cublas_chain")
    assert "target" not in forward and forward["phase"] == "forward"
    assert kept["ratio"] >= kept["target"] == 1.0
    assert skewed["ratio"] == 1.0 and skewed["target"] == pytest.approx(1 / 1.15)
    assert all(moe.line(row) for row in rows)


def test_the_picture_has_each_side_and_what_is_asked_for(tmp_path: Path) -> None:
    ms = {(moe.CHAIN, phase): 10.0 for phase in moe.PHASES}
    ms |= {(name, phase): 12.5 for name in ("triton", "torch", "triton, skewed") for phase in moe.PHASES}
    rows = moe._tell(4096, ms, {"triton": 179.0, "torch": 400.0, "triton, skewed": 179.0}) + moe._tell(16384, ms, {})
    both, forward, kept = moe_plot.layer_panels(rows)
    assert both.lines == forward.lines == {name: [(4096, 0.8), (16384, 0.8)] for name in ("triton", "torch")}
    assert (both.asked, forward.asked) == ([(4096, 0.7), (16384, 0.85)], [])
    assert (kept.lines, kept.asked) == ({"triton": [(4096, 179.0)], "torch": [(4096, 400.0)]}, [(4096, 180.0)])
    result = {"benchmark": "moe-h100", "device": "H100", "rows": rows}
    path = draw("moe", result, tmp_path)
    assert path == tmp_path / "moe-h100.png" and path.read_bytes().startswith(b"\x89PNG")
    assert draw("moe", {**result, "rows": []}, tmp_path / "none") is None and not (tmp_path / "none").exists()
