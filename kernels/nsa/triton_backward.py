"""NSA's backward pass in Triton: one pass for what all branches need, then the branches one after the other."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    bases, dots, d_gates = row_sums(d_out, gates.contiguous(), Forward(d_out, *kept))
    blocks = kept[-1]
    kept.clear()
    d_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)

    def grads(k: Tensor, v: Tensor) -> Grads:
        d_k, d_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
        return Grads(d_q, d_k, d_v)

    cmp, slc, win = grads(k_cmp, v_cmp), grads(k_slc, v_slc), grads(k_win, v_win)
    for side, branch, k, v, span, seen, tuned in (
        (0, cmp, k_cmp, v_cmp, tables.cmp, tables.cmp_seen, tuning.cmp),
        (2, win, k_win, v_win, tables.window, tables.window_seen, tuning.window),
    ):
        args = (q, k, v, d_out, bases[side], dots[side], span, seen, scale, branch)
        branch_backward(*args, deterministic=deterministic, tuning=tuned)
    if arrive is not None:
        arrive()
    selected = (q, k_slc, v_slc, d_out, bases[1], dots[1], blocks, tables, scale, slc)
    d_q = selected_backward(*selected, deterministic=deterministic, tuning=tuning.selected)
    keys = [
        rounded(x, factor, torch.float32 if wide and g is slc else q.dtype)
        for g in (cmp, slc, win)
        for x, factor in ((g.d_k, scale), (g.d_v, 1.0))
    ]
    return (d_q, *keys, d_gates)


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

        if supported(q, v):
            # Programs enough for the multiprocessors, and few that add to the same keys.
            chunk = min(max(256, q.shape[0] // 2048 * 64), 2048) if tuning.chunk else 0
            return gluon_span_backward(*args, chunk=chunk, lap=triton.cdiv(tuning.lap, 64) * 64)
    return span_backward(*args, deterministic=deterministic, tuning=tuning)


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
        _row_sums_kernel[(triton.cdiv(rows, tile),)](
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
