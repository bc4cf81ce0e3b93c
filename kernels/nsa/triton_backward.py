"""NSA's backward pass in Triton: one pass for what all branches need, then the branches one after the other."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import launch, tiles
from shoal.kernels.nsa.layout import Layout
from shoal.kernels.nsa.triton_forward import Forward
from shoal.kernels.nsa.triton_gather_grad import GatherGradTuning, selected_backward
from shoal.kernels.nsa.triton_select import padded
from shoal.kernels.nsa.triton_span_grad import Grads, SpanGradTuning, span_backward
from shoal.kernels.nsa.triton_tables import Span, make_tables


@dataclass(frozen=True)
class BackwardTuning:
    """One for each kernel; they change speed, never results (beyond rounding)."""

    cmp: SpanGradTuning = field(default_factory=lambda: SpanGradTuning(chunk=1024, stages=3))
    window: SpanGradTuning = field(default_factory=lambda: SpanGradTuning(lap=640, stages=3))
    selected: GatherGradTuning = field(default_factory=GatherGradTuning)


def nsa_backward(
    d_out: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    kept: list[Tensor],
    layout: Layout,
    scale: float,
    *,
    deterministic: bool = False,
    tuning: BackwardTuning | None = None,
    arrive: Callable[[], object] | None = None,
    wide: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of ``nsa_forward``'s eight tensors, in their order and dtypes, for ``d_out [T, H, E]``.

    kept: of the forward pass, emptied when its outputs have been read. Gates must not be negative. deterministic: the
    same bits in every run, for more time. arrive, wide: as in ``attention.nsa_backward``.
    """
    tuning = tuning or BackwardTuning()
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, d_out = (
        x.contiguous() for x in (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, d_out)
    )
    tables = make_tables(layout)
    *rows, d_gates = row_sums(d_out, gates.contiguous(), Forward(d_out, *kept))
    blocks = kept[-1]
    kept.clear()
    # The selected branch comes first: its parts are gone by the time the sum of all is rounded, to a buffer of its own.
    # Where its keys are on their way it comes last, and rounds the sum itself.
    first = arrive is None
    d_q = (torch.empty if first else torch.zeros)(q.shape, dtype=torch.float32, device=q.device)

    def selected() -> tuple[Tensor, Tensor, Tensor]:
        grads = Grads.of(d_q, k_slc, v_slc)
        base, dots = (x[1] for x in rows)
        args = (q, k_slc, v_slc, d_out, base, dots, blocks, tables, scale, grads)
        queries = selected_backward(*args, alone=first, deterministic=deterministic, tuning=tuning.selected)
        return queries, *finished(grads, scale, torch.float32 if wide else q.dtype)

    def spanned(
        side: int, k: Tensor, v: Tensor, span: Span, seen: Span, tuned: SpanGradTuning
    ) -> tuple[Tensor, Tensor]:
        grads = Grads.of(d_q, k, v)
        base, dots = (x[side] for x in rows)
        args = (q, k, v, d_out, base, dots, span, seen, scale, grads)
        branch_backward(*args, deterministic=deterministic, tuning=tuned)
        return finished(grads, scale, q.dtype)

    if first:
        queries, *slc = selected()
    cmp = spanned(0, k_cmp, v_cmp, tables.cmp, tables.cmp_seen, tuning.cmp)
    win = spanned(2, k_win, v_win, tables.window, tables.window_seen, tuning.window)
    if arrive is not None:
        arrive()
        queries, *slc = selected()
    rows.clear()
    return (rounded(queries, scale, q.dtype) if first else queries, *cmp, *slc, *win, d_gates)


def branch_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    base: Tensor,
    dots: Tensor,
    span: Span,
    seen: Span,
    scale: float,
    grads: Grads,
    *,
    deterministic: bool,
    tuning: SpanGradTuning,
) -> None:
    """``span_backward``, by its twin for Hopper where that takes them and may add in any order."""
    args = (q, k, v, d_out, base, dots, span, seen, scale, grads)
    if q.is_cuda and not deterministic:
        from shoal.kernels.nsa.gluon_span_grad import gluon_span_backward, supported

        if supported(q, v, wide=tuning.wide):
            # Programs enough for the multiprocessors, and few that add to the same keys.
            chunk = min(max(256, q.shape[0] // 2048 * 64), 2048) if tuning.chunk else 0
            return gluon_span_backward(*args, chunk=chunk, lap=tiles(tuning.lap, 64) * 64)
    return span_backward(*args, deterministic=deterministic, tuning=tuning)


def finished(grads: Grads, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values in ``dtype``."""
    return rounded(grads.d_k, scale, dtype), rounded(grads.d_v, 1.0, dtype)


def rounded(x: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """``factor · x`` in ``dtype``, in one pass."""
    return torch.mul(x, factor, out=torch.empty(x.shape, dtype=dtype, device=x.device))


def row_sums(d_out: Tensor, gates: Tensor, forward: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels of the branches read of each row, from one pass over the outputs.

    Returns bases ``[3, T, H]`` float32, log-sum-exp (base 2) minus log2 of the gate, inf where there is no weight; dots
    ``[3, T, H]`` float32, ``d_out · out`` of each branch; and the gradients of the gates, ``[T, H, 3]``, which are the
    same numbers in the gates' dtype.
    """
    tokens, heads, dim = d_out.shape
    bases, dots = (torch.empty(3, tokens, heads, dtype=torch.float32, device=d_out.device) for _ in range(2))
    d_gates = torch.empty_like(gates)
    rows = tokens * heads
    if rows:
        f, tile = forward, 32
        launch(
            _row_sums_kernel,
            (tiles(rows, tile),),
            *(d_out, f.cmp, f.slc, f.win, f.cmp_lse, f.slc_lse, f.win_lse, gates, bases, dots, d_gates, rows),
            E=dim,
            EP=padded(dim),
            TILE=tile,
            num_warps=4,
        )
    return bases, dots, d_gates


@triton.jit
def _row_sums_branch(d_out, out, lse, gates, bases, dots, d_gates, rows, row, at, mask, BRANCH: tl.constexpr, inside):
    dot = tl.sum(d_out * tl.load(out + at, mask=mask, other=0.0).to(tl.float32), 1)
    gate = tl.load(gates + row * 3 + BRANCH, mask=inside, other=0.0).to(tl.float32)
    b_lse = tl.load(lse + row, mask=inside, other=float("-inf"))
    none = (gate == 0.0) | (b_lse == float("-inf"))
    base = b_lse * 1.4426950408889634 - tl.log2(tl.where(none, 1.0, gate))
    tl.store(bases + BRANCH * rows + row, tl.where(none, float("inf"), base), mask=inside)
    tl.store(dots + BRANCH * rows + row, dot, mask=inside)
    tl.store(d_gates + row * 3 + BRANCH, dot.to(d_gates.dtype.element_ty), mask=inside)


@triton.jit
def _row_sums_kernel(
    d_out,
    cmp,
    slc,
    win,
    cmp_lse,
    slc_lse,
    win_lse,
    gates,
    bases,
    dots,
    d_gates,
    rows,
    E: tl.constexpr,
    EP: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    o_e = tl.arange(0, EP)
    inside = row < rows
    mask = inside[:, None] & (o_e < E)[None, :]
    at = row[:, None] * E + o_e[None, :]
    b_do = tl.load(d_out + at, mask=mask, other=0.0).to(tl.float32)
    _row_sums_branch(b_do, cmp, cmp_lse, gates, bases, dots, d_gates, rows, row, at, mask, 0, inside)
    _row_sums_branch(b_do, slc, slc_lse, gates, bases, dots, d_gates, rows, row, at, mask, 1, inside)
    _row_sums_branch(b_do, win, win_lse, gates, bases, dots, d_gates, rows, row, at, mask, 2, inside)
