"""A trained model in this process: one rank, no Ray, weights from a run's newest whole checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.jobs import runs as runs_of
from shoal.jobs.run_folder import RunFolder
from shoal.workers.checkpoint_files import checkpoint_path, last_good, list_checkpoints, verify
from shoal.workers.config import Recipe
from shoal.workers.errors import InvalidInput, NotFound
from shoal.workers.run_store import fetch_run, is_url

if TYPE_CHECKING:
    from shoal.workers.model import Transformer


@dataclass(frozen=True)
class Trained:
    """A model with its recipe and the run that trained it; ``step`` is the checkpoint's."""

    model: Transformer
    recipe: Recipe
    folder: RunFolder
    step: int

    @property
    def corpus(self) -> Path:
        """What it was trained on."""
        return self.folder.corpus()


def find_run(run: str, runs: Path) -> RunFolder:
    """RUN as a folder, or as a name in ``runs``. Raises NotFound."""
    return RunFolder(runs_of.find_run(runs, run))


def open_run(
    run: str, runs: Path, step: int | None, told: Callable[[str], None] = lambda said: None
) -> tuple[RunFolder, int, list[str]]:
    """RUN as a folder, as a name in ``runs``, or as a URL, which is fetched; the step; and what was skipped.

    told: is given a sentence when something is fetched. Raises ShoalError.
    """
    if is_url(run):
        fetched = fetch_run(run, step, told)
        return RunFolder(fetched.folder, run), fetched.step, fetched.skipped
    folder = find_run(run, runs)
    return folder, *choose_step(folder, step)


def choose_step(folder: RunFolder, step: int | None) -> tuple[int, list[str]]:
    """The asked step, or that of the newest whole checkpoint; and what was skipped. Raises NotFound, InvalidInput."""
    checkpoints = folder.path / "checkpoints"
    if step is not None:
        path = checkpoint_path(checkpoints, step)
        if not path.is_dir():
            there = ", ".join(str(found.step) for found in list_checkpoints(checkpoints)) or "none"
            raise NotFound(
                f"{folder.path} has no checkpoint of step {step} (it has {there}): leave --step out for the newest"
            )
        if problems := verify(path):
            raise InvalidInput(f"{path} is damaged ({'; '.join(problems)}): leave --step out for the newest whole one")
        return step, []
    good, damaged = last_good(checkpoints)
    if good is None and damaged:
        raise InvalidInput(f"{folder.path} has no whole checkpoint ({damaged[0]}): restore one")
    if good is None:
        raise NotFound(f"{folder.path} has no whole checkpoint: train it first (shoal train --resume --name NAME)")
    return good.step, damaged


def serving_recipe(folder: RunFolder, sets: Sequence[str] | None, workers: int | None, placement: str | None) -> Recipe:
    """The recipe of a run as its model is to be served: on one rank, unless told otherwise.

    Raises InvalidInput for what does not fit together.
    """
    from shoal.jobs.recipe import load_recipe

    alone = workers is None and placement is None
    split = re.fullmatch(r"(\d+)A:\d+F", placement or "")
    overrides = {
        "parallel.ranks": 1 if alone else workers,
        "parallel.placement": placement or "colocated",
        "parallel.expert": 0,
        "parallel.context": 1,
        # nothing is trained: no experts move, weights are whole, and a batch divides over any attention ranks
        "parallel.rebalance_every": 0,
        "parallel.shard_dense": False,
        "train.accumulate": 1,
        "train.batch": int(split[1]) if split else workers or 1,
    }
    return load_recipe(folder.recipe_file, sets or (), overrides)


def load_trained(folder: RunFolder, step: int, recipe: Recipe | None = None) -> Trained:
    """Loads the weights on this process's device. The dtype is the checkpoint's; ranks and placement do not matter.

    recipe: to be served by; None for the run's.
    """
    import torch

    from shoal.workers.weights import load_model

    serving = recipe is not None
    recipe = recipe or folder.recipe()
    asked = recipe.parallel.device if serving else "auto"
    recipe = recipe.model_copy(update={"parallel": type(recipe.parallel)()})
    device = asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(recipe, folder.path / "checkpoints", step, device=device)
    return Trained(model, model.recipe, folder, step)
