"""``shoal bench sequence`` on a CPU: two gloo ranks, without Ray and pydantic, and a case that fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.jobs.bench.cases import run_cases
from shoal.jobs.bench.command import environment
from shoal.jobs.bench.sequence import SMALL, draw, measure
from shoal.jobs.bench.sequence_rank import Case, rank_main
from shoal.workers.errors import UsageError

ALONE = """
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "pydantic", "typer", "rich"):
            raise ImportError(name)
if __name__ == "__main__":
    sys.meta_path.insert(0, Missing())
    from shoal.jobs.bench.sequence import main
    main()
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "alone.py").write_text(ALONE)
    command = [sys.executable, str(folder / "alone.py"), "--out", str(folder), "--contexts", "2048"]
    subprocess.run([*command, "--repeats", "1"], check=True, env=environment(), timeout=300)
    return json.loads((folder / "sequence-2xcpu.json").read_text())


def test_rows_name_attention_context_ranks_and_phase(result: Any, tmp_path: Path) -> None:
    rows = [row for row in result["rows"] if "phase" in row]
    assert {(r["attention"], r["ranks"], r["phase"]) for r in rows} == {
        (kind, ranks, phase)
        for kind in ("nsa", "full")
        for ranks in (1, 2)
        for phase in ("forward", "backward", "forward+backward")
    }
    for row in rows:
        assert row["ms"] > 0
        assert (row["context"], "peak_bytes" in row) == (2048, True)
        assert row["bytes"] == row["bytes_by_formula"]
        if row["ranks"] == 2:
            assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ms"], rel=1e-4)
    draw(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_formula_goes_on_to_a_million_tokens_over_64_ranks(result: Any) -> None:
    """4 KV heads of 128 in bf16, forward and backward. Around the ring each rank's keys and values reach all others,
    twice, and their gradients, in float32, come all the way round. Of NSA the first rank receives the far keys of all
    segments but its own two, twice, and the gradients of its early segment from all other ranks; of compressed keys,
    one for 16 tokens, twice as many segments' once, and those gradients; beside them it gets windows and halos."""
    rows = [row for row in result["rows"] if row["what"] == "bytes by formula"]
    assert {row["context"] for row in rows} == {1 << 20}
    found = {(row["attention"], row["ranks"]): row["value"] for row in rows}
    for ranks in (2, 4, 8, 16, 32, 64):
        segment = (1 << 20) // (2 * ranks) * 4 * (128 + 128) * 2
        assert found.pop(("full", ranks)) == segment * (4 * (ranks - 1) + 2 * 2 * ranks)
        more = found.pop(("nsa", ranks)) - segment * (5 + 3 / 16) * (ranks - 1)
        assert 0 < more < 2200 * 4 * (128 + 128) * 2
    assert not found


def test_two_ranks_agree_with_one(result: Any) -> None:
    errors = [row["value"] for row in result["rows"] if "relative error" in row["what"]]
    assert len(errors) == 4
    assert max(errors) < 1e-5


def test_segments_without_a_token_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--contexts 192 is too short for 2 ranks, .* name 256 or more"):
        next(measure((2048, 192), 2, 1))


@pytest.mark.slow
def test_a_case_that_fails_is_left_out_and_the_others_are_measured() -> None:
    said: list[str] = []
    good = Case("nsa", 64, 1, **SMALL)
    bad = Case("full", 64, 1, heads=3, kv_heads=2, dim=16)
    found = dict(run_cases(rank_main, 1, [bad, good], said.append))
    assert list(found) == [good]
    assert any(line.startswith("left out, 1 rank, full 64: ") for line in said)
