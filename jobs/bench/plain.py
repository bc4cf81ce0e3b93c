"""Training in one process without Ray, to compare with: ``python -m shoal.jobs.bench.plain KIND CORPUS STEPS THREADS``.

THREADS is how many the process computes with.
Prints a JSON list: when each step ended, in seconds since 1970. ``trainer`` runs the class that Ray's actors run.
``loop`` is what one would write by hand over the same model and batches: backward, clip, ``torch.optim.AdamW``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.workers.config import Recipe

if TYPE_CHECKING:
    from shoal.workers.mesh import Mesh

Step = Callable[[], object]


def trainer_step(recipe: Recipe, corpus: Path, mesh: Mesh) -> Step:
    """A step of :class:`Trainer`."""
    import torch

    from shoal.workers.trainer import Trainer

    return Trainer(recipe, corpus, None, mesh, torch.device("cpu")).train_step


def loop_step(recipe: Recipe, corpus: Path, mesh: Mesh) -> Step:
    """A step written by hand; the learning rate stays at its peak, which costs the same."""
    import torch
    from torch.nn.utils import clip_grad_norm_

    from shoal.workers.data.loader import TrainLoader
    from shoal.workers.model import Transformer
    from shoal.workers.model.load import MoELoad

    t = recipe.train
    torch.manual_seed(t.seed)
    model = Transformer(recipe, mesh, torch.device("cpu"))
    optimizer = torch.optim.AdamW(
        model.parameters(), t.learning_rate, (t.beta1, t.beta2), t.adam_eps, t.weight_decay, fused=True
    )
    shuffling = (recipe.data.shuffle_groups, recipe.data.shuffle_tokens)
    loader = TrainLoader(corpus, t.sequence, t.batch, t.accumulate, t.seed, *shuffling, (0, 1))

    def step() -> float:
        (batch,) = loader.next()
        load = MoELoad(t.batch * t.sequence)
        loss = model.loss_sum(model(batch, load), batch.targets) / batch.targets_count
        if (balance := load.loss(recipe.balance)) is not None:
            loss = loss + balance
        loss.backward()
        clip_grad_norm_(model.parameters(), t.clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


KINDS = {"trainer": trainer_step, "loop": loop_step}


def ends(kind: str, recipe: Recipe, corpus: Path, steps: int) -> list[float]:
    """Trains; when each step ended, in seconds since 1970."""
    from shoal.workers.mesh import make_mesh
    from shoal.workers.placement import Placement

    step = KINDS[kind](recipe, corpus, make_mesh(Placement.of(recipe)))
    times = []
    for _ in range(steps):
        step()
        times.append(time.time())
    return times


def main(kind: str, corpus: str, steps: str, threads: str) -> None:
    """Trains ``tiny`` on one rank."""
    import torch

    from shoal.jobs.recipe import load_recipe

    torch.set_num_threads(int(threads))
    recipe = load_recipe("tiny", overrides={"parallel.ranks": 1, "train.steps": int(steps)})
    print(json.dumps(ends(kind, recipe, Path(corpus), int(steps))))


if __name__ == "__main__":
    main(*sys.argv[1:])
