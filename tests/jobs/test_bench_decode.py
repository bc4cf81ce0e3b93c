"""What ``shoal bench decode`` measures, in small over gloo, and what it tells."""

from __future__ import annotations

import pytest
import torch

from shoal.jobs.bench import decode
from shoal.jobs.bench.registry import Settings
from shoal.workers.errors import InvalidInput


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are two GPUs")
def test_without_two_gpus_it_says_so() -> None:
    with pytest.raises(InvalidInput, match=r"needs 2 CUDA GPUs.*--device cpu"):
        next(decode.run(Settings()))


def test_it_runs_in_small_between_two_processes() -> None:
    """All loads, on colocated ranks and with experts apart, each beside steps of any shape and one rank; an odd number
    of requests too."""
    said: list[str] = []
    rows = list(decode.run(Settings(say=said.append), decode.small(), "cpu"))
    assert [(row["at_once"], row["placement"], row["baseline"]) for row in rows] == [
        (at_once, placement, baseline)
        for at_once in (1, 3)
        for placement in ("colocated", "1A:1F")
        for baseline in (decode.PLAIN, decode.ALONE)
    ]
    assert len(said) == 1 + 10
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(1000 * row["at_once"] / row["ms"])
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ms"])
