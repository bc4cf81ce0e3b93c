"""φ of training in Triton, outputs and gradients, against the oracle and PyTorch's operations in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
import triton_on_cpu
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton_on_cpu import DEVICE, close, draw

triton_on_cpu.prepare()

from nsa_packs import LENGTHS, compressing, hyper  # noqa: E402

from shoal.kernels.nsa import BlockSizes, compress, make_layout, oracle  # noqa: E402
from shoal.kernels.nsa.compress import own_blocks  # noqa: E402
from shoal.kernels.nsa.layout import ChunkInverse  # noqa: E402
from shoal.kernels.nsa.rows import Rows  # noqa: E402
from shoal.kernels.nsa.triton_phi_grad import triton_compress  # noqa: E402

PAPER = BlockSizes(32, 16, 64, 16, 1, 2, 512)
HALF = BlockSizes(16, 8, 32, 16, 1, 2, 256)
SMALL = BlockSizes(4, 2, 8, 4, 1, 2, 11)
Phi = Callable[..., Tensor]
NAMES = ("x", "position", "w1", "w2")


def inputs(tokens: int, kv: int, dim: int, sizes: BlockSizes, dtype: torch.dtype) -> list[Tensor]:
    """x, position, w1 and w2, sized so that the hidden layer, and the output, have numbers of about 1."""
    width = sizes.cmp_block * dim
    w1, w2 = (kv, width, 2 * dim), (kv, 2 * dim, dim)
    return [
        draw(tokens, kv, dim, dtype=dtype, seed=1),
        draw(kv, sizes.cmp_block, dim, dtype=dtype, seed=2),
        (draw(*w1, dtype=torch.float32, seed=3) * width**-0.5).to(dtype),
        (draw(*w2, dtype=torch.float32, seed=4) * dim**-0.5).to(dtype),
    ]


def passes(phi: Phi, taken: list[Tensor], layout: Any, frozen: tuple[str, ...] = ()) -> list[Tensor | None]:
    """Output and gradients, None for those of what is frozen."""
    leaves = [x.detach().requires_grad_(name not in frozen) for name, x in zip(NAMES, taken, strict=True)]
    out = phi(*leaves, layout)
    upstream = draw(*out.shape, dtype=torch.float32, seed=5).to(taken[3].dtype)
    out.backward(upstream.to(out.device, out.dtype))
    return [out.detach(), *(x.grad for x in leaves)]


def check(lengths: list[int], sizes: BlockSizes, kv: int, dim: int, frozen: tuple[str, ...] = ()) -> None:
    """Relative errors of all, in float32, with tokens of no chunk and chunks of no block among them."""
    cu = tuple(accumulate(lengths, initial=0))
    layout = make_layout(cu, sizes, DEVICE)
    if not layout.cmp_chunks.numel():
        return

    def defined(x: Tensor, position: Tensor, w1: Tensor, w2: Tensor, _: Any) -> Tensor:
        return oracle.compress(x, oracle.Phi(position, w1, w2), cu, hyper(sizes))

    taken = inputs(layout.tokens, kv, dim, sizes, torch.float32)
    got = passes(triton_compress, taken, layout, frozen)
    want = passes(defined, [x.cpu().double() for x in taken], layout, frozen)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None and w is not None:
            close(g, w, torch.float32)


packs = given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    sizes=compressing(),
    kv=st.integers(1, 3),
    dim=st.integers(4, 20),  # of one element a sum may be nearly nothing, and so what errors are compared with
)


@packs
def test_random_packs(lengths: list[int], sizes: BlockSizes, kv: int, dim: int) -> None:
    check(lengths, sizes, kv, dim)


@pytest.mark.parametrize(("kv", "dim", "sizes"), [(4, 64, HALF), (2, 96, HALF), (1, 128, PAPER), (1, 192, HALF)])
def test_heads_that_models_have(kv: int, dim: int, sizes: BlockSizes) -> None:
    """With more blocks than a program holds, and rows wider than one."""
    check([1, 100, 31, 230], sizes, kv, dim)


@pytest.mark.parametrize("frozen", [("x",), ("position",), ("w1",), ("w2",), ("x", "position"), ("x", "w1", "w2")])
def test_what_is_frozen_gets_no_gradient(frozen: tuple[str, ...]) -> None:
    check([7, 30, 1], SMALL, 2, 8, frozen)


@pytest.mark.parametrize("kv", [1, 3])
def test_keys_that_are_views(kv: int) -> None:
    """One branch of three, heads that lie apart, and numbers that do; the upstream gradient may be a view as well."""
    layout, dim = make_layout((0, 30, 33, 70), SMALL, DEVICE), 8
    _, *weights = inputs(70, kv, dim, SMALL, torch.float32)
    branches = draw(70, 3, kv, dim, dtype=torch.float32, seed=6).requires_grad_()
    for view in (
        lambda x: x[:, 1],
        lambda x: x.view(70, kv, 3, dim)[:, :, 2],
        lambda x: x.view(70, dim, 3, kv)[:, :, 0].transpose(1, 2),
    ):
        found = []
        for phi, wide in ((triton_compress, torch.float32), (compress, torch.float64)):
            position, w1, w2 = (w.to(wide) for w in weights)
            out = phi(view(branches).to(wide), position, w1, w2, layout)
            upstream = draw(dim, kv, len(out), dtype=torch.float32, seed=7).to(wide).permute(2, 1, 0)
            found.append((out.detach(), *torch.autograd.grad(out, branches, upstream)))
        close(found[0][0], found[1][0].cpu(), torch.float32)
        close(found[0][1], found[1][1].cpu().double(), torch.float32)


def test_of_a_part_of_the_queries() -> None:
    """The blocks that end with them, from the tokens that they need."""
    cu = (0, 10, 100)
    whole = make_layout(cu, SMALL, DEVICE)
    part = make_layout(cu, SMALL, DEVICE, queries=Rows.of([(14, 33), (71, 90)]))
    x, position, w1, w2 = inputs(100, 2, 8, SMALL, torch.float32)
    x.requires_grad_()
    got = triton_compress(x[part.needs.raw.indices(x.device)], position, w1, w2, own_blocks(part))
    all_of_them = compress(x.double(), position.double(), w1.double(), w2.double(), whole)
    want = all_of_them[part.needs.own.indices(x.device)]
    close(got, want.detach().cpu(), torch.float32)
    upstream = torch.randn_like(got)
    mine, theirs = (torch.autograd.grad(out, x, upstream.to(out.dtype))[0] for out in (got, want))
    close(mine, theirs.cpu().double(), torch.float32)


@given(lengths=LENGTHS, sizes=compressing())
def test_the_inverse_of_chunks_and_blocks(lengths: list[int], sizes: BlockSizes) -> None:
    layout = make_layout(tuple(accumulate(lengths, initial=0)), sizes, "cpu")
    inverse: ChunkInverse = layout.inverse
    for found, rows, count in (
        (inverse.places, layout.chunk_tokens, layout.tokens),
        (inverse.blocks, layout.cmp_chunks, len(layout.chunk_tokens) // sizes.cmp_stride),
    ):
        where = {row: i for i, row in enumerate(rows.tolist())}
        assert found.tolist() == [where.get(row, -1) for row in range(count)]
    assert layout.inverse is inverse


def test_gradients_are_the_same_bits_in_every_run() -> None:
    layout = make_layout((0, 100, 333), SMALL, DEVICE)
    taken = inputs(333, 2, 8, SMALL, torch.float32)
    for a, b in zip(*(passes(triton_compress, taken, layout) for _ in range(2)), strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_triton_without_a_gpu_is_refused() -> None:
    x, position, w1, w2 = (x.cpu() for x in inputs(40, 1, 8, PAPER, torch.float32))
    with pytest.raises(ValueError, match=r"on a GPU, and x is torch\.float32 on cpu"):
        compress(x, position, w1, w2, make_layout((0, 40), PAPER, "cpu"), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kv", "dim"), [(4, 128), (1, 64), (2, 96), (3, 192)])
def test_on_a_gpu(dtype: torch.dtype, kv: int, dim: int) -> None:
    """``compress`` itself: it is no further from float64 than PyTorch's operations in the same dtype, which round the
    hidden layer more often, and within 1 %."""
    lengths = [700, 1, 63, 31, 900]
    layout = make_layout(tuple(accumulate(lengths, initial=0)), PAPER, DEVICE)
    taken = inputs(layout.tokens, kv, dim, PAPER, dtype)
    got = passes(compress, taken, layout)
    plain = passes(partial(compress, backend="torch"), taken, layout)
    want = passes(compress, [x.double() for x in taken], layout)
    for g, p, w in zip(got, plain, want, strict=True):
        assert g is not None and p is not None and w is not None and g.dtype == dtype and g.shape == w.shape
        mine, theirs = (((x.double() - w).norm() / w.norm()).item() for x in (g, p))
        assert mine <= min(1.1 * theirs, 0.01), (mine, theirs)
