"""The compression MLP φ of training in Triton and cuBLAS, forward and backward.

Keys are copied into chunks of ``d`` once, ``[KV, n, d*D]``, and the products with ``w1``, in its parts for the 1st, 2nd
… chunk of a block, are single batched ones. The block's positions are l keys as well: they stand as ``l/d`` more chunks
behind the others, so that their products, their gradient and their share of ``w1``'s come of the same three batched
products. What lies between these takes a launch each, and gathers instead of adding up: no atomics, the same bits in
every run. Sums are in float32 and rounded once.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.kernels.launches import launch, power_of_2, tiles
from shoal.kernels.nsa.compress import OwnBlocks
from shoal.kernels.nsa.layout import Layout

TOKENS, ROWS, COLUMNS = 32, 16, 128  # tokens of a program that copies; rows and columns of one that adds up
SUMS = 32  # columns of a program that adds up the sums of all others


def triton_compress(x: Tensor, position: Tensor, w1: Tensor, w2: Tensor, layout: Layout | OwnBlocks) -> Tensor:
    """What :func:`shoal.kernels.nsa.compress` returns, from the same arguments, in 16 bits or float32; C is not 0."""
    out: Tensor = _Phi.apply(x, position, w1, w2, layout)
    return out


class _Phi(torch.autograd.Function):
    """Chunks are kept rather than x: that is most often a view, and would keep all that it is a part of."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, position, w1, w2, layout = args
        kv, width = len(w1), layout.sizes.cmp_stride * x.shape[2]
        chunks = _chunks(x, position, layout).view(kv, -1, width)
        by_part = _swapped(w1.view(kv, -1, width, w1.shape[2])).view(kv, width, -1)
        hidden, act = _hidden(torch.bmm(chunks, by_part), layout, w1.shape[2])
        out = x.new_empty(hidden.shape[1], kv, w2.shape[2])
        torch.bmm(act, w2, out=out.transpose(0, 1))
        for_inputs, for_w1 = ctx.needs_input_grad[0] or ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        ctx.save_for_backward(chunks if for_w1 else None, by_part if for_inputs else None, hidden, w2)
        ctx.layout, ctx.x, ctx.position, ctx.w1 = layout, x.shape, position.shape, w1.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        chunks, by_part, hidden, w2 = ctx.saved_tensors
        d_out = grads[0].transpose(0, 1)
        d_act = torch.bmm(d_out, w2.transpose(1, 2))
        d_products, act = _hidden_grad(d_act, hidden, ctx.layout)
        d_x = d_position = d_w1 = d_w2 = None
        if ctx.needs_input_grad[3]:
            d_w2 = torch.bmm(act.transpose(1, 2), d_out)
        del d_act, act
        if chunks is not None:
            d_by_part = torch.bmm(chunks.transpose(1, 2), d_products)
            d_w1 = _swapped(d_by_part.view(*d_by_part.shape[:2], -1, ctx.w1[2])).view(ctx.w1)
        if by_part is not None:
            # Where keys are frozen, only the chunks that are positions.
            mine = d_products if ctx.needs_input_grad[0] else d_products[:, -(ctx.w1[1] // by_part.shape[1]) :]
            d_chunks = torch.bmm(mine, by_part.transpose(1, 2)).view(ctx.x[1], -1, ctx.x[2])
            if ctx.needs_input_grad[1]:
                d_position = d_chunks[:, -ctx.position[1] :].clone(memory_format=torch.contiguous_format)
            if ctx.needs_input_grad[0]:
                d_x = _key_grad(d_chunks, ctx.layout)
        return d_x, d_position, d_w1, d_w2, None


def _chunks(x: Tensor, position: Tensor, layout: Layout | OwnBlocks) -> Tensor:
    """``[KV, n*d + l, D]``: the tokens of all chunks, and the positions."""
    (kv, dim), tokens = x.shape[1:], layout.chunk_tokens
    if x.stride(2) != 1 or (kv > 1 and x.stride(1) != dim):  # a view may skip tokens, not heads
        x = x.contiguous()
    rows = len(tokens) + position.shape[1]
    out = x.new_empty(kv, rows, dim)
    launch(
        _chunks_kernel,
        (tiles(rows, TOKENS) * kv,),
        *(x, position.contiguous(), tokens, out, len(tokens)),
        X=x.stride(0),
        L=position.shape[1],
        KV=kv,
        D=dim,
        DP=power_of_2(dim),
        R=TOKENS,
    )
    return out


def _swapped(x: Tensor) -> Tensor:
    """``[KV, A, B, W]`` to ``[KV, B, A, W]``, contiguous."""
    kv, first, second, width = x.shape
    x = x.contiguous()
    if first == 1 or second == 1:
        return x.view(kv, second, first, width)
    out = x.new_empty(kv, second, first, width)
    rows = kv * first * second
    grid = tiles(rows, ROWS), tiles(width, COLUMNS)
    launch(_swap_kernel, grid, x, out, rows, A=first, B=second, W=width, R=ROWS, BW=COLUMNS)
    return out


def _hidden(products: Tensor, layout: Layout | OwnBlocks, width: int) -> tuple[Tensor, Tensor]:
    """The hidden layer of each block, ``[KV, C, W]``, before and after silu. products: ``[KV, n + parts, parts*W]``."""
    kv, chunks = products.shape[:2]
    parts, blocks = products.shape[2] // width, len(layout.cmp_chunks)
    hidden, act = (products.new_empty(kv, blocks, width) for _ in range(2))
    launch(
        _hidden_kernel,
        (tiles(blocks, ROWS), tiles(width, COLUMNS), kv),
        *(products, layout.cmp_chunks, hidden, act, blocks, chunks - parts),
        PARTS=parts,
        W=width,
        R=ROWS,
        BW=COLUMNS,
    )
    return hidden, act


def _hidden_grad(d_act: Tensor, hidden: Tensor, layout: Layout | OwnBlocks) -> tuple[Tensor, Tensor]:
    """The products' gradients ``[KV, n + parts, parts*W]``, and what silu makes of hidden, both ``[KV, C, W]``."""
    kv, blocks, width = hidden.shape
    begins, parts = layout.inverse.blocks, layout.sizes.cmp_block // layout.sizes.cmp_stride
    chunks = len(begins)
    d_products, act = hidden.new_empty(kv, chunks + parts, parts * width), torch.empty_like(hidden)
    count = tiles(chunks, ROWS)
    sums = torch.empty(kv, count, width, dtype=torch.float32, device=hidden.device)
    shape = {"PARTS": parts, "W": width, "R": ROWS}
    launch(
        _hidden_grad_kernel,
        (count, tiles(width, COLUMNS), kv),
        *(d_act, hidden, begins, d_products, act, sums, blocks, chunks),
        BW=COLUMNS,
        **shape,
    )
    grid = tiles(width, SUMS), kv
    launch(_position_grad_kernel, grid, sums, d_products, count, chunks, BW=SUMS, **shape)
    return d_products, act


def _key_grad(d_chunks: Tensor, layout: Layout | OwnBlocks) -> Tensor:
    """``[KV, n*d + l, D]`` to ``[T, KV, D]``, 0 for tokens of no chunk."""
    (kv, rows, dim), places = d_chunks.shape, layout.inverse.places
    d_x = d_chunks.new_empty(len(places), kv, dim)
    launch(
        _key_grad_kernel,
        (tiles(len(places), TOKENS) * kv,),
        *(d_chunks, places, d_x, len(places), rows),
        KV=kv,
        D=dim,
        DP=power_of_2(dim),
        R=TOKENS,
    )
    return d_x


@triton.jit(do_not_specialize=["count"])
def _chunks_kernel(
    x,
    position,
    tokens,
    out,
    count,
    X: tl.constexpr,
    L: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
):
    """x ``[T, KV, D]``, X elements from token to token, position ``[KV, L, D]`` and tokens ``[count]`` int64 to out
    ``[KV, count + L, D]``."""
    # Heads of the same tokens are neighbours, since they share lines of memory.
    i, kv = tl.program_id(0).to(tl.int64) // KV, tl.program_id(0).to(tl.int64) % KV
    row, o_d = i * R + tl.arange(0, R), tl.arange(0, DP)
    inside, there = (o_d < D)[None, :], row < count
    token = tl.load(tokens + row, mask=there, other=0)
    key = tl.load(x + token[:, None] * X + kv * D + o_d[None, :], mask=there[:, None] & inside, other=0.0)
    behind = (row >= count) & (row < count + L)
    p_position = position + (kv * L + row - count)[:, None] * D + o_d[None, :]
    added = tl.load(p_position, mask=behind[:, None] & inside, other=0.0)
    value = tl.where(there[:, None], key, added.to(key.dtype))
    p_out = out + (kv * (count + L) + row)[:, None] * D + o_d[None, :]
    tl.store(p_out, value, mask=(there | behind)[:, None] & inside)


@triton.jit(do_not_specialize=["rows"])
def _swap_kernel(x, out, rows, A: tl.constexpr, B: tl.constexpr, W: tl.constexpr, R: tl.constexpr, BW: tl.constexpr):
    """x ``[KV, A, B, W]`` to out ``[KV, B, A, W]``, of KV·A·B rows."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * BW + tl.arange(0, BW)
    mask = (row < rows)[:, None] & (column < W)[None, :]
    kv, b, a = row // (A * B), row // A % B, row % A
    value = tl.load(x + ((kv * A + a) * B + b)[:, None] * W + column[None, :], mask=mask)
    tl.store(out + row[:, None] * W + column[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["blocks", "chunks"])
def _hidden_kernel(
    products,
    firsts,
    hidden,
    act,
    blocks,
    chunks,
    PARTS: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BW: tl.constexpr,
):
    """products ``[KV, chunks + PARTS, PARTS, W]``, firsts ``[blocks]`` int64 to hidden and act ``[KV, blocks, W]``."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column, kv = tl.program_id(1) * BW + tl.arange(0, BW), tl.program_id(2).to(tl.int64)
    inside = column < W
    mask = (row < blocks)[:, None] & inside[None, :]
    first = tl.load(firsts + row, mask=row < blocks, other=0)
    base = kv * (chunks + PARTS)
    total, share = tl.zeros([R, BW], tl.float32), tl.zeros([BW], tl.float32)
    for j in tl.static_range(PARTS):
        p_part = products + ((base + first + j) * PARTS + j)[:, None] * W + column[None, :]
        total += tl.load(p_part, mask=mask, other=0.0).to(tl.float32)
        p_share = products + ((base + chunks + j) * PARTS + j) * W + column
        share += tl.load(p_share, mask=inside, other=0.0).to(tl.float32)
    b_hidden = (total + share[None, :]).to(hidden.dtype.element_ty)
    place = (kv * blocks + row)[:, None] * W + column[None, :]
    tl.store(hidden + place, b_hidden, mask=mask)
    wide = b_hidden.to(tl.float32)
    tl.store(act + place, (wide / (1 + tl.exp(-wide))).to(act.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["blocks", "chunks"])
def _hidden_grad_kernel(
    d_act,
    hidden,
    begins,
    d_products,
    act,
    sums,
    blocks,
    chunks,
    PARTS: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BW: tl.constexpr,
):
    """d_act and hidden ``[KV, blocks, W]`` to d_products ``[KV, chunks + PARTS, PARTS, W]``, but for the last PARTS
    rows, act as hidden, and what a program's blocks add up to: sums ``[KV, programs, W]`` float32.

    begins: ``[chunks]`` int32, the block that begins with a chunk, or -1: j chunks before a chunk begins the block
    whose j-th chunk it is.
    """
    chunk = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column, kv = tl.program_id(1) * BW + tl.arange(0, BW), tl.program_id(2).to(tl.int64)
    inside, row = column < W, kv * (chunks + PARTS) + chunk
    for j in tl.static_range(PARTS):
        among = (chunk < chunks) & (chunk >= j)
        block = tl.load(begins + chunk - j, mask=among, other=-1).to(tl.int64)
        mask = (block >= 0)[:, None] & inside[None, :]
        place = (kv * blocks + block)[:, None] * W + column[None, :]
        b_hidden = tl.load(hidden + place, mask=mask, other=0.0).to(tl.float32)
        b_grad = tl.load(d_act + place, mask=mask, other=0.0).to(tl.float32)
        gate = 1 / (1 + tl.exp(-b_hidden))
        b_grad *= gate * (1 + b_hidden * (1 - gate))
        p_products = d_products + (row * PARTS + j)[:, None] * W + column[None, :]
        tl.store(p_products, b_grad.to(d_products.dtype.element_ty), mask=(chunk < chunks)[:, None] & inside[None, :])
        if j == 0:
            tl.store(act + place, (b_hidden * gate).to(act.dtype.element_ty), mask=mask)
            p_sums = sums + (kv * tl.num_programs(0) + tl.program_id(0)) * W + column
            tl.store(p_sums, tl.sum(b_grad, 0), mask=inside)


@triton.jit(do_not_specialize=["count", "chunks"])
def _position_grad_kernel(
    sums, d_products, count, chunks, PARTS: tl.constexpr, W: tl.constexpr, R: tl.constexpr, BW: tl.constexpr
):
    """The last PARTS rows of d_products: of the j-th, part j is the sum of ``[KV, count, W]``, and the others are 0."""
    column, kv = tl.program_id(0) * BW + tl.arange(0, BW), tl.program_id(1).to(tl.int64)
    inside = column < W
    total = tl.zeros([R, BW], tl.float32)
    for first in range(0, count, R):
        row = first + tl.arange(0, R)
        p_sums = sums + (kv * count + row)[:, None] * W + column[None, :]
        total += tl.load(p_sums, mask=(row < count)[:, None] & inside[None, :], other=0.0)
    whole = tl.sum(total, 0).to(d_products.dtype.element_ty)
    for i in tl.static_range(PARTS):
        for j in tl.static_range(PARTS):
            p_part = d_products + ((kv * (chunks + PARTS) + chunks + i) * PARTS + j) * W + column
            tl.store(p_part, whole if i == j else tl.zeros_like(whole), mask=inside)


@triton.jit(do_not_specialize=["count", "rows"])
def _key_grad_kernel(
    d_chunks,
    places,
    d_x,
    count,
    rows,
    KV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
):
    """d_chunks ``[KV, rows, D]``, places ``[count]`` int32, -1 for none, to d_x ``[count, KV, D]``."""
    i, kv = tl.program_id(0).to(tl.int64) // KV, tl.program_id(0).to(tl.int64) % KV
    token, o_d = i * R + tl.arange(0, R), tl.arange(0, DP)
    inside = (o_d < D)[None, :]
    place = tl.load(places + token, mask=token < count, other=-1).to(tl.int64)
    p_chunks = d_chunks + (kv * rows + place)[:, None] * D + o_d[None, :]
    value = tl.load(p_chunks, mask=(place >= 0)[:, None] & inside, other=0.0)
    p_x = d_x + (token * KV + kv)[:, None] * D + o_d[None, :]
    tl.store(p_x, value, mask=(token < count)[:, None] & inside)
