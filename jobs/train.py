"""Training on this machine or inside a Ray cluster: from a recipe to a run folder."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from shoal.jobs.data.baselines import Baselines, baselines
from shoal.jobs.data.corpus import ensure_corpus
from shoal.jobs.data.prepare import corpus_tokenizer
from shoal.jobs.estimate import estimate
from shoal.jobs.interrupt import interruptible
from shoal.jobs.load import choose_step, find_run
from shoal.jobs.memory import refuse_what_does_not_fit
from shoal.jobs.report import RunReport
from shoal.jobs.report.journal import read_records
from shoal.jobs.report.run import draw_missing
from shoal.jobs.run_folder import (
    TOKENIZER,
    RunFolder,
    as_begun,
    check_same_corpus,
    discard_unused,
    new_run,
    write_identity,
)
from shoal.workers.checkpoint_files import checkpoint_path, last_good, read_state
from shoal.workers.config import Recipe
from shoal.workers.data.manifest import SPLITS, checked_files, read_manifest
from shoal.workers.errors import InvalidInput, ShoalError

SAMPLE_PROMPTS = {"stdlib": "def ", "shakespeare": "\n"}
SAMPLE_TOKENS = 96
Record = dict[str, Any]


@dataclass(frozen=True)
class TrainResult:
    """What a training run came to. ``evaluation``: its last validation; ``sample``: empty when none was made."""

    run: Path
    step: int
    stopped: bool
    evaluation: Record | None
    prompt: str = ""
    sample: str = ""


class _WithBaselines:
    """Puts the unigram and gzip figures of the same text beside each validation, and remembers the last one."""

    def __init__(self, report: RunReport, beside: Baselines, started: Callable[[], None]) -> None:
        self.report, self.started = report, started
        self.beside = {k: v for k, v in asdict(beside).items() if k.endswith("bits_per_byte")}
        self.last: Record | None = None

    def record(self, record: Record) -> None:
        """Passes a record on."""
        if record["kind"] == "eval":
            record = self.last = {**record, **self.beside}
        self.report.record(record)
        if record["kind"] == "train":
            self.started()

    def rewind(self, step: int) -> None:
        """Passes it on."""
        self.report.rewind(step)


def train(
    recipe: Recipe, runs: Path, name: str | None, resume: RunFolder | None, data_root: Path, console: Console
) -> TrainResult:
    """Trains ``recipe`` to its end in a run folder. SIGTERM and SIGHUP are treated like Ctrl-C.

    Raises: ShoalError for whatever cannot be done; KeyboardInterrupt when it is to end at once.
    """
    started = time.monotonic()
    with interruptible():
        return _train(recipe, runs, name, resume, data_root, console, started)


def _train(
    recipe: Recipe,
    runs: Path,
    name: str | None,
    resume: RunFolder | None,
    data_root: Path,
    console: Console,
    started: float,
) -> TrainResult:
    refuse_what_does_not_fit(recipe, begun=resume is not None)
    corpus = resume.corpus() if resume else _corpus(recipe, data_root, console)
    manifest = read_manifest(corpus)
    if resume:
        check_same_corpus(resume, manifest.corpus_hash)
        _check_history(resume, recipe)
    recipe = _beginning(recipe, runs, resume, corpus)
    for split in SPLITS:
        checked_files(corpus, manifest, split)  # what is missing or cut short is said before Ray starts
    folder = resume or new_run(runs, name, recipe)
    with folder.locked():
        if resume and _finished(folder, recipe):
            draw_missing(folder.path)
            console.print(f"{folder.path} is done: step {recipe.train.steps} of {recipe.train.steps}", highlight=False)
            return TrainResult(folder.path, recipe.train.steps, False, _last_evaluation(folder))
        console.print(f"run      {folder.path}", highlight=False, soft_wrap=True)
        shown = corpus.relative_to(Path.cwd()) if corpus.is_relative_to(Path.cwd()) else corpus
        console.print(
            f"corpus   {shown}  {manifest.corpus_hash[:16]}  {_split_sizes(manifest)}", highlight=False, soft_wrap=True
        )
        try:
            write_identity(folder, recipe, corpus, manifest.corpus_hash)
            return _supervised(recipe, folder, corpus, console, started, resume is not None)
        except KeyboardInterrupt:
            _tell_how_to_resume(folder, console)
            raise
        except ShoalError:
            if not resume:
                discard_unused(folder)
            raise


def _beginning(recipe: Recipe, runs: Path, resume: RunFolder | None, corpus: Path) -> Recipe:
    """The recipe with the very checkpoint that its run begins with, and that one's dtype; a resumed run has its own.

    Raises NotFound, and InvalidInput when the weights were trained on other tokens than the corpus has.
    """
    if resume:
        return as_begun(resume, recipe)
    initial = recipe.train.initial
    if not initial:
        return recipe
    path = Path(initial)
    if path.parent.name == "checkpoints" and (path / "state.json").is_file():
        source = RunFolder(path.parent.parent)
        step, _ = choose_step(source, int(read_state(path)["step"]))
    else:
        source = find_run(initial, runs)
        step, _ = choose_step(source, None)
    path = checkpoint_path(source.path / "checkpoints", step).resolve()
    own = source.path / TOKENIZER
    if own.is_file() and own.read_bytes() != (corpus / TOKENIZER).read_bytes():
        raise InvalidInput(
            f"train.initial={initial!r} was trained with another tokenizer than that of {corpus}: "
            f"prepare the corpus with --tokenizer {own}"
        )
    dtype = recipe.train.dtype
    return _with(recipe, initial=str(path), dtype=read_state(path).get("dtype", dtype) if dtype == "auto" else dtype)


def _with(recipe: Recipe, **train: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


def _check_history(folder: RunFolder, recipe: Recipe) -> None:
    """Refuses to start a run from step 0 that has come so far that its checkpoints must be somewhere."""
    steps = [r["step"] for r in read_records(folder.path / "metrics.jsonl") if r.get("kind") == "train"]
    if steps and steps[-1] > 2 * recipe.checkpoint.every and not folder.last_step():
        raise InvalidInput(
            f"{folder.path} was trained to step {steps[-1]}, and its checkpoints are gone: "
            f"restore {folder.path / 'checkpoints'}, or start a new run with another --name"
        )


def _finished(folder: RunFolder, recipe: Recipe) -> bool:
    """Whether the checkpoint of the last step is there and whole."""
    if folder.last_step() < recipe.train.steps:
        return False
    good, _ = last_good(folder.path / "checkpoints")
    return good is not None and good.step >= recipe.train.steps


def _last_evaluation(folder: RunFolder) -> Record | None:
    found = [r for r in read_records(folder.path / "metrics.jsonl") if r.get("kind") == "eval"]
    return found[-1] if found else None


def _supervised(
    recipe: Recipe, folder: RunFolder, corpus: Path, console: Console, started: float, resumed: bool
) -> TrainResult:
    from shoal.cluster.local import ray_session
    from shoal.cluster.supervisor import SampleRequest, Supervisor
    from shoal.workers.placement import Placement

    tokenizer = corpus_tokenizer(corpus)
    prompt = SAMPLE_PROMPTS.get(recipe.data.corpus, "The ")
    chosen = {"temperature": 0.7, "top_p": 0.95, "stop": tokenizer.eos}
    request = SampleRequest(tokenizer.prompt(prompt), SAMPLE_TOKENS, chosen)
    placement = Placement.of(recipe)
    with (
        ray_session(recipe.parallel.ranks) as session,
        RunReport(folder.path, recipe.train.steps, console, folder.last_step() if resumed else None) as report,
    ):
        ranks = ", ".join(f"{r}: {placement.role(r)}" for r in range(min(placement.ranks, 8)))
        console.print(f"ranks    {placement.ranks} ({ranks})", highlight=False, soft_wrap=True)
        if session.dashboard:
            console.print(f"watch    {session.dashboard}", highlight=False)
        first = _Once(lambda: console.print(f"first step after {time.monotonic() - started:.1f} s", highlight=False))
        told = _WithBaselines(report, baselines(corpus, recipe.train.eval_tokens), first)
        recipe = _with_saved_dtype(recipe, folder)
        flops = estimate(recipe).flops.training
        outcome = Supervisor(recipe, corpus, folder.path, told, session, flops).run(request, resumed)
        if outcome.stopped:
            _tell_how_to_resume(folder, console)
    text = tokenizer.decode(outcome.sample)
    return TrainResult(folder.path, outcome.step, outcome.stopped, told.last, prompt, text)


def _with_saved_dtype(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The recipe with the dtype that the run was begun in, where it leaves that to the device."""
    good, _ = last_good(folder.path / "checkpoints")
    if recipe.train.dtype != "auto" or good is None:
        return recipe
    return _with(recipe, dtype=read_state(good.path).get("dtype", "auto"))


class _Once:
    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def __call__(self) -> None:
        if self.action:
            self.action()
        self.action = None


def _corpus(recipe: Recipe, root: Path, console: Console) -> Path:
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
                if not console.is_terminal:
                    console.print(f"preparing {recipe.data.corpus}: {stage}", highlight=False)
            bar.update(tasks[stage], completed=done, total=total)

        return ensure_corpus(recipe.data.corpus, recipe.model.vocab, root, progress)


def _split_sizes(manifest: Any) -> str:
    return ", ".join(f"{name} {part.tokens:,}" for name, part in manifest.splits.items()) + " tokens"


def _tell_how_to_resume(folder: RunFolder, console: Console) -> None:
    runs = "" if folder.path.parent == Path("runs") else f" --runs-dir {shlex.quote(str(folder.path.parent))}"
    command = f"shoal train --resume --name {shlex.quote(folder.path.name)}{runs}"
    console.print(f"go on with: {command}", highlight=False, markup=False, soft_wrap=True)
