"""The sum of a decode step's partial outputs, in Triton: of each branch, and of the branches by their gates."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.nsa.paged import HiddenGates
from shoal.kernels.nsa.triton_select import padded


def sum_branches(
    parts: tuple[Tensor, Tensor, Tensor],
    gates: Tensor | HiddenGates,
    out: Tensor,
    begins: tuple[int, int],
    group: int,
    launch: dict[str, Any],
) -> None:
    """parts: ``[N, KV, P, G, d_v]``, not divided by their sums of weights, maxima, and those sums, ``[N, KV, P, G]``,
    in float32. gates: ``[N, H, 3]``, or what they are of, contiguous, older than the last launch. begins: of the second
    and the third branch's parts. launch: of ``begins_ahead``."""
    n, heads, dim_v = out.shape
    if isinstance(gates, HiddenGates):
        given, weight, depth = gates.hidden, gates.weight, gates.weight.shape[1]
    else:
        given = weight = gates
        depth = 0
    width = padded(parts[0].shape[2])
    _sum_kernel[(n * heads,)](
        *(*parts, given, weight, out, *begins, parts[0].shape[2]),
        H=heads,
        G=group,
        R=depth,
        RP=padded(depth, least=1),
        E=dim_v,
        EP=padded(dim_v),
        PP=width,
        num_warps=min(8, width // 16),
        **launch,
    )


@triton.jit
def _gate(gates, weight, row, c, H: tl.constexpr, R: tl.constexpr, RP: tl.constexpr):
    """The gate of branch c of a query's head; of R hidden numbers where it is not computed yet."""
    if R:
        o_r = tl.arange(0, RP)
        hidden = tl.load(gates + row // H * R + o_r, mask=o_r < R, other=0.0).to(tl.float32)
        b_w = tl.load(weight + (row % H * 3 + c) * R + o_r, mask=o_r < R, other=0.0).to(tl.float32)
        gate = 1.0 / (1.0 + tl.exp(-tl.sum(hidden / (1.0 + tl.exp(-hidden)) * b_w, 0)))
    else:
        gate = tl.load(gates + row * 3 + c).to(tl.float32)
    return gate


@triton.jit
def _factor(tops, totals, mine, gate):
    """What a branch's partial outputs count for, 0 for those of the others: all 0 over no keys."""
    b_tops = tl.where(mine, tops, float("-inf"))
    m = tl.max(b_tops, 0)
    weights = tl.exp2(b_tops - tl.where(m == float("-inf"), 0.0, m))
    total = tl.sum(weights * totals, 0)
    return weights * (gate / tl.where(total == 0.0, 1.0, total))


@triton.jit(do_not_specialize=["slc", "win", "parts"])
def _sum_kernel(
    part,
    tops,
    totals,
    gates,
    weight,
    out,
    slc,
    win,
    parts,
    H: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    PP: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """``Σ_c g_c · o_c`` (NSA eq. 5) of one query and head. slc, win: the first partial outputs of those branches."""
    row = tl.program_id(0).to(tl.int64)
    at, g = row // G * parts, row % G
    f_cmp = _gate(gates, weight, row, 0, H, R, RP)
    f_slc = _gate(gates, weight, row, 1, H, R, RP)
    f_win = _gate(gates, weight, row, 2, H, R, RP)
    if AHEAD:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    o_i, o_e = tl.arange(0, PP), tl.arange(0, EP)
    rows = (at + o_i) * G + g
    b_part = tl.load(part + rows[:, None] * E + o_e[None, :], (o_i < parts)[:, None] & (o_e < E)[None, :], other=0.0)
    b_tops = tl.load(tops + rows, mask=o_i < parts, other=float("-inf"))
    b_totals = tl.load(totals + rows, mask=o_i < parts, other=0.0)
    factor = _factor(b_tops, b_totals, o_i < slc, f_cmp)
    factor += _factor(b_tops, b_totals, (o_i >= slc) & (o_i < win), f_slc)
    factor += _factor(b_tops, b_totals, o_i >= win, f_win)
    acc = tl.sum(factor[:, None] * b_part, 0)
    tl.store(out + row * E + o_e, acc.to(out.dtype.element_ty), mask=o_e < E)
