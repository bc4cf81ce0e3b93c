"""Which way the rows of a training reach experts on other ranks: exchanged, or put into the memory of a node's GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from shoal.workers import symmetric
from shoal.workers.errors import InvalidInput
from shoal.workers.model.transformer import Transformer
from shoal.workers.slots import capacity, travels, why_exchanged


def open_inbox(model: Transformer) -> str:
    """Lets the MoE layers of a model to be trained put their rows, as ``parallel.dispatch`` says. Collective.

    Layers share one inbox, since they take turns. Returns which way rows travel, in a sentence for the run's records;
    "" where none do. Raises InvalidInput for ``put`` where rows cannot be put.
    """
    recipe, layers, untold = model.recipe, model.moe_layers, ""
    if not travels(recipe):
        return ""
    why = why_exchanged(recipe, model.dtype.itemsize)
    if not why:
        d, moe = layers[0].dispatcher, recipe.moe
        sizes = capacity(recipe), recipe.model.hidden, model.dtype, moe.top_k + layers[0].sent_shared
        try:
            box = symmetric.inbox(d.group, *sizes, len(d.ways.hosts), d.device)
        except symmetric.OutOfReach as error:
            why = str(error)
        else:
            untold = box.untold
            for layer in layers:
                layer.dispatcher.inbox = box
    if why and recipe.parallel.dispatch == "put":
        raise InvalidInput(f"parallel.dispatch='put', and rows cannot be put: {why}; set parallel.dispatch='auto'")
    slower = f", and so are counts that hosts read, which takes longer: {untold}" if untold else ""
    return f"rows for other ranks' experts are {f'exchanged: {why}' if why else f'put into their memory{slower}'}"


def rows_awaited(model: Transformer) -> AbstractContextManager[None]:
    """While a model trains or is validated: who waits in vain for rows that other ranks put fails with RowsMissing."""
    boxes = [layer.dispatcher.inbox for layer in model.moe_layers]
    return boxes[0].patience() if boxes and boxes[0] else nullcontext()


@contextmanager
def rows_exchanged(model: Transformer) -> Iterator[None]:
    """Rows are exchanged however they travel else: slots have room for a micro-batch, and a sample may be longer. All
    ranks call it alike."""
    dispatchers = [layer.dispatcher for layer in model.moe_layers]
    boxes = [each.inbox for each in dispatchers]
    try:
        for each in dispatchers:
            each.inbox = None
        yield
    finally:
        for each, box in zip(dispatchers, boxes, strict=True):
            each.inbox = box
