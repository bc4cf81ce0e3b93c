"""Decode over a paged cache in Triton against the PyTorch operations in float64, which serving's tests hold against a
training forward."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
import triton_on_cpu
from torch import Tensor
from triton_on_cpu import DEVICE, SHAPES, TOLERANCE, close, draw

triton_on_cpu.prepare()

from shoal.kernels.nsa.layout import BlockSizes  # noqa: E402
from shoal.kernels.nsa.paged import (  # noqa: E402
    DecodeTables,
    HiddenGates,
    PagedCache,
    decode_tables,
    make_cache,
    paged_decode,
    paged_prefill,
)
from shoal.kernels.nsa.triton_choose import ChooseTuning  # noqa: E402
from shoal.kernels.nsa.triton_forward import ForwardTuning  # noqa: E402
from shoal.kernels.nsa.triton_gather import Tuning  # noqa: E402
from shoal.kernels.nsa.triton_paged import PagedTuning, triton_paged_decode, triton_paged_prefill  # noqa: E402
from shoal.kernels.nsa.triton_span import SpanTuning  # noqa: E402

Case = tuple[Tensor, Tensor, PagedCache, DecodeTables]
ARRAYS = ("positions", "far", "near", "near_first")


def case(
    positions: list[int], sizes: BlockSizes, kv: int, group: int, dims: tuple[int, int], dtype: torch.dtype
) -> Case:
    """Queries at ``positions`` of sequences of their own, whose pages lie anywhere among more pages than they need."""
    page, n = sizes.slc_block, len(positions)
    width, windows = max(positions) // page + 3, (sizes.window + 2 * page - 2) // page
    generator = torch.Generator().manual_seed(5)
    far = torch.randperm(n * width + 3, generator=generator)[: n * width].view(n, width)
    near = torch.randperm(n * windows + 2, generator=generator)[: n * windows].view(n, windows)
    first = torch.tensor([max(0, t - sizes.window + 1) // page * page for t in positions])
    cache = make_cache(far.numel() + 3, near.numel() + 2, kv, dims, sizes, dtype, torch.device(DEVICE))
    for seed, field in enumerate(fields(cache)):
        pages = getattr(cache, field.name)
        pages.copy_(draw(*pages.shape, dtype=dtype, seed=seed))
    at, far, near, first = (x.to(DEVICE) for x in (torch.tensor(positions), far, near, first))
    tables = decode_tables(at, far, near, first, kv, sizes)
    q = draw(n, kv * group, dims[0], dtype=dtype, seed=20)
    return q, draw(n, kv * group, 3, dtype=dtype, seed=21).sigmoid(), cache, tables


def chunk(
    position: int,
    count: int,
    sizes: BlockSizes,
    kv: int,
    group: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, PagedCache, tuple[Tensor, Tensor, int]]:
    """Queries at ``position …`` of one sequence, gates, and its pages: far, near, the first token of the near ones."""
    last = position + count - 1
    _, _, cache, tables = case([last, last], sizes, kv, group, dims, dtype)
    page, first = sizes.slc_block, max(0, position - sizes.window + 1) // sizes.slc_block * sizes.slc_block
    far = tables.far[0, 0] // kv
    near = torch.arange((last - first) // page + 1, device=DEVICE).flip(0) % cache.k_win.shape[0]
    q = draw(count, kv * group, dims[0], dtype=dtype, seed=20)
    return q, draw(count, kv * group, 3, dtype=dtype, seed=21).sigmoid(), cache, (far, near, first)


def exact(q: Tensor, gates: Tensor, cache: PagedCache, tables: DecodeTables, sizes: BlockSizes, scale: float) -> Tensor:
    """The same in float64 on the CPU."""
    wide = PagedCache(*(getattr(cache, f.name).cpu().double() for f in fields(cache)))
    host = replace(tables, **{name: getattr(tables, name).cpu() for name in ARRAYS})
    return paged_decode(q.cpu().double(), gates.cpu().double(), wide, host, sizes, scale)


@pytest.mark.parametrize(
    ("positions", "sizes", "kv", "group", "dims"),
    [
        ([0, 3, 17, 100, 63, 64], BlockSizes(4, 2, 8, 4, 1, 2, 11), 2, 2, (8, 4)),
        ([70, 1, 30], BlockSizes(6, 2, 8, 3, 0, 1, 20), 1, 3, (24, 6)),
        ([40], BlockSizes(4, 4, 4, 5, 2, 1, 1), 1, 1, (16, 16)),
        ([9, 2], BlockSizes(4, 2, 8, 4, 1, 2, 11), 1, 4, (8, 8)),
        ([90, 2, 24], BlockSizes(4, 2, 8, 3, 1, 2, 11), 1, 4, (8, 8)),
        ([150, 60], BlockSizes(8, 2, 8, 6, 1, 1, 9), 2, 2, (8, 8)),
    ],
)
def test_against_float64(positions: list[int], sizes: BlockSizes, kv: int, group: int, dims: tuple[int, int]) -> None:
    """Sequences of one token, at the ends of blocks, that choose and that do not; rows shared by programs or not; no
    block left to choose; rows as long as blocks."""
    args = case(positions, sizes, kv, group, dims, torch.float32)
    want = exact(*args, sizes, 0.4)
    for tuning in (PagedTuning(rows=16), PagedTuning(rows=16, programs=1, blocks=2)):
        close(triton_paged_decode(*args, sizes, 0.4, tuning), want, torch.float32)


@pytest.mark.parametrize("depth", [1, 20])
def test_gates_before_their_last_product(depth: int) -> None:
    sizes = BlockSizes(4, 2, 8, 4, 1, 2, 11)
    q, _, cache, tables = case([0, 17, 100], sizes, 2, 3, (8, 4), torch.float32)
    gates = HiddenGates(draw(3, depth, dtype=torch.float32, seed=30), draw(18, depth, dtype=torch.float32, seed=31))
    given = HiddenGates(gates.hidden.cpu().double(), gates.weight.cpu().double()).gates()
    want = exact(q, given, cache, tables, sizes, 0.4)
    strided = HiddenGates(gates.hidden.repeat(1, 2)[:, :depth], gates.weight.t().contiguous().t())
    for mixed in (gates, gates.gates(), strided, gates.gates().mT.contiguous().mT):
        close(triton_paged_decode(q, mixed, cache, tables, sizes, 0.4, PagedTuning(rows=16)), want, torch.float32)


@pytest.mark.parametrize("sizes", [BlockSizes(4, 4, 4, 5, 1, 1, 1), BlockSizes(4, 2, 8, 6, 1, 2, 9)])
def test_of_equally_important_blocks_the_lower_is_chosen(sizes: BlockSizes) -> None:
    """All queries and keys alike: of the blocks that have as many keys of compressed rows the first ones, whichever
    tile they are in."""
    q, gates, cache, tables = case([159], sizes, 1, 2, (16, 4), torch.float32)
    cache.k_cmp.zero_()
    want = exact(q, gates, cache, tables, sizes, 0.4)
    for tuning in (PagedTuning(), PagedTuning(rows=16, blocks=4)):
        close(triton_paged_decode(q, gates, cache, tables, sizes, 0.4, tuning), want, torch.float32)


@pytest.mark.parametrize("first", [20.0, -20.0])
def test_scores_of_neighbouring_tiles_that_are_far_apart(first: float) -> None:
    """The block before a tile whose scores are higher by 300 shares keys with the tile's first row: it is chosen where
    that row scores high in its tile, and only there."""
    sizes = BlockSizes(4, 2, 8, 6, 1, 1, 9)
    q, gates, cache, tables = case([150], sizes, 1, 2, (16, 4), torch.float32)
    q.zero_()[..., 0] = 1
    pages = tables.far[0, 0]
    cache.k_cmp.zero_()
    cache.k_cmp[pages, 0, :, 0] = draw(len(pages), 4, dtype=torch.float32, seed=40)
    cache.k_cmp[pages[:8], 0, :, 0] -= 300
    cache.k_cmp[pages[8], 0, 0, 0] = first
    want = exact(q, gates, cache, tables, sizes, 1.0)
    for tuning in (PagedTuning(rows=16), PagedTuning(rows=16, programs=1, blocks=2)):
        close(triton_paged_decode(q, gates, cache, tables, sizes, 1.0, tuning), want, torch.float32)


@pytest.mark.parametrize(
    ("position", "count", "sizes", "kv", "group", "dims"),
    [
        (50, 13, BlockSizes(4, 2, 8, 4, 1, 2, 11), 2, 2, (8, 4)),
        (0, 21, BlockSizes(6, 2, 8, 3, 0, 1, 20), 1, 3, (24, 6)),
        (39, 2, BlockSizes(4, 4, 4, 5, 2, 1, 1), 1, 1, (16, 16)),
        (3, 6, BlockSizes(4, 2, 8, 4, 1, 2, 11), 1, 8, (8, 8)),
        (1, 5, BlockSizes(4, 2, 8, 4, 1, 2, 11), 2, 2, (8, 4)),
    ],
)
def test_chunks_against_float64(
    position: int, count: int, sizes: BlockSizes, kv: int, group: int, dims: tuple[int, int]
) -> None:
    """Queries that begin anywhere in their sequence, before its first compressed row too, end anywhere, in one page."""
    q, gates, cache, (far, near, first) = chunk(position, count, sizes, kv, group, dims, torch.float32)
    wide = PagedCache(*(getattr(cache, f.name).cpu().double() for f in fields(cache)))
    exact_q, exact_gates = q.cpu().double(), gates.cpu().double()
    want = paged_prefill(exact_q, exact_gates, wide, position, far.cpu(), near.cpu(), first, sizes, 0.4)
    span = SpanTuning(rows=16, keys=16)
    for direct in (0, 2):
        gather = Tuning(chunk=7, rows=16, steps=2, direct=direct)
        tuning = ForwardTuning(span, span, ChooseTuning(chunk=5, rows=16, blocks=16), gather)
        close(
            triton_paged_prefill(q, gates, cache, position, far, near, first, sizes, 0.4, tuning), want, torch.float32
        )


def test_no_queries() -> None:
    sizes = BlockSizes(4, 2, 8, 4, 1, 2, 11)
    q, gates, cache, tables = case([5], sizes, 2, 2, (8, 4), torch.float32)
    nothing = replace(tables, **{name: getattr(tables, name)[:0] for name in ARRAYS})
    assert triton_paged_decode(q[:0], gates[:0], cache, nothing, sizes, 0.4).shape == (0, 4, 4)


@pytest.mark.gpu
@pytest.mark.parametrize(("kv", "group", "dims", "dtype"), SHAPES, ids=str)
def test_on_a_gpu(kv: int, group: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    """With more blocks than are chosen for one query, whose row may differ where rounding swaps equal blocks."""
    sizes = BlockSizes(32, 16, 64, 16, 1, 2, 512)
    args = case([0, 40, 1023, 700, 5000], sizes, kv, group, dims, dtype)
    want = exact(*args, sizes, dims[0] ** -0.5)
    got = triton_paged_decode(*args, sizes, dims[0] ** -0.5).cpu().double()
    assert not got.isnan().any()
    assert ((got - want)[:-1].norm() / want[:-1].norm()) <= TOLERANCE[dtype]
    assert ((got - want)[-1].norm() / want[-1].norm()) <= 0.2


@pytest.mark.gpu
def test_gates_on_a_gpu() -> None:
    """Before their last product, rounded but once."""
    sizes = BlockSizes(32, 16, 64, 16, 1, 2, 512)
    q, _, cache, tables = case([0, 1000], sizes, 4, 16, (128, 128), torch.bfloat16)
    gates = HiddenGates(draw(2, 64, dtype=torch.bfloat16, seed=30), draw(192, 64, dtype=torch.bfloat16, seed=31) / 8)
    given = HiddenGates(gates.hidden.cpu().double(), gates.weight.cpu().double()).gates()
    want = exact(q, given, cache, tables, sizes, 0.1)
    close(triton_paged_decode(q, gates, cache, tables, sizes, 0.1), want, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "kv", "group", "dims"),
    [
        (torch.bfloat16, 4, 16, (128, 128)),
        (torch.bfloat16, 4, 16, (64, 64)),
        (torch.bfloat16, 4, 16, (192, 128)),
        (torch.float16, 1, 8, (96, 96)),
        (torch.float16, 2, 4, (192, 192)),
        (torch.bfloat16, 2, 2, (128, 128)),
        (torch.float16, 4, 1, (192, 128)),
    ],
    ids=str,
)
@pytest.mark.parametrize(("position", "count"), [(0, 20), (0, 64), (1, 1), (700, 300)])
def test_chunks_on_a_gpu(
    position: int, count: int, dtype: torch.dtype, kv: int, group: int, dims: tuple[int, int]
) -> None:
    """Prompts within a page and longer; every block is chosen, so that no rounding decides which."""
    sizes = BlockSizes(32, 16, 64, 16, 1, 2, 512)
    q, gates, cache, (far, near, first) = chunk(position, count, sizes, kv, group, dims, dtype)
    wide = PagedCache(*(getattr(cache, f.name).cpu().double() for f in fields(cache)))
    exact_q, exact_gates, scale = q.cpu().double(), gates.cpu().double(), dims[0] ** -0.5
    want = paged_prefill(exact_q, exact_gates, wide, position, far.cpu(), near.cpu(), first, sizes, scale)
    got = triton_paged_prefill(q, gates, cache, position, far, near, first, sizes, scale)
    close(got, want, dtype)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """A captured step gives, for other positions and pages put into its tables, what a step of their own gives."""
    sizes = BlockSizes(32, 16, 64, 16, 1, 2, 512)
    q, gates, cache, tables = case([3000, 4000], sizes, 2, 16, (128, 128), torch.bfloat16)
    _, _, _, other = case([3999, 70], sizes, 2, 16, (128, 128), torch.bfloat16)
    other = replace(
        tables, far=tables.far.flip(0), near=tables.near.flip(0), positions=other.positions, near_first=other.near_first
    )
    want = triton_paged_decode(q, gates, cache, other, sizes, 0.1)
    triton_paged_decode(q, gates, cache, tables, sizes, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_paged_decode(q, gates, cache, tables, sizes, 0.1)
    for name in ARRAYS:
        getattr(tables, name).copy_(getattr(other, name))
    graph.replay()
    assert torch.equal(out, want)
