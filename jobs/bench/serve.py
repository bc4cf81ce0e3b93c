"""A server under load: latencies and output tokens/s over requests at once, and over requests a second.

The server is any that speaks OpenAI's completions API, or a ``shoal serve`` of a run, started for this and ended after.
What the load generator measures, and how, is in ``jobs/bench/load.py``. Each load is preceded by warm-up requests,
answered in full before it begins; no prompt comes twice but by chance, so that a prefix cache has nothing to give.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import aiohttp

from shoal.jobs.bench.load import (
    CHARACTERS,
    Answer,
    Limits,
    Prompts,
    Shape,
    Target,
    Text,
    ask,
    clock,
    closed_loop,
    figures,
    open_loop,
    parse_mix,
)
from shoal.jobs.bench.registry import Settings
from shoal.jobs.bench.result import Row, gpu_figures, time_row
from shoal.jobs.bench.server import READY_SECONDS, served
from shoal.workers.errors import ClusterRefused, InvalidInput, NotFound, UsageError
from shoal.workers.machine import cores

if TYPE_CHECKING:
    from shoal.jobs.run_folder import RunFolder

Measured = list[tuple["Level", Row]]
"""Loads and what was found of them, as they are measured."""

PLAIN = "plain loop without a cache, one at a time"
MIX = "64:32*3,256:64*1"
LIMITS = Limits(seconds=20.0)
RATE_WARMUP = 8  # requests at once, and in all, before a load that is given as a rate
TEXT_TOKENS = 1 << 18  # of a run's validation text
TEXT_CHARACTERS = 1 << 22  # of a file


@dataclass(frozen=True)
class Level:
    """A load: requests at once, or requests a second."""

    concurrency: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"{self.concurrency} at once" if self.concurrency else f"{self.rate:g} a second"


@dataclass(frozen=True)
class ServeSettings(Settings):
    """run: a run's folder or its name; its server is started where there is no ``url``. model: None for the server's
    first. text: a file to cut prompts from; None for the run's validation text. warmup: requests before each load;
    None for as many as it has at once. baseline: also measure the plain loop (needs a run). patience: seconds that a
    server which is started may take until all its loads are measured."""

    run: str | None = None
    runs_dir: Path = Path("runs")
    url: str | None = None
    model: str | None = None
    token_file: Path | None = None
    levels: tuple[Level, ...] = tuple(Level(n) for n in (1, 4, 16, 64))
    mix: tuple[Shape, ...] = parse_mix(MIX)
    text: Path | None = None
    limits: Limits = LIMITS
    warmup: int | None = None
    temperature: float = 0.8
    seed: int = 0
    baseline: bool = False
    against: str | None = None
    options: tuple[str, ...] = ()
    patience: float | None = None

    def prompts(self, text: Text, name: object) -> Prompts:
        """The prompts of a load, the same whenever they are asked for."""
        return Prompts(text, self.mix, f"{self.seed} {name}")


def run(settings: Settings) -> Iterator[Row]:
    """A row for each load, and one for the baseline. Raises ShoalError before the load for what cannot work."""
    asked = settings if isinstance(settings, ServeSettings) else ServeSettings(settings.data_dir, say=settings.say)
    if not asked.run and not asked.url:
        raise UsageError("neither a run nor --url was given: name the run to serve, or the server to ask")
    if asked.baseline and not asked.run:
        raise UsageError("--baseline computes with the model itself: name its run as well")
    if asked.against and (asked.baseline or asked.url or not asked.run):
        raise UsageError("--against compares with the server of another run: give a run, without --url and --baseline")
    folder, other = _run_folder(asked, asked.run), _run_folder(asked, asked.against)
    token, text = _token(asked.token_file), _text(asked, folder)
    asked.prompts(text, "check")
    about = {
        "server": asked.url or _command(asked, asked.run),
        "mix": ",".join(f"{s.prompt}:{s.output}*{s.weight:g}" for s in asked.mix),
        "temperature": asked.temperature,
        "seed": asked.seed,
    }
    ours: Measured = []
    theirs: Measured = []
    plain = None
    try:
        if asked.url or folder is None:
            asyncio.run(_measure(asked, str(asked.url).rstrip("/"), token, text, ours))
        else:
            _serve_and_measure(asked, folder, token, text, ours)
        plain = _plain(asked, folder, text) if asked.baseline and folder else None
        if other:
            _serve_and_measure(asked, other, token, text, theirs)
    finally:  # when it is cut off, too: loads stand beside what comes later
        second = rows(theirs, None, about | {"server": _command(asked, asked.against)})
        yield from [*beside(rows(ours, plain, about), second), *second]


def rows(measured: Sequence[tuple[Level, Row]], plain: Row | None, about: Row) -> list[Row]:
    """Time an output token over all requests of a load together: the ratio to the plain loop is one of tokens/s."""
    against = {"baseline": PLAIN, "baseline_ms": plain["ms"]} if plain else {}
    out = []
    for level, found in measured:
        load = {"concurrency": level.concurrency} if level.concurrency else {"rate": level.rate}
        ms = 1e3 / found["output_tokens_per_second"]
        out.append(time_row(f"an output token, {level}", ms, **against, **load, **found, **about))
    return [*out, plain] if plain else out


def beside(ours: Sequence[Row], theirs: Sequence[Row]) -> list[Row]:
    """Rows of one server with those of the other, under the same loads, as their baselines, as far as there are any."""
    out = []
    for row, other in zip_longest(ours, theirs):
        if other is None:
            out.append(row)
            continue
        facts = {key: value for key, value in row.items() if key not in ("what", "ms")}
        out.append(time_row(row["what"], row["ms"], other["server"], other["ms"], **facts))
    return out


def _command(asked: ServeSettings, run: str | None) -> str:
    return " ".join(["shoal serve", str(run), *asked.options])


def _serve_and_measure(asked: ServeSettings, folder: RunFolder, token: str | None, text: Text, found: Measured) -> None:
    options = [*asked.options, *(("--token-file", str(asked.token_file)) if asked.token_file else ())]
    asked.say(f"starting {' '.join(['shoal serve', str(folder.path), *asked.options])}")
    end = None if asked.patience is None else clock() + asked.patience
    with served(folder.path.resolve(), options, min(READY_SECONDS, asked.patience or READY_SECONDS)) as url:
        asyncio.run(_measure(asked, url, token, text, found, end))


async def _measure(
    asked: ServeSettings, url: str, token: str | None, text: Text, found: Measured, end: float | None = None
) -> None:
    """Adds all loads to ``found``. Raises ClusterRefused, also where it is not done by ``end``, of ``clock``."""
    try:
        async with asyncio.timeout(None if end is None else end - clock()):
            await _loads(asked, url, token, text, found)
    except TimeoutError:
        raise ClusterRefused(f"{url} was not measured within {asked.patience:g} s: ask for less, or wait") from None


async def _loads(asked: ServeSettings, url: str, token: str | None, text: Text, found: Measured) -> None:
    target = Target(url, asked.model or "", token, asked.temperature)
    async with target.connect() as session:
        target = replace(target, model=target.model or await _first_model(session, url))
        await _check(session, target, asked, text)
        for level in asked.levels:
            load = await _load(session, target, asked, level, text)
            found.append((level, load))
            asked.say(f"{level}: {load['output_tokens_per_second']:,.0f} tokens/s, {load['failed']} failed")


async def _load(
    session: aiohttp.ClientSession, target: Target, asked: ServeSettings, level: Level, text: Text
) -> dict[str, Any]:
    """Warms up, then measures a load. Raises ClusterRefused when nothing was answered."""
    prompts = asked.prompts(text, f"{level} warm-up")

    async def send(due: float) -> Answer:
        return await ask(session, target, prompts.next(), due)

    clients = level.concurrency or RATE_WARMUP
    warmup = clients if asked.warmup is None else asked.warmup
    await closed_loop(send, clients, Limits(requests=warmup))
    prompts, begin = asked.prompts(text, level), clock()
    if level.concurrency:
        answers = await closed_loop(send, level.concurrency, asked.limits)
    else:
        answers = await open_loop(send, level.rate or 0.0, asked.limits, Random(f"{asked.seed} {level}"))
    found = figures(answers, begin) | ({} if asked.url else _gpu_bytes())
    if not found["output_tokens_per_second"]:
        failed = next((f" ({a.error}: {_short(a.said)})" for a in answers if a.error), "")
        raise ClusterRefused(f"none of {len(answers)} requests, {level}, gave a token{failed}: ask for less, or longer")
    return found | {"warmup": warmup}


def _gpu_bytes() -> Row:
    """Memory of the fullest GPU that is in use now, pages that nothing is in among it."""
    used = [int(mib) << 20 for mib in gpu_figures("memory.used", os.environ.get("CUDA_VISIBLE_DEVICES", ""))]
    return {"gpu_bytes": max(used)} if used else {}


async def _first_model(session: aiohttp.ClientSession, url: str) -> str:
    """The model that a server names first. Raises ClusterRefused."""
    try:
        async with session.get(f"{url}/models") as response:
            if response.status != 200:
                raise _refused(url, str(response.status), await response.text())
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError) as error:
        raise _refused(url, "connection", str(error)) from None
    except (ValueError, LookupError, TypeError):
        raise ClusterRefused(f"{url}/models names no model: say which one with --model") from None


async def _check(session: aiohttp.ClientSession, target: Target, asked: ServeSettings, text: Text) -> None:
    """Makes the largest request of the mix: what cannot work is known before the load. Raises ClusterRefused."""
    largest = max(asked.mix, key=lambda shape: shape.prompt + shape.output)
    answer = await ask(session, target, Prompts(text, [largest], f"{asked.seed} check").next(), clock())
    if answer.error:
        raise _refused(target.url, answer.error, answer.said)


def _refused(url: str, error: str, said: str) -> ClusterRefused:
    if error == "connection":
        return ClusterRefused(f"{url} cannot be reached ({_short(said)}): start a server there, or correct --url")
    if error in ("401", "403"):
        return ClusterRefused(f"{url} does not let us in ({error}): give its token with --token-file")
    return ClusterRefused(f"{url} did not do a first request ({error}: {_short(said)}): change what that names")


def _short(said: str) -> str:
    return " ".join(said.split())[:200] or "no word"


# What is asked of it


def _run_folder(asked: ServeSettings, run: str | None) -> RunFolder | None:
    """The run's folder; InvalidInput when the mix does not fit into its model's context."""
    if not run:
        return None
    from shoal.jobs.load import find_run

    folder = find_run(run, asked.runs_dir)
    context = folder.recipe().model.context
    for shape in asked.mix:
        if shape.prompt + shape.output >= context:
            raise InvalidInput(
                f"--mix {shape.prompt}:{shape.output} and a bos do not fit into {run}'s context of {context} "
                "tokens: ask for less"
            )
    return folder


def _token(file: Path | None) -> str | None:
    """The bearer token: the first of a file's lines, or SHOAL_API_TOKEN."""
    if file is None:
        return os.environ.get("SHOAL_API_TOKEN") or None
    try:
        lines = file.read_text().split()
    except (OSError, ValueError) as error:
        raise NotFound(f"--token-file {file} cannot be read ({error}): name a file that holds the token") from None
    if not lines:
        raise InvalidInput(f"--token-file {file} is empty: write the token into it")
    return lines[0]


def _text(asked: ServeSettings, folder: RunFolder | None) -> Text:
    """What prompts are cut from: the file, the run's validation text, or else the help of Python itself."""
    tokenizer = None
    if folder:
        from shoal.jobs.data.prepare import corpus_tokenizer
        from shoal.workers.data.manifest import validation_text

        tokenizer = corpus_tokenizer(folder.corpus())
    if asked.text:
        try:
            with asked.text.open(encoding="utf-8") as file:
                text = file.read(TEXT_CHARACTERS)
        except (OSError, ValueError) as error:
            raise NotFound(f"--text {asked.text} cannot be read ({error}): name a text file in UTF-8") from None
    elif folder and tokenizer:
        documents = validation_text(folder.corpus(), TEXT_TOKENS).documents
        text = "\n".join(tokenizer.decode(document.tolist()) for document in documents)
    else:
        from pydoc_data.topics import topics

        text = "\n".join(topics.values())
    if tokenizer is None:
        asked.say(f"no tokenizer is known without a run: {CHARACTERS} characters of a prompt are taken for a token")
        return Text.of(text)
    return Text.of(text, [start for start, _ in tokenizer.tokenizer.encode(text, add_special_tokens=False).offsets])


def _plain(asked: ServeSettings, folder: RunFolder, text: Text) -> Row:
    """The prompts of the first load through ``sample``, which computes the whole sequence for every token."""
    import torch

    from shoal.jobs.data.prepare import corpus_tokenizer
    from shoal.jobs.load import choose_step, load_trained
    from shoal.workers.sample import sample

    threads = folder.recipe().parallel.threads or cores()
    torch.set_num_threads(threads)
    trained = load_trained(folder, choose_step(folder, None)[0])
    tokenizer, prompts = corpus_tokenizer(trained.corpus), asked.prompts(text, asked.levels[0])

    def answer(most: int | None = None) -> int:
        prompt = prompts.next()
        new = sample(
            trained.model, tokenizer.prompt(prompt.text), most or prompt.output,
            temperature=asked.temperature, seed=prompt.seed, stop=tokenizer.eos,
        )  # fmt: skip
        return len(new)

    asked.say(f"{PLAIN}, on {threads} thread{'s' * (threads > 1)}")
    answer(2)
    prompts = asked.prompts(text, asked.levels[0])
    begin, requests, tokens = clock(), 0, 0
    while asked.limits.allow(requests, clock() - begin):
        tokens += answer()
        requests += 1
    seconds = clock() - begin
    if not tokens:
        raise InvalidInput(f"{folder.path} answers {requests} prompts with no token at all: train it longer")
    return time_row(
        f"an output token, {PLAIN}", 1e3 * seconds / tokens,
        requests=requests, seconds=seconds, output_tokens_per_second=tokens / seconds, threads=threads,
    )  # fmt: skip
