"""Rows that fan out from tokens, to experts or to ranks, and sums that come back: the same in PyTorch and in Triton.

A *fan* says where each token's copies stand. Nothing here is read by the host, and every sum has one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fan:
    """rows: ``[T, K]`` int32, the place of each copy of a token, -1 for none. order: ``[R]`` int32, the copy (token
    times K plus k) at each place, some copy where there is none."""

    rows: Tensor
    order: Tensor


def by_expert(choices: Tensor, experts: int, places: int) -> tuple[Fan, Tensor]:
    """Copies sorted by expert, then by token, and ``[experts]`` int32: where each expert's end.

    choices: ``[T, K]`` int, from 0 to ``experts`` - 1, or -1 for a copy that goes nowhere. places: how many there are,
    not fewer than copies that go somewhere.
    """
    keys = torch.where(choices < 0, experts, choices).flatten()
    keys = keys.to(torch.uint8 if experts < 256 else torch.int32)  # a radix sort takes a pass for each byte
    ranked, order = torch.sort(keys, stable=True)
    edges = torch.arange(experts, device=keys.device, dtype=torch.int32).to(keys.dtype)
    ends = torch.searchsorted(ranked, edges, right=True, out_int32=True)
    rows = torch.empty(len(order), dtype=torch.int32, device=keys.device)
    rows[order] = torch.arange(len(order), dtype=torch.int32, device=keys.device)
    rows = torch.where(choices < 0, -1, rows.view_as(choices))
    return Fan(rows, order[:places].to(torch.int32)), ends


def by_rank(hosts: Tensor, ranks: Tensor) -> tuple[Fan, Tensor]:
    """One copy of a token for each rank that hosts an expert of its choice, sorted by rank, then by token.

    hosts: ``[T, K]`` int, the host of each choice. ranks: ``[D]`` int, those that copies may go to. Also the number of
    copies for each, ``[D]`` int32. The fan has min(K, D)·T places, of which the first ones are taken.
    """
    (tokens, choices), ranks_count = hosts.shape, len(ranks)
    needed = (hosts[None] == ranks[:, None, None]).any(2)
    counts = needed.sum(1, dtype=torch.int32)
    needed = needed.flatten()
    places = torch.where(needed, needed.cumsum(0, dtype=torch.int32) - 1, -1).view(ranks_count, tokens)
    rows = places.T.contiguous()
    most = min(choices, ranks_count) * tokens
    order = torch.zeros(most + 1, dtype=torch.int32, device=hosts.device)
    numbers = torch.arange(rows.numel(), dtype=torch.int32, device=hosts.device)
    order[torch.where(rows < 0, most, rows).flatten().long()] = numbers  # all that go nowhere to one place too many
    return Fan(rows, order[:most]), counts


def expand(parts: Sequence[Tensor], fan: Fan, triton: bool, out: Tensor | None = None) -> Tensor:
    """``[T, H] -> [R, H]``: each token's row at the places of its copies; what stands at other places is undefined.

    parts: rows of the tokens, in one part or two; a part's rows are contiguous, but may lie apart. out: where to write.
    """
    if out is None:
        out = parts[0].new_empty(len(fan.order), parts[0].shape[1])
    if triton:
        from shoal.kernels.moe import triton_rows

        return triton_rows.expand(parts[0], fan.rows, out, parts[1] if len(parts) > 1 else None)
    if len(out):
        rows = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        out.copy_(rows[fan.order[: len(out)].long() // fan.rows.shape[1]])
    return out


def combine(
    results: Tensor,
    rows: Tensor,
    triton: bool,
    gates: Tensor | None = None,
    base: Tensor | None = None,
    product: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
    more: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``[R, H] -> [T, H]``: base plus the sum of a token's results, weighted, in the order of its copies.

    rows: ``[T, K]`` int32, part of a fan. gates: ``[T, K]``. product: ``[T, N]`` and ``[N, H]``, whose product is
    added, by Triton only. out: where to write; base itself if you like. more: other rows ``[·, H]`` and their places
    ``[T, D]``, whose sums are added behind, unweighted.
    """
    if triton:
        from shoal.kernels.moe import triton_rows

        given = gates, base, *(product or (None, None))
        return triton_rows.combine(results, rows, *given, some=True, out=out, more=more)
    sums = [base, _sums(results, rows, gates), _sums(*more) if more else None]
    first, *others = [each for each in sums if each is not None] or [results.new_zeros(len(rows), results.shape[1])]
    total = sum(others, first)
    return total if out is None else out.copy_(total)


def _sums(results: Tensor, rows: Tensor, gates: Tensor | None = None) -> Tensor | None:
    """None where there is nothing to add up."""
    if not len(results) or not rows.shape[1]:
        return None
    taken = results[rows.clamp(min=0).long()].masked_fill_((rows < 0)[..., None], 0)
    return taken.sum(1) if gates is None else torch.bmm(gates.to(taken.dtype)[:, None], taken)[:, 0]
