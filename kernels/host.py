"""What the host has for a device: copied behind the work that is launched already, and the host goes on at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sent_to(device: torch.device, x: Tensor) -> Tensor:
    """A tensor of the host on ``device``. To a GPU it goes from pinned memory, which PyTorch keeps until the copy is
    done: from other memory the host would wait for all that the GPU has to do before."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def numbers_on(device: torch.device, numbers: Sequence[Any], dtype: torch.dtype = torch.int64) -> Tensor:
    """``numbers``, ints or rows of as many of them, as a tensor on ``device``."""
    return sent_to(device, torch.tensor(numbers, dtype=dtype))
