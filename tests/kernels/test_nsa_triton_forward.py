"""NSA's forward pass in Triton, whole and in parts, against the oracle in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import cast

import pytest
import torch
import triton_on_cpu
from torch import Tensor
from triton_on_cpu import DEVICE, SHAPES, TOLERANCE, close, draw

triton_on_cpu.prepare()

from nsa_packs import hyper  # noqa: E402

from shoal.kernels.nsa import BlockSizes, Layout, make_layout, nsa_attention, oracle  # noqa: E402
from shoal.kernels.nsa.triton_attention import narrow_tunings  # noqa: E402
from shoal.kernels.nsa.triton_choose import ChooseTuning, choose_blocks  # noqa: E402
from shoal.kernels.nsa.triton_forward import Forward, ForwardTuning, nsa_forward  # noqa: E402
from shoal.kernels.nsa.triton_gather import Tuning  # noqa: E402
from shoal.kernels.nsa.triton_span import SpanTuning, span_attention  # noqa: E402
from shoal.kernels.nsa.triton_tables import Span, make_tables  # noqa: E402

SCALE = 0.5
SPAN = SpanTuning(rows=16, keys=16)
TINY = ForwardTuning(
    SPAN, SPAN, ChooseTuning(chunk=64, rows=16, blocks=16), Tuning(chunk=50, rows=16, steps=2, direct=1)
)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def layout_of(lengths: list[int], sizes: BlockSizes) -> Layout:
    return make_layout(tuple(accumulate(lengths, initial=0)), sizes, DEVICE)


def inputs(layout: Layout, kv: int, group: int, dims: tuple[int, int], dtype: torch.dtype) -> Inputs:
    """q, three pairs of keys and values, gates."""
    q = draw(layout.tokens, kv * group, dims[0], dtype=dtype, seed=1)
    rows = (layout.cmp_starts.numel(), layout.tokens, layout.tokens)
    keys = [draw(n, kv, dims[side], dtype=dtype, seed=2 + side + 2 * i) for i, n in enumerate(rows) for side in (0, 1)]
    return cast("Inputs", (q, *keys, draw(layout.tokens, kv * group, 3, dtype=dtype, seed=9).sigmoid()))


def in_float64(args: Inputs) -> Inputs:
    return cast("Inputs", tuple(x.cpu().double() for x in args))


def run(lengths: list[int], sizes: BlockSizes, kv: int, group: int, dims: tuple[int, int]) -> Forward:
    layout = layout_of(lengths, sizes)
    args = inputs(layout, kv, group, dims, torch.float32)
    result = nsa_forward(*args, layout, SCALE, TINY)
    close(result.out, oracle.nsa(*in_float64(args), layout.cu_seqlens, hyper(sizes), SCALE), torch.float32)
    return result


@pytest.mark.parametrize(
    ("lengths", "sizes", "kv", "group", "dims"),
    [
        ([41, 2, 24], BlockSizes(4, 2, 8, 4, 1, 2, 11), 2, 2, (8, 4)),
        ([1, 1, 3, 50], BlockSizes(6, 2, 8, 3, 0, 1, 100), 1, 3, (20, 6)),
        ([70], BlockSizes(4, 4, 4, 4, 2, 1, 1), 1, 1, (16, 16)),
        ([30], BlockSizes(4, 2, 4, 3, 1, 2, 7), 2, 1, (8, 8)),
    ],
)
def test_against_the_oracle(lengths: list[int], sizes: BlockSizes, kv: int, group: int, dims: tuple[int, int]) -> None:
    """Also where only forced blocks are kept, windows of one key, and documents without compressed keys."""
    run(lengths, sizes, kv, group, dims)


def test_no_tokens() -> None:
    result = run([0], BlockSizes(4, 2, 8, 4, 1, 2, 11), 2, 2, (8, 4))
    assert result.out.shape == (0, 4, 4)


def test_spans_of_any_kind() -> None:
    """Empty, falling and far apart, with a second one or not."""
    tokens, keys = 24, 90
    q, k = draw(tokens, 4, 8, dtype=torch.float32, seed=1), draw(keys, 2, 8, dtype=torch.float32, seed=2)
    v = draw(keys, 2, 5, dtype=torch.float32, seed=3)
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(0, 46, (2, tokens, 2), generator=generator, dtype=torch.int32) + torch.tensor([[[0]], [[45]]])
    ends[:, 8:12] = 7
    first, second = (Span(*(x.to(torch.int32).to(DEVICE) for x in part.unbind(-1))) for part in ends)
    for also in (None, second):
        out, lse = span_attention(q, k, v, first, SCALE, also=also, tuning=SPAN)
        want, want_lse = torch.zeros(tokens, 4, 5).double(), torch.full((tokens, 4), -torch.inf).double()
        for t in range(tokens):
            seen = [key for part in ends[: 1 if also is None else 2].tolist() for key in range(*part[t])]
            for head in range(4):
                rows = k[seen, head // 2].cpu().double(), v[seen, head // 2].cpu().double()
                want[t, head] = oracle.attend(q[t, head].cpu().double(), *rows, SCALE)
                want_lse[t, head] = torch.logsumexp(SCALE * (rows[0] @ q[t, head].cpu().double()), 0)
        close(out, want, torch.float32)
        torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("equal", "top_group"), [(False, 128), (True, 128), (False, 4), (True, 1)])
def test_chosen_blocks(equal: bool, top_group: int) -> None:
    """Those of the oracle; of equally important ones (all compressed keys alike) the first."""
    sizes, kv, group = BlockSizes(4, 2, 4, 5, 1, 2, 21), 1, 4
    layout = layout_of([3, 69, 26], sizes)  # up to 18 blocks: lists of 32, of which 16 groups take two each
    tables = make_tables(layout)
    q, k_cmp = inputs(layout, kv, group, (8, 8), torch.float32)[:2]
    if equal:
        k_cmp = k_cmp[:1].expand_as(k_cmp).contiguous()
    _, lse = span_attention(q, k_cmp, k_cmp, tables.cmp, SCALE, tuning=SPAN)
    blocks = choose_blocks(q, k_cmp, lse, tables, SCALE, replace(TINY.choose, top_group=top_group))
    for t, start in enumerate(tables.starts.tolist()):
        keys = k_cmp[int(tables.cmp.low[t]) : int(tables.cmp.high[t]), 0].cpu().double()
        p = torch.softmax(SCALE * keys @ q[t].cpu().double().T, 0).sum(1)
        if equal:
            p = torch.ones_like(p)  # else float64 rounding makes a choice
        scores = oracle.slc_importance(p, (t - start) // sizes.slc_block + 1, hyper(sizes))
        got = blocks[t, 0].tolist()
        assert sorted(b for b in got if b >= 0) == oracle.chosen_blocks(scores, t - start, hyper(sizes))
        forced = [
            -1 if b < 0 else b for b in range((t - start) // sizes.slc_block - 1, (t - start) // sizes.slc_block + 1)
        ]
        assert got[1:3] == forced


@pytest.mark.gpu
@pytest.mark.parametrize(("kv", "group", "dims", "dtype"), SHAPES, ids=str)
def test_on_a_gpu(kv: int, group: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    """Against the PyTorch operations in float64, which other tests hold against the oracle; heads that Gluon takes by
    Triton as well."""
    sizes = BlockSizes(32, 16, 64, 6, 1, 2, 100)
    layout = layout_of([700, 1, 63, 64, 900], sizes)
    args = inputs(layout, kv, group, dims, dtype)
    scale = dims[0] ** -0.5
    exact = make_layout(layout.cu_seqlens, sizes, "cpu")
    want = nsa_attention(*in_float64(args), exact, scale)
    for tuning in (None, narrow_tunings()[0]) if dims[0] in (96, 192) else (None,):
        got = nsa_forward(*args, layout, scale, tuning).out.cpu().double()
        # A block that rounding swaps for an equally important one changes a row, and is not counted as an error.
        rows = (got - want).norm(dim=-1) <= 0.1 * want.norm(dim=-1)
        assert rows.double().mean() > 0.999
        assert (got - want)[rows].norm() / want[rows].norm() <= TOLERANCE[dtype]
