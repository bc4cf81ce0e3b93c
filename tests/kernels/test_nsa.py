"""NSA forward and gradients against the oracle, in float64, on random packs and on each edge case of the definition."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nsa_packs import hyper
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shoal.kernels.nsa import BlockSizes, Layout, compress, make_layout, nsa_attention, oracle
from shoal.kernels.nsa.attention import Backend, chosen_backend

PAPER = BlockSizes(32, 16, 64, 16, 1, 2, 512)
SMALL = BlockSizes(cmp_block=4, cmp_stride=2, slc_block=8, slc_count=3, slc_initial=1, slc_local=1, window=5)
SCALE = 0.7


@dataclass
class Problem:
    """A pack and all that NSA reads; ``leaves`` is what gradients are taken of."""

    sizes: BlockSizes
    cu: tuple[int, ...]
    q: Tensor
    raw: list[Tensor]
    gates: Tensor
    phi_k: list[Tensor]
    phi_v: list[Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, *self.raw, self.gates, *self.phi_k, *self.phi_v]

    def fast(self, layout: Layout) -> Tensor:
        k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = self.raw
        (k_pos, k_w1, k_w2), (v_pos, v_w1, v_w2) = self.phi_k, self.phi_v
        keys, values = compress(k_cmp, k_pos, k_w1, k_w2, layout), compress(v_cmp, v_pos, v_w1, v_w2, layout)
        return nsa_attention(self.q, keys, values, k_slc, v_slc, k_win, v_win, self.gates, layout, SCALE)

    def slow(self) -> Tensor:
        cu, sizes = self.cu, hyper(self.sizes)
        k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = self.raw
        keys = oracle.compress(k_cmp, oracle.Phi(*self.phi_k), cu, sizes)
        values = oracle.compress(v_cmp, oracle.Phi(*self.phi_v), cu, sizes)
        return oracle.nsa(self.q, keys, values, k_slc, v_slc, k_win, v_win, self.gates, cu, sizes, SCALE)

    def layout(self, tile: int | None = None, dense_keys: int | None = None) -> Layout:
        return make_layout(self.cu, self.sizes, "cpu", tile=tile, dense_keys=dense_keys)


def problem(
    sizes: BlockSizes, lengths: list[int], kv: int = 2, group: int = 2, dims: tuple[int, int] = (4, 3), seed: int = 0
) -> Problem:
    gen = torch.Generator().manual_seed(seed)

    def make(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(*shape, generator=gen, dtype=torch.float64)).requires_grad_()

    def phi(dim: int) -> list[Tensor]:
        width = sizes.cmp_block * dim
        return [make(kv, sizes.cmp_block, dim), make(kv, width, 2 * dim, std=width**-0.5), make(kv, 2 * dim, dim)]

    cu = tuple(accumulate(lengths, initial=0))
    raw = [make(cu[-1], kv, dims[side]) for _ in range(3) for side in (0, 1)]
    gates = torch.rand(cu[-1], kv * group, 3, generator=gen, dtype=torch.float64).requires_grad_()
    return Problem(sizes, cu, make(cu[-1], kv * group, dims[0]), raw, gates, phi(dims[0]), phi(dims[1]))


def moved(p: Problem, to: torch.dtype | str) -> Problem:
    """The same problem in another dtype or on another device."""
    q, raw, gates, phi_k, phi_v = (
        [x.detach().to(to).requires_grad_() for x in part] for part in ([p.q], p.raw, [p.gates], p.phi_k, p.phi_v)
    )
    return Problem(p.sizes, p.cu, q[0], raw, gates[0], phi_k, phi_v)


def close(got: Tensor, want: Tensor, name: str) -> None:
    error, size = (got - want).norm().item(), want.norm().item()
    assert error <= 1e-9 * size + 1e-11, f"{name}: error {error:.2e} of {size:.2e}"


def check(p: Problem, tile: int | None = None, dense_keys: int | None = None) -> Tensor:
    """Compare the output and every gradient with the oracle's; returns the output."""
    out, want = p.fast(p.layout(tile, dense_keys)), p.slow()
    close(out, want, "output")
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, p.leaves, upstream)
    ref = torch.autograd.grad(want, p.leaves, upstream, allow_unused=True)
    for i, (g, w) in enumerate(zip(got, ref, strict=True)):
        close(g, torch.zeros_like(g) if w is None else w, f"gradient {i}")
    return out.detach()


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    d = draw(st.integers(1, 4))
    per_cmp = draw(st.integers(1, 3))
    per_slc = draw(st.integers(per_cmp, per_cmp + 2))
    initial, local, others = draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.integers(0, 2))
    n, window = initial + local + others, draw(st.integers(1, 20))
    sizes = BlockSizes(per_cmp * d, d, per_slc * d, n, initial, local, window)
    lengths = draw(st.lists(st.one_of(st.integers(1, 3), st.integers(0, 50)), min_size=1, max_size=4))
    lengths = lengths if sum(lengths) else [1]
    dims = draw(st.sampled_from([(4, 4), (4, 2), (2, 5)]))
    return problem(sizes, lengths, draw(st.integers(1, 2)), draw(st.integers(1, 3)), dims, draw(st.integers(0, 999)))


@given(p=problems(), tile=st.sampled_from([1, 4, 8, 64]), dense_keys=st.sampled_from([0, 16, 10**6]))
def test_random_packs(p: Problem, tile: int, dense_keys: int) -> None:
    check(p, tile, dense_keys)


@pytest.mark.slow
@given(p=problems(), tile=st.integers(1, 70), dense_keys=st.integers(0, 60))
def test_random_packs_at_length(p: Problem, tile: int, dense_keys: int) -> None:
    check(p, tile, dense_keys)


def test_hyper_parameters_of_the_paper() -> None:
    check(problem(PAPER, [1500, 37], kv=1, group=2, dims=(6, 4)))


def test_documents_of_one_token_return_their_own_values() -> None:
    p = problem(SMALL, [1, 1, 1])
    out = check(p)
    own = p.gates[..., 1:2] * p.raw[3].repeat_interleave(2, 1) + p.gates[..., 2:] * p.raw[5].repeat_interleave(2, 1)
    torch.testing.assert_close(out, own.detach())


def test_no_compression_block_has_ended_yet() -> None:
    """The first l - 1 queries of a document get nothing from the cmp branch, whatever its gate."""
    p = problem(SMALL, [3, 20])
    out = check(p)
    with torch.no_grad():
        p.gates[:, :, 0] += 1
    changed = (check(p) != out).flatten(1).any(1)
    assert changed.tolist() == [False] * 6 + [True] * 17


def test_fewer_than_n_blocks_select_everything() -> None:
    """Up to ``n·l'`` keys, the selected branch is full causal attention."""
    p = problem(SMALL, [24], kv=1, group=1)
    with torch.no_grad():
        p.gates.copy_(torch.tensor([0.0, 1.0, 0.0]))
    scores = SCALE * p.q[:, 0] @ p.raw[2][:, 0].T
    full = torch.softmax(scores.masked_fill(torch.ones(24, 24).triu(1).bool(), -torch.inf), -1) @ p.raw[3][:, 0]
    close(check(p)[:, 0], full.detach(), "full")


@pytest.mark.parametrize("before", [1, 2, 3, 7, 64])
def test_document_starting_anywhere_in_the_pack(before: int) -> None:
    check(problem(SMALL, [before, 45, 2]))


def test_document_shorter_than_a_compression_block() -> None:
    check(problem(SMALL, [2, 3, 3, 1]))


@pytest.mark.parametrize(("kv", "group"), [(1, 1), (1, 4), (4, 1), (2, 3)])
@pytest.mark.parametrize("dims", [(6, 6), (6, 4), (4, 6)])
def test_groups_and_head_sizes(kv: int, group: int, dims: tuple[int, int]) -> None:
    check(problem(SMALL, [40], kv, group, dims))


def test_dense_and_gathering_selection_agree() -> None:
    p = problem(SMALL, [90, 5, 60])
    dense, gathered = p.layout(tile=16, dense_keys=10**6), p.layout(tile=16, dense_keys=0)
    upstream = torch.randn(155, 4, 3, dtype=torch.float64)
    outs = [p.fast(layout) for layout in (dense, gathered)]
    close(outs[0], outs[1], "output")
    grads = [torch.autograd.grad(out, p.leaves, upstream) for out in outs]
    for a, b in zip(*grads, strict=True):
        close(a, b, "gradient")


def test_neighbours_change_nothing() -> None:
    """A document's outputs keep their bits when its neighbours' contents change, and send them no gradient."""
    p = problem(SMALL, [5, 70, 9, 30])
    out = p.fast(p.layout())
    grads = torch.autograd.grad(out[5:75].sum(), p.leaves[:8])
    assert all(not g[:5].any() and not g[75:].any() for g in grads)
    with torch.no_grad():
        for x in p.leaves[:8]:
            x[:5] += 1
            x[75:] -= 1
    assert torch.equal(p.fast(p.layout())[5:75], out[5:75])
    alone = problem(SMALL, [70])
    for mine, theirs in zip(alone.leaves[:8], p.leaves[:8], strict=True):
        mine.data = theirs.data[5:75].clone()
    alone.phi_k, alone.phi_v = p.phi_k, p.phi_v
    torch.testing.assert_close(alone.fast(alone.layout()), out[5:75], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dense_keys", [0, 10**6])
def test_of_equally_important_blocks_the_first_are_kept(dense_keys: int) -> None:
    """Equal compressed keys make all blocks equal; then the earliest are kept, by the fast path and by the oracle."""
    p = problem(BlockSizes(4, 2, 8, 4, 1, 1, 5), [80], kv=1, group=2)
    with torch.no_grad():
        p.raw[0].zero_()
        p.phi_k[0].zero_()
        p.gates.copy_(torch.tensor([0.0, 1.0, 0.0]))
    check(p, tile=16, dense_keys=dense_keys)
    out = p.fast(p.layout(16, dense_keys))
    used = torch.autograd.grad(out[79].sum(), p.raw[3])[0].abs().sum((1, 2)).view(10, 8).sum(1) > 0
    assert used.nonzero()[:, 0].tolist() == [0, 1, 2, 9]


def test_no_tokens_stay_in_the_graph() -> None:
    p = problem(SMALL, [])
    out = p.fast(p.layout())
    assert out.shape == (0, 4, 3)
    out.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in p.leaves)


def test_retained_and_checkpointed_graphs_give_the_same_gradients() -> None:
    p = problem(SMALL, [40, 3])
    out = p.fast(p.layout())
    upstream = torch.randn_like(out)
    want, again = (torch.autograd.grad(out, p.leaves, upstream, retain_graph=keep) for keep in (True, False))
    out = checkpoint(p.fast, p.layout(), use_reentrant=False)
    got = torch.autograd.grad(out, p.leaves, upstream)
    for first, *others in zip(want, again, got, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_float32_is_close_to_float64_and_repeats_its_bits() -> None:
    p = problem(BlockSizes(16, 8, 32, 8, 1, 2, 64), [300, 90], kv=2, group=4, dims=(32, 32))
    want = p.fast(p.layout())
    upstream = torch.randn_like(want)
    exact = [want, *torch.autograd.grad(want, p.leaves, upstream)]
    single = moved(p, torch.float32)
    runs = []
    for _ in range(2):
        out = single.fast(single.layout())
        runs.append([out, *torch.autograd.grad(out, single.leaves, upstream.float())])
    for first, second, reference in zip(*runs, exact, strict=True):
        assert first.dtype == torch.float32
        assert torch.equal(first, second)
        assert (first.double() - reference).norm() <= 2e-5 * reference.norm()


def test_shapes_that_do_not_fit_the_layout_are_refused() -> None:
    p = problem(SMALL, [20])
    with pytest.raises(ValueError, match="the layout has 21, 21, 21 tokens"):
        p.fast(make_layout((0, 21), SMALL, "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dense_keys", [0, None])
def test_on_a_gpu(dense_keys: int | None) -> None:
    p = problem(BlockSizes(16, 8, 32, 8, 1, 2, 64), [300, 1, 700, 2, 90], kv=2, group=4, dims=(32, 24))
    want = p.fast(p.layout())
    upstream = torch.randn_like(want)
    exact = [want, *torch.autograd.grad(want, p.leaves, upstream)]
    there = moved(p, "cuda")
    out = there.fast(make_layout(p.cu, p.sizes, "cuda", dense_keys=dense_keys))
    for got, ref in zip([out, *torch.autograd.grad(out, there.leaves, upstream.cuda())], exact, strict=True):
        close(got.cpu(), ref, "on the GPU")


def backend_of(p: Problem, backend: Backend) -> str:
    k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = p.raw
    layout = make_layout(p.cu, p.sizes, p.q.device)
    blocks = slice(layout.cmp_starts.numel())
    tensors = (p.q, k_cmp[blocks], v_cmp[blocks], k_slc, v_slc, k_win, v_win, p.gates)
    return chosen_backend(tensors, layout, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cpu_computes_with_pytorch_and_refuses_triton(dtype: torch.dtype) -> None:
    p = moved(problem(SMALL, [20]), dtype)
    assert backend_of(p, "auto") == backend_of(p, "torch") == "torch"
    with pytest.raises(ValueError, match=r"on a GPU, and q is torch\.\w+ on cpu: take 'auto'"):
        backend_of(p, "triton")


@pytest.mark.gpu
def test_a_gpu_computes_with_triton_in_16_bits_and_as_it_is_told() -> None:
    for dtype, own in ((torch.bfloat16, "triton"), (torch.float16, "triton"), (torch.float32, "torch")):
        p = moved(moved(problem(SMALL, [20]), dtype), "cuda")
        assert backend_of(p, "auto") == own
        assert [backend_of(p, "torch"), backend_of(p, "triton")] == ["torch", "triton"]
