"""What a job does: the command that runs in the cluster, and what it must be given."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from shoal.jobs.kube.names import fresh_name
from shoal.jobs.kube.options import JobOptions
from shoal.jobs.kube.parts import volumes
from shoal.jobs.recipe import load_recipe, recipe_to_toml
from shoal.jobs.recipe_errors import quote
from shoal.workers.config import Recipe
from shoal.workers.errors import InvalidInput
from shoal.workers.run_store import check_url, is_url

RECIPE_FILE = "/etc/shoal/recipe/recipe.toml"  # where the recipe stands in a pod
TRAIN = ("shoal", "train", "--recipe", RECIPE_FILE)  # how the command of a training job begins
_OF_A_PROCESS = ("memory", "file", "local")  # schemes of fsspec that mean another thing in another pod
KINDS = ("train", "evaluate", "generate", "serve")


@dataclass(frozen=True)
class Work:
    """One of ``KINDS``. name: of the job. command: of the entrypoint, empty for serve. run: its name or path there.

    ranks: how many compute, on Ray's workers; 0: the command itself computes, and stands on a worker. recipe: given to
    the command as a file. service: keyword arguments of the service's builder.
    """

    kind: str
    name: str
    command: tuple[str, ...]
    run: str
    ranks: int
    recipe: Recipe | None = None
    service: dict[str, Any] | None = None

    @property
    def fetches(self) -> bool:
        """Whether its run is in an object store, and is fetched in the cluster."""
        return is_url(self.run)

    @property
    def recipe_toml(self) -> str | None:
        """The recipe as the file that a pod sees."""
        return recipe_to_toml(self.recipe) if self.recipe else None


@dataclass(frozen=True)
class Places:
    """Folders of the cluster, on a volume that all pods share."""

    runs: str
    data: str


def places(options: JobOptions, runs: str | None, data: str | None = None) -> Places:
    """Where runs and data lie: on the first shared volume, unless said otherwise.

    Raises InvalidInput when no volume outlives the pods, or a folder is on none.
    """
    shared = [volume for volume in volumes(options.volume) if volume.shared]
    if options.ray_address is not None:
        found = _places_of_ray(runs, data)
    elif shared:
        first = shared[0].path
        found = Places(runs or posixpath.join(first, "runs"), data or posixpath.join(first, "data"))
    else:
        raise InvalidInput(
            "no --volume outlives the pods, so that runs would be lost with them: add --volume CLAIM:/path, "
            "a claim that all nodes can write to"
        )
    for what, folder in (("--runs-dir", found.runs), ("--data-dir", found.data)):
        _check_place(options, what, folder, "folder")
    return found


def _places_of_ray(runs: str | None, data: str | None) -> Places:
    """On a Ray cluster that runs already: data beside the runs, unless said otherwise."""
    if runs is None:
        raise InvalidInput(
            "--runs-dir is not given, and a Ray cluster's jobs run in folders that go with them: add --runs-dir, "
            "a folder that all of its nodes share"
        )
    return Places(runs, data or posixpath.join(posixpath.dirname(runs.rstrip("/")), "data"))


def _check_place(options: JobOptions, what: str, path: str, kind: str) -> None:
    """Refuses what lies on no volume; on a Ray cluster that runs already, what is no whole path."""
    if options.ray_address is not None:
        if not path.startswith("/"):
            raise InvalidInput(f"{what} {quote(path)} is not a path from the root of the cluster's nodes: add that")
        return
    shared = [volume.path for volume in volumes(options.volume) if volume.shared]
    if not any(_within(path, folder) for folder in shared):
        remedy = f"name a {kind} below {', '.join(shared)}" if shared else "add --volume CLAIM:/path and name one there"
        raise InvalidInput(f"{what} {quote(path)} is on no volume: {remedy}")


def _check_corpus(options: JobOptions, corpus: str, folder: str) -> None:
    """Refuses a corpus on no volume, and one that is named from where a person is and not from the cluster's folder."""
    own = posixpath.basename(folder.rstrip("/"))
    first, _, rest = corpus.partition("/")
    if corpus.startswith("/"):
        _check_place(options, "data.corpus", corpus, "folder")
    elif first in (".", "..", "~", own):
        said = rest if first == own and rest else "its name there"
        raise InvalidInput(
            f"data.corpus={quote(corpus)} is looked for below {folder}: say {said}, or give the whole path on a volume"
        )


def _check_writable(options: JobOptions, what: str, path: str) -> None:
    """Refuses a path on a read-only volume; of volumes within each other the innermost decides."""
    above = [volume for volume in volumes(options.volume) if _within(path, volume.path)]
    if above and max(above, key=lambda volume: len(volume.path)).read_only:
        raise InvalidInput(f"{what} {quote(path)} is on a volume mounted read-only: leave out its ':ro'")


def train(
    options: JobOptions,
    recipe: str,
    sets: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    run: str | None = None,
    runs: str | None = None,
    data: str | None = None,
) -> Work:
    """``shoal train`` of a recipe that is checked here; one rank a GPU unless the recipe is told its ranks.

    The command goes on with the run where it exists, so that a job that was preempted or begun again loses nothing but
    the steps since its last checkpoint.
    """
    where, overrides = places(options, runs, data), dict(overrides or {})
    _check_writable(options, "--runs-dir", where.runs)
    told = [text.partition("=")[0].strip() for text in sets]
    told += [key for key, value in overrides.items() if value is not None]
    gpus = options.nodes * options.gpus_per_node
    if gpus and not {"parallel.ranks", "parallel.placement"} & set(told):
        overrides["parallel.ranks"] = gpus
    checked = load_recipe(recipe, sets, overrides)
    _check_corpus(options, checked.data.corpus, where.data)
    name = options.name or fresh_name(checked.name)
    if run is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", run, re.ASCII):
        raise InvalidInput(f"--run {quote(run)} is not a plain name: use up to 200 letters, digits, '.', '_' and '-'")
    folders = ("--runs-dir", where.runs, "--data-dir", where.data)
    command = (*TRAIN, "--name", run or name, "--or-resume", *folders)
    return Work("train", name, command, run or name, checked.parallel.ranks, checked)


def evaluate(options: JobOptions, run: str, runs: str | None = None, arguments: Sequence[str] = ()) -> Work:
    """``shoal evaluate`` of a run on the volume; it computes in one process, on a worker."""
    if is_url(run) and options.ray_address is None and not any(volume.shared for volume in volumes(options.volume)):
        raise InvalidInput(
            "the corpus that the run is measured on is fetched from nowhere: add --volume CLAIM:/path, where it lies"
        )
    told = dict(pairwise(arguments))
    if "--data" in told:
        _check_place(options, "--data", told["--data"], "folder")
    command = ("shoal", "evaluate", _run(options, run), *_runs_dir(options, run, runs), *arguments)
    return Work("evaluate", _name(options, "evaluate", run), command, run, 0)


def generate(
    options: JobOptions, run: str, source: str, target: str, runs: str | None = None, arguments: Sequence[str] = ()
) -> Work:
    """``shoal generate`` of a file of prompts: a rank a GPU, or one process on a worker when that is one rank.

    Raises InvalidInput for files that are on no volume.
    """
    folder = _runs_dir(options, run, runs)
    for what, file in (("--input", source), ("--output", target)):
        if Path(file).suffix not in (".jsonl", ".parquet"):
            raise InvalidInput(f"{what} {quote(file)} is neither .jsonl nor .parquet: name such a file on a volume")
        _check_place(options, what, file, "file")
    _check_writable(options, "--output", target)
    ranks = _serving_ranks(options)
    spread = ("--workers", str(ranks)) if ranks > 1 else ()
    files = ("--input", source, "--output", target, *folder)
    command = ("shoal", "generate", _run(options, run), *files, *spread, *arguments)
    return Work("generate", _name(options, "generate", run), command, run, ranks if ranks > 1 else 0)


def serve(
    options: JobOptions,
    run: str,
    runs: str | None = None,
    step: int | None = None,
    model: str | None = None,
    placement: str | None = None,
    insecure: bool = False,
) -> Work:
    """The service of a run. Raises InvalidInput when it would be open to whoever reaches it, without ``insecure``."""
    folder = _runs_dir(options, run, runs)
    if any(text.partition("=")[0] == "SHOAL_API_TOKEN" for text in options.env):
        raise InvalidInput(
            "--env SHOAL_API_TOKEN would stand in the manifest for all to read: put it into a Secret, and write "
            "--secret SHOAL_API_TOKEN=SECRET:ENTRY"
        )
    told = {text.partition("=")[0] for text in options.secret}
    if "SHOAL_API_TOKEN" not in told and not insecure:
        raise InvalidInput(
            "the service would be open to everyone in the cluster: add --secret SHOAL_API_TOKEN=SECRET:ENTRY, "
            "or --insecure if something else guards it"
        )
    arguments: dict[str, Any] = {"run": _run(options, run), "runs_dir": folder[-1] if folder else None}
    arguments |= {"step": step, "name": model, "placement": placement}
    split = _split(placement)
    ranks = split or _serving_ranks(options)
    arguments |= {"workers": None if split else ranks, "insecure": insecure or None}
    given = {key: value for key, value in arguments.items() if value is not None}
    return Work("serve", _name(options, "serve", run), (), run, ranks, service=given)


def _name(options: JobOptions, kind: str, run: str) -> str:
    return options.name or fresh_name(f"{kind}-{posixpath.basename(run.rstrip('/'))}")


def _split(placement: str | None) -> int | None:
    """Ranks of nA:mF, None of colocated ones, which are as many as there are GPUs."""
    if placement in (None, "colocated"):
        return None
    match = re.fullmatch(r"([1-9]\d{0,3})A:([1-9]\d{0,3})F", placement or "", re.ASCII)
    if not match:
        raise InvalidInput(f"--placement {quote(placement)} is neither colocated nor nA:mF: write, say, 2A:2F")
    return int(match[1]) + int(match[2])


def _serving_ranks(options: JobOptions) -> int:
    return options.nodes * max(options.gpus_per_node, 1)


def _run(options: JobOptions, run: str) -> str:
    if is_url(run):
        check_url(run)
        if run.partition("://")[0] in _OF_A_PROCESS:
            raise InvalidInput(f"RUN {quote(run)} is not where the cluster's pods can read it: give s3://… or gs://…")
    elif not run or not run.isprintable() or run.startswith("-"):
        raise InvalidInput(
            f"RUN {quote(run)} is not a run: give its name, its path on a --volume, or its URL in an object store"
        )
    elif run.startswith("/"):
        _check_place(options, "RUN", run, "run")
    return run


def _runs_dir(options: JobOptions, run: str, runs: str | None) -> tuple[str, ...]:
    """``--runs-dir`` of a command about a run; a run in an object store needs none, and no volume."""
    if not is_url(run):
        return ("--runs-dir", places(options, runs).runs)
    if runs is not None:
        raise InvalidInput(f"--runs-dir {quote(runs)} is where names of runs are looked for, and RUN is a URL: drop it")
    return ()


def _within(path: str, folder: str) -> bool:
    """Whether ``path`` is absolute and lies in ``folder``."""
    plain = posixpath.normpath(path)
    return path.startswith("/") and (plain == folder or plain.startswith(f"{folder}/"))
