"""The sum of a decode step's partial outputs, in Triton: of each branch, and of the branches by their gates."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

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
) -> None:
    """parts: ``[N, KV, P, G, d_v]``, not divided by their sums of weights, maxima, and those sums, ``[N, KV, P, G]``,
    in float32. gates: ``[N, H, 3]``, or what they are of. begins: of the second and the third branch's parts."""
    n, heads, dim_v = out.shape
    if isinstance(gates, HiddenGates):
        given, weight, depth = gates.hidden.contiguous(), gates.weight.contiguous(), gates.weight.shape[1]
    else:
        given = weight = gates.contiguous()
        depth = 0
    _sum_kernel[(n * heads,)](
        *(*parts, given, weight, out, *begins, parts[0].shape[2]),
        H=heads,
        G=group,
        R=depth,
        RP=padded(depth, least=1),
        E=dim_v,
        EP=padded(dim_v),
    )


@triton.jit
def _sum_branch(part, tops, totals, at, g, begin, stop, parts, G, E: tl.constexpr, EP: tl.constexpr):
    """One branch's output ``[EP]`` of one head from partial ones, many at a time; 0 over no keys."""
    o_i, o_e = tl.arange(0, 32), tl.arange(0, EP)
    m, total = float("-inf"), 0.0
    acc = tl.zeros([EP], tl.float32)
    for i in range(begin, stop, 32):
        inside = i + o_i < stop
        rows = (at * parts + i + o_i) * G + g
        b_tops = tl.load(tops + rows, mask=inside, other=float("-inf"))
        b_totals = tl.load(totals + rows, mask=inside, other=0.0)
        b_part = tl.load(part + rows[:, None] * E + o_e[None, :], inside[:, None] & (o_e < E)[None, :], other=0.0)
        m_new = tl.maximum(m, tl.max(b_tops, 0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        fade, weights = tl.exp2(m - base), tl.exp2(b_tops - base)
        total = total * fade + tl.sum(weights * b_totals, 0)
        acc = acc * fade + tl.sum(weights[:, None] * b_part, 0)
        m = m_new
    return acc / tl.where(total == 0.0, 1.0, total)


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
):
    """``Σ_c g_c · o_c`` (NSA eq. 5) of one query and head. slc, win: the first partial outputs of those branches."""
    row = tl.program_id(0).to(tl.int64)
    at, g = row // G, row % G
    o_e = tl.arange(0, EP)
    acc = _sum_branch(part, tops, totals, at, g, 0, slc, parts, G, E, EP) * _gate(gates, weight, row, 0, H, R, RP)
    acc += _sum_branch(part, tops, totals, at, g, slc, win, parts, G, E, EP) * _gate(gates, weight, row, 1, H, R, RP)
    acc += _sum_branch(part, tops, totals, at, g, win, parts, parts, G, E, EP) * _gate(gates, weight, row, 2, H, R, RP)
    tl.store(out + row * E + o_e, acc.to(out.dtype.element_ty), mask=o_e < E)
