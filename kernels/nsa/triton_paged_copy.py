"""Keys and values of a sequence copied out of the pages of a cache, in Triton: both in one launch, each read once."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.launches import launch
from shoal.kernels.nsa.triton_select import padded


def copy_rows(k: Tensor, v: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a sequence, in order: of ``[pages, KV, rows, D]`` and ``[pages, KV, rows, E]``, contiguous, those of
    ``pages [P]`` as ``[P · rows, KV, D]`` and ``[P · rows, KV, E]``. pages: int64."""
    _, kv, rows, dim = k.shape
    dim_v, count = v.shape[-1], len(pages)
    outs = k.new_empty(count * rows, kv, dim), v.new_empty(count * rows, kv, dim_v)
    if count:
        launch(
            _copy_kernel,
            (count, kv),
            *(k, v, pages, *outs),
            KV=kv,
            ROWS=rows,
            ROWS_P=padded(rows, least=1),
            D=dim,
            DP=padded(dim),
            E=dim_v,
            EP=padded(dim_v),
            num_warps=4,
        )
    return outs


@triton.jit
def _copy_kernel(
    k,
    v,
    pages,
    k_out,
    v_out,
    KV: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_P: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
):
    """One page of one head."""
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_r, o_d, o_e = tl.arange(0, ROWS_P), tl.arange(0, DP), tl.arange(0, EP)
    row = (tl.load(pages + i) * KV + h) * ROWS + o_r
    to = (i * ROWS + o_r) * KV + h
    in_k = (o_r < ROWS)[:, None] & (o_d < D)[None, :]
    in_v = (o_r < ROWS)[:, None] & (o_e < E)[None, :]
    b_k = tl.load(k + row[:, None] * D + o_d[None, :], mask=in_k)
    b_v = tl.load(v + row[:, None] * E + o_e[None, :], mask=in_v)
    tl.store(k_out + to[:, None] * D + o_d[None, :], b_k, mask=in_k)
    tl.store(v_out + to[:, None] * E + o_e[None, :], b_v, mask=in_v)
