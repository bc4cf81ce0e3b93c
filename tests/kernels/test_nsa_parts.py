"""Some queries of a pack over the keys they need give what all queries give at once: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import cast

import pytest
import torch
import triton_on_cpu
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton_on_cpu import DEVICE, ON_GPU, close, draw

triton_on_cpu.prepare()

from shoal.kernels.nsa import BlockSizes, make_layout, nsa_attention  # noqa: E402
from shoal.kernels.nsa.attention import Tensors, nsa_forward  # noqa: E402
from shoal.kernels.nsa.layout import Layout  # noqa: E402
from shoal.kernels.nsa.rows import Rows, needs  # noqa: E402
from shoal.kernels.nsa.triton_attention import Tunings, nsa_triton  # noqa: E402
from shoal.kernels.nsa.triton_backward import BackwardTuning  # noqa: E402
from shoal.kernels.nsa.triton_choose import ChooseTuning  # noqa: E402
from shoal.kernels.nsa.triton_forward import ForwardTuning  # noqa: E402
from shoal.kernels.nsa.triton_forward import nsa_forward as triton_forward  # noqa: E402
from shoal.kernels.nsa.triton_gather import Tuning  # noqa: E402
from shoal.kernels.nsa.triton_gather_grad import GatherGradTuning  # noqa: E402
from shoal.kernels.nsa.triton_span import SpanTuning  # noqa: E402
from shoal.kernels.nsa.triton_span_grad import SpanGradTuning  # noqa: E402

SIZES = BlockSizes(4, 2, 8, 4, 1, 2, 11)
SPAN = SpanTuning(rows=16, keys=16)
TINY: Tunings = (
    ForwardTuning(SPAN, SPAN, ChooseTuning(chunk=64, rows=16, blocks=16), Tuning(chunk=50, rows=16, steps=2, direct=1)),
    BackwardTuning(
        SpanGradTuning(rows=16, keys=16, chunk=24),
        SpanGradTuning(rows=16, keys=16, lap=13),
        GatherGradTuning(chunk=30, item=4, rows=16),
    ),
)
SHAPE = (1, 2, 8, 4)  # KV heads, group, d_qk, d_v


def inputs(layout: Layout, dtype: torch.dtype, shape: tuple[int, int, int, int] = SHAPE) -> list[Tensor]:
    """q, three pairs of keys and values, gates, and last the gradient of the output."""
    tokens, (kv, group, d_qk, d_v) = layout.tokens, shape
    rows = (layout.cmp_starts.numel(), tokens, tokens)
    q = draw(tokens, kv * group, d_qk, dtype=torch.float32, seed=1)
    keys = [
        draw(n, kv, d, dtype=torch.float32, seed=2 + 2 * i + j)
        for i, n in enumerate(rows)
        for j, d in enumerate((d_qk, d_v))
    ]
    gates = draw(tokens, kv * group, 3, dtype=torch.float32, seed=9).sigmoid()
    return [x.to(dtype) for x in (q, *keys, gates, draw(tokens, kv * group, d_v, dtype=torch.float32, seed=10))]


def pieces(layout: Layout, part: Layout) -> list[Tensor]:
    """Of each input its rows that belong to a part."""
    n, q = part.needs, part.queries.indices()
    return [q, *(r.indices() for r in (n.cmp, n.cmp, n.far, n.far, n.near, n.near)), q, q]


def compare(cu: tuple[int, ...], cut: list[Rows], dtype: torch.dtype, run, tile: int | None = None, **options) -> None:  # type: ignore[no-untyped-def]
    """The parts' outputs and gradients, put together, beside the whole's in float64."""
    whole = make_layout(cu, SIZES, "cpu")
    args = inputs(whole, dtype)
    exact = [x.detach().clone().cpu().double().requires_grad_() for x in args[:-1]]
    want = nsa_attention(*cast(Tensors, exact), whole, 0.5)
    want.backward(args[-1].cpu().double())
    out = torch.full_like(want, torch.nan)
    sums = [torch.zeros_like(x) for x in exact]
    for queries in cut:
        part = make_layout(cu, SIZES, DEVICE if dtype != torch.float64 else "cpu", tile, queries=queries, **options)
        at = pieces(whole, part)
        leaves = [x[i.to(x.device)].requires_grad_() for x, i in zip(args[:-1], at, strict=False)]
        got = run(leaves, part)
        got.backward(args[-1][at[0].to(args[-1].device)])
        out[at[0]] = got.detach().cpu().double()
        for total, leaf, i in zip(sums, leaves, at, strict=False):
            assert leaf.grad is not None
            total[i] += leaf.grad.cpu().double()
    if dtype == torch.float64:
        torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-11)
        for total, leaf in zip(sums, exact, strict=True):
            torch.testing.assert_close(total, leaf.grad, rtol=1e-9, atol=1e-11)
        return
    close(out.to(dtype), want, dtype)
    for total, leaf in zip(sums, exact, strict=True):
        assert leaf.grad is not None
        close(total.to(dtype), leaf.grad, dtype)


def zigzag(tokens: int, ranks: int, step: int) -> list[Rows]:
    """Pieces of ``step`` tokens, an early and a late one each."""
    edges = [min(tokens, i * step) for i in range(2 * ranks)] + [tokens]
    pairs = list(pairwise(edges))
    return [Rows.of([pairs[i], pairs[-1 - i]]) for i in range(ranks)]


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    cuts=st.lists(st.integers(0, 150), max_size=5),
    tile=st.sampled_from([8, 64]),
    dense=st.sampled_from([0, 10**6]),
)
def test_any_parts_in_pytorch(lengths: list[int], cuts: list[int], tile: int, dense: int) -> None:
    cu = tuple(accumulate(lengths, initial=0))
    edges = sorted({0, cu[-1], *(c for c in cuts if c < cu[-1])})
    ranges = list(pairwise(edges))
    cut = [Rows.of(ranges[::2]), Rows.of(ranges[1::2])]
    compare(cu, cut, torch.float64, lambda x, part: nsa_attention(*cast(Tensors, x), part, 0.5), tile, dense_keys=dense)


@pytest.mark.parametrize(("lengths", "ranks", "step"), [([65], 2, 16), ([20, 27, 3, 36], 2, 24), ([40], 1, 24)])
def test_zigzag_in_triton(lengths: list[int], ranks: int, step: int) -> None:
    """With gaps between a part's queries, blocks that begin on another part, and one that holds all."""
    cu = tuple(accumulate(lengths, initial=0))
    tunings = None if ON_GPU else TINY
    compare(
        cu,
        zigzag(cu[-1], ranks, step),
        torch.float32,
        lambda x, part: nsa_triton(*cast(Tensors, x), part, 0.5, deterministic=bool(len(lengths) > 1), tunings=tunings),
    )


def test_both_ways_tell_which_pages_are_read() -> None:
    """Who fetches chosen blocks alone asks by that, of queries that end within blocks and pages, and documents that
    begin within pages."""
    whole = make_layout((0, 70, 76, 500), SIZES, "cpu")
    for queries in (Rows.of([(40, 53), (440, 456)]), Rows.of([(74, 91), (300, 303)])):
        part = make_layout(whole.cu_seqlens, SIZES, "cpu", 16, 0, queries)
        tensors = [x.cpu()[i] for x, i in zip(inputs(whole, torch.float32)[:-1], pieces(whole, part), strict=False)]
        pages: list[Tensor] = []
        nsa_forward(cast(Tensors, tuple(tensors)), part, 0.5, "torch", partial(keep, pages))
        part = make_layout(whole.cu_seqlens, SIZES, DEVICE, queries=queries)
        triton_forward(*cast(Tensors, [x.to(DEVICE) for x in tensors]), part, 0.5, TINY[0], partial(keep, pages))
        assert 0 < pages[1].sum() < pages[1].numel()
        assert torch.equal(pages[1], pages[0])


def keep(pages: list[Tensor], read: Callable[[], Tensor]) -> None:
    pages.append(read().cpu())


def test_what_queries_need() -> None:
    """A pack of 10 and 90 tokens; the queries are tokens 40 to 55."""
    n = needs((0, 10, 100), SIZES, Rows.of([(40, 56)]))
    assert n.far == Rows(((10, 56),))
    assert n.near == Rows(((30, 56),))
    blocks = (10 - 4) // 2 + 1  # of the first document
    assert n.cmp == Rows(((blocks, blocks + (46 - 4) // 2 + 1),))
    ended = (30 - 4) // 2 + 1  # before the queries
    assert n.own == Rows(((blocks + ended, blocks + 22),))
    assert n.raw == Rows(((10 + 2 * ended, 56),))


def test_rows() -> None:
    rows = Rows.of([(8, 10), (2, 4), (4, 5), (7, 7)])
    assert rows == Rows(((2, 5), (8, 10)))
    assert rows.indices().tolist() == [2, 3, 4, 8, 9]
    assert rows.places(rows.indices()).tolist() == [0, 1, 2, 3, 4] == [rows.at(i) for i in rows.indices().tolist()]
    assert rows.holds(torch.arange(11)).tolist() == [i in (2, 3, 4, 8, 9) for i in range(11)]
    assert list(rows.shared(Rows(((3, 9),)))) == [(slice(1, 3), slice(0, 2)), (slice(3, 4), slice(5, 6))]
    assert Rows(()).count == 0 == Rows(()).indices().numel()
