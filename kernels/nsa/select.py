"""Which blocks a query group attends to (NSA eq. 8-12)."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.nsa.layout import BlockSizes


def importance(p_cmp: Tensor, blocks: int, sizes: BlockSizes) -> Tensor:
    """Importance of each selection block (NSA eq. 9, 10): compressed attention weight, times the chunks shared.

    p_cmp: ``[…, C]`` weights on the first C compression blocks of a document, summed over the heads of the group.
    Returns ``[…, blocks]``. A chunk is ``d`` keys: compression block i holds chunks ``i … i + l/d - 1``, selection
    block j holds chunks ``j·l'/d … (j+1)·l'/d - 1``. Terms are added one by one in the same order for every block, so
    that equal weights give equal importance to the last bit.
    """
    per_cmp, per_slc = sizes.cmp_block // sizes.cmp_stride, sizes.slc_block // sizes.cmp_stride
    span = blocks * per_slc
    right = max(0, span - p_cmp.shape[-1])
    padded = torch.nn.functional.pad(p_cmp, (per_cmp - 1, right))
    total: Tensor | None = None
    for offset in range(1 - per_cmp, per_slc):
        shared = min(per_cmp, per_slc, offset + per_cmp, per_slc - offset)
        low = offset + per_cmp - 1
        term = padded[..., low : low + span : per_slc]
        total = shared * term if total is None else total.add_(term, alpha=shared)
    assert total is not None
    return total


def select(scores: Tensor, positions: Tensor, sizes: BlockSizes) -> Tensor:
    """The ``n`` best blocks of each query, forced ones counted (NSA eq. 11); of equals, the lower index.

    scores: ``[…, blocks]`` importance, ``blocks > n``, such as ``[KV, rows, blocks]``; it is overwritten. positions:
    int64, each query's position in its document; ``[…]`` or what broadcasts to it. Returns a bool mask of the shape of
    scores; blocks that begin after the query are never kept, so that early queries keep fewer than n.
    """
    return keep_best(scores, *forced_blocks(positions[..., None], scores.shape[-1], sizes), sizes)


def forced_blocks(positions: Tensor, blocks: int, sizes: BlockSizes) -> tuple[Tensor, Tensor]:
    """Of queries at ``positions [..., 1]`` the blocks that are always selected, and those that begin after the query.

    Both ``[…, blocks]`` bool; ``forced`` may hold later blocks.
    """
    block = torch.arange(blocks, device=positions.device)
    own = torch.div(positions, sizes.slc_block, rounding_mode="floor")
    return (block < sizes.slc_initial) | (block > own - sizes.slc_local), block > own


def keep_best(scores: Tensor, forced: Tensor, later: Tensor, sizes: BlockSizes) -> Tensor:
    """:func:`select`, given :func:`forced_blocks`, which do not depend on the layer."""
    scores.masked_fill_(forced, torch.inf).masked_fill_(later, -torch.inf)
    worst = scores.topk(sizes.slc_count, dim=-1, sorted=True).values[..., -1:]
    better, equal = scores > worst, scores == worst
    room = sizes.slc_count - better.sum(-1, keepdim=True)
    return (better | (equal & (equal.cumsum(-1) <= room))) & ~later
