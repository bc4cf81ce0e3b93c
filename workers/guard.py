"""Finds where numbers stopped being finite, once a step has failed."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from shoal.workers.data.batch import PackedBatch
from shoal.workers.mesh import Group
from shoal.workers.model import Transformer
from shoal.workers.shards import local


@torch.no_grad()
def first_bad_layer(model: Transformer, micro: list[PackedBatch], gradients: dict[str, Tensor]) -> str:
    """Names the first layer with a value that is not finite: forward, in order, else backward, from the last layer.

    Collective: every rank calls it with its own rows and gradients, and gets the same answer.
    """
    layers = len(model.layers)
    # one flag a place: embedding, layers, loss; then the gradients of layers, and of everything else
    flags = torch.zeros(2 * layers + 3, device=gradients_device(gradients))
    handles = []

    def watch(place: int, module: torch.nn.Module) -> None:
        def look(_module: torch.nn.Module, _inputs: object, output: Tensor) -> None:
            flags[place] += float(not torch.isfinite(output).all())

        handles.append(module.register_forward_hook(look))

    if model.hosts_attention:
        watch(0, model.embedding)
    for i, layer in enumerate(model.layers):
        watch(1 + i, layer)
    try:
        for batch in micro:
            hidden = model(batch)
            flags[layers + 1] += float(not torch.isfinite(model.loss_sum(hidden, batch.targets)))
    finally:
        for handle in handles:
            handle.remove()
    for name, gradient in gradients.items():
        flags[layers + 2 + _layer_of(name, layers)] += float(not torch.isfinite(gradient).all())
    bad = [place for place, flag in enumerate(model.mesh.world.all_reduce(flags).tolist()) if flag]
    return _describe(bad, layers)


def gradients_device(gradients: dict[str, Tensor]) -> torch.device:
    """The device the gradients are on."""
    return next(iter(gradients.values())).device


def _describe(bad: list[int], layers: int) -> str:
    forward = [p for p in bad if p <= layers + 1]
    if forward:
        place = forward[0]
        what = "the embedding" if place == 0 else "the loss" if place == layers + 1 else f"layers.{place - 1}"
        return f"the output of {what} is not finite"
    backward = [p - layers - 2 for p in bad if layers + 2 <= p < 2 * layers + 2]
    if backward:
        return f"the gradient of layers.{max(backward)} is not finite"
    return "the gradient of the embedding or the head is not finite"


def bad_weight(parameters: Mapping[str, Tensor], layers: int, world: Group, device: torch.device) -> str:
    """Names the first of a model's layers with a weight that is not finite on any rank; else an empty string.
    Collective."""
    flags = torch.zeros(layers + 1, device=device)
    for name, parameter in parameters.items():
        flags[_layer_of(name, layers)] += (~torch.isfinite(local(parameter)).all()).float()
    bad = [i for i, flag in enumerate(world.all_reduce(flags).tolist()) if flag]
    if not bad:
        return ""
    where = f"layers.{bad[0]}" if bad[0] < layers else "the embedding or the head"
    return f"a weight of {where} is not finite after the update"


def _layer_of(name: str, layers: int) -> int:
    """The layer that a parameter is in; ``layers``, one beyond the last, of the embedding and the head."""
    match = re.match(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else layers
