"""What Triton writes to the paged cache against PyTorch's operations, bit by bit; few compressed rows to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest
import torch
import triton_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_on_cpu import DEVICE, close, draw

triton_on_cpu.prepare()

from shoal.kernels.nsa import triton_store  # noqa: E402
from shoal.kernels.nsa.layout import BlockSizes  # noqa: E402
from shoal.kernels.nsa.paged import PagedCache, make_cache, row_index  # noqa: E402
from shoal.kernels.nsa.paged_store import Compressed, Heads, Phi, store_compressed, store_tokens  # noqa: E402
from shoal.kernels.nsa.triton_phi import PhiTuning, triton_compress_few  # noqa: E402
from shoal.kernels.rope import rope_tables  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """Of a layer and a step. idle: rows at the end that nobody needs, which all write to the last page."""

    kv: int
    group: int
    dims: tuple[int, int]
    stride: int
    block: int  # strides of a compression block
    page: int  # strides of a page
    rows: int
    idle: int

    @property
    def sizes(self) -> BlockSizes:
        """Those of NSA; what is chosen does not matter here."""
        return BlockSizes(self.block * self.stride, self.stride, self.page * self.stride, 3, 1, 1, 5)


SHAPES: st.SearchStrategy[Shape] = st.builds(
    Shape,
    kv=st.integers(1, 5),
    group=st.integers(1, 9),
    dims=st.tuples(st.integers(1, 20).map(lambda half: 2 * half), st.integers(1, 40)),
    stride=st.integers(1, 5),
    block=st.integers(1, 3),
    page=st.integers(3, 5),
    rows=st.integers(0, 6),
    idle=st.integers(0, 3),
)


def caches(s: Shape, dtype: torch.dtype, model: torch.dtype) -> tuple[PagedCache, PagedCache]:
    """Two alike, full of numbers, so that a row written to a wrong place shows."""
    pages = s.rows + 2
    pair = tuple(make_cache(pages, pages, s.kv, s.dims, s.sizes, dtype, torch.device(DEVICE)) for _ in range(2))
    for seed, field in enumerate(fields(PagedCache)):
        for cache in pair:
            kept = getattr(cache, field.name)
            kept.copy_(draw(*kept.shape, dtype=model, seed=seed))
    return pair[0], pair[1]


def places(s: Shape, length: int, seed: int) -> Tensor:
    """A page of its own for each row, in any order, and any row of it; the last page for idle ones."""
    generator = torch.Generator().manual_seed(seed)
    page = torch.cat((torch.randperm(s.rows + 1, generator=generator)[: s.rows], torch.full((s.idle,), s.rows + 1)))
    row = torch.randint(length, (s.rows + s.idle,), generator=generator)
    return row_index(page, row, s.kv, length).to(DEVICE)


def angles(s: Shape, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    at = torch.randint(1 << 20, (s.rows + s.idle,), generator=generator).to(DEVICE)
    return rope_tables(at, s.dims[0], 10000.0, torch.float32)


def same(want: PagedCache, got: PagedCache) -> None:
    """In all pages but the one of idle rows, whose last writer is anyone."""
    for field in fields(PagedCache):
        w, g = getattr(want, field.name), getattr(got, field.name)
        assert torch.equal(w[:-1], g[:-1]), field.name
        assert g.isfinite().all(), field.name


def check(s: Shape, model: torch.dtype, kept: torch.dtype) -> None:
    """A step's tokens, then its compressed rows, which read what was written."""
    want, got = caches(s, kept, model)
    tokens = s.rows + s.idle
    heads = Heads(
        draw(tokens, s.kv * s.group, s.dims[0], dtype=model, seed=30),
        draw(tokens, 3, s.kv, s.dims[0], dtype=model, seed=31),
        draw(tokens, 3, s.kv, s.dims[1], dtype=model, seed=32),
    )
    far, near, rotation = places(s, s.sizes.slc_block, 1), places(s, s.sizes.slc_block, 2), angles(s, 3)
    q = [store_tokens(heads, rotation, cache, far, near, triton) for cache, triton in ((want, False), (got, True))]
    assert q[0].dtype == q[1].dtype and torch.equal(*q)
    same(want, got)
    raw = torch.Generator().manual_seed(5)
    shape = tokens, s.sizes.cmp_block
    page, row = (torch.randint(n, shape, generator=raw).to(DEVICE) for n in (s.rows + 1, s.sizes.slc_block))
    new = Compressed(places(s, s.page, 4), page, row, angles(s, 6))
    phi = weights(s, model)
    for cache, triton in ((want, False), (got, True)):
        store_compressed(new, cache, phi, triton)
    same(want, got)


def weights(s: Shape, dtype: torch.dtype) -> tuple[Phi, Phi]:
    """Of keys and of values, whose φ are about as large as what they take."""

    def one(dim: int) -> Phi:
        block = s.sizes.cmp_block
        position = draw(s.kv, block, dim, dtype=dtype, seed=40)
        w1 = draw(s.kv, block * dim, 2 * dim, dtype=dtype, seed=41) * (block * dim) ** -0.5
        return Phi(position, w1, draw(s.kv, 2 * dim, dim, dtype=dtype, seed=42) * (2 * dim) ** -0.5)

    return one(s.dims[0]), one(s.dims[1])


def check_few(
    s: Shape, dtype: torch.dtype, compress: Callable[[Compressed, PagedCache, tuple[Phi, Phi]], None]
) -> None:
    """φ in two launches of its own against float64, and nothing else written."""
    got, other = caches(s, dtype, dtype)
    want = PagedCache(*(getattr(other, field.name).double() for field in fields(PagedCache)))
    count, raw = s.rows + s.idle, torch.Generator().manual_seed(5)
    shape = count, s.sizes.cmp_block
    page, row = (torch.randint(n, shape, generator=raw).to(DEVICE) for n in (s.rows + 1, s.sizes.slc_block))
    new, phi = Compressed(places(s, s.page, 4), page, row, angles(s, 6)), weights(s, dtype)
    k, v = (Phi(p.position.double(), p.w1.double(), p.w2.double()) for p in phi)
    store_compressed(replace(new, rotation=(new.rotation[0].double(), new.rotation[1].double())), want, (k, v), False)
    compress(new, got, phi)
    for field in fields(PagedCache):
        g, w, old = (getattr(cache, field.name)[:-1] for cache in (got, want, other))
        written = (w != old.double()).any(-1)
        assert torch.equal(g[~written], old[~written]), field.name
        close(g[written], w[written].cpu(), dtype)
        assert getattr(got, field.name).isfinite().all(), field.name


def directly(
    most: int = 16, tuning: PhiTuning | None = None
) -> Callable[[Compressed, PagedCache, tuple[Phi, Phi]], None]:
    return lambda new, cache, phi: triton_compress_few(new, cache, phi, most, tuning)


@given(SHAPES)
def test_of_any_shape(shape: Shape) -> None:
    """Groups that do not fill a program, keys wider or narrower than values, no row at all, rows that nobody needs."""
    check(shape, torch.float32, torch.float32)


def test_a_cache_in_another_type() -> None:
    """Numbers are rounded to the model's type first, then to the cache's."""
    check(Shape(2, 3, (12, 10), 2, 2, 4, 3, 1), torch.float32, torch.float16)


@settings(max_examples=8)
@given(SHAPES)
def test_few_compressed_rows_of_any_shape(shape: Shape) -> None:
    check_few(shape, torch.float32, directly())


@pytest.mark.parametrize(
    ("dims", "rows", "most"),
    [
        ((16, 24), 16, 16),
        ((96, 64), 5, 16),
        ((128, 128), 1, 1),
        ((192, 128), 15, 16),
        pytest.param((64, 192), 17, 32, marks=pytest.mark.slow),
    ],
)
def test_few_compressed_rows(dims: tuple[int, int], rows: int, most: int) -> None:
    """Of blocks of 32 tokens, in tiles that have some of them, or a part of one."""
    check_few(Shape(1, 1, dims, 16, 2, 4, rows, min(1, most - rows)), torch.float32, directly(most))


def test_tiles_of_other_sizes() -> None:
    check_few(Shape(2, 1, (48, 32), 4, 2, 4, 3, 1), torch.float32, directly(16, PhiTuning(32, 64, 16, (8, 4))))


def test_which_compressed_rows_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the constant says, in 16 bits; of more, or in float32, bits are PyTorch's as before."""
    monkeypatch.setattr(triton_store, "FEW_ROWS", 3)
    few, calls = Shape(2, 1, (64, 32), 4, 2, 4, 2, 1), []

    def counted(new: Compressed, cache: PagedCache, phi: tuple[Phi, Phi], most: int) -> None:
        calls.append(most)
        triton_compress_few(new, cache, phi, most)

    monkeypatch.setattr(triton_store, "triton_compress_few", counted)
    check_few(few, torch.float16, lambda new, cache, phi: store_compressed(new, cache, phi, True))
    assert calls == [3]
    check(few, torch.float32, torch.float32)
    check(replace(few, rows=3), torch.float16, torch.float16)
    assert calls == [3]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(128, 128), (192, 128), (64, 96)])
@pytest.mark.parametrize("rows", [0, 6, 15])
def test_few_compressed_rows_on_a_gpu(dtype: torch.dtype, dims: tuple[int, int], rows: int) -> None:
    check_few(Shape(4, 16, dims, 16, 2, 4, rows, 1), dtype, directly())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(128, 128), (192, 128), (64, 96)])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_on_a_gpu(dtype: torch.dtype, dims: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, products and sums are not fused."""
    monkeypatch.setattr(triton_store, "FEW_ROWS", 0)  # few rows are computed to rounding
    check(Shape(4, 16, dims, 16, 2, 4, rows, 1), dtype, dtype)
