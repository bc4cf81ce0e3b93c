"""Run folders, read: what a run is, how far it came, how it went. Needs neither torch nor Ray, and changes nothing."""

from __future__ import annotations

import contextlib
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from shoal.jobs.report.journal import Record, read_records
from shoal.workers.checkpoint_files import list_checkpoints
from shoal.workers.errors import InvalidInput, NotFound
from shoal.workers.records import PROFILE, TABLE

RECIPE, METRICS, CHECKPOINTS = "recipe.toml", "metrics.jsonl", "checkpoints"


@dataclass(frozen=True)
class RunSummary:
    """One line of ``shoal runs list``. What a run has not written yet is None.

    step: the last one trained, of ``steps``. loss: of that step, in nats a token. bits_per_byte: of the last
    validation. checkpoints: their steps. updated: when the run last wrote, ISO 8601 in UTC.
    """

    name: str
    recipe: str | None
    step: int | None
    steps: int | None
    loss: float | None
    bits_per_byte: float | None
    checkpoints: tuple[int, ...]
    updated: str


@dataclass(frozen=True)
class RunDetails:
    """``shoal runs show``. ``curve``: ``(step, training loss)``; ``evals`` and ``events``: lines of metrics.jsonl.

    dispatch: which way rows went to other ranks' experts at last, and why; None where that is not on record. profile:
    lines of the table of what took most time, where steps were traced.
    """

    summary: RunSummary
    folder: Path
    tokens: int | None
    tokens_per_second: float | None
    expert_imbalance: float | None
    dispatch: str | None
    curve: tuple[tuple[int, float], ...]
    evals: tuple[Record, ...]
    events: tuple[Record, ...]
    plots: tuple[str, ...]
    profile: tuple[str, ...]


def list_runs(root: Path) -> list[RunSummary]:
    """All runs below ``root``, the one that wrote last at the end; none when there is no such folder.

    Raises InvalidInput when ``root`` is a file or cannot be read.
    """
    return sorted((_summary(folder, _records(folder)) for folder in _run_folders(root)), key=lambda run: run.updated)


def show_run(root: Path, name: str) -> RunDetails:
    """Everything a run tells of itself. Raises NotFound, with the nearest names, when ``root`` has no such run."""
    folder = find_run(root, name)
    records = _records(folder)
    trained = _by_step(records, "train")
    last = trained[-1] if trained else {}
    events = tuple(record for record in records if record["kind"] == "event")
    dispatch = [record.get("text") for record in events if record.get("event") == "dispatch"]
    return RunDetails(
        summary=_summary(folder, records),
        folder=folder,
        tokens=last.get("tokens"),
        tokens_per_second=last.get("tokens_per_second"),
        expert_imbalance=last.get("expert_imbalance"),
        dispatch=dispatch[-1] if dispatch else None,
        curve=tuple((r["step"], r["loss"]) for r in trained if isinstance(r.get("loss"), int | float)),
        evals=tuple(_by_step(records, "eval")),
        events=events,
        plots=tuple(sorted(path.name for path in folder.glob("*.png"))),
        profile=_lines(folder / PROFILE / TABLE),
    )


def find_run(root: Path, name: str) -> Path:
    """A run by its folder, or by its name in ``root``. Raises NotFound with near names, or with what there is."""
    for path in (Path(name), root / name):
        if name and _is_run(path) and (path == Path(name) or ".." not in path.relative_to(root).parts):
            return path
    folders = {folder.name: folder for folder in _run_folders(root)}
    if name in folders:
        return folders[name]
    near = get_close_matches(name, folders, n=3)
    if near:
        remedy = f"did you mean {' or '.join(near)}"
    elif folders:
        remedy = f"there are {', '.join(sorted(folders))}"
    else:
        remedy = "that folder holds no runs; give another --runs-dir, or start one with shoal train"
    raise NotFound(f"run {name!r} is neither a run's folder nor in {root}: {remedy}")


def _run_folders(root: Path) -> list[Path]:
    if not root.exists():
        return []
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise InvalidInput(f"--runs-dir {root} cannot be read ({error.strerror}): give a folder of runs") from None
    return [entry for entry in entries if not entry.name.startswith(".") and _is_run(entry)]  # hidden: not finished


def _is_run(folder: Path) -> bool:
    try:
        return (folder / RECIPE).is_file() or (folder / METRICS).is_file()
    except OSError:  # a name that is too long, or may not be looked at
        return False


def _records(folder: Path) -> list[Record]:
    """Lines of metrics.jsonl that are what they should be; a run that is being written may end in half a line."""
    try:
        found = list(read_records(folder / METRICS))
    except OSError as error:
        raise InvalidInput(f"{folder / METRICS} cannot be read ({error.strerror}): make it readable") from None
    return [record for record in found if isinstance(record.get("step"), int) and "kind" in record]


def _by_step(records: list[Record], kind: str) -> list[Record]:
    """Records of a kind, by step; of a step that was computed twice, the last."""
    steps = {record["step"]: record for record in records if record["kind"] == kind}
    return [steps[step] for step in sorted(steps)]


def _summary(folder: Path, records: list[Record]) -> RunSummary:
    trained, evals = _by_step(records, "train"), _by_step(records, "eval")
    last = trained[-1] if trained else {}
    recipe = _recipe(folder)
    train = recipe.get("train")
    return RunSummary(
        name=folder.name,
        recipe=recipe.get("name"),
        step=last.get("step"),
        steps=train.get("steps") if isinstance(train, dict) else None,
        loss=last.get("loss"),
        bits_per_byte=evals[-1].get("bits_per_byte") if evals else None,
        checkpoints=tuple(info.step for info in list_checkpoints(folder / CHECKPOINTS) if info.manifest),
        updated=_updated(folder),
    )


def _recipe(folder: Path) -> dict[str, Any]:
    """The run's recipe as plain tables, unchecked: a list of runs shows runs of older versions too."""
    with contextlib.suppress(OSError, ValueError):
        return tomllib.loads((folder / RECIPE).read_text(encoding="utf-8"))
    return {}


def _lines(file: Path) -> tuple[str, ...]:
    """Of a text; none where it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return tuple(file.read_text("utf-8").splitlines())
    return ()


def _updated(folder: Path) -> str:
    newest = max(path.stat().st_mtime for path in (folder / RECIPE, folder / METRICS) if path.exists())
    return datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds")
