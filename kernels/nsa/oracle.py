"""NSA as its paper writes it: one query and one head at a time, in plain sums. Slow, and meant to be read.

Equation numbers are those of arXiv 2502.11089. Indices start at 0 here, at 1 in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hyper:
    """l, d, l', n, how many of the n blocks are forced at the start and at the end, w."""

    l: int  # noqa: E741
    d: int
    l_slc: int
    n: int
    initial: int
    local: int
    w: int


@dataclass(frozen=True)
class Phi:
    """φ of one branch side: position ``[KV, l, D]``, w1 ``[KV, l*D, 2*D]``, w2 ``[KV, 2*D, D]``."""

    position: Tensor
    w1: Tensor
    w2: Tensor


def phi(keys: Tensor, weights: Phi, g: int) -> Tensor:
    """φ of one block (eq. 7): keys ``[l, D]`` of KV head g to ``[D]``."""
    hidden = (keys + weights.position[g]).flatten() @ weights.w1[g]
    return (hidden * torch.sigmoid(hidden)) @ weights.w2[g]


def cmp_starts(length: int, hyper: Hyper) -> list[int]:
    """First keys of the compression blocks that lie whole in a document (eq. 7)."""
    return [i for i in range(0, length, hyper.d) if i + hyper.l <= length]


def compress(x: Tensor, weights: Phi, cu_seqlens: tuple[int, ...], hyper: Hyper) -> Tensor:
    """All compressed keys of a pack: x ``[T, KV, D]`` to ``[C, KV, D]``, document by document."""
    blocks = [
        torch.stack([phi(x[start + i : start + i + hyper.l, g], weights, g) for g in range(x.shape[1])])
        for start, stop in pairwise(cu_seqlens)
        for i in cmp_starts(stop - start, hyper)
    ]
    return torch.stack(blocks) if blocks else x.new_zeros(0, *x.shape[1:])


def compress_mean(x: Tensor, cu_seqlens: tuple[int, ...], hyper: Hyper) -> Tensor:
    """The mean of each block in φ's place (eq. 7): x ``[T, KV, D]`` to ``[C, KV, D]``."""
    blocks = [
        x[start + i : start + i + hyper.l].sum(0) / hyper.l
        for start, stop in pairwise(cu_seqlens)
        for i in cmp_starts(stop - start, hyper)
    ]
    return torch.stack(blocks) if blocks else x.new_zeros(0, *x.shape[1:])


def slc_importance(p_cmp: Tensor, blocks: int, hyper: Hyper) -> Tensor:
    """Importance of each selection block from compressed weights ``[C]`` (eq. 9), with the paper's two sums.

    In the paper's 1-based indices, ``p_slc[j] = Σ_m Σ_n p_cmp[(l'/d)·j - m - n]`` over 0 ≤ m < l'/d and 0 ≤ n < l/d.
    """
    out = []
    for j in range(1, blocks + 1):
        terms = [
            p_cmp[(hyper.l_slc // hyper.d) * j - m - n - 1]
            for m in range(hyper.l_slc // hyper.d)
            for n in range(hyper.l // hyper.d)
            if 1 <= (hyper.l_slc // hyper.d) * j - m - n <= len(p_cmp)
        ]
        out.append(torch.stack(terms).sum() if terms else p_cmp.new_zeros(()))
    return torch.stack(out)


def chosen_blocks(p_slc: Tensor, t: int, hyper: Hyper) -> list[int]:
    """The blocks kept for a query at position t (eq. 11): the forced ones, then the best, of equals the lower index."""
    candidates = [j for j in range(len(p_slc)) if j * hyper.l_slc <= t]
    forced = sorted({*candidates[: hyper.initial], *candidates[-hyper.local :]})
    others = sorted((j for j in candidates if j not in forced), key=lambda j: (-float(p_slc[j]), j))
    return sorted(forced + others[: hyper.n - len(forced)])


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax attention of one query ``[Dqk]`` over ``[keys, D]``; 0 over no keys."""
    return torch.softmax(scale * (k @ q), dim=0) @ v if len(k) else v.new_zeros(v.shape[1])


def nsa(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    cu_seqlens: tuple[int, ...],
    hyper: Hyper,
    scale: float,
) -> Tensor:
    """``[T, H, Dv]`` (eq. 5), from compressed keys and values ``[C, KV, D]`` and the others ``[T, KV, D]``.

    Differentiable by autograd; the choice of blocks is a choice of indices and carries no gradient.
    """
    heads, groups = q.shape[1], k_slc.shape[1]
    size = heads // groups
    out: dict[tuple[int, int], Tensor] = {}
    first_cmp = 0
    for start, stop in pairwise(cu_seqlens):
        starts = cmp_starts(stop - start, hyper)
        for t in range(stop - start):
            ended = [first_cmp + i for i, s in enumerate(starts) if s + hyper.l - 1 <= t]
            recent = slice(start + max(0, t - hyper.w + 1), start + t + 1)
            for g in range(groups):
                members = range(g * size, (g + 1) * size)
                keys, values = k_cmp[ended, g], v_cmp[ended, g]
                p_cmp = sum(torch.softmax(scale * (keys @ q[start + t, h]), dim=0) for h in members)
                assert isinstance(p_cmp, Tensor)
                blocks = chosen_blocks(slc_importance(p_cmp.detach(), t // hyper.l_slc + 1, hyper), t, hyper)
                kept = [start + s for s in range(t + 1) if s // hyper.l_slc in blocks]
                for h in members:
                    q_t, gate = q[start + t, h], gates[start + t, h]
                    out[start + t, h] = (
                        gate[0] * attend(q_t, keys, values, scale)
                        + gate[1] * attend(q_t, k_slc[kept, g], v_slc[kept, g], scale)
                        + gate[2] * attend(q_t, k_win[recent, g], v_win[recent, g], scale)
                    )
        first_cmp += len(starts)
    rows = [out[t, h] for t in range(q.shape[0]) for h in range(heads)]
    return torch.stack(rows).view(q.shape[0], heads, -1) if rows else q.new_zeros(0, heads, v_win.shape[2])
