"""NSA over a paged cache, in PyTorch operations: what serving computes, forward only.

A page holds the tokens of one selection block, ``l'`` of them, and begins at a multiple of l' in its sequence. *Far*
pages keep what every later query may read: keys and values of the selected branch, and the compressed rows that end in
the page. *Near* pages keep what only the next tokens read: the window's keys and values, and the raw ones that the
compression MLP is yet to take. All are ``[pages, KV, rows, D]``, so that a page of one KV head lies in one piece.

Compressed row c of a sequence is the one that ends with key ``(c + 1) · d - 1``; it lies in page ``c // (l'/d)``. The
first ``l/d - 1`` rows do not exist. A query at position t sees the rows ``l/d - 1 ≤ c < (t + 1) // d``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.kernels.nsa.attention import Backend, takes_triton
from shoal.kernels.nsa.gather import ELEMENTS, gather_forward
from shoal.kernels.nsa.layout import BlockSizes
from shoal.kernels.nsa.select import forced_blocks, importance, keep_best, select

TILE = 64  # queries of one sequence that are computed together, at least
# A GPU takes more at a time: an operator costs its host some 10 to 30 µs, whatever its size. Elements, of 4 bytes:
SCORES = 1 << 27  # of a tile's scores in one branch, of which three copies exist for a moment
COPIED = 1 << 26  # of the keys and values that selected attention gathers at a time


@dataclass(frozen=True)
class PagedCache:
    """The pages of one layer; rows that were never written must be finite.

    k_slc, v_slc: ``[far, KV, l', D]``, keys rotated. k_cmp, v_cmp: ``[far, KV, l'/d, D]``. k_win, v_win: ``[near, KV,
    l', D]``. k_raw, v_raw: ``[near, KV, l', D]``, keys not rotated. D is d_qk for keys, d_v for values.
    """

    k_slc: Tensor
    v_slc: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_win: Tensor
    v_win: Tensor
    k_raw: Tensor
    v_raw: Tensor


def make_cache(
    far: int, near: int, kv: int, dims: tuple[int, int], sizes: BlockSizes, dtype: torch.dtype, device: torch.device
) -> PagedCache:
    """Empty pages. dims: d_qk and d_v."""
    page, rows = sizes.slc_block, sizes.slc_block // sizes.cmp_stride
    shapes = ((far, page), (far, rows), (near, page), (near, page))
    pages = (torch.zeros(n, kv, length, dim, dtype=dtype, device=device) for n, length in shapes for dim in dims)
    return PagedCache(*pages)


def by_head(pages: Tensor, kv: int) -> Tensor:
    """Where pages lie once the first two dimensions of a cache are one: ``[…, n] -> […, KV, n]`` int64."""
    return pages.unsqueeze(-2) * kv + torch.arange(kv, device=pages.device)[:, None]


def read_pages(cache: Tensor, index: Tensor) -> Tensor:
    """Pages of a cache at an index of :func:`by_head`: ``[…, n] -> […, n · rows, D]``, in float32 at least."""
    dim = cache.shape[-1]
    read = cache.flatten(0, 1).index_select(0, index.flatten())
    return read.to(torch.promote_types(read.dtype, torch.float32)).view(*index.shape[:-1], -1, dim)


def row_index(pages: Tensor, rows: Tensor, kv: int, length: int) -> Tensor:
    """Where rows ``rows[i]`` of pages ``pages[i]``, of ``length`` rows, lie once the first three dimensions of a cache
    are one: ``[n] -> [n, KV]`` int64."""
    return by_head(pages[:, None], kv)[..., 0] * length + rows[:, None]


def store_rows(cache: Tensor, index: Tensor, values: Tensor) -> None:
    """Write ``values [n, KV, D]`` to the rows of a cache at an index of :func:`row_index`."""
    cache.flatten(0, 2)[index] = values.to(cache.dtype)


@dataclass(frozen=True)
class DecodeMasks:
    """What PyTorch's operations read of single queries besides their pages.

    cmp: ``[N, 1, 1, P · l'/d]``, win: ``[N, 1, 1, W · l']``, 0 where visible and -inf where not. blind: ``[N, 1, 1,
    1]`` bool, queries without a compressed row; None when there is none. forced, later: of ``forced_blocks``.
    """

    cmp: Tensor
    win: Tensor
    blind: Tensor | None
    forced: Tensor
    later: Tensor


@dataclass(frozen=True)
class DecodeTables:
    """Single queries, each with pages of its own; shared by all layers.

    positions: ``[N]`` int64, in the sequence. far, near: ``[N, KV, P]``, ``[N, KV, W]``, indices of :func:`by_head`;
    unused places name any page, whose rows must be finite. near_first: ``[N]`` int64, the token that the near pages
    begin with. blind: False promises that every query sees a compressed row.
    """

    positions: Tensor
    far: Tensor
    near: Tensor
    near_first: Tensor
    sizes: BlockSizes
    blind: bool = True

    @cached_property
    def masks(self) -> DecodeMasks:
        """Made when the first layer asks for them; Triton does not."""
        t, device = self.positions[:, None], self.positions.device
        cmp = _visible_rows(self.far.shape[-1], t, self.sizes)
        keys = self.near_first[:, None] + torch.arange(self.near.shape[-1] * self.sizes.slc_block, device=device)
        return DecodeMasks(
            _mask(cmp)[:, None, None],
            _mask((keys <= t) & (keys > t - self.sizes.window))[:, None, None],
            ~cmp.any(-1, keepdim=True)[:, None, None] if self.blind else None,
            *forced_blocks(t[..., None], self.far.shape[-1], self.sizes),
        )


def decode_tables(
    positions: Tensor, far: Tensor, near: Tensor, near_first: Tensor, kv: int, sizes: BlockSizes, blind: bool = True
) -> DecodeTables:
    """Tables of N queries. positions: ``[N]``. far: ``[N, P]``, pages of the sequence from its start; near: ``[N, W]``,
    pages from token ``near_first [N]`` on. All int64, on one device. blind: as of ``DecodeTables``."""
    return DecodeTables(positions, by_head(far, kv), by_head(near, kv), near_first, sizes, blind)


@dataclass(frozen=True)
class HiddenGates:
    """Gates before their last product. hidden: ``[N, R]``, before its activation. weight: ``[3 · H, R]``."""

    hidden: Tensor
    weight: Tensor

    def contiguous(self) -> HiddenGates:
        """The same, contiguous."""
        return HiddenGates(self.hidden.contiguous(), self.weight.contiguous())

    def gates(self) -> Tensor:
        """``[N, H, 3]``, after the sigmoid (NSA eq. 5)."""
        logits = F.linear(F.silu(self.hidden), self.weight)
        return torch.sigmoid(logits).view(len(logits), -1, 3)


def reads_in_place(q: Tensor, cache: PagedCache, backend: Backend) -> bool:
    """Whether :func:`paged_decode` reads keys where they lie, with Triton, instead of copying them."""
    return backend == "triton" or (backend == "auto" and takes_triton(q, cache.v_slc))


def paged_decode(
    q: Tensor,
    gates: Tensor | HiddenGates,
    cache: PagedCache,
    tables: DecodeTables,
    sizes: BlockSizes,
    scale: float,
    backend: Backend = "auto",
) -> Tensor:
    """NSA of single queries: ``[N, H, d_qk] -> [N, H, d_v]`` in q's dtype. gates: ``[N, H, 3]``, or what they are of.

    Everything up to each query's own position must have been written to its pages. backend: as of ``nsa_attention``.
    """
    if reads_in_place(q, cache, backend):
        # Imported here: Triton is not there on every system, and this is of no use without a GPU.
        from shoal.kernels.nsa.triton_paged import triton_paged_decode

        return triton_paged_decode(q, gates, cache, tables, sizes, scale)
    gates = gates.gates() if isinstance(gates, HiddenGates) else gates
    n, heads, dim = q.shape
    kv = cache.k_slc.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, masks = (q.to(wide) * scale).view(n * kv, heads // kv, dim), tables.masks
    p = _decode_weights(rows, read_pages(cache.k_cmp, tables.far), masks.cmp)
    if masks.blind is not None:
        p = p.masked_fill(masks.blind, 0)
    cmp = _decode_values(p, cache.v_cmp, tables.far)
    chosen, mask = _chosen_pages(p, tables, sizes)
    p = _decode_weights(rows, read_pages(cache.k_slc, chosen), mask)
    slc = _decode_values(p, cache.v_slc, chosen)
    p = _decode_weights(rows, read_pages(cache.k_win, tables.near), masks.win)
    win = _decode_values(p, cache.v_win, tables.near)
    mixed = torch.stack((cmp, slc, win), -1).view(n, heads, -1, 3) @ gates.to(wide)[..., None]
    return mixed[..., 0].to(q.dtype)


def _decode_weights(rows: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """Weights ``[N, KV, G, keys]`` of rows ``[N · KV, G, D]`` on keys ``[N, KV, keys, D]``."""
    scores = torch.bmm(rows, keys.flatten(0, 1).transpose(1, 2))
    return torch.softmax(scores.view(*keys.shape[:2], *scores.shape[1:]) + mask, -1)


def _decode_values(p: Tensor, cache: Tensor, index: Tensor) -> Tensor:
    """``[N · KV, G, Dv]``: values at ``index`` by the weights p."""
    return torch.bmm(p.flatten(0, 1), read_pages(cache, index).flatten(0, 1))


def _chosen_pages(p_cmp: Tensor, tables: DecodeTables, sizes: BlockSizes) -> tuple[Tensor, Tensor]:
    """The pages each query selects, ``[N, KV, ≤ n]`` as an index of :func:`by_head`, and the mask over their keys."""
    far, page = tables.far, sizes.slc_block
    blocks = far.shape[-1]
    t = tables.positions[:, None, None]
    block = torch.arange(blocks, device=far.device)
    if blocks > sizes.slc_count:
        skipped = sizes.cmp_block // sizes.cmp_stride - 1
        scores = importance(p_cmp.sum(2)[..., skipped:], blocks, sizes)
        kept = keep_best(scores, tables.masks.forced, tables.masks.later, sizes)
        # Places that stay empty name the block after the last: its keys come after the query, which masks them.
        order = torch.where(kept, block, blocks).topk(sizes.slc_count, dim=-1, largest=False, sorted=True).values
        far = far.gather(-1, order.clamp(max=blocks - 1))
    else:
        order = block.expand(far.shape)
    keys = (order[..., None] * page + torch.arange(page, device=far.device)).flatten(-2)
    return far, _mask(keys <= t)[:, :, None]


def paged_prefill(
    q: Tensor,
    gates: Tensor,
    cache: PagedCache,
    position: int,
    far: Tensor,
    near: Tensor,
    near_first: int,
    sizes: BlockSizes,
    scale: float,
    dense_keys: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """NSA of consecutive queries of one sequence: ``[R, H, d_qk] -> [R, H, d_v]`` in q's dtype. gates: ``[R, H, 3]``.

    position: of the first query in its sequence. far: ``[P]``, pages of the sequence from its start; near: ``[W]``,
    pages from token ``near_first`` on. Everything up to the last query must have been written. dense_keys: with at most
    this many keys, selected attention of PyTorch operations masks dense scores; with more it gathers blocks. It changes
    speed only. backend: as of ``nsa_attention``.
    """
    if reads_in_place(q, cache, backend):
        from shoal.kernels.nsa.triton_paged import triton_paged_prefill

        return triton_paged_prefill(q, gates, cache, position, far, near, near_first, sizes, scale)
    count, heads, dim = q.shape
    kv = cache.k_slc.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = (q.to(wide) * scale).view(count, kv, heads // kv, dim).transpose(0, 1)
    at_far, at_near = by_head(far, kv), by_head(near, kv)
    cmp, slc = ((read_pages(k, at_far), read_pages(v, at_far)) for k, v in (
        (cache.k_cmp, cache.v_cmp), (cache.k_slc, cache.v_slc)
    ))  # fmt: skip
    win = read_pages(cache.k_win, at_near), read_pages(cache.v_win, at_near)
    dense = 8 * sizes.slc_count * sizes.slc_block if dense_keys is None else dense_keys
    outs = q.new_empty(kv, count, heads // kv, cache.v_slc.shape[-1], 3, dtype=wide)
    seen = max(cmp[0].shape[1], win[0].shape[1], min(position + count, dense))
    tile = max(TILE, SCORES // (heads * seen)) if q.is_cuda else TILE
    for start in range(0, count, tile):
        part = slice(start, min(count, start + tile))
        _prefill_tile(rows[:, part], position + start, cmp, slc, win, near_first, sizes, dense, outs[:, part])
    mixed = outs.transpose(0, 1).reshape(count, heads, -1, 3) @ gates.to(wide)[..., None]
    return mixed[..., 0].to(q.dtype)


def _prefill_tile(
    q: Tensor,
    first: int,
    cmp: tuple[Tensor, Tensor],
    slc: tuple[Tensor, Tensor],
    win: tuple[Tensor, Tensor],
    near_first: int,
    sizes: BlockSizes,
    dense_keys: int,
    out: Tensor,
) -> None:
    """Fill ``out [KV, r, G, Dv, 3]`` for queries ``[KV, r, G, D]`` at positions ``first …``."""
    count, stop, page = q.shape[1], first + q.shape[1], sizes.slc_block
    t = torch.arange(first, stop, device=q.device)
    blocks = -(-stop // page)
    seen = slice(0, blocks * (page // sizes.cmp_stride))
    visible = _visible_rows(blocks, t[:, None], sizes)
    p = _tile_weights(q, cmp[0][:, seen], _mask(visible)[:, None])
    p = p.masked_fill(~visible.any(-1)[:, None, None], 0)
    out[..., 0] = _tile_values(p, cmp[1][:, seen])
    kept = None
    if blocks > sizes.slc_count:
        skipped = sizes.cmp_block // sizes.cmp_stride - 1
        kept = select(importance(p.sum(2)[..., skipped:], blocks, sizes), t, sizes)
    keys = torch.arange(blocks * page, device=q.device)
    k, v = (x[:, : blocks * page] for x in slc)
    if kept is None or stop <= dense_keys:
        allowed = (keys <= t[:, None]).expand(q.shape[0], count, -1)
        if kept is not None:
            allowed = allowed & kept.repeat_interleave(page, -1)
        out[..., 1] = _tile_values(_tile_weights(q, k, _mask(allowed)[:, :, None]), v)
    else:
        block = torch.arange(blocks, device=q.device)
        order = torch.where(kept, block, blocks).topk(sizes.slc_count, dim=-1, largest=False, sorted=True).values
        part = torch.empty_like(out[..., 1])
        gather_forward(q, k, v, order, first, page, part, COPIED if q.is_cuda else ELEMENTS)
        out[..., 1] = part
    keys = near_first + torch.arange(win[0].shape[1], device=q.device)
    inside = (keys <= t[:, None]) & (keys > t[:, None] - sizes.window)
    out[..., 2] = _tile_values(_tile_weights(q, win[0], _mask(inside)[:, None]), win[1])


def _tile_weights(q: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """Weights ``[KV, r, G, keys]`` of q ``[KV, r, G, D]`` on keys ``[KV, keys, D]``; mask: ``[…, r, 1, keys]``."""
    scores = torch.bmm(q.flatten(1, 2), keys.transpose(1, 2)).view(*q.shape[:3], -1)
    return torch.softmax(scores + mask, -1)


def _tile_values(p: Tensor, values: Tensor) -> Tensor:
    return torch.bmm(p.flatten(1, 2), values).view(*p.shape[:3], -1)


def _visible_rows(pages: int, t: Tensor, sizes: BlockSizes) -> Tensor:
    """Which compressed rows of ``pages`` pages queries at ``t [N, 1]`` see: ``[N, pages · l'/d]``."""
    row = torch.arange(pages * (sizes.slc_block // sizes.cmp_stride), device=t.device)
    return (row >= sizes.cmp_block // sizes.cmp_stride - 1) & (row < (t + 1) // sizes.cmp_stride)


def _mask(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -torch.inf)
