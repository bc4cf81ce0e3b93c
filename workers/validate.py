"""Loss over validation documents."""

from __future__ import annotations

import math
from typing import Any

import torch

from shoal.workers.data.loader import ValLoader
from shoal.workers.model import Transformer


@torch.no_grad()
def validate(model: Transformer, loader: ValLoader) -> dict[str, Any]:
    """Nats a token, and bits a byte of the documents' text, over all ranks. Collective: all ranks call it."""
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for whole in loader:
        part = model.own_part(whole)
        batch = part.to(device)
        sums[0] += model.loss_sum(model(batch), batch.targets).double()
        sums[1] += part.targets_count  # counted on the host: on the device it would be waited for
    nats, predicted = model.mesh.world.all_reduce(sums).tolist()
    return {
        "loss": nats / max(1.0, predicted),
        "bits_per_byte": nats / math.log(2) / loader.bytes,
        "tokens": loader.tokens,
        "bytes": loader.bytes,
    }
