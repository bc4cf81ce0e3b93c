"""What Triton writes to the paged cache against PyTorch's operations, bit by bit."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
import triton_on_cpu
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton_on_cpu import DEVICE, draw

triton_on_cpu.prepare()

from shoal.kernels.nsa.layout import BlockSizes  # noqa: E402
from shoal.kernels.nsa.paged import PagedCache, make_cache, row_index  # noqa: E402
from shoal.kernels.nsa.paged_store import Compressed, Heads, Phi, store_compressed, store_tokens  # noqa: E402
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
    phi = [
        Phi(
            draw(s.kv, s.sizes.cmp_block, dim, dtype=model, seed=40),
            draw(s.kv, s.sizes.cmp_block * dim, 2 * dim, dtype=model, seed=41),
            draw(s.kv, 2 * dim, dim, dtype=model, seed=42),
        )
        for dim in s.dims
    ]
    for cache, triton in ((want, False), (got, True)):
        store_compressed(new, cache, (phi[0], phi[1]), triton)
    same(want, got)


@given(SHAPES)
def test_of_any_shape(shape: Shape) -> None:
    """Groups that do not fill a program, keys wider or narrower than values, no row at all, rows that nobody needs."""
    check(shape, torch.float32, torch.float32)


def test_a_cache_in_another_type() -> None:
    """Numbers are rounded to the model's type first, then to the cache's."""
    check(Shape(2, 3, (12, 10), 2, 2, 4, 3, 1), torch.float32, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(128, 128), (192, 128), (64, 96)])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_on_a_gpu(dtype: torch.dtype, dims: tuple[int, int], rows: int) -> None:
    """Compiled, products and sums are not fused."""
    check(Shape(4, 16, dims, 16, 2, 4, rows, 1), dtype, dtype)
