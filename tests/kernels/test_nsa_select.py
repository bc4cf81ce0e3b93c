"""The choice of blocks, the compression and the tables of a layout, each on its own."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nsa_packs import hyper

from shoal.kernels.nsa import BlockSizes, compress, make_layout, oracle
from shoal.kernels.nsa.select import importance, select

PAPER = BlockSizes(32, 16, 64, 16, 1, 2, 512)


@st.composite
def block_sizes(draw: st.DrawFn) -> BlockSizes:
    d = draw(st.integers(1, 4))
    per_cmp = draw(st.integers(1, 3))
    per_slc = draw(st.integers(per_cmp, per_cmp + 3))
    initial, local, others = draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.integers(0, 3))
    return BlockSizes(per_cmp * d, d, per_slc * d, initial + local + others, initial, local, draw(st.integers(1, 20)))


def test_weights_of_the_paper_are_1_2_2_2_1_on_4j_minus_1_to_4j_plus_3() -> None:
    weights = importance(torch.eye(20), 5, PAPER)
    for j in range(5):
        want = {i: w for i, w in zip(range(4 * j - 1, 4 * j + 4), (1, 2, 2, 2, 1), strict=True) if i >= 0}
        assert weights[:, j].tolist() == [want.get(i, 0) for i in range(20)]


@given(sizes=block_sizes(), keys=st.integers(1, 60))
def test_importance_is_the_papers_double_sum_and_counts_shared_chunks(sizes: BlockSizes, keys: int) -> None:
    count, blocks = sizes.cmp_blocks(keys), sizes.slc_blocks(keys)
    p = torch.rand(3, count, dtype=torch.float64)
    got = importance(p, blocks, sizes)
    for row in range(3):
        want = oracle.slc_importance(p[row], blocks, hyper(sizes))
        torch.testing.assert_close(got[row], want, rtol=1e-12, atol=1e-14)
    d = sizes.cmp_stride
    for i in range(count):
        for j in range(blocks):
            one = importance(torch.eye(count, dtype=torch.float64)[i], blocks, sizes)[j]
            cmp_keys = set(range(i * d, i * d + sizes.cmp_block))
            slc_keys = set(range(j * sizes.slc_block, (j + 1) * sizes.slc_block))
            assert one == len(cmp_keys & slc_keys) / d


@given(sizes=block_sizes(), data=st.data())
def test_select_keeps_forced_and_best_and_of_equals_the_lower(sizes: BlockSizes, data: st.DataObject) -> None:
    blocks = sizes.slc_count + data.draw(st.integers(1, 6))
    positions = torch.arange(blocks * sizes.slc_block)
    few = st.lists(st.sampled_from([0.0, 0.25, 0.5]), min_size=blocks, max_size=blocks)
    rows = [data.draw(few) for _ in range(3)]
    scores = torch.tensor(rows).repeat(len(positions) // 3 + 1, 1)[: len(positions)]
    got = select(scores[None].clone(), positions, sizes)[0]
    for t in positions.tolist():
        want = oracle.chosen_blocks(scores[t, : t // sizes.slc_block + 1], t, hyper(sizes))
        assert got[t].nonzero()[:, 0].tolist() == want


@given(sizes=block_sizes(), lengths=st.lists(st.integers(0, 40), max_size=5))
def test_layout_tables(sizes: BlockSizes, lengths: list[int]) -> None:
    cu = tuple(accumulate(lengths, initial=0))
    layout = make_layout(cu, sizes, "cpu")
    starts = [
        (doc, i) for doc, n in enumerate(lengths) for i in range(0, n, sizes.cmp_stride) if i + sizes.cmp_block <= n
    ]
    assert layout.cmp_documents.tolist() == [doc for doc, _ in starts]
    assert layout.cmp_positions.tolist() == [i for _, i in starts]
    assert layout.cmp_starts.tolist() == [cu[doc] + i for doc, i in starts]
    assert layout.cmp_before == tuple(sum(d < doc for d, _ in starts) for doc in range(len(cu)))
    assert layout.slc_blocks == tuple(-(-n // sizes.slc_block) for n in lengths)
    assert make_layout(cu, sizes, "cpu") is layout


@given(sizes=block_sizes(), lengths=st.lists(st.integers(0, 40), max_size=4), kv=st.integers(1, 2))
def test_compress_forward_and_gradients(sizes: BlockSizes, lengths: list[int], kv: int) -> None:
    cu, dim, width = tuple(accumulate(lengths, initial=0)), 3, sizes.cmp_block * 3
    shapes = [(cu[-1], kv, dim), (kv, sizes.cmp_block, dim), (kv, width, 2 * dim), (kv, 2 * dim, dim)]
    x, position, w1, w2 = leaves = [torch.randn(*s, dtype=torch.float64).requires_grad_() for s in shapes]
    got = compress(x, position, w1, w2, make_layout(cu, sizes, "cpu"))
    want = oracle.compress(x, oracle.Phi(position, w1, w2), cu, hyper(sizes))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(got)
    grads = torch.autograd.grad(got, leaves, upstream)
    if len(want):
        for g, w in zip(grads, torch.autograd.grad(want, leaves, upstream), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-10)
    else:
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cmp_block": 24},
        {"slc_block": 72},
        {"slc_block": 16},
        {"slc_count": 2},
        {"slc_local": 0},
        {"slc_initial": -1},
        {"window": 0},
    ],
)
def test_impossible_sizes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        BlockSizes(**{**PAPER.__dict__, **wrong})


@pytest.mark.parametrize("offsets", [(), (1, 5), (0, 5, 3)])
def test_offsets_that_are_no_documents_are_refused(offsets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="begin with 0 and do not fall"):
        make_layout(offsets, PAPER, "cpu")
