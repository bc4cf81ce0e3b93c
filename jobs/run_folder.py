"""A run's folder: made for a new run, checked for one that goes on."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.jobs.recipe import load_recipe, recipe_to_toml
from shoal.jobs.report.journal import read_records
from shoal.workers.checkpoint_files import list_checkpoints
from shoal.workers.config import Recipe, TrainTable
from shoal.workers.errors import InvalidInput, NotFound, UsageError

if TYPE_CHECKING:
    from shoal.jobs.data.tokenizer import CorpusTokenizer

TOKENIZER = "tokenizer.json"
IMPORTED = "imported"  # key of run.json: where an imported run's weights are from
MAY_CHANGE = ("name", "description", "parallel", "checkpoint", "serve")  # what a resumed run may have otherwise


@dataclass(frozen=True)
class RunFolder:
    """``runs/NAME``: recipe.toml, run.json (its corpus), tokenizer.json, metrics.jsonl, checkpoints, plots, events.

    source: the URL that it was fetched from, in which case ``path`` is in the cache.
    """

    path: Path
    source: str | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.source.rstrip("/").rpartition("/")[2] if self.source else self.path.resolve().name

    @property
    def place(self) -> str:
        """The run as other processes find it: its URL, or its path."""
        return self.source or str(self.path.resolve())

    @property
    def checkpoints(self) -> str:
        """Its checkpoints as ranks find them, see ``checkpoints_here``."""
        return self.source or str((self.path / "checkpoints").resolve())

    @property
    def recipe_file(self) -> Path:
        """Where the recipe stands."""
        return self.path / "recipe.toml"

    def recipe(self) -> Recipe:
        """The recipe of the run. Raises NotFound when there is none."""
        if not self.recipe_file.is_file():
            raise NotFound(f"{self.path} is not a run (it has no recipe.toml): `shoal runs list` shows the runs")
        return load_recipe(self.recipe_file)

    def corpus(self) -> Path:
        """The corpus that the run was trained on, where it was, or where it is when both were moved together.

        Raises InvalidInput for a run that was imported, and where that is not known.
        """
        try:
            facts = json.loads((self.path / "run.json").read_text())
            if "corpus" not in facts and IMPORTED in facts:
                raise InvalidInput(
                    f"{self.path} was imported from {facts[IMPORTED]} and has no corpus: shoal evaluate takes one by "
                    f"--data, and shoal train begins a new run with its weights by --from {self.path.name}"
                )
            corpus, moved = Path(facts["corpus"]), self.path / facts.get("corpus_from_here", "no such folder")
        except (OSError, ValueError, KeyError, TypeError):
            raise InvalidInput(f"{self.path / 'run.json'} does not name the run's corpus: restore it") from None
        return moved if not corpus.exists() and moved.exists() else corpus

    def tokenizer(self) -> CorpusTokenizer:
        """The run's own copy of the corpus's tokenizer; the corpus's itself for a run that has none."""
        from shoal.jobs.data.prepare import corpus_tokenizer
        from shoal.jobs.data.tokenizer import CorpusTokenizer, load_tokenizer

        try:
            entry = json.loads((self.path / "run.json").read_text())["tokenizer"]
            ends = entry["bos_token"], entry["eos_token"]
            own = load_tokenizer(self.path / TOKENIZER, ends).tokenizer
            return CorpusTokenizer(own, entry["bos"], entry["eos"], tuple(entry["added"]))
        except (OSError, ValueError, KeyError, TypeError, NotFound):
            return corpus_tokenizer(self.corpus())

    def tokenizer_hash(self) -> str:
        """SHA-256 of its tokenizer.json, which that of a corpus for it must have."""
        from shoal.workers.data.manifest import read_manifest

        try:
            return str(json.loads((self.path / "run.json").read_text())["tokenizer"]["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            return read_manifest(self.corpus()).tokenizer.sha256

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for one trainer, no longer than the process lives. Raises InvalidInput when it is held."""
        lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise InvalidInput(
                f"{self.path} is being trained by another process: let that end first, or choose another --name"
            ) from None
        except OSError:
            pass  # a file system may know no locks
        try:
            yield
        finally:
            os.close(lock)

    def wait_until_free(self, seconds: float, say: Callable[[str], None]) -> None:
        """Waits for another trainer of this folder to end, and says so. Raises InvalidInput when it lasts longer."""
        end, said = time.monotonic() + seconds, False
        while True:
            try:
                with self.locked():
                    return
            except InvalidInput:
                if time.monotonic() > end:
                    raise
            if not said:
                say(f"{self.path} is being trained by another process: waiting up to {seconds:.0f} s for it to end")
                said = True
            time.sleep(0.2)

    def last_step(self) -> int:
        """Step of the newest checkpoint, 0 when there is none."""
        found = list_checkpoints(self.path / "checkpoints")
        return found[-1].step if found else 0


def new_run(runs: Path, name: str | None, recipe: Recipe) -> RunFolder:
    """Makes a folder: NAME if given and free, else the recipe's name with the first free number.

    A folder of that NAME which holds nothing is free. Raises InvalidInput, UsageError.
    """
    if name is not None and (not name or Path(name).name != name):
        raise UsageError(f"--name {name!r} is not a plain folder name: the run's folder is --runs-dir/NAME")
    names = (recipe.name if number == 1 else f"{recipe.name}-{number}" for number in itertools.count(1))
    with refusing(runs):
        runs.mkdir(parents=True, exist_ok=True)
    for each in [name] if name is not None else names:
        folder = RunFolder(runs / each)
        with refusing(folder.path):
            if _made(folder.path, reuse=name is not None):
                return folder
    raise InvalidInput(f"{runs / (name or '')} exists: go on with it by --resume, or choose another --name")


def discard_unused(folder: RunFolder) -> None:
    """Removes the folder of a run that was refused before anything was recorded but which way rows would go."""
    records = read_records(folder.path / "metrics.jsonl")
    if not folder.last_step() and all(record.get("event") == "dispatch" for record in records):
        shutil.rmtree(folder.path, ignore_errors=True)


def write_identity(folder: RunFolder, recipe: Recipe, corpus: Path, corpus_hash: str) -> None:
    """Writes recipe.toml, tokenizer.json and run.json, each whole or not at all: what serving the run takes; and the
    tokenizer's settings where the corpus has them."""
    from shoal.jobs.data.tokenizer import SETTINGS, settings_of
    from shoal.workers.data.manifest import read_manifest

    facts = {
        "corpus": str(corpus.resolve()),
        "corpus_from_here": os.path.relpath(corpus.resolve(), folder.path.resolve()),
        "corpus_hash": corpus_hash,
        "tokenizer": read_manifest(corpus).tokenizer.model_dump(),
    }
    files = {
        folder.recipe_file: recipe_to_toml(recipe).encode(),
        folder.path / TOKENIZER: (corpus / TOKENIZER).read_bytes(),
        folder.path / "run.json": json.dumps(facts).encode(),
    }
    if (settings := settings_of(corpus / TOKENIZER)) is not None:
        files[folder.path / SETTINGS] = settings
    for file, content in files.items():
        draft = file.with_name(f".{file.name}.tmp")
        with refusing(folder.path):
            draft.write_bytes(content)
            draft.replace(file)


def check_same_recipe(folder: RunFolder, wanted: Recipe) -> None:
    """Refuses to go on with a run under another recipe; ranks, placement and checkpoints may differ."""
    # what changes no result; and what a run began with, which stands in its own recipe
    free: dict[str, Any] = {
        **dict.fromkeys(MAY_CHANGE, True),
        "model": {"embedding_std"},
        "train": {"recompute", "initial", "profile_at", "profile_steps"},
    }
    before = folder.recipe()
    _check_profile(folder, before.train, wanted.train)
    old, new = (r.model_dump(exclude=free) for r in (before, wanted))
    for key, was, now in _differences(old, new):
        same_weights = key.split(".")[0] in ("balance", "data", "train") and key != "train.dtype"
        begun = f" (--from {folder.name} begins it with these weights)" if same_weights else ""
        raise InvalidInput(
            f"{folder.path} was trained with {key}={was!r}, and --resume was given {key}={now!r}: "
            f"leave {key} as it was, or start a new run with another --name{begun}"
        )


def as_begun(folder: RunFolder, wanted: Recipe) -> Recipe:
    """The recipe, but what it says of a run's beginning as this run's own recipe has it.

    One that says nothing of embeddings is from before they could be wider than other weights.
    """
    own = folder.recipe()
    std = own.model.embedding_std if "embedding_std" in own.model.model_fields_set else 0.0
    model = wanted.model.model_copy(update={"embedding_std": std})
    train = wanted.train.model_copy(update={"initial": own.train.initial})
    return wanted.model_copy(update={"model": model, "train": train})


def _check_profile(folder: RunFolder, before: TrainTable, wanted: TrainTable) -> None:
    """Refuses steps to be traced that are done already, unless they were asked for before that."""
    step, last = folder.last_step(), wanted.profile_at + wanted.profile_steps - 1
    if wanted.profile_at not in (0, before.profile_at) and last <= step < wanted.steps:
        raise InvalidInput(
            f"train.profile_at={wanted.profile_at} is for steps up to {last}, and {folder.path} stands at step {step}: "
            f"set train.profile_at to {step + 1} or more"
        )


def check_same_corpus(folder: RunFolder, corpus_hash: str) -> None:
    """Refuses to go on with a run on other data."""
    try:
        before = json.loads((folder.path / "run.json").read_text())["corpus_hash"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if before != corpus_hash:
        raise InvalidInput(
            f"{folder.path} was trained on a corpus with hash {before[:12]}, and this one has {corpus_hash[:12]}: "
            f"resume with the same data, or start a new run with another --name"
        )


class refusing:
    """Turns what a file system refuses into one sentence about ``path``."""

    REMEDIES = {  # noqa: RUF012
        errno.ENOSPC: "free some space or choose another --runs-dir",
        errno.EDQUOT: "free some space or choose another --runs-dir",
    }

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            remedy = self.REMEDIES.get(error.errno or 0, "make it a writable folder or choose another --runs-dir")
            raise InvalidInput(f"{self.path} cannot be written ({error.strerror}): {remedy}") from error


def _made(path: Path, reuse: bool) -> bool:
    """Makes a run's folder and tries whether it can be written; False when there is one. reuse: take an empty one."""
    try:
        path.mkdir()
    except FileExistsError:
        if not reuse or not path.is_dir() or any(path.iterdir()):
            return False
    try:
        probe = path / ".probe"
        try:
            with probe.open("wb") as file:
                file.write(bytes(4096))
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError:
        path.rmdir()
        raise
    return True


def _differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [d for k in old for d in _differences(old[k], new.get(k), f"{key}.{k}" if key else k)]
    return [] if old == new else [(key, old, new)]
