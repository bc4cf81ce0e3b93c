"""NSA's forward pass in Triton: the branches one after the other, then their sum by the gates."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import launch, tiles
from shoal.kernels.nsa.attention import Arrive
from shoal.kernels.nsa.layout import Layout
from shoal.kernels.nsa.triton_choose import ChooseTuning, choose_blocks
from shoal.kernels.nsa.triton_gather import Tuning, selected_by_block
from shoal.kernels.nsa.triton_read import pages_read
from shoal.kernels.nsa.triton_select import padded
from shoal.kernels.nsa.triton_span import SpanTuning, span_attention
from shoal.kernels.nsa.triton_tables import PackTables, Span, Tables, make_tables


@dataclass(frozen=True)
class ForwardTuning:
    """One for each kernel; they change speed, never results (beyond rounding)."""

    cmp: SpanTuning = field(default_factory=SpanTuning)
    near: SpanTuning = field(default_factory=lambda: SpanTuning(rows=64, keys=32, warps=4))
    choose: ChooseTuning = field(default_factory=ChooseTuning)
    gather: Tuning = field(default_factory=Tuning)


@dataclass(frozen=True)
class Forward:
    """What a forward pass returns: the output, and what a backward pass would need of the branches.

    out: ``[T, H, E]``. cmp, slc, win: outputs of the branches, ``[T, H, E]``, without gates; cmp_lse, slc_lse,
    win_lse: ``[T, H]`` float32. blocks: ``[T, KV, n]`` int32, of :func:`choose_blocks`.
    """

    out: Tensor
    cmp: Tensor
    cmp_lse: Tensor
    slc: Tensor
    slc_lse: Tensor
    win: Tensor
    win_lse: Tensor
    blocks: Tensor

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """All but the output."""
        return (self.cmp, self.cmp_lse, self.slc, self.slc_lse, self.win, self.win_lse, self.blocks)


def nsa_forward(
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
    tuning: ForwardTuning | None = None,
    arrive: Arrive | None = None,
) -> Forward:
    """``o_t = Σ_c g_t^c · Attn(q_t, K_t^c, V_t^c)`` (NSA eq. 5), from the arguments of ``nsa_attention``.

    q, keys and values are of one dtype, bfloat16, float16 or float32; gates: ``[T, H, 3]``, of any. scale: above 0.
    arrive: as in ``attention.nsa_forward``; k_slc and v_slc have to be contiguous then.
    """
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = (
        x.contiguous() for x in (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
    )
    tensors = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
    return attend(*tensors, make_tables(layout), scale, tuning or ForwardTuning(), arrive)


def attend(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    tables: Tables,
    scale: float,
    tuning: ForwardTuning,
    arrive: Arrive | None = None,
) -> Forward:
    """The same over any keys that tables speak of, all tensors contiguous."""
    sizes = tables.sizes
    cmp, cmp_lse = attend_span(q, k_cmp, v_cmp, tables.cmp, scale, tuning.cmp)
    blocks = choose_blocks(q, k_cmp, cmp_lse, tables, scale, tuning.choose)
    win, win_lse = attend_span(q, k_win, v_win, tables.window, scale, tuning.near)
    if arrive is not None:
        assert isinstance(tables, PackTables)
        arrive(partial(pages_read, blocks, tables))
    # Forced blocks lie side by side for neighbouring queries: dense tiles read them. The others are gathered.
    forced = span_attention(q, k_slc, v_slc, tables.local, scale, also=tables.initial, tuning=tuning.near)
    others = blocks[..., sizes.slc_initial + sizes.slc_local :]
    if not others.shape[-1]:
        return Forward(mix(cmp, forced[0], win, gates), cmp, cmp_lse, *forced, win, win_lse, blocks)
    out = torch.empty_like(cmp)
    args = (q, k_slc, v_slc, others, tables, scale)
    mixing = (cmp, win, gates, out)
    slc, slc_lse = selected_by_block(*args, own=False, beside=forced, mix=mixing, tuning=tuning.gather)
    return Forward(out, cmp, cmp_lse, slc, slc_lse, win, win_lse, blocks)


def attend_span(q: Tensor, k: Tensor, v: Tensor, span: Span, scale: float, tuning: SpanTuning) -> tuple[Tensor, Tensor]:
    """Attention over one span: in Gluon where it knows the GPU and the shapes, which is 1.3 times as fast."""
    if q.is_cuda:
        # Imported here: Gluon's module for Hopper is of no use without a GPU.
        from shoal.kernels.nsa.gluon_span import gluon_span_attention, supported

        if supported(q, k, v, wide=tuning.wide):
            return gluon_span_attention(q, k, v, span, scale)
    return span_attention(q, k, v, span, scale, tuning=tuning)


def mix(cmp: Tensor, slc: Tensor, win: Tensor, gates: Tensor) -> Tensor:
    """Sum of three ``[T, H, E]`` by gates ``[T, H, 3]``, all contiguous; in float32, rounded once."""
    out = torch.empty_like(cmp)
    rows, dim = cmp.shape[0] * cmp.shape[1], cmp.shape[2]
    if rows:
        tile = 32
        launch(
            _mix_kernel,
            (tiles(rows, tile),),
            *(cmp, slc, win, gates, out, rows),
            E=dim,
            EP=padded(dim),
            TILE=tile,
            num_warps=4,
        )
    return out


@triton.jit(do_not_specialize=["rows"])
def _mix_kernel(cmp, slc, win, gates, out, rows, E: tl.constexpr, EP: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    o_e = tl.arange(0, EP)
    inside = row < rows
    mask = inside[:, None] & (o_e < E)[None, :]
    at = row[:, None] * E + o_e[None, :]
    total = tl.load(gates + row * 3, mask=inside, other=0.0).to(tl.float32)[:, None] * tl.load(cmp + at, mask, 0.0)
    total += tl.load(gates + row * 3 + 1, mask=inside, other=0.0).to(tl.float32)[:, None] * tl.load(slc + at, mask, 0.0)
    total += tl.load(gates + row * 3 + 2, mask=inside, other=0.0).to(tl.float32)[:, None] * tl.load(win + at, mask, 0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)
