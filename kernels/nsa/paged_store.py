"""Writing to the paged cache of NSA: the keys and values of a step's tokens, and the compressed rows that end in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.nsa.paged import PagedCache, store_rows
from shoal.kernels.rope import rotate


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values as an NSA layer's products make them, none of them rotated.

    q: ``[T, H, d_qk]``. k: ``[T, 3, KV, d_qk]``, v: ``[T, 3, KV, d_v]``, of the branches in order: compressed,
    selected, window.
    """

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Compressed:
    """Compressed rows that end in a step. index: ``[R, KV]``, where they go, of ``row_index``. raw_page, raw_row:
    ``[R, l]``, where the raw rows of each lie. rotation: of its first key. All numbers int64."""

    index: Tensor
    raw_page: Tensor
    raw_row: Tensor
    rotation: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Phi:
    """The weights of φ for keys or for values, as :func:`shoal.kernels.nsa.compress` takes them."""

    position: Tensor
    w1: Tensor
    w2: Tensor

    def of(self, blocks: Tensor) -> Tensor:
        """φ (NSA eq. 7) of blocks that have the position added: ``[KV, R, l · D] -> [KV, R, D]``."""
        return torch.bmm(torch.nn.functional.silu(torch.bmm(blocks, self.w1)), self.w2)


def store_tokens(
    heads: Heads, rotation: tuple[Tensor, Tensor], cache: PagedCache, far: Tensor, near: Tensor, triton: bool
) -> Tensor:
    """Writes the tokens of a step to their pages, and returns their rotated queries ``[T, H, d_qk]``.

    rotation: of the tokens' positions. far, near: ``[T, KV]``, where they go, of ``row_index``. triton: in one launch,
    as :func:`shoal.kernels.nsa.paged.reads_in_place` says; the bits are the same.
    """
    if triton:
        from shoal.kernels.nsa.triton_store import triton_store_tokens

        return triton_store_tokens(heads, rotation, cache, far, near)
    (k_cmp, k_slc, k_win), (v_cmp, v_slc, v_win) = heads.k.unbind(1), heads.v.unbind(1)
    for index, kept, values in (
        (far, cache.k_slc, rotate(k_slc, *rotation)),
        (far, cache.v_slc, v_slc),
        (near, cache.k_win, rotate(k_win, *rotation)),
        (near, cache.v_win, v_win),
        (near, cache.k_raw, k_cmp),
        (near, cache.v_raw, v_cmp),
    ):
        store_rows(kept, index, values)
    return rotate(heads.q, *rotation)


def store_compressed(new: Compressed, cache: PagedCache, phi: tuple[Phi, Phi], triton: bool) -> None:
    """Compresses the raw rows that ``new`` names and writes the results. phi: of keys and of values. triton: as above,
    in two launches beside the products of φ."""
    if triton:
        from shoal.kernels.nsa.triton_store import triton_store_compressed

        triton_store_compressed(new, cache, phi)
        return
    raw = (x[new.raw_page, :, new.raw_row].permute(2, 0, 1, 3) for x in (cache.k_raw, cache.v_raw))
    k, v = (p.of((blocks + p.position[:, None]).flatten(2)).transpose(0, 1) for blocks, p in zip(raw, phi, strict=True))
    store_rows(cache.k_cmp, new.index, rotate(k, *new.rotation))
    store_rows(cache.v_cmp, new.index, v)
