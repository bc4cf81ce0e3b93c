"""What kernels in Gluon for Hopper share: where they can run, descriptors for TMA, a barrier, halves of registers, work
that programs take, numbers told from warp to warp.

Tensors in Gluon have powers of two for sizes: what is 192 columns wide in memory is three pieces of 64 in shared
memory, whose products are added up in the same registers.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import count

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from shoal.kernels.launches import Descriptor

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
"""Triton 3.7 calls it the first, 3.6 the second."""

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def on_hopper(x: Tensor) -> bool:
    """Whether a tensor is on a GPU of compute capability 9.0."""
    return x.is_cuda and _is_hopper(x.device)


@lru_cache(maxsize=8)
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def begins_ahead(x: Tensor, wanted: bool = True) -> dict[str, bool]:
    """For a launch that may begin before the one before has ended, where x's GPU can do that: the kernel's ``AHEAD``,
    by which it waits for what it reads, and Triton's option."""
    ahead = wanted and on_hopper(x)
    return {"AHEAD": ahead, "launch_pdl": True} if ahead else {"AHEAD": False}


_kinds = count()


@lru_cache(maxsize=256)
def _blocks(block: tuple[int, ...], dtype: torch.dtype, rows: bool) -> tuple[list[int], gl.NVMMASharedLayout, int]:
    shape = list(block)
    assert dtype == torch.float32 or not rows, "rows that lie side by side are of float32"
    layout = (
        gl.NVMMASharedLayout(0, 32, rank=2) if rows else gl.NVMMASharedLayout.get_default_for(shape, _DTYPES[dtype])
    )
    return shape, layout, next(_kinds)


def descriptor(x: Tensor, *block: int, rows: bool = False) -> Descriptor:
    """For copies of blocks of a tensor of 16 bits or float32 by TMA. rows: of float32, whose rows lie side by side in
    shared memory, instead of swizzled."""
    return descriptor_of(x, x.shape, x.stride(), *block, rows=rows)


def descriptor_of(
    x: Tensor, shape: Sequence[int], strides: Sequence[int], *block: int, rows: bool = False
) -> Descriptor:
    """As :func:`descriptor`, of the memory of ``x`` in another shape. Triton would check it whenever one is made, which
    takes the host longer than all of this; CUDA checks sizes and strides again."""
    assert x.data_ptr() % 16 == 0, "TMA copies from multiples of 16 bytes"
    assert strides[-1] == 1, "TMA copies rows whose elements are neighbours"
    made = Descriptor.__new__(Descriptor)
    made.base, made.shape, made.strides, made.padding = x, shape, strides, "zero"
    made.block_shape, made.layout, made.kind = _blocks(block, x.dtype, rows)
    return made


@lru_cache(maxsize=8)
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has: the number of persistent programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@gluon.jit
def split_halves(x):
    """Left and right columns of a warpgroup's rows ``[M, N]``, as matrix products leave them in registers."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N // 2, 16])
    left, right = gl.split(gl.permute(gl.reshape(x, [M, 2, N // 2]), [0, 2, 1]))
    return gl.convert_layout(left, L, assert_trivial=True), gl.convert_layout(right, L, assert_trivial=True)


@gluon.jit
def pieces(smem, slot, PIECES: gl.constexpr):
    """The pieces of a tile ``[64, D]`` in shared memory."""
    tiles = ()
    for c in gl.static_range(PIECES):
        tiles = tiles + (smem.index(slot * PIECES + c).reshape([64, smem.shape[-1]]),)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@gluon.jit
def half_rows(tiles, half: gl.constexpr, PIECES: gl.constexpr):
    """The first or second 32 rows of a tile's pieces."""
    halves = ()
    for c in gl.static_range(PIECES):
        halves = halves + (tiles[c].slice(32 * half, 32, 0),)  # type: ignore[assignment]  # noqa: RUF005
    return halves


@gluon.jit
def scores(k, q, PIECES: gl.constexpr, S: gl.constexpr):
    """Begin the product of 64 keys and the rows of queries, ``[64, rows]``."""
    COLUMNS: gl.constexpr = q[0].shape[0]
    s = gl.zeros([64, COLUMNS], gl.float32, S)
    for c in gl.static_range(PIECES):
        s = warpgroup_mma(k[c], q[c].permute((1, 0)), s, use_acc=c > 0, is_async=True)
    return s


@gluon.jit
def take(taken):
    """The number of the next unit of work that nobody has, for a warp. Units differ too much in length to be dealt out
    beforehand."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    number = gl.atomic_add(taken + lane * 0, lane * 0 + 1, mask=lane == 0, sem="relaxed")
    return gl.max(gl.where(lane == 0, number, 0), 0)


@gluon.jit
def tell(smem, at, value):
    """Write a number to shared memory."""
    smem.index(at).store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))


@gluon.jit
def told(smem, at):
    """Read a number from shared memory."""
    return gl.max(smem.index(at).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
