"""Selected attention in Triton, query by query and block by block, against the oracle in float64."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
import triton_on_cpu
from torch import Tensor
from triton_on_cpu import DEVICE, close, draw

triton_on_cpu.prepare()

from shoal.kernels.nsa import BlockSizes, make_layout, oracle  # noqa: E402
from shoal.kernels.nsa.triton_gather import Tuning, selected_by_block  # noqa: E402
from shoal.kernels.nsa.triton_inverse import invert, longest_first  # noqa: E402
from shoal.kernels.nsa.triton_select import selected_by_query  # noqa: E402
from shoal.kernels.nsa.triton_tables import Tables, make_tables  # noqa: E402

SCALE = 0.3


def sizes(block: int, count: int) -> BlockSizes:
    return BlockSizes(4, 2, block, count, slc_initial=1, slc_local=1, window=5)


def tables_of(lengths: list[int], size: BlockSizes) -> Tables:
    return make_tables(make_layout(tuple(accumulate(lengths, initial=0)), size, DEVICE))


def random_blocks(tables: Tables, kv: int, own: bool = True) -> Tensor:
    """Random blocks that have begun, in random order, the query's own among them or not; sometimes fewer, or none."""
    generator = torch.Generator().manual_seed(1)
    n, starts = tables.sizes.slc_count, tables.starts.tolist()
    rows = []
    for t, start in enumerate(starts):
        begun = (t - start) // tables.sizes.slc_block + own
        for _ in range(kv):
            order = torch.randperm(begun, generator=generator).tolist()
            row = order[: n if t % 7 else n - 1]
            rows.append(row[::-1] + [-1] * (n - len(row)) if t % 5 else [-1] * (n - len(row)) + row)
    return torch.tensor(rows, dtype=torch.int32).view(len(starts), kv, n).to(DEVICE)


def expect(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp from the oracle's attention over the keys of the blocks."""
    q, k, v = (x.cpu().double() for x in (q, k, v))
    group, block = q.shape[1] // k.shape[1], tables.sizes.slc_block
    out, lse = v.new_zeros(*q.shape[:2], v.shape[2]), v.new_full(q.shape[:2], -torch.inf)
    for t, start in enumerate(tables.starts.tolist()):
        for h, chosen in enumerate(blocks[t].tolist()):
            keys = [key for b in chosen if b >= 0 for key in range(start + b * block, start + b * block + block)]
            keys = [key for key in keys if key <= t]
            for head in range(h * group, (h + 1) * group):
                out[t, head] = oracle.attend(q[t, head], k[keys, h], v[keys, h], SCALE)
                lse[t, head] = torch.logsumexp(SCALE * (k[keys, h] @ q[t, head]), 0)
    return out, lse


def check(
    lengths: list[int],
    size: BlockSizes,
    kv: int,
    group: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    tunings: list[Tuning],
) -> None:
    tables = tables_of(lengths, size)
    tokens = tables.starts.numel()
    q = draw(tokens, kv * group, dims[0], dtype=dtype, seed=2)
    k, v = draw(tokens, kv, dims[0], dtype=dtype, seed=3), draw(tokens, kv, dims[1], dtype=dtype, seed=4)
    for own in (True, False):
        blocks = random_blocks(tables, kv, own)
        out, lse = expect(q, k, v, blocks, tables)
        results = [selected_by_query(q, k, v, blocks, tables, SCALE)]
        results += [selected_by_block(q, k, v, blocks, tables, SCALE, own=own, tuning=t) for t in tunings]
        for got, got_lse in results:
            close(got, out, dtype)
            torch.testing.assert_close(got_lse.cpu().double(), lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "block", "count", "kv", "group", "dims", "tuning"),
    [
        ([3, 37, 1, 16], 16, 2, 2, 2, (8, 4), Tuning(chunk=30, rows=16, steps=2, direct=0)),
        ([50], 4, 3, 1, 3, (24, 8), Tuning(chunk=16, rows=16, steps=1, direct=3)),
        ([0, 33, 0], 8, 3, 2, 1, (16, 16), Tuning(chunk=1000, heads=1, rows=16, steps=2, direct=2)),
        ([9, 21], 6, 2, 1, 16, (8, 8), Tuning(chunk=7, rows=32, steps=4, direct=1)),
        # More partial outputs than are loaded before blocks are read.
        ([1, 17], 4, 7, 1, 16, (8, 128), Tuning(chunk=12, rows=16, steps=1, direct=1)),
    ],
)
def test_against_the_oracle(
    lengths: list[int], block: int, count: int, kv: int, group: int, dims: tuple[int, int], tuning: Tuning
) -> None:
    check(lengths, sizes(block, count), kv, group, dims, torch.float32, [tuning])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kv", "group"), [(2, 16), (1, 4), (4, 1), (1, 6)])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (96, 96)])
def test_against_the_oracle_on_a_gpu(dtype: torch.dtype, kv: int, group: int, dims: tuple[int, int]) -> None:
    tunings = [Tuning(), Tuning(chunk=100, rows=128, steps=2, warps=8, stages=2)]
    check([200, 1, 63, 64, 150], sizes(32, 4), kv, group, dims, dtype, tunings)


def test_other_keys_are_merged_in() -> None:
    """Two halves of a selection, one handed to the other as ``beside``, are the whole."""
    size = sizes(8, 4)
    tables = tables_of([40, 5], size)
    q, k = draw(45, 4, 8, dtype=torch.float32, seed=2), draw(45, 2, 8, dtype=torch.float32, seed=3)
    blocks = random_blocks(tables, 2)
    beside = selected_by_query(q, k, k, blocks[..., :2], tables, SCALE)
    tuning = Tuning(rows=16, steps=2)
    out, lse = selected_by_block(q, k, k, blocks[..., 2:], tables, SCALE, beside=beside, tuning=tuning)
    want, want_lse = expect(q, k, k, blocks, tables)
    close(out, want, torch.float32)
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=1e-5, atol=1e-5)


def test_no_tokens() -> None:
    tables = tables_of([0], sizes(8, 2))
    q, k = draw(0, 4, 8, dtype=torch.float32, seed=0), draw(0, 2, 8, dtype=torch.float32, seed=0)
    blocks = torch.zeros(0, 2, 2, dtype=torch.int32, device=DEVICE)
    for attend in (selected_by_query, selected_by_block):
        out, lse = attend(q, k, k, blocks, tables, SCALE)
        assert out.shape == (0, 4, 8)
        assert lse.shape == (0, 4)


@pytest.mark.parametrize(("chunk", "size"), [(10, 1), (16, 4), (1000, 3)])
def test_every_pair_lies_once_in_an_item_of_its_block(chunk: int, size: int) -> None:
    tables = tables_of([30, 1, 45], sizes(8, 3))
    kv, n = 2, 3
    blocks = random_blocks(tables, kv)
    inverse = invert(blocks, tables, chunk, size)
    got: list[tuple[int, int, int]] = []
    edges = inverse.first_items.tolist()
    assert len(edges) == kv * inverse.chunks + 1
    for part in range(kv * inverse.chunks):
        h, index = divmod(part, inverse.chunks)
        items = range(edges[part], edges[part + 1])
        in_block = [int(inverse.item_blocks[item]) for item in items]
        assert in_block == sorted(in_block)
        for item, block in zip(items, in_block, strict=True):
            pairs = inverse.item_pairs[item].tolist()
            used = [pair for pair in pairs if pair >= 0]
            assert used == pairs[: len(used)]
            assert used
            for t, i in (divmod(pair, n) for pair in used):
                assert t // chunk == index
                assert int(tables.block_base[t]) + int(blocks[t, h, i]) == block
                got.append((t, h, i))
    want = (blocks >= 0).nonzero().tolist()
    assert sorted(map(list, got)) == want


@pytest.mark.parametrize(("chunk", "size"), [(10, 1), (16, 4), (1000, 8)])
def test_items_with_the_most_queries_go_first(chunk: int, size: int) -> None:
    """Of each head's chunk; they are the same items."""
    tables = tables_of([30, 1, 45], sizes(8, 3))
    inverse = invert(random_blocks(tables, 2), tables, chunk, size)
    ordered = longest_first(inverse)
    assert torch.equal(inverse.first_items, ordered.first_items)
    for begin, end in pairwise(inverse.first_items.tolist()):
        was, now = (
            [(int(x.item_blocks[i]), tuple(sorted(x.item_pairs[i].tolist()))) for i in range(begin, end)]
            for x in (inverse, ordered)
        )
        assert sorted(was) == sorted(now)
        lengths = (ordered.item_pairs[begin:end] >= 0).sum(1).tolist()
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.gpu
def test_repeats_its_bits() -> None:
    tables = tables_of([3000], sizes(32, 6))
    q, k = draw(3000, 16, 64, dtype=torch.bfloat16, seed=2), draw(3000, 1, 64, dtype=torch.bfloat16, seed=3)
    blocks = random_blocks(tables, 1)
    first, again = (selected_by_block(q, k, k, blocks, tables, SCALE) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
