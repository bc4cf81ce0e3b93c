"""One rank of ``shoal bench context``: trains a few steps, without Ray, and says how they went."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shoal.jobs.recipe import load_recipe
from shoal.kernels.moe import load_fractions
from shoal.workers.config import Recipe
from shoal.workers.exchange import watched
from shoal.workers.machine import spare_collector
from shoal.workers.mesh import make_mesh
from shoal.workers.model.load import MoELoad
from shoal.workers.placement import Placement
from shoal.workers.symmetric import Inbox
from shoal.workers.trainer import Trainer

RECIPE = "nsa-64k-small"
PASSES, FIRST = 16, 1e-3
"""Forward passes that move the biases of experts to where a long run has them, and their rate to begin with."""
ENOUGH = 1 << 17  # tokens of a pass
SETTLING, FEWEST = 15.0, 4  # seconds after which no pass follows, once there are so many


def rank_main(
    process: int,
    places: list[tuple[int, int]],
    cases: list[tuple[list[str], int, str]],
    corpus: str,
    seconds: float,
    least: int,
    folder: str,
) -> None:
    """Trains one of the cases that run side by side. cases: settings, ranks and meeting point of each; places: case and
    rank of each process. The first rank of a case writes a line of JSON to ``folder/records-CASE`` for each step."""
    index, rank = places[process]
    settings, ranks, store = cases[index]
    recipe = load_recipe(RECIPE, settings)
    device = torch.device("cpu")
    if recipe.parallel.device == "cuda":
        device = torch.device("cuda", process)
        torch.cuda.set_device(device)
    torch.set_num_threads(1)  # as ranks of training have them beside a GPU
    if ranks > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, f"file://{store}", timedelta(minutes=3), ranks, rank)
    with Path(folder, f"records-{index}" if rank == 0 else "unused").open("a", buffering=1) as file:
        for record in train(recipe, Path(corpus), rank, device, seconds, least):
            if rank == 0:
                file.write(json.dumps(record) + "\n")
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def train(
    recipe: Recipe, corpus: Path, rank: int, device: torch.device, seconds: float, least: int
) -> Iterator[dict[str, Any]]:
    """Trains up to ``train.steps``, or for so many seconds once there are ``least`` steps; collective over all ranks.

    Yields the record of each step, with its time on the wall (the GPU is done with it: its facts were read), the
    context, recomputed layers, ``device_load``, of the rank with most rows for its experts, as a multiple of a fair
    share, the mean over layers, ``settling``, the same in each pass before the first step, ``rows_put``, whether rows
    are put into the memory of other ranks, and ``peak_bytes``, the most that a rank has allocated since the start,
    slots for rows of other ranks among it.
    """
    mesh = make_mesh(Placement.of(recipe), rank, device)
    trainer = Trainer(_within_a_long_run(recipe), corpus, None, mesh, device)
    passes = PASSES if device.type == "cuda" else 1  # on a CPU nothing is measured that more would change
    settling = [device_load(trainer, load_fractions(counts).tolist()) for counts in settle(trainer, passes)]
    settings = {"settling": settling, "context": recipe.train.sequence, "recompute": recipe.train.recompute}
    began = time.monotonic()
    try:
        for step in range(1, recipe.train.steps + 1):
            start = time.perf_counter()
            with watched(trainer.watch.clock):
                record = trainer.train_step()
            del record["gates"], record["coverage"]
            busiest = device_load(trainer, record.pop("load"))
            # the host's clocks differ: whether there is time for another step is decided together
            facts = torch.tensor([time.monotonic() - began, _peak(trainer)], dtype=torch.float64, device=device)
            passed, peak = mesh.world.all_gather(facts).amax(0).tolist()
            wall = time.perf_counter() - start
            load = {"device_load": busiest, "rows_put": bool(_inboxes(trainer))}
            yield {**record, "wall_seconds": wall, **settings, **load, "peak_bytes": int(peak)}
            if step == 1:
                spare_collector()
            if step >= least and passed > seconds:
                break
        trainer.weights.finish()  # NCCL keeps what was not waited for, as long as there are its groups
    finally:
        gc.unfreeze()  # this model goes


def device_load(trainer: Trainer, load: list[list[float]]) -> float:
    """Rows of the rank that has most for its experts, as a multiple of a fair share, the mean over layers. load: of
    each layer's experts, likewise."""
    rows = [max(layer) for layer in trainer.by_place(load)]
    return sum(rows) / len(rows) if rows else 1.0


def _within_a_long_run(recipe: Recipe) -> Recipe:
    """A run looks at what was chosen some 200 times in all, which a short one would in each step."""
    table = recipe.train.model_copy(update={"steps": recipe.train.steps + 1_000_000, "log_every": 1})
    return recipe.model_copy(update={"train": table})


@torch.no_grad()
def settle(trainer: Trainer, passes: int = PASSES) -> list[torch.Tensor]:
    """Evens out the load of experts by their biases, where there are any, before the first step; collective. Returns
    ``[layers, experts]`` of each pass, the tokens that chose each expert before it moved the biases.

    Routers that are new send tokens to few experts, and a benchmark has fewer steps than biases take. So each expert's
    rate grows as long as its load stays on one side of the mean, and is halved when it changes sides (Rprop). Of passes
    that take long there are fewer. No bias evens out tokens that are alike within a sequence and others in the next:
    see ``SETTLED`` of scale_series.
    """
    layers = trainer.model.moe_layers
    found: list[torch.Tensor] = []
    if not trainer.recipe.balance.bias_rate or not layers:
        return found
    rates = torch.full((len(layers), trainer.recipe.moe.experts), FIRST, device=trainer.device)
    before = torch.zeros_like(rates)
    began = time.monotonic()
    for done in range(passes):
        if done == 1:  # in the first one kernels were compiled
            began = time.monotonic()
        passed = torch.tensor([time.monotonic() - began], dtype=torch.float64, device=trainer.device)
        if done >= FEWEST and trainer.mesh.world.all_gather(passed).max() > SETTLING:
            break
        counts = counts_of(trainer)
        found.append(counts)
        side = (counts.sum(1, keepdim=True) - counts * counts.shape[1]).sign().float()
        rates *= torch.where(before * side < 0, 0.5, torch.where(before * side > 0, 1.2, 1.0))
        before = side
        for layer, own, rate in zip(layers, counts, rates, strict=True):
            layer.nudge(own, rate)
    return found


def counts_of(trainer: Trainer) -> torch.Tensor:
    """``[layers, experts]``: tokens of each expert, of the next batch's first micro-batches."""
    t, total = trainer.recipe.train, torch.zeros(())
    for i, batch in enumerate(trainer.loader.next(), 1):
        load = MoELoad(1)
        trainer.model(batch.to(trainer.device), load)
        assert load.counts is not None
        total = load.counts + total.to(trainer.device)
        if i * (t.batch // t.accumulate) * t.sequence >= ENOUGH:
            break
    return total


def _peak(trainer: Trainer) -> int:
    """Bytes allocated at most since the start, and slots that rows are put into, which PyTorch's allocator does not
    see; 0 on a CPU."""
    if trainer.device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated() + sum(box.nbytes for box in _inboxes(trainer))


def _inboxes(trainer: Trainer) -> set[Inbox]:
    """Where other ranks put rows; layers share them."""
    boxes = {layer.dispatcher.inbox for layer in trainer.model.moe_layers}
    return {box for box in boxes if box}
