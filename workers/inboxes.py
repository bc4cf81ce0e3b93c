"""Which way the rows of a training reach experts on other ranks: exchanged, or put into the memory of a node's GPUs."""

from __future__ import annotations

from math import comb

import torch

from shoal.workers import symmetric
from shoal.workers.config import Recipe
from shoal.workers.errors import InvalidInput
from shoal.workers.model.transformer import Transformer

ENOUGH = 0.8
"""Of a rank's tokens, how many must need a given other rank, so that all of them are put there: with 64 experts and 6
or 7 of them chosen 0.99 do with 2 ranks, 0.84 or more with 4, 0.6 with 8."""


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


def capacity(recipe: Recipe) -> int:
    """Tokens that a rank has at most: of a micro-batch, whose rows attention ranks divide among them."""
    t, p = recipe.train, recipe.parallel
    tokens = t.batch // t.accumulate * t.sequence
    if p.context == 1:
        return tokens // p.attention_ranks
    # two segments, each of which a rank's share of an uneven division makes longer by at most one block
    block = recipe.attention.slc_block if recipe.attention.kind == "nsa" else 1
    return -(-tokens // p.attention_ranks) + 2 * block


def needed(recipe: Recipe, ranks: int) -> float:
    """Of tokens whose choices are even, the share that needs a given one of the ranks that share the experts."""
    moe = recipe.moe
    if 0 < recipe.route.max_devices < recipe.balance.device_groups:
        return 0.0  # which keeps tokens away from ranks
    elsewhere = moe.experts - moe.experts // ranks
    return 1 - comb(elsewhere, moe.top_k) / comb(moe.experts, moe.top_k)
