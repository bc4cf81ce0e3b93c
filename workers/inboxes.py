"""Which way the rows of a training reach experts on other ranks: exchanged, or put into the memory of a node's GPUs."""

from __future__ import annotations

import torch

from shoal.workers import symmetric
from shoal.workers.errors import InvalidInput
from shoal.workers.model.transformer import Transformer
from shoal.workers.slots import ENOUGH, capacity, needed


def open_inbox(model: Transformer) -> None:
    """Lets the MoE layers of a model to be trained put their rows, as ``parallel.dispatch`` says. Collective.

    Layers share one inbox, since they take turns. Raises InvalidInput for ``put`` where rows cannot be put.
    """
    recipe, mesh, layers = model.recipe, model.mesh, model.moe_layers
    wanted = recipe.parallel.dispatch
    if not layers or mesh.dispatch.size == 1 or wanted == "exchanged":
        return
    if wanted == "auto" and needed(recipe, mesh.dispatch.size) < ENOUGH:
        return
    box, d = None, layers[0].dispatcher
    if not d.apart and model.dtype != torch.float64:  # whose gates would be float64
        choices, slots = recipe.moe.top_k + layers[0].sent_shared, len(d.ways.hosts)
        box = symmetric.inbox(
            mesh.dispatch, capacity(recipe), recipe.model.hidden, model.dtype, choices, slots, d.device
        )
    if box is None and wanted == "put":
        raise InvalidInput(
            "parallel.dispatch='put' needs ranks that host tokens and experts alike, in 16 or 32 bits, on GPUs of one "
            "node that each rank sees and reaches (Ray's actors see their own alone): set parallel.dispatch='auto'"
        )
    for layer in layers:
        layer.dispatcher.inbox = box
