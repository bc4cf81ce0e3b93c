"""A model's weights out of a checkpoint: every rank reads what it hosts, whatever ranks wrote it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from shoal.workers.checkpoint import Checkpointer
from shoal.workers.checkpoint_files import checkpoint_path, read_state
from shoal.workers.config import Recipe
from shoal.workers.expert_plan import Plan
from shoal.workers.mesh import Mesh
from shoal.workers.model import Transformer
from shoal.workers.model.feedforward import named_biases, named_views


def load_model(
    recipe: Recipe,
    checkpoints: Path,
    step: int,
    mesh: Mesh | None = None,
    device: torch.device | str = "cpu",
    plan: Plan | None = None,
) -> Transformer:
    """The model of a rank, ready to infer. Its dtype is the checkpoint's. Nothing in the folder is changed. plan: where
    the routed experts lie; None: in equal runs.

    Raises: InvalidInput for a checkpoint of other sizes.
    """
    saved = read_state(checkpoint_path(checkpoints, step))
    train = recipe.train.model_copy(update={"dtype": saved.get("dtype", recipe.train.dtype)})
    model = Transformer(recipe.model_copy(update={"train": train}), mesh, device, draw=False, plan=plan)
    # Rank 1 of a world of 1: it reads by itself, and does not tidy up the folder as rank 0 would.
    Checkpointer(checkpoints, 1, None, 1, 1).load(step, weights_of(model))
    return model.eval()


def weights_of(model: Transformer) -> dict[str, Tensor]:
    """What a checkpoint holds of a model itself, by its names there: views of the parameters, and experts' biases."""
    out = {f"model.{name}": bias for name, bias in named_biases(model)}
    for name, parameter, index in named_views(model):
        out[f"model.{name}"] = parameter.data if index is None else parameter.data[index]
    return out
