"""NSA's three branches in PyTorch operations, tile by tile, with an explicit backward pass.

Rows of a tile are ``(query, head of the group)`` pairs, ``[KV, rows * G, D]``: the heads of a group meet their shared
keys in one matrix product, and no key is copied per head. The backward pass recomputes the attention weights, so that
nothing of size queries x keys outlives its tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.kernels.nsa.gather import attend_backward, gather_backward, gather_forward
from shoal.kernels.nsa.layout import Layout, Tile
from shoal.kernels.nsa.select import importance, select

Backend = Literal["auto", "torch", "triton"]
Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates."""
Arrive = Callable[[Callable[[], Tensor]], object]


def takes_triton(q: Tensor, v: Tensor) -> bool:
    """Whether ``backend="auto"`` computes with the Triton kernels: in 16 bits, where tiles fit the GPU's shared memory.

    q: ``[…, H, d_qk]``; v: values of the selected branch, ``[T, KV, d_v]`` or pages of them, ``[…, KV, l', d_v]``.
    """
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or torch.version.hip is not None:
        return False
    kv, wide = v.shape[1], max(q.shape[-1], v.shape[-1])
    # Bytes that the largest tile takes, of the backward pass over spans (triton_span_grad.py), as it was compiled.
    bytes_needed = 165_000 if wide <= 128 else 214_000 if wide <= 192 else math.inf
    return q.shape[-2] // kv <= 64 and bytes_needed <= _shared_memory(q.device.index)


@lru_cache(maxsize=16)
def _shared_memory(device: int) -> int:
    """Bytes of shared memory that a program on a GPU may use; 0 without Triton."""
    if find_spec("triton") is None:
        return 0
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(device)["max_shared_mem"])


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    layout: Layout,
    scale: float,
    backend: Backend = "auto",
) -> Tensor:
    """``o_t = Σ_c g_t^c · Attn(q_t, K_t^c, V_t^c)`` over c = cmp, slc, win (NSA eq. 5), causal, per document.

    q: ``[T, H, Dqk]``. k_cmp, v_cmp: ``[C, KV, Dqk]``, ``[C, KV, Dv]``, compressed. k_slc, k_win: ``[T, KV, Dqk]``;
    v_slc, v_win: ``[T, KV, Dv]``; for a layout of some queries, as many rows of each as ``layout.needs`` says. gates:
    ``[T, H, 3]`` after the sigmoid, in the order cmp, slc, win. scale: factor on the scores, above 0. H is a multiple
    of KV.
    Returns ``[T, H, Dv]`` in q's dtype, computed in float32 or q's float64.

    Queries and keys come rotated: q, k_slc and k_win at their own positions, k_cmp (φ of un-rotated keys) at the
    position of its block's first key, ``layout.cmp_positions``. The choice of blocks is not differentiated through; a
    branch without keys contributes 0. backend: auto takes Triton where :func:`takes_triton` says so; it wants no
    negative gates, and gives gradients of the same bits in every run under ``torch.use_deterministic_algorithms``, for
    three to four times the time of a backward pass. Raises ValueError when a shape does not fit the layout, or Triton
    is asked for without a GPU.
    """
    tensors = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
    out: Tensor = _NSA.apply(*tensors, layout, scale, chosen_backend(tensors, layout, backend))
    return out


def chosen_backend(tensors: Tensors, layout: Layout, backend: Backend) -> Literal["torch", "triton"]:
    """Who computes, for the arguments of :func:`nsa_attention`; raises ValueError as it does."""
    q, k_cmp, _, k_slc, v_slc, k_win, _, _ = tensors
    found = [x.shape[0] for x in (q, k_slc, k_win, k_cmp)]
    needs = layout.needs
    if found != [layout.queries.count, needs.far.count, needs.near.count, needs.cmp.count]:
        raise ValueError(
            f"q, k_slc, k_win hold {found[0]}, {found[1]}, {found[2]} tokens and k_cmp {found[3]} blocks; the layout "
            f"has {layout.queries.count}, {needs.far.count}, {needs.near.count} tokens and {needs.cmp.count} blocks"
        )
    if q.shape[1] % k_slc.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads do not divide over {k_slc.shape[1]} KV heads")
    if backend == "triton" and (not q.is_cuda or q.dtype == torch.float64):
        raise ValueError(
            f"backend='triton' takes float32 and 16 bits on a GPU, and q is {q.dtype} on {q.device}: take 'auto'"
        )
    return "triton" if backend == "triton" or (backend == "auto" and takes_triton(q, v_slc)) else "torch"


class _NSA(torch.autograd.Function):
    """Forward keeps the inputs, the three branches' outputs and the chosen blocks; backward recomputes the rest."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, layout, scale, backend = args
        out, kept = nsa_forward(cast(Tensors, tensors), layout, scale, backend)
        ctx.save_for_backward(*tensors, *kept.tensors)
        ctx.layout, ctx.scale, ctx.backend, ctx.choices = layout, scale, backend, kept.choices
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, kept = unpacked(ctx)
        back = nsa_backward(grads[0], tensors, Kept(kept, ctx.choices), ctx.layout, ctx.scale, ctx.backend)
        return (*back, None, None, None)


def unpacked(ctx: Any) -> tuple[Tensors, list[Tensor]]:
    """What a forward pass saved for the backward pass, which runs now: the eight inputs, and what it kept.

    A node's saved tensors live until its backward pass has returned, unless they are let go of before: then who empties
    the list frees their memory, except where the graph is retained.
    """
    saved = list(ctx.saved_tensors)  # once: checkpoints unpack a tensor but once
    ctx.maybe_clear_saved_tensors()
    return cast(Tensors, tuple(saved[:8])), saved[8:]


@dataclass(frozen=True)
class Kept:
    """What a forward pass leaves for the backward pass, which may empty the list, beside its arguments.

    choices: of each tile, in PyTorch.
    """

    tensors: list[Tensor]
    choices: tuple[Tensor | None, ...] = ()


def nsa_forward(
    tensors: Tensors, layout: Layout, scale: float, backend: Literal["torch", "triton"], arrive: Arrive | None = None
) -> tuple[Tensor, Kept]:
    """:func:`nsa_attention` without autograd. arrive: called before k_slc and v_slc are read for the first time, with a
    function that tells which pages of the pack, ``slc_block`` tokens each, have a row that is read, ``[KV, pages]``
    bool: who calls may fill them then."""
    if backend == "triton":
        # Imported here: Triton is not there on every system, and this is of no use without a GPU.
        from shoal.kernels.nsa.triton_attention import forward

        out, kept = forward(tensors, layout, scale, arrive)
        return out, Kept(list(kept))
    t = _inputs(tensors, layout, scale)
    outs = t.q.new_zeros(3, *t.q.shape[:-1], t.v_win.shape[-1])
    choices = tuple(_compressed_tile(t, tile, layout, outs[:, :, tile.start : tile.stop]) for tile in layout.tiles)
    if arrive is not None:
        arrive(partial(_pages_read, choices, layout, t.k_win.shape[0]))
        t.k_slc, t.v_slc = (_by_head(x, layout.sizes.slc_block) for x in tensors[3:5])
    mixed = torch.empty_like(outs[0])
    for tile, choice in zip(layout.tiles, choices, strict=True):
        rows = slice(tile.start, tile.stop)
        _near_tile(t, tile, choice, layout, outs[:, :, rows])
        torch.sum(outs[:, :, rows] * t.gates[:, :, rows], 0, out=mixed[:, rows])
    out = mixed.transpose(0, 1).reshape(*tensors[0].shape[:2], outs.shape[-1]).to(tensors[0].dtype)
    return out, Kept([outs], choices)


def nsa_backward(
    d_out: Tensor,
    tensors: Tensors,
    kept: Kept,
    layout: Layout,
    scale: float,
    backend: Literal["torch", "triton"],
    arrive: Callable[[], object] | None = None,
    wide: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of :func:`nsa_forward`'s tensors, in their dtypes. arrive: called before k_slc and v_slc are read.

    wide: those of k_slc and v_slc in float32 at least, as they were summed. Empties ``kept`` when that has been read.
    """
    if backend == "triton":
        from shoal.kernels.nsa.triton_attention import backward

        return backward(d_out, tensors, kept.tensors, layout, scale, arrive, wide)
    if arrive is not None:
        arrive()
    (outs,) = kept.tensors
    t = _inputs(tensors, layout, scale)
    d_mixed = _rows(d_out, outs.shape[1])
    d = _Inputs(**{f.name: torch.zeros_like(getattr(t, f.name)) for f in fields(t)})
    for tile, choice in zip(layout.tiles, kept.choices, strict=True):
        _backward_tile(t, d, outs, d_mixed, tile, choice, layout)
    d.q.mul_(scale)
    tokens, heads, dim = tensors[0].shape
    d_q = d.q.transpose(0, 1).reshape(tokens, heads, dim)
    far = tensors[3].shape[0]
    d_keys = (d.k_cmp, d.v_cmp, d.k_slc[:, :far], d.v_slc[:, :far], d.k_win, d.v_win)
    d_gates = d.gates[..., 0].permute(2, 1, 3, 0).reshape(tokens, heads, 3)
    back = (d_q, *(x.transpose(0, 1) for x in d_keys), d_gates)
    return tuple(
        g if wide and i in (3, 4) else g.to(x.dtype) for i, (g, x) in enumerate(zip(back, tensors, strict=True))
    )


def _pages_read(choices: tuple[Tensor | None, ...], layout: Layout, kv: int) -> Tensor:
    """Which pages of the pack the choices read, ``[KV, pages]`` bool."""
    block, far = layout.sizes.slc_block, layout.needs.far
    read = torch.zeros(kv, far.count + block, dtype=torch.bool, device=layout.device)
    for tile, choice in zip(layout.tiles, choices, strict=True):
        here = read[:, tile.first : tile.last]
        if choice is None:
            here.fill_(True)
            continue
        blocks = choice.any(1)
        if choice.dtype != torch.bool:
            blocks = torch.zeros(kv, tile.blocks + 1, dtype=torch.bool, device=layout.device)
            blocks = blocks.scatter_(1, choice.flatten(1), True)[:, :-1]
        here |= blocks.repeat_interleave(block, 1)[:, : here.shape[1]]
    none = layout.sizes.slc_blocks(layout.tokens)
    pages = torch.zeros(kv, none + 1, dtype=torch.bool, device=layout.device)
    of_rows = far.indices(layout.device) // block
    return pages.scatter_(1, torch.where(read[:, :-block], of_rows, none), True)[:, :none]


@dataclass
class _Inputs:
    """What the tiles read (or, in the backward pass, the gradients they add to), with the KV heads in front.

    q: ``[KV, T, G, Dqk]``, scaled. k_cmp: ``[KV, C, Dqk]``. k_slc: ``[KV, T + l', Dqk]``, zeros at the end, so that the
    last block of a document can be read whole. k_win: ``[KV, T, Dqk]``. Values alike. gates: ``[3, KV, T, G, 1]``.
    """

    q: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    gates: Tensor


def _inputs(tensors: Tensors, layout: Layout, scale: float) -> _Inputs:
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = tensors
    kv, keys, pad = k_slc.shape[1], _by_head, layout.sizes.slc_block
    by_gate = _rows(gates, kv).permute(3, 0, 1, 2)[..., None]
    return _Inputs(
        (_rows(q, kv) * scale).contiguous(),
        keys(k_cmp),
        keys(v_cmp),
        keys(k_slc, pad),
        keys(v_slc, pad),
        keys(k_win),
        keys(v_win),
        by_gate,
    )


def _by_head(x: Tensor, extra: int = 0) -> Tensor:
    """``[T, KV, D]`` to ``[KV, T + extra, D]``, zeros at the end, in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    out = x.new_zeros(x.shape[1], x.shape[0] + extra, x.shape[2], dtype=dtype)
    out[:, : x.shape[0]] = x.transpose(0, 1)
    return out


def _rows(x: Tensor, kv: int) -> Tensor:
    """``[T, H, D]`` to a contiguous ``[KV, T, G, D]``, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.reshape(x.shape[0], kv, x.shape[1] // kv, x.shape[2]).transpose(0, 1).contiguous()


def _compressed_tile(t: _Inputs, tile: Tile, layout: Layout, outs: Tensor) -> Tensor | None:
    """Fill the first of ``outs [3, KV, rows, G, Dv]``; returns the choice of blocks, if one was made."""
    if tile.cmp_stop == tile.cmp_first:
        return None
    q = t.q[:, tile.start : tile.stop].flatten(1, 2)
    p = _cmp_weights(q, t.k_cmp, tile)
    torch.bmm(p, t.v_cmp[:, tile.cmp_first : tile.cmp_stop], out=outs[0].flatten(1, 2))
    return _choose(p, tile, layout) if tile.blocks else None


def _near_tile(t: _Inputs, tile: Tile, choice: Tensor | None, layout: Layout, outs: Tensor) -> None:
    """Fill the others of ``outs [3, KV, rows, G, Dv]``."""
    q = t.q[:, tile.start : tile.stop].flatten(1, 2)
    _, slc, win = (out.flatten(1, 2) for out in outs)
    if choice is None or not _gathers(tile, layout):
        p = _slc_weights(q, t.k_slc, tile, choice, layout)
        torch.bmm(p, t.v_slc[:, tile.first : tile.last], out=slc)
    else:
        at = slice(tile.first, tile.first + tile.blocks * layout.sizes.slc_block)
        q_rows, block = t.q[:, tile.start : tile.stop], layout.sizes.slc_block
        gather_forward(q_rows, t.k_slc[:, at], t.v_slc[:, at], choice, tile.position, block, outs[1])
    p = _weights(q, t.k_win[:, tile.win_first : tile.win_last], tile.win_mask)
    torch.bmm(p.flatten(1, 2), t.v_win[:, tile.win_first : tile.win_last], out=win)


def _backward_tile(
    t: _Inputs, d: _Inputs, outs: Tensor, d_mixed: Tensor, tile: Tile, choice: Tensor | None, layout: Layout
) -> None:
    """Add the tile's share to the gradients ``d``. outs: ``[3, KV, T, G, Dv]``; d_mixed: the output's gradient."""
    here = slice(tile.start, tile.stop)
    q, d_q = t.q[:, here].flatten(1, 2), d.q[:, here].flatten(1, 2)
    gates, d_gates, d_out = t.gates[:, :, here], d.gates[:, :, here], d_mixed[:, here]
    torch.sum(outs[:, :, here] * d_out, -1, keepdim=True, out=d_gates)
    d_out = (gates * d_out).flatten(2, 3)
    if tile.cmp_stop > tile.cmp_first:
        at = slice(tile.cmp_first, tile.cmp_stop)
        p = _cmp_weights(q, t.k_cmp, tile)
        keys = (t.k_cmp[:, at], t.v_cmp[:, at], d.k_cmp[:, at], d.v_cmp[:, at])
        attend_backward(p, q, *keys, d_out[0], d_q)
    if choice is None or not _gathers(tile, layout):
        at = slice(tile.first, tile.last)
        p = _slc_weights(q, t.k_slc, tile, choice, layout)
        keys = (t.k_slc[:, at], t.v_slc[:, at], d.k_slc[:, at], d.v_slc[:, at])
        attend_backward(p, q, *keys, d_out[1], d_q)
    else:
        at, block = slice(tile.first, tile.first + tile.blocks * layout.sizes.slc_block), layout.sizes.slc_block
        keys = (t.k_slc[:, at], t.v_slc[:, at], d.k_slc[:, at], d.v_slc[:, at])
        d_rows = d_out[1].view(d_mixed[:, here].shape)
        gather_backward(t.q[:, here], *keys, d_rows, d.q[:, here], choice, tile.position, block)
    at = slice(tile.win_first, tile.win_last)
    p = _weights(q, t.k_win[:, at], tile.win_mask).flatten(1, 2)
    keys = (t.k_win[:, at], t.v_win[:, at], d.k_win[:, at], d.v_win[:, at])
    attend_backward(p, q, *keys, d_out[2], d_q)


def _weights(q: Tensor, k: Tensor, mask: Tensor, chosen: Tensor | None = None, block: int = 1) -> Tensor:
    """Attention weights ``[KV, rows, G, keys]`` of q ``[KV, rows * G, D]`` on k ``[KV, keys, D]``.

    mask: ``[rows, 1, ≤ keys]``, of the last keys. chosen: ``[KV, rows, blocks]`` bool, for each ``block`` keys; what
    is left after the last whole block is the newest block of the document, always chosen by those who may see it.
    """
    keys, masked = k.shape[1], mask.shape[-1]
    scores = torch.bmm(q, k.transpose(1, 2)).view(q.shape[0], mask.shape[0], -1, keys)
    if masked:
        scores[..., keys - masked :].add_(mask)
    if chosen is not None:
        whole = keys // block
        bias = torch.zeros_like(chosen, dtype=q.dtype).masked_fill_(~chosen, -torch.inf)
        scores[..., : whole * block].unflatten(-1, (whole, block)).add_(bias[:, :, None, :whole, None])
    return torch.softmax(scores, -1)


def _cmp_weights(q: Tensor, k_cmp: Tensor, tile: Tile) -> Tensor:
    """Weights ``[KV, rows * G, C]`` on the compression blocks; zeros in rows that see none."""
    p = _weights(q, k_cmp[:, tile.cmp_first : tile.cmp_stop], tile.cmp_mask)
    if tile.cmp_none is not None:
        p.masked_fill_(tile.cmp_none, 0)
    return p.flatten(1, 2)


def _slc_weights(q: Tensor, k_slc: Tensor, tile: Tile, chosen: Tensor | None, layout: Layout) -> Tensor:
    """Weights ``[KV, rows * G, stop - first]`` on all keys of the document so far, zeros in blocks not chosen."""
    k = k_slc[:, tile.first : tile.last]
    return _weights(q, k, tile.own_mask, chosen, layout.sizes.slc_block).flatten(1, 2)


def _gathers(tile: Tile, layout: Layout) -> bool:
    """Whether the tile gathers its chosen blocks, rather than mask dense scores."""
    return tile.blocks > 0 and tile.last - tile.first > layout.dense_keys


def _choose(p_cmp: Tensor, tile: Tile, layout: Layout) -> Tensor:
    """The tile's blocks: a mask ``[KV, rows, blocks]``, or for gathering the indices ``[KV, rows, n]``, ascending."""
    rows = tile.stop - tile.start
    group = p_cmp.view(p_cmp.shape[0], rows, -1, p_cmp.shape[-1]).sum(2)
    positions = torch.arange(tile.position, tile.position + rows, device=p_cmp.device)
    chosen = select(importance(group, tile.blocks, layout.sizes), positions, layout.sizes)
    if not _gathers(tile, layout):
        return chosen
    block = torch.arange(tile.blocks, device=p_cmp.device)
    # Unused places name the last block; its keys lie after the query, which masks them.
    index = torch.where(chosen, block, tile.blocks)
    return index.topk(layout.sizes.slc_count, dim=-1, largest=False, sorted=True).values
