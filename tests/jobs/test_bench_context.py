"""``shoal bench context`` on a CPU: trainings over two gloo ranks and on one, and what is written of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.jobs.bench.command import environment


@pytest.mark.slow
def test_two_ranks_lose_what_one_loses_and_all_is_written(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shoal.jobs.bench.context", "--out", str(tmp_path), "--steps", "3"]
    subprocess.run([*command, "--data-dir", str(tmp_path / "data")], check=True, env=environment(), timeout=300)
    result = json.loads((tmp_path / "context.json").read_text())
    losses = {(r["context"], r["attention"], r["ranks"]): r["losses"] for r in result["rows"]}
    assert set(losses) == {(2048, kind, ranks) for kind in ("nsa", "full") for ranks in (1, 2)} | {(8192, "nsa", 2)}
    for kind in ("nsa", "full"):
        assert losses[2048, kind, 2] == pytest.approx(losses[2048, kind, 1], rel=1e-5)
    beside = {(r["attention"], r["ranks"], r["baseline"]) for r in result["rows"] if "ratio" in r}
    assert beside == {
        ("nsa", 2, "full attention"),
        ("nsa", 2, "one rank"),
        ("full", 2, "one rank"),
        ("nsa", 1, "full attention"),
    }
    records = [json.loads(line) for line in (tmp_path / "64k-nsa-2.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3]
