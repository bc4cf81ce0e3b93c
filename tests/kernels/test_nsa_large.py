"""Tensors of more than 2³¹ elements, and a document of 1,048,576 tokens, which want a GPU of 80 GB to themselves; the
same in small without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pytest
import torch
import triton_on_cpu
from torch import Tensor
from triton_on_cpu import DEVICE

triton_on_cpu.prepare()

from test_nsa_triton_backward import NAMES, TINY, Inputs  # noqa: E402

from shoal.kernels.nsa import BlockSizes, compress_mean, make_layout, nsa_attention  # noqa: E402
from shoal.kernels.nsa.attention import Tensors  # noqa: E402
from shoal.kernels.nsa.rows import Rows  # noqa: E402
from shoal.kernels.nsa.triton_attention import Tunings, nsa_triton  # noqa: E402
from shoal.kernels.nsa.triton_mean import triton_compress_mean  # noqa: E402
from shoal.kernels.nsa.triton_phi_grad import triton_compress  # noqa: E402


@dataclass(frozen=True)
class Size:
    """A long document, and one after it that is so short that all its blocks are chosen. heads: of q and of keys."""

    long: int
    short: int
    heads: int
    sizes: BlockSizes
    dtype: torch.dtype
    tunings: Tunings | None

    @property
    def ends(self) -> tuple[int, ...]:
        return 0, self.long, self.long + self.short

    def inputs(self, dims: tuple[int, int]) -> list[Tensor]:
        """q, three pairs of keys and values, gates, and the gradient of the output, drawn where they are used."""
        torch.cuda.empty_cache()  # of tests before
        generator = torch.Generator(DEVICE).manual_seed(1)
        tokens, blocks = self.ends[-1], make_layout(self.ends, self.sizes, DEVICE).cmp_starts.numel()

        def normal(rows: int, dim: int) -> Tensor:
            return torch.randn(rows, self.heads, dim, generator=generator, device=DEVICE, dtype=self.dtype)

        keys = [normal(rows, dim) for rows in (blocks, tokens, tokens) for dim in dims]
        return [normal(tokens, dims[0]), *keys, normal(tokens, 3).sigmoid(), normal(tokens, dims[1])]


SMALL = Size(50, 19, 2, BlockSizes(4, 2, 8, 4, 1, 2, 11), torch.float32, None if triton_on_cpu.ON_GPU else TINY)
LARGE = Size(1 << 20, 700, 16, BlockSizes(32, 16, 64, 16, 1, 2, 512), torch.bfloat16, None)  # 2³¹ in the long one


def without_room(gigabytes: int) -> bool:
    return not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < gigabytes * 10**9


def on_both(gigabytes: int) -> pytest.MarkDecorator:
    """gigabytes: a tenth more than the large case's tensors take, counted as test_nsa_memory.py does."""
    room = pytest.mark.skipif(without_room(gigabytes), reason=f"needs {gigabytes} GB on a GPU")
    large = pytest.param(LARGE, marks=[pytest.mark.gpu, room])
    return pytest.mark.parametrize("size", [SMALL, large], ids=["small", "large"])


def alone(size: Size, tensors: list[Tensor]) -> list[Tensor]:
    """Of each tensor the rows of the short document."""
    first = len(make_layout((0, size.long), size.sizes, DEVICE).cmp_starts)
    return [x[first if i in (1, 2) else size.long :].detach().clone() for i, x in enumerate(tensors)]


def near(got: Tensor, want: Tensor, dtype: torch.dtype, name: str) -> None:
    """Two ways to round the same."""
    error, size = (got.double() - want.double()).norm().item(), want.double().norm().item()
    assert error <= {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}[dtype] * size, f"{name}: {error:.2e} of {size:.2e}"


@on_both(46)
@torch.no_grad()
def test_the_last_queries_of_a_long_document(size: Size) -> None:
    """Of its last head, against PyTorch's operations in float64 over the keys that these queries need. Where rounding
    swaps a block for an equally important one a row is off by more: hence most rows."""
    dims = (128, 128) if size is LARGE else (8, 4)
    *args, _ = size.inputs(dims)
    layout = make_layout(size.ends, size.sizes, DEVICE)
    out = nsa_triton(*cast(Inputs, args), layout, dims[0] ** -0.5, tunings=size.tunings)
    assert size is SMALL or min(out.numel(), args[3].numel()) > 1 << 31
    rows = slice(size.long - 40, size.long)
    part = make_layout(size.ends, size.sizes, DEVICE, queries=Rows.of([(rows.start, rows.stop)]))
    n = part.needs
    at = [x.indices(layout.device) for x in (part.queries, n.cmp, n.cmp, n.far, n.far, n.near, n.near, part.queries)]
    tensors = cast(Tensors, tuple(x[i, -1:].double() for x, i in zip(args, at, strict=True)))
    want = nsa_attention(*tensors, part, dims[0] ** -0.5, "torch")
    got = out[rows, -1:].double()
    same = (got - want).norm(dim=-1) <= 0.1 * want.norm(dim=-1)
    assert same.double().mean() >= 0.8
    near(got[same], want[same], size.dtype, "output")
    short = alone(size, args)
    layout = make_layout((0, size.short), size.sizes, DEVICE)
    near(out[size.long :], nsa_triton(*cast(Inputs, short), layout, dims[0] ** -0.5), size.dtype, "the other's output")


@on_both(65)
@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_of_a_document_that_lies_behind_a_long_one(size: Size, deterministic: bool) -> None:
    """They are those of the document alone. Values are narrower than keys, so that a GPU of 80 GB has room."""
    dims = (128, 64) if size is LARGE else (8, 4)
    *args, d_out = size.inputs(dims)
    short = [x.requires_grad_() for x in alone(size, args)]
    d_short = d_out[size.long :].clone()
    for x in args:
        x.requires_grad_()
    scale, given = dims[0] ** -0.5, {"deterministic": deterministic, "tunings": size.tunings}
    layout = make_layout(size.ends, size.sizes, DEVICE)
    nsa_triton(*cast(Inputs, args), layout, scale, **given).backward(d_out)  # type: ignore[arg-type]
    layout = make_layout((0, size.short), size.sizes, DEVICE)
    nsa_triton(*cast(Inputs, short), layout, scale, **given).backward(d_short)  # type: ignore[arg-type]
    got = alone(size, [cast(Tensor, x.grad) for x in args])
    for name, mine, leaf in zip(NAMES, got, short, strict=True):
        assert leaf.grad is not None
        near(mine, leaf.grad, size.dtype, name)


@on_both(17)
def test_the_mlp_of_a_document_that_lies_behind_a_long_one(size: Size) -> None:
    """Its compressed keys, and the gradients of its own, are those of the document alone."""
    torch.cuda.empty_cache()
    dim, block = 128 if size is LARGE else 8, size.sizes.cmp_block
    generator = torch.Generator(DEVICE).manual_seed(1)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=size.dtype) * std

    x, position = normal(size.ends[-1], size.heads, dim), normal(size.heads, block, dim)
    w1 = normal(size.heads, block * dim, 2 * dim, std=(block * dim) ** -0.5)
    w2 = normal(size.heads, 2 * dim, dim, std=(2 * dim) ** -0.5)
    found, count = [], size.sizes.cmp_blocks(size.short)
    for tokens, ends in ((x, size.ends), (x[size.long :].clone(), (0, size.short))):
        leaf = tokens.requires_grad_()
        out = triton_compress(leaf, position, w1, w2, make_layout(ends, size.sizes, DEVICE))
        out.square().sum().backward()
        assert leaf.grad is not None and leaf.grad.any()
        found.append((out[-count:].detach().clone(), leaf.grad[-size.short :].clone()))
        leaf.grad = None
    for name, got, want in zip(("output", "gradient"), *found, strict=True):
        near(got, want, size.dtype, name)


@on_both(11)
def test_means_of_blocks(size: Size) -> None:
    dim = 128 if size is LARGE else 8
    x = torch.ones(size.ends[-1], size.heads, dim, device=DEVICE, dtype=size.dtype)
    x[size.long :] = 2
    x.requires_grad_()
    out = triton_compress_mean(x, make_layout(size.ends, size.sizes, DEVICE))
    short = compress_mean(x[size.long :].detach(), make_layout((0, size.short), size.sizes, DEVICE))
    assert torch.equal(out[-len(short) :], short) and (out[: -len(short)] == 1).all()
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad[size.long : size.long + 10], x.grad[:10])
