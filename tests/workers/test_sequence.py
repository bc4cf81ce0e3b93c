"""Attention over a sequence that ranks share: one rank's outputs and gradients, buffers and bytes by the formula."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor

from shoal.kernels.nsa import BlockSizes, Layout, compress, make_layout, nsa_attention
from shoal.kernels.nsa.compress import OwnBlocks
from shoal.workers.mesh import Group
from shoal.workers.sequence import Chosen, Sequence, make_sequence, sequence_attention, zigzag
from shoal.workers.volume import Shape, nsa_volume

SIZES = BlockSizes(8, 4, 8, 4, 1, 2, 12)
SCALE = 0.6
KV, GROUP, D_QK, D_V = 2, 2, 6, 4


def inputs(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """q, raw, selected and window keys and values, gates, φ of keys and of values, gradient of the output."""
    gen = torch.Generator().manual_seed(0)

    def make(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(*shape, generator=gen, dtype=torch.float64)).to(dtype)

    def phi(dim: int) -> list[Tensor]:
        width = SIZES.cmp_block * dim
        return [make(KV, SIZES.cmp_block, dim), make(KV, width, 2 * dim, std=width**-0.5), make(KV, 2 * dim, dim)]

    keys = [make(tokens, KV, dim) for _ in range(3) for dim in (D_QK, D_V)]
    gates = make(tokens, KV * GROUP, 3).sigmoid()
    weights = [*phi(D_QK), *phi(D_V)]
    return [make(tokens, KV * GROUP, D_QK), *keys, gates, *weights, make(tokens, KV * GROUP, D_V)]


def whole(cu: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of one rank."""
    *args, upstream = inputs(cu[-1], dtype)
    leaves = [x.requires_grad_() for x in args]
    q, k_raw, v_raw, k_slc, v_slc, k_win, v_win, gates, *phi = leaves
    layout = make_layout(cu, SIZES, "cpu")
    keys, values = _phi(phi[:3], layout, k_raw), _phi(phi[3:], layout, v_raw)
    out = nsa_attention(q, keys, values, k_slc, v_slc, k_win, v_win, gates, layout, SCALE)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def _on_rank(
    rank: int, world: int, packs: list[tuple[int, ...]], dtype: torch.dtype, tile: int, dense: int, chosen: Chosen
) -> Any:
    """Of each pack what this rank computes: its part of the output, gradients, and its sequence's facts."""
    import torch.distributed as dist

    handle = dist.group.WORLD if world > 1 else None
    group = Group(tuple(range(world)), rank, handle)
    results = []
    for cu in packs:
        *args, upstream = inputs(cu[-1], dtype)
        at = zigzag(cu[-1], world, SIZES.slc_block)[rank].indices()
        leaves = [x[at] if i < 8 else x for i, x in enumerate(args)]
        leaves = [x.clone().requires_grad_() for x in leaves]
        q, k_raw, v_raw, k_slc, v_slc, k_win, v_win, gates, *phi = leaves
        made = make_sequence(cu, SIZES, group, torch.device("cpu"), tile, dense)
        sequence = replace(made, coverage=[])
        out = sequence_attention(
            q,
            (k_raw, v_raw),
            (k_slc, v_slc),
            (k_win, v_win),
            gates,
            (partial(_phi, phi[:3], sequence.own), partial(_phi, phi[3:], sequence.own)),
            sequence,
            SCALE,
            chosen=chosen,
        )
        forward = dict(sequence.received)
        grads = torch.autograd.grad(out, leaves, upstream[at])
        results.append((out.detach(), grads, forward, dict(sequence.received), _buffers(sequence), sequence.coverage))
    return results


def _phi(weights: list[Tensor], blocks: Layout | OwnBlocks, x: Tensor) -> Tensor:
    position, w1, w2 = weights
    return compress(x, position, w1, w2, blocks)


def _buffers(sequence: Sequence) -> dict[str, int]:
    """Rows of each buffer of fetched keys."""
    return {plan.name: plan.needed for plan in (sequence.raw, sequence.cmp, sequence.near, sequence.far)}


def check(
    world: int,
    packs: list[tuple[int, ...]],
    dtype: torch.dtype,
    tile: int = 64,
    dense: int = 512,
    chosen: Chosen = "never",
) -> list[Any]:
    """All ranks' parts put together beside one rank's; returns what the ranks returned."""
    results = run_ranks(world, _on_rank, packs, dtype, tile, dense, chosen)
    bound = 1e-10 if dtype == torch.float64 else 3e-5
    for i, cu in enumerate(packs):
        want = whole(cu, dtype)
        got = [torch.zeros_like(x) for x in want]
        for rank, rows in enumerate(zigzag(cu[-1], world, SIZES.slc_block)):
            at = rows.indices()
            out, grads = results[rank][i][:2]
            got[0][at] = out
            for j, grad in enumerate(grads):
                if j < 8:
                    got[1 + j][at] = grad
                else:
                    got[1 + j] += grad
        for j, (a, b) in enumerate(zip(got, want, strict=True)):
            error, size = (a - b).norm().item(), b.norm().item()
            assert error <= bound * size + 1e-12, (cu, j, error, size)
    return results


def pack(*lengths: int) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_compute_what_one_rank_computes(world: int) -> None:
    """One document; uneven ones, that segments cut; many short ones; fewer tokens than ranks; none."""
    packs = [pack(256), pack(37, 140, 3, 76), pack(*[9] * 20), pack(5), pack(0), pack(1, 1, 301)]
    check(world, packs, torch.float64)
    check(world, packs[:2], torch.float32, tile=8, dense=0)


@settings(max_examples=3)
@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=6), dense=st.sampled_from([0, 512]))
def test_random_packs_over_three_ranks(lengths: list[int], dense: int) -> None:
    check(3, [pack(*lengths)], torch.float64, 16, dense)


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_and_buffers_are_those_of_the_formula(world: int) -> None:
    tokens = 512
    results = check(world, [pack(tokens)], torch.float32)
    for rank in range(world):
        _, _, forward, total, buffers, _ = results[rank][0]
        model = nsa_volume(
            tokens, world, rank, Shape(KV, (D_QK, D_V), 4, 4), SIZES.cmp_block, SIZES.cmp_stride, SIZES.window
        )
        for phase, got in (("forward", forward), ("backward", {k: total[k] - forward[k] for k in total})):
            for name, want in model[phase].items():
                assert got[name] == want, (rank, phase, name)
        keys = tokens // (2 * world) * (2 * world - rank)  # all up to the last query, less for every further rank
        assert buffers["far"] == keys
        assert buffers["cmp"] == SIZES.cmp_blocks(keys)
        assert buffers["near"] <= tokens // world + 2 * (SIZES.window - 1)
        assert buffers["raw"] <= tokens // world + 2 * (SIZES.cmp_block - SIZES.cmp_stride)


@pytest.mark.parametrize("dense", [0, 10**6])
def test_only_chosen_pages_are_fetched_where_that_is_less(dense: int) -> None:
    """Of a long document few of its first pages are chosen by few late queries; of a short one all of them."""
    packs = [pack(1024), pack(40, 150, 66)]
    always = check(4, packs, torch.float64, 16, dense, "always")
    fetched = check(4, packs, torch.float64, 16, dense)
    for rank in range(4):
        for many, few in zip(fetched[rank], always[rank], strict=True):
            assert many[5] == few[5]  # the coverage
            (coverage,) = few[5]
            assert few[2].get("far", 0) <= many[2].get("far", 0)
            if many[2].get("far", 0):
                assert few[2].get("far", 0) / many[2]["far"] == pytest.approx(coverage, abs=0.12)
    less = check(4, packs, torch.float64, 16, dense, "less")
    for i in range(len(packs)):
        rows = {
            name: sum(r[rank][i][2].get("far", 0) for rank in range(4))
            for name, r in (("all", fetched), ("few", always), ("less", less))
        }
        assert rows["less"] == min(rows["all"], rows["few"])
    assert 0 < sum(always[rank][0][5][0] for rank in range(4)) < 4
