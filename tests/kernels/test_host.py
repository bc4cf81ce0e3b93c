"""What a new pack makes the host do for its device: tell it where documents begin, and never ask it anything."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from shoal.kernels.host import numbers_on, sent_to
from shoal.kernels.nsa import BlockSizes, make_layout
from shoal.kernels.nsa.compress import own_blocks
from shoal.kernels.nsa.layout import Layout
from shoal.kernels.nsa.rows import Rows
from shoal.kernels.nsa.triton_tables import make_tables

SIZES = BlockSizes(cmp_block=32, cmp_stride=16, slc_block=64, slc_count=16, slc_initial=1, slc_local=2, window=512)
TOKENS, DOCUMENTS = 40_000, 30
TABLES: dict[str, Callable[[Layout], Any]] = {
    "layout": lambda layout: layout,
    "tiles": lambda layout: layout.tiles,
    "tables": make_tables,
    "own blocks": own_blocks,
    "inverse": lambda layout: own_blocks(layout).inverse,
}


class Sent(TorchDispatchMode):
    """Counts copies from the host to another device, and the elements that they copy."""

    copies = elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.device.type == "cpu" and isinstance(result, Tensor) and result.is_meta:
            self.copies += 1
            self.elements += x.numel()
        return result


def tensors(made: Any) -> Iterator[Tensor]:
    """All tensors of a table."""
    if isinstance(made, Tensor):
        yield made
    for part in [getattr(made, f.name) for f in fields(made)] if is_dataclass(made) else ():
        yield from tensors(part)
    for part in made if isinstance(made, tuple) else ():
        yield from tensors(part)


@pytest.mark.parametrize("what", TABLES)
@pytest.mark.parametrize("queries", [None, Rows.of([(1_280, 5_120), (30_720, 34_560)])])
def test_a_device_is_told_where_documents_begin(what: str, queries: Rows | None) -> None:
    """On a device from which nothing can be read: a host that asked it for a number would fail. Few copies, of as
    many numbers as there are documents, whatever the tokens; what is made there has the sizes of a CPU's."""
    rng = random.Random(what)  # other documents each time: tables of a pack are remembered
    cu = (0, *sorted(rng.sample(range(1, TOKENS), DOCUMENTS - 1)), TOKENS)
    with Sent() as sent:
        there = make_layout(cu, SIZES, "meta", queries=queries)
        made = TABLES[what](there)
    assert 0 < sent.copies <= 12
    assert sent.elements <= 12 * len(cu)
    here = TABLES[what](make_layout(cu, SIZES, "cpu", there.tile, queries=queries))
    mine, theirs = ([(x.shape, x.dtype) for x in tensors(x)] for x in (made, here))
    assert mine == theirs
    assert all(x.is_meta for x in tensors(made))


@pytest.mark.gpu
def test_the_host_goes_on_while_a_gpu_is_busy() -> None:
    """Numbers for a GPU are on their way at once, behind what it is doing; they are right, though the host has let go
    of its memory by then and other numbers have been put there."""
    device = torch.device("cuda")
    numbers_on(device, range(100_000))  # pinned memory is taken from the driver once, which may wait
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    busy = torch.cuda.Event()
    busy.record()
    there = [numbers_on(device, range(i, 100_000 + i)) for i in range(8)]
    rows = sent_to(device, torch.arange(100_000))
    assert not busy.query(), "the host has waited"
    for i, numbers in enumerate(there):
        assert torch.equal(numbers.cpu(), torch.arange(i, 100_000 + i))
    assert torch.equal(rows.cpu(), torch.arange(100_000))
