"""What a rank of a training holds, weights, masters and moments, under names that no placement changes.

Checkpoints go by these names, experts that change their rank, and weights that a run begins with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from shoal.workers.checkpoint import Checkpointer
from shoal.workers.checkpoint_files import read_state
from shoal.workers.expert_plan import Plan
from shoal.workers.model import Transformer
from shoal.workers.model.feedforward import named_biases, named_views
from shoal.workers.optimizer import MasterAdamW
from shoal.workers.rehome import rehome
from shoal.workers.shards import as_part, local

MASTER = "optim.master."


def tensors_of(model: Transformer, parameters: Mapping[str, nn.Parameter], optimizer: MasterAdamW) -> dict[str, Tensor]:
    """Everything a checkpoint holds of a rank. Parts of tensors are DTensors. parameters: the optimizer's, in its
    order, by their names in the model."""
    index_of = {id(p): i for i, p in enumerate(parameters.values())}
    out = {f"model.{name}": bias for name, bias in named_biases(model)}
    for name, parameter, part in named_views(model, parameters):
        weights = local(parameter).detach()
        # no copy, unless the weights are masters, which are in a checkpoint beside what they are rounded to
        held = [("model", (weights if part is None else weights[part]).to(model.dtype))]
        held += [(f"optim.{kind}", x) for kind, x in optimizer.state_of(index_of[id(parameter)], part)]
        out |= {f"{kind}.{name}": as_part(tensor, parameter, part) for kind, tensor in held}
    return out


@torch.no_grad()
def move_experts(model: Transformer, plan: Plan, tensors: Callable[[], dict[str, Tensor]]) -> None:
    """Gives the model's experts to the ranks that a plan says, with all that ranks hold of them. tensors: tells what
    this rank holds, as :func:`tensors_of` does. Collective."""
    layers = model.moe_layers
    moves = [(i, homes) for i, (layer, homes) in enumerate(zip(layers, plan, strict=True)) if layer.homes != homes]
    if not moves:
        return
    before = _by_layer(tensors())
    for i, homes in moves:
        layers[i].assign(homes)
    after, first = _by_layer(tensors()), len(model.layers) - len(layers)
    for i, _ in moves:  # one at a time: what moves is in memory three times meanwhile
        rehome(model.mesh.world, before.get(first + i, {}), after.get(first + i, {}))


def take_weights(checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills the weights and masters among a rank's tensors with those of another run's checkpoint; of one without
    masters, weights become masters. Experts' biases stay as they are where it has none.

    Raises: ``InvalidInput`` for weights of other sizes, or of another dtype.
    """
    saved = read_state(checkpoint)
    step = int(saved["step"])
    weights = {k: v for k, v in tensors.items() if k.startswith(("model.", MASTER))}
    masters = {k: weights.pop(k) for k in list(weights) if k.startswith(MASTER) and saved.get("weights_alone")}
    if not saved.get("biased"):
        weights = {k: v for k, v in weights.items() if not k.endswith(".moe.bias")}
    # Rank 1 of a world of 1: it reads by itself, and does not tidy up the folder as rank 0 would.
    Checkpointer(checkpoint.parent, 1, None, 1, 1).load(step, weights)
    for name, master in masters.items():
        local(master).copy_(local(weights[f"model.{name.removeprefix(MASTER)}"]))


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Those of routed experts, by the layer they are in."""
    out: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if found := re.search(r"\.layers\.(\d+)\.moe\.experts\.", name):
            out.setdefault(int(found[1]), {})[name] = tensor
    return out
