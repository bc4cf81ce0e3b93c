"""What ``shoal bench dispatch`` measures, in small over gloo, and what it tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal.jobs.bench import dispatch, moe_plot
from shoal.jobs.bench.registry import Settings, draw
from shoal.workers.errors import InvalidInput


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are two GPUs")
def test_without_two_gpus_it_says_so() -> None:
    with pytest.raises(InvalidInput, match=r"needs 2 CUDA GPUs.*--device cpu"):
        next(dispatch.run(Settings()))


def test_it_runs_in_small_between_two_processes() -> None:
    said: list[str] = []
    rows = list(dispatch.run(Settings(say=said.append), dispatch.small(), "cpu"))
    assert all(row["ms"] > 0 for row in rows)
    copies, ranks, whole, alone, spread = rows
    assert 0 < ranks["bytes"] == whole["bytes"] < copies["bytes"] < 64 * 3 * 32 * 4  # tokens, choices, width, float32
    assert alone["ratio"] == 1.0 and spread["baseline_ms"] == alone["ms"]
    assert spread["host_wait_ms"] >= 0 and len(said) == 1 + len(rows)


MS = {
    "exchange, row per copy": 0.9,
    "dispatch, symmetric": 0.2,
    "layer, one rank": 12.0,
    "layer, all_to_all": 12.3,
}


def test_targets_are_limits_on_times() -> None:
    figures = [{"name": name, "tokens": 16384, "ms": value, "path": "all_to_all"} for name, value in MS.items()]
    _, against_copies, against_best, alone, spread = dispatch.tell(figures, 2)
    assert against_copies["ratio"] == pytest.approx(4.5) and "target" not in against_copies
    assert against_best["ratio"] == pytest.approx(0.207 / 0.2) and against_best["target"] == pytest.approx(1 / 1.1)
    assert "target" not in alone
    assert spread["ratio"] >= spread["target"] == pytest.approx(1 / 1.05)


def test_the_picture_has_times_and_what_is_asked_for(tmp_path: Path) -> None:
    figures = [
        {"name": name, "tokens": 16384, "ms": ms, "path": "none" if name == "layer, one rank" else "all_to_all"}
        for name, ms in MS.items()
    ]
    rows = dispatch.tell(figures, 2)
    layers, one_way = moe_plot.dispatch_panels(rows)
    assert list(layers.lines) == ["all_to_all"]
    assert dict(layers.lines["all_to_all"]) == pytest.approx({16384: 12.3 / 12})
    assert dict(layers.asked) == pytest.approx({16384: 1.05})
    assert one_way.lines == {"exchange, row per copy": [(16384, 0.9)], "dispatch, symmetric": [(16384, 0.2)]}
    assert dict(one_way.asked) == pytest.approx({16384: 1.1 * 0.207})
    path = draw("dispatch", {"benchmark": "dispatch-2xh100", "device": "H100", "rows": rows}, tmp_path)
    assert path == tmp_path / "dispatch-2xh100.png" and path.read_bytes().startswith(b"\x89PNG")
