"""Inference jobs over files that were interrupted: what is finished is kept, and the rest goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from batch_source import PATIENCE, SAMPLING, TOKENIZER, Source, done, expected, job, prompts, quiet, read, written
from hypothesis import given
from hypothesis import strategies as st

from shoal.jobs.batch import open_batch
from shoal.workers.engine.request import Sampling
from shoal.workers.errors import ClusterRefused, InvalidInput

# Going on

KILLED = """
import asyncio, sys
from pathlib import Path
from batch_source import Source, job, quiet

class Stuck(Source):
    async def generate(self, request):
        if len(self.asked) >= 5:
            await asyncio.Event().wait()
        async for output in super().generate(request):
            yield output

with job(Path("in.jsonl"), Path("out.parquet")) as batch:
    asyncio.run(batch.run(Stuck().engine, quiet(), 2))
"""


def test_rows_that_are_finished_survive_a_kill(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", prompts(12))
    ledger, target = tmp_path / "out.parquet.partial", tmp_path / "out.parquet"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", KILLED], cwd=tmp_path, env=env)
    end = time.monotonic() + PATIENCE
    while not ledger.exists() or ledger.read_bytes().count(b"\n") < 6:
        assert process.poll() is None
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not target.exists()

    tokens = Source()
    summary = done(source, target, tokens)
    assert (summary.rows, summary.resumed, summary.tokens) == (12, 5, 42)
    assert len(tokens.asked) == 7
    assert [row["text"] for row in read(target)] == [expected(f"fish {i}", seed=3 + i) for i in range(12)]
    assert not ledger.exists()


def _ledger(folder: Path, count: int) -> tuple[Path, bytes, list[dict[str, Any]]]:
    """A job's input, all that its ledger held before its output was written, and its output."""
    source, tokens = written(folder / "in.jsonl", [*prompts(count), {"prompt": "gone"}]), Source(broken="gone")
    with pytest.raises(ClusterRefused):
        done(source, folder / "out.jsonl", tokens, concurrency=1)
    content = (folder / "out.jsonl.partial").read_bytes()
    done(source, folder / "out.jsonl", Source())
    return source, content, read(folder / "out.jsonl")


@given(share=st.floats(0, 1))
def test_a_ledger_torn_anywhere_is_gone_on_with(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    folder = tmp_path_factory.mktemp("torn")
    source, content, whole = _ledger(folder, 4)
    cut = content[: round(share * len(content))]
    (folder / "again.jsonl.partial").write_bytes(cut)
    tokens = Source(broken="gone")
    with pytest.raises(ClusterRefused):
        done(source, folder / "again.jsonl", tokens, concurrency=1)
    assert len(tokens.asked) == 4 - len(set(cut.splitlines()) & set(content.splitlines()[1:]))
    assert done(source, folder / "again.jsonl", Source()).resumed == 4
    assert read(folder / "again.jsonl") == whole


def test_a_damaged_line_of_a_ledger_is_computed_again(tmp_path: Path) -> None:
    source, content, whole = _ledger(tmp_path, 4)
    lines = content.splitlines(keepends=True)
    lines[2] = b"\0" * 30 + b"\n"
    (tmp_path / "again.jsonl.partial").write_bytes(b"".join(lines))
    tokens = Source()
    assert done(source, tmp_path / "again.jsonl", tokens).resumed == 3
    assert read(tmp_path / "again.jsonl") == whole


def test_an_engine_that_is_gone_ends_the_job_and_the_rest_goes_on_later(tmp_path: Path) -> None:
    source, target = written(tmp_path / "in.jsonl", prompts(9)), tmp_path / "out.jsonl"
    with pytest.raises(ClusterRefused, match="the engine is gone"):
        done(source, target, Source(broken="fish 6"), concurrency=1)
    assert not target.exists()
    tokens = Source()
    assert done(source, target, tokens).resumed == 6
    assert [TOKENIZER.decode(request.prompt) for request in tokens.asked] == ["fish 6", "fish 7", "fish 8"]
    assert len(read(target)) == 9


def test_another_input_or_other_options_do_not_go_on_with_a_job(tmp_path: Path) -> None:
    source, target = written(tmp_path / "in.jsonl", prompts(3)), tmp_path / "out.jsonl"
    with pytest.raises(ClusterRefused):
        done(source, target, Source(broken="fish 2"), concurrency=1)
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    with pytest.raises(InvalidInput, match=r"begun with temperature=0.5, and now temperature=0.7: give the same"):
        done(source, target, Source(), sampling=Sampling(6, 0.7, seed=3, stop_tokens=(TOKENIZER.eos,)))
    other = open_batch(source, target, SAMPLING, "runs/first step 200")
    with pytest.raises(InvalidInput, match="model=runs/first step 100, and now model=runs/first step 200"), other:
        pass
    written(source, prompts(4))
    with pytest.raises(InvalidInput, match="begun with input sha256="):
        done(source, target, Source())
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before
    written(source, prompts(3))
    assert done(source, target, Source()).resumed == 2


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    source, target = written(tmp_path / "in.jsonl", prompts(3)), tmp_path / "out.jsonl"
    with job(source, target) as batch:
        with pytest.raises(InvalidInput, match="being written by another process"), job(source, target):
            pass
        asyncio.run(batch.run(Source().engine, quiet()))
    assert len(read(target)) == 3


def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    tokens = Source(busy={"fish 1": 3, "fish 2": 1})
    summary = done(written(tmp_path / "in.jsonl", prompts(4)), tmp_path / "out.jsonl", tokens)
    assert (summary.rows, summary.failed, summary.tokens) == (4, 0, 24)
    assert tokens.busy == {"fish 1": 0, "fish 2": 0}


def test_a_job_that_is_cancelled_cancels_its_requests_and_keeps_what_is_finished(tmp_path: Path) -> None:
    source, target, tokens = written(tmp_path / "in.jsonl", prompts(9)), tmp_path / "out.jsonl", Source()

    async def cancelled() -> None:
        with job(source, target) as batch:
            task = asyncio.create_task(batch.run(tokens.engine, quiet(), 3))
            while len(batch.ledger) < 3:
                await asyncio.sleep(0)
            tokens.hold = 1000
            while len(tokens.here) < 3:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancelled())
    assert tokens.inside == 0
    assert not target.exists()
    assert done(source, target, Source()).resumed >= 3


FULL = """
import resource, sys
from pathlib import Path
from batch_source import Source, done
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
done(Path("in.jsonl"), Path("out.jsonl"), Source())
"""


def test_a_full_disk_ends_the_job_in_one_sentence_and_it_goes_on_with_room(tmp_path: Path) -> None:
    source, target = written(tmp_path / "in.jsonl", prompts(60)), tmp_path / "out.jsonl"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run([sys.executable, "-c", FULL], cwd=tmp_path, env=env, capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("shoal.workers.errors.InvalidInput: out.jsonl.partial cannot be written (File too large)")
    assert not target.exists()
    summary = done(source, target, Source())
    assert 0 < summary.resumed < 60
    assert len(read(target)) == 60
