"""Text from a model, one forward pass of the whole sequence a token: plain, for samples and short answers."""

from __future__ import annotations

import torch

from shoal.workers.data.batch import IGNORE, PackedBatch, empty_batch
from shoal.workers.model import Transformer


@torch.no_grad()
def sample(
    model: Transformer,
    prompt: list[int],
    count: int,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
) -> list[int]:
    """Up to ``count`` tokens after ``prompt`` (at least one token); temperature 0 is greedy; ends at token ``stop``.

    Collective: all ranks call it; the first attention rank holds the sequence and returns it, others return [].
    A sequence longer than the model's context keeps its newest tokens.
    """
    mesh, device = model.mesh, next(model.parameters()).device
    leads = mesh.attention is not None and mesh.attention.index == 0
    generator = torch.Generator().manual_seed(seed)
    tokens, context = list(prompt), model.recipe.model.context
    for _ in range(count):
        batch = _as_batch(tokens[-context:]) if leads else empty_batch()
        hidden = model(batch.to(device))
        if not leads:
            continue
        logits = model.logits(hidden[-1:])[0].double().cpu()
        tokens.append(_choose(logits, temperature, top_k, top_p, generator))
        if tokens[-1] == stop and mesh.world.size == 1:  # with several ranks the others would wait for this one
            break
    new = tokens[len(prompt) :]
    return (new[: new.index(stop)] if stop in new else new) if leads else []


def _as_batch(tokens: list[int]) -> PackedBatch:
    ids = torch.tensor(tokens, dtype=torch.int64)
    return PackedBatch(ids, torch.full_like(ids, IGNORE), torch.arange(len(tokens)), (0, len(tokens)))


def _choose(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    ordered, ids = logits.sort(descending=True, stable=True)
    weights = torch.softmax((ordered - ordered[0]) / temperature, -1)  # finite for any temperature
    keep = (weights.cumsum(-1) - weights < top_p) & (torch.arange(len(weights)) < (top_k or len(weights)))
    keep[0] = True
    return int(ids[torch.multinomial(weights * keep, 1, generator=generator)])
