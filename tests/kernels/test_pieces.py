"""Tensors made of pieces of others: Triton's bits are PyTorch's, and those of a sum row by row."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import triton_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_on_cpu import DEVICE, ON_GPU, draw

triton_on_cpu.prepare()

from shoal.kernels import triton_pieces  # noqa: E402
from shoal.kernels.pieces import Piece, Pieces, columns, letters, put_together  # noqa: E402

SOURCE = 13  # rows of each of the two
PIECE: st.SearchStrategy[tuple[int, int, int, bool]] = st.tuples(
    st.integers(0, 20), st.integers(0, SOURCE - 1), st.integers(1, 9), st.booleans()
)


def pieces_of(drawn: Sequence[tuple[int, int, int, bool]], count: int) -> Pieces:
    """Pieces ``(to, of, rows, came)``, cut to what there is."""
    kept: list[Piece] = []
    for to, of, rows, came in drawn:
        rows = min(rows, count - to, SOURCE - of)
        if rows > 0:
            kept.append((slice(to, to + rows), slice(of, of + rows), came))
    return Pieces(count, kept)


def row_by_row(pieces: Pieces, own: Tensor, came: Tensor, dtype: torch.dtype) -> Tensor:
    total = torch.zeros(pieces.count, *own.shape[1:])
    for to, of, elsewhere in pieces.pieces:
        for row in range(to.stop - to.start):
            total[to.start + row] += (came if elsewhere else own)[of.start + row].float().cpu()
    return total.to(dtype)


def sides(
    widths: Sequence[tuple[int, ...]], dtype: torch.dtype, rows: int = SOURCE
) -> tuple[list[Tensor], list[Tensor]]:
    """Own tensors, which stand beside others in memory, and letters, which two tensors share."""
    own = [draw(rows, 2 * w[0], *w[1:], dtype=dtype, seed=i)[:, : w[0]] for i, w in enumerate(widths)]
    came = letters(own, rows)
    came.copy_(draw(*came.shape, dtype=dtype, seed=7))
    return own, columns(came, own)


@settings(max_examples=60)
@given(
    drawn=st.lists(PIECE, max_size=6),
    count=st.integers(0, 30),
    widths=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), min_size=1, max_size=2),
    name=st.sampled_from(["float32", "float16"]),
)
def test_rows_are_sums_of_what_pieces_name(
    drawn: list[tuple[int, int, int, bool]], count: int, widths: list[tuple[int, int]], name: str
) -> None:
    """Of any pieces, which overlap, leave gaps or are none."""
    dtype = getattr(torch, name)
    own, came = sides(widths, dtype)
    pieces = pieces_of([(to % max(count, 1), *rest) for to, *rest in drawn], count)  # type: ignore[misc]
    made = [[x.new_full((count, *x.shape[1:]), torch.nan) for x in own] for _ in range(2)]
    put_together(pieces, own, came, made[0])
    if count:
        triton_pieces.put_together(pieces, own, came, made[1])
    for x, theirs, one, other in zip(own, came, *made, strict=True):
        want = row_by_row(pieces, x, theirs.unflatten(1, x.shape[1:]), dtype)
        assert torch.equal(one.cpu(), want)
        assert torch.equal(other.cpu(), want)


def test_heads_that_lie_apart_and_rows_into_letters() -> None:
    """What is sent: rows of two tensors, one of which has other heads between its own, side by side."""
    pieces = Pieces(8, [(slice(0, 5), slice(3, 8), False), (slice(5, 8), slice(0, 3), False)])
    assert pieces.plain
    own = [draw(SOURCE, 6, 8, dtype=torch.float32, seed=0)[:, ::2], draw(SOURCE, 2, 5, dtype=torch.float32, seed=1)]
    made = [letters(own, 8) for _ in range(2)]
    for out, make in zip(made, (put_together, triton_pieces.put_together), strict=True):
        make(pieces, own, own, columns(out, own))
    index = torch.tensor([3, 4, 5, 6, 7, 0, 1, 2])
    want = torch.cat([x.cpu()[index].flatten(1) for x in own], 1)
    assert all(torch.equal(out.cpu(), want) for out in made)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_rows_on_a_gpu(dtype: torch.dtype) -> None:
    """Of the sizes that ranks exchange: gradients of many rows, in which all have a part."""
    rows, owned = 70_001, 16_384
    own, came = sides([(4, 192), (4, 128)], dtype, rows)
    starts = [0, 17_000, 33_000, 49_000]
    spans = [slice(0, owned), slice(100, owned), slice(0, 8_000), slice(8_000, owned - 5)]
    pieces = Pieces(
        owned,
        [
            (to, slice(at, at + to.stop - to.start), bool(i))
            for i, (to, at) in enumerate(zip(spans, starts, strict=True))
        ],
    )
    out = [torch.full((owned, *x.shape[1:]), torch.nan, dtype=dtype, device=DEVICE) for x in own]
    put_together(pieces, own, came, out)
    for x, theirs, got in zip(own, came, out, strict=True):
        total = torch.zeros(owned, x[0].numel(), device=DEVICE)
        for to, of, elsewhere in pieces.pieces:
            total[to] += (theirs if elsewhere else x.flatten(1))[of].float()
        assert torch.equal(got, total.to(dtype).view_as(got))
