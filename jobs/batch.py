"""Inference jobs over files: every row of a file of prompts is answered, and a job that was killed goes on.

Rows that are finished stand in ``OUTPUT.partial`` until all are; then OUTPUT appears, whole, and that file goes. Doing
the same again goes on where the job was. A row that cannot be answered has a sentence in its column ``error``; what is
wrong with a file, or with the engine, ends the job.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from shoal.jobs.batch_files import Input, Ledger, Record, Row, check_output, write_output
from shoal.jobs.data.tokenizer import CorpusTokenizer
from shoal.workers.engine.request import Busy, Output, Request, Sampling
from shoal.workers.errors import ClusterRefused, InvalidInput

Generate = Callable[[Request], AsyncGenerator[Output, None]]  # as jobs/serve/client.py has it
FIRST_WAIT, LONGEST_WAIT = 0.05, 2.0  # seconds, when the engine's queue is full
EVERY = 10.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Summary:
    """What a job came to. rows: of the output. failed: those with an error. resumed: finished before this process.
    tokens: new ones, generated in this process within ``seconds``."""

    rows: int
    failed: int
    resumed: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Engine:
    """What answers. context: longest prompt and answer together, in tokens; bos counts."""

    generate: Generate
    tokenizer: CorpusTokenizer
    context: int


@contextmanager
def open_batch(source: Path, target: Path, sampling: Sampling, model: str) -> Iterator[Batch]:
    """A job, checked before anything is loaded: its files, and what an earlier process left of it.

    sampling: for rows that do not say otherwise; row n without a seed has ``sampling.seed + n``. model: names the
    weights, so that a job does not go on with others. Raises NotFound and InvalidInput.
    """
    check_output(source, target)
    found = Input.open(source)
    job: Record = {"job": "shoal generate", "version": 1, "input sha256": found.sha256, "model": model}
    job |= {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(sampling).items()}
    batch = Batch(found, target, sampling, Ledger(target.with_name(f"{target.name}.partial"), job))
    try:
        yield batch
    finally:
        batch.ledger.close(remove=batch.done)


@dataclass
class Batch:
    """A job over ``source``; ``done`` once its output is there."""

    source: Input
    target: Path
    sampling: Sampling
    ledger: Ledger
    done: bool = False

    async def run(self, engine: Engine, console: Console, concurrency: int = 64) -> Summary:
        """Answers the rows that are left, ``concurrency`` at once, and writes the output.

        Raises ClusterRefused when the engine is gone and InvalidInput when a file cannot be read or written; what was
        finished by then is kept. Cancelling it cancels the requests in flight.
        """
        begin, resumed, tokens = time.monotonic(), len(self.ledger), 0
        left = (row for row in self.source.read() if row.number not in self.ledger)
        view = make_view(console, self.source.rows, resumed)
        prefix = secrets.token_hex(4)  # an engine may serve several jobs

        async def worker() -> None:
            nonlocal tokens
            for row in left:
                record = await self._answer(engine, row, f"{prefix}-{row.number}")
                self.ledger.add(row.number, record)
                tokens += record["tokens"]
                view.show(len(self.ledger), self.ledger.failed, tokens)
                await asyncio.sleep(0)  # rows that are refused without waiting leave others their turn

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(worker())
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        finally:
            view.close()
        write_output(self.target, self.ledger)
        self.done = True
        return Summary(len(self.ledger), self.ledger.failed, resumed, tokens, time.monotonic() - begin)

    async def _answer(self, engine: Engine, row: Row, name: str) -> Record:
        """A finished row. Waits as long as the engine's queue is full."""
        wait = FIRST_WAIT
        while True:
            try:
                return await _answered(engine, row, self._request(engine, row, name))
            except InvalidInput as error:
                return _record(row, error=str(error))
            except Busy:
                await asyncio.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)

    def _request(self, engine: Engine, row: Row, name: str) -> Request:
        """Raises InvalidInput for a row that cannot be asked."""
        if row.error or row.prompt is None:
            raise InvalidInput(row.error)
        seeded = replace(self.sampling, seed=(self.sampling.seed + row.number) % 2**63)
        sampling = replace(seeded, **row.own)
        prompt = tuple(engine.tokenizer.prompt(row.prompt))
        if len(prompt) + sampling.max_tokens > engine.context:
            raise InvalidInput(
                f"the prompt's {len(prompt)} tokens and max_tokens={sampling.max_tokens} do not fit into the context "
                f"of {engine.context}: shorten the prompt, or lower max_tokens"
            )
        return Request(name, prompt, sampling)


async def _answered(engine: Engine, row: Row, request: Request) -> Record:
    tokens: list[int] = []
    async with aclosing(engine.generate(request)) as news:
        async for output in news:
            tokens += [token.id for token in output.tokens]
            if output.finish:
                return _record(row, engine.tokenizer.decode(tokens), len(tokens), str(output.finish))
    raise ClusterRefused(f"the engine left row {row.number} unanswered: look at its log, then do the same again")


def _record(row: Row, text: str | None = None, tokens: int = 0, finish: str | None = None, error: str = "") -> Record:
    return {
        "id": row.id, "prompt": row.prompt, "text": text, "tokens": tokens, "finish_reason": finish,
        "error": error or None,
    }  # fmt: skip


# Progress


class View(Protocol):
    """Shows how far a job is."""

    def show(self, rows: int, failed: int, tokens: int) -> None:
        """rows: finished, ever. failed: of them. tokens: new ones since the view was made."""

    def close(self) -> None:
        """Leaves the terminal as it was."""


def make_view(console: Console, total: int, done: int, clock: Callable[[], float] = time.monotonic) -> View:
    """A bar where ``console`` is a terminal that can move its cursor, lines where it is not."""
    pace = Pace(total, done, clock)
    return Bar(console, pace) if console.is_terminal and not console.is_dumb_terminal else Lines(console, pace)


class Pace:
    """Words for a job of ``total`` rows, ``done`` of which were finished before."""

    def __init__(self, total: int, done: int, clock: Callable[[], float]) -> None:
        self.total, self.done, self.clock = total, done, clock
        self._begin = clock()

    def words(self, rows: int, failed: int, tokens: int) -> str:
        """``1,234 tok/s  2 failed  ETA 0:01:02``"""
        seconds = max(self.clock() - self._begin, 1e-9)
        left = (self.total - rows) * seconds / max(rows - self.done, 1)
        parts = [f"{tokens / seconds:,.0f} tok/s", f"{failed:,} failed" if failed else ""]
        return "  ".join([*filter(None, parts), f"ETA {timedelta(seconds=round(left))}"])


class Bar:
    """One live line at the bottom of the terminal."""

    def __init__(self, console: Console, pace: Pace) -> None:
        self._pace = pace
        columns = [MofNCompleteColumn(), BarColumn(bar_width=None), TextColumn("{task.fields[words]}", markup=False)]
        # twice a second is enough for an eye, and the cores belong to the engine
        self._progress = Progress(*columns, console=console, refresh_per_second=2, expand=True)
        self._task = self._progress.add_task("", total=pace.total, completed=pace.done, words="starting")
        self._progress.start()

    def show(self, rows: int, failed: int, tokens: int) -> None:
        self._progress.update(self._task, completed=rows, words=self._pace.words(rows, failed, tokens))

    def close(self) -> None:
        self._progress.stop()


class Lines:
    """A line every ten seconds, and one at the end."""

    def __init__(self, console: Console, pace: Pace) -> None:
        self._console, self._pace, self._shown = console, pace, pace.clock()
        if pace.done:
            self._say(f"{pace.done:,} of {pace.total:,} rows were finished before")

    def show(self, rows: int, failed: int, tokens: int) -> None:
        now = self._pace.clock()
        if rows >= self._pace.total or now - self._shown >= EVERY:
            self._shown = now
            self._say(f"row {rows:,}/{self._pace.total:,}  {self._pace.words(rows, failed, tokens)}")

    def close(self) -> None:
        pass

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
