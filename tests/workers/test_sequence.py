"""Attention over a sequence that ranks share: one rank's outputs and gradients, buffers and bytes by the formula."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from sequences import NSA_NAMES, SIZES, TOKENS, Problem, drawn, nsa_alone, nsa_of, nsa_shared, rank_part
from torch.profiler import ProfilerActivity, profile

from shoal.kernels.nsa import BlockSizes
from shoal.kernels.nsa.rows import needs
from shoal.workers import volume
from shoal.workers.exchange import Fetch, Give, Plan
from shoal.workers.mesh import Group, make_mesh
from shoal.workers.placement import Placement
from shoal.workers.sequence import make_sequence, zigzag
from shoal.workers.volume import Shape, far_volume, nsa_volume


def straight() -> None:
    """Far keys of this process go straight to where they are read, as those of long sequences do."""
    volume.PACKED = -1


def _on_rank(
    rank: int,
    world: int,
    problems: list[Problem],
    tile: int,
    dense: int,
    pull: bool,
    wide: bool,
    heads: int,
    long: bool = False,
) -> Any:
    """Of each problem what this rank computes. long: as long sequences are exchanged."""
    import torch.distributed as dist

    if long:
        straight()

    group = Group(tuple(range(world)), rank, dist.group.WORLD if world > 1 else None)
    return [nsa_shared(p, drawn(p), group, tile, dense, pull, wide, heads) for p in problems]


def check(
    world: int,
    packs: list[tuple[int, ...]],
    dtype: torch.dtype,
    tile: int = 64,
    dense: int = 512,
    pull: bool = False,
    wide: bool = False,
    heads: int = 0,
    kv: int = 2,
    long: bool = False,
) -> list[Any]:
    """All ranks' parts put together beside one rank's; returns what the ranks returned."""
    problems = [Problem(cu, kv=kv, dtype=dtype) for cu in packs]
    results = run_ranks(world, _on_rank, problems, tile, dense, pull, wide, heads, long)
    bound = 1e-10 if dtype == torch.float64 else 3e-5
    for i, p in enumerate(problems):
        want = nsa_alone(p, drawn(p))
        got = [torch.zeros_like(x) for x in want]
        for rank, rows in enumerate(zigzag(p.cu[-1], world, p.sizes.slc_block)):
            at = rows.indices()
            for j, part in enumerate(results[rank][i].results):
                if j <= TOKENS:
                    got[j][at] = part
                else:
                    got[j] += part
        for j, (a, b) in enumerate(zip(got, want, strict=True)):
            error, size = (a - b).norm().item(), b.norm().item()
            assert error <= bound * size + 1e-12, (p.cu, j, error, size)
    return results


def pack(*lengths: int) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_compute_what_one_rank_computes(world: int) -> None:
    """One document; uneven ones, that segments cut; many short ones; fewer tokens than ranks; none."""
    packs = [pack(256), pack(37, 140, 3, 76), pack(*[9] * 20), pack(5), pack(0), pack(1, 1, 301)]
    check(world, packs, torch.float64)
    check(world, packs[:2], torch.float32, tile=8, dense=0)
    check(world, packs, torch.float64, long=True)


@given(lengths=st.lists(st.integers(1, 400), max_size=6), world=st.integers(1, 8))
def test_each_token_and_each_compressed_block_has_one_owner(lengths: list[int], world: int) -> None:
    """Segments are whole pages, but for the last, and about equally long; of others' tokens a block needs a few."""
    cu, page = pack(*lengths), SIZES.slc_block
    owned = zigzag(cu[-1], world, page)
    assert sorted(t for rows in owned for t in rows.indices().tolist()) == list(range(cu[-1]))
    for rows in owned:
        assert all(edge % page == 0 or edge == cu[-1] for segment in rows.ranges for edge in segment)
        assert abs(rows.count - cu[-1] / world) <= 2 * page
    need = [needs(cu, SIZES, rows) for rows in owned]
    blocks = sum(SIZES.cmp_blocks(length) for length in lengths)
    assert sorted(i for n in need for i in n.own.indices().tolist()) == list(range(blocks))
    for rows, n in zip(owned, need, strict=True):
        halo = n.raw.indices()[~rows.holds(n.raw.indices())]
        assert len(halo) <= len(rows.ranges) * (SIZES.cmp_block - 1)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_have_equally_many_pairs_of_queries_and_keys(world: int) -> None:
    pairs = [sum(t + 1 for t in rows.indices().tolist()) for rows in zigzag(512, world, SIZES.slc_block)]
    assert pairs == [512 * 513 // 2 // world] * world


@settings(max_examples=3)
@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=6), dense=st.sampled_from([0, 512]))
def test_random_packs_over_three_ranks(lengths: list[int], dense: int) -> None:
    check(3, [pack(*lengths)], torch.float64, 16, dense)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_bytes_and_buffers_are_those_of_the_formula(world: int) -> None:
    """Of one document, of one whose segments are shorter than a window, and of uneven ones that segments cut."""
    packs = [pack(512), pack(61), pack(37, 140, 3, 76)]
    results = check(world, packs, torch.float32, long=world == 4)
    shape = Shape(Problem.kv, Problem.dims, 4, 4)
    for i, cu in enumerate(packs):
        owned = zigzag(cu[-1], world, SIZES.slc_block)
        for rank in range(world):
            r, model = results[rank][i], nsa_volume(cu, owned, rank, shape, SIZES)
            assert r.forward == model["forward"]
            assert {k: r.total[k] - r.forward[k] for k in r.total} == model["backward"]
    for rank in range(world):
        buffers = results[rank][0].buffers
        keys = 512 // (2 * world) * (2 * world - rank)  # all up to the last query, less for every further rank
        assert buffers["far"] == keys
        assert buffers["cmp"] == SIZES.cmp_blocks(keys)
        assert buffers["near"] <= 512 // world + 2 * (SIZES.window - 1)
        assert buffers["raw"] <= 512 // world + 2 * (SIZES.cmp_block - SIZES.cmp_stride)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 400), max_size=5),
    world=st.integers(2, 8),
    stride=st.sampled_from([1, 4]),
    parts=st.tuples(st.integers(1, 3), st.integers(0, 2)),
    window=st.integers(1, 200),
)
def test_bytes_of_any_pack_are_those_of_the_plans(
    lengths: list[int], world: int, stride: int, parts: tuple[int, int], window: int
) -> None:
    """Segments may be shorter than a window, several documents long, or empty."""
    cu, shape = pack(*lengths), Shape(1, (2, 1), 2, 4)
    sizes = BlockSizes(stride * parts[0], stride, stride * sum(parts), 3, 1, 1, window)
    owned = zigzag(cu[-1], world, sizes.slc_block)
    for rank in range(world):
        sequence = make_sequence(cu, sizes, Group(tuple(range(world)), rank), torch.device("cpu"))
        model = nsa_volume(cu, owned, rank, shape, sizes)
        for plan in (sequence.raw, sequence.cmp, sequence.near, sequence.far):
            arriving, returning = (sum(x.stop - x.start for _, x in side) for side in (plan.receives, plan.sends))
            assert model["forward"][plan.name] == 6 * arriving
            again, width = (6 * arriving, 12) if plan.name == "far" else (0, 6)
            assert model["backward"][plan.name] == again + width * returning


@pytest.mark.parametrize("dense", [0, 10**6])
@pytest.mark.parametrize("world", [2, 4])
def test_chosen_pages_alone_give_the_same_bits_for_the_bytes_of_the_formula(world: int, dense: int) -> None:
    """Of a long document few of its first pages are chosen by few late queries; of a short one all of them."""
    packs = [pack(1024), pack(40, 150, 66)]
    pulled = check(world, packs, torch.float64, 16, dense, pull=True)
    fetched = check(world, packs, torch.float64, 16, dense)
    shape = Shape(Problem.kv, Problem.dims, 8, 8)
    for i, cu in enumerate(packs):
        many, few = ([results[rank][i] for rank in range(world)] for results in (fetched, pulled))
        assert [x.counts for x in many] == [x.counts for x in few]
        for a, b in zip(many, few, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.results, b.results, strict=True))
        _, rows, _, all_rows, told = (sum(x) for x in zip(*(x.counts for x in few), strict=True))
        assert told == world * Problem.kv * -(-cu[-1] // SIZES.slc_block)
        assert sum(x.total.get("far", 0) for x in many) == far_volume(all_rows, shape)
        received = sum(x.total.get("far", 0) + x.total["pages"] for x in few)
        assert received == far_volume(rows, shape, told=told * (world - 1))
    assert 0 < max(pulled[rank][0].coverage for rank in range(world)) < 1
    owned = zigzag(1024, world, SIZES.slc_block)
    volumes = [nsa_volume(packs[0], owned, rank, shape, SIZES) for rank in range(world)]
    far = sum(v["forward"]["far"] + v["backward"]["far"] for v in volumes)
    assert far == sum(fetched[rank][0].total["far"] for rank in range(world))


@pytest.mark.parametrize(("world", "heads", "pull"), [(2, 1, False), (3, 2, False), (4, 1, True)])
def test_heads_in_turns_compute_the_same_and_send_the_same(world: int, heads: int, pull: bool) -> None:
    packs = [pack(37, 140, 3, 76), pack(5), pack(512)]
    settings = {"tile": 16, "dense": 64, "pull": pull, "wide": True, "kv": 3}
    turns, once = (check(world, packs, torch.float64, heads=n, long=n > 0, **settings) for n in (heads, 0))  # type: ignore[arg-type]
    for mine, all_at_once in zip(turns, once, strict=True):
        for a, b in zip(mine, all_at_once, strict=True):
            assert (a.counts, a.forward, a.total) == (b.counts, b.forward, b.total)


def test_gradients_in_float32_travel_so_and_lose_nothing() -> None:
    """Of the selected branch in bfloat16: twice the bytes, and owners sum what has not been rounded, as one rank."""
    world, p = 4, Problem(pack(512), dtype=torch.bfloat16)
    owned = zigzag(512, world, SIZES.slc_block)
    want = nsa_alone(p, drawn(p))[NSA_NAMES.index("k_slc")].double()
    errors = []
    for wide in (False, True):
        got, shape = torch.zeros_like(want), Shape(Problem.kv, Problem.dims, 2, 4 if wide else 2)
        for rank, (r,) in enumerate(run_ranks(world, _on_rank, [p], 64, 512, False, wide, 0)):
            returned = {k: r.total[k] - r.forward[k] for k in r.total}
            assert returned == nsa_volume(p.cu, owned, rank, shape, SIZES)["backward"]
            got[owned[rank].indices()] = r.results[NSA_NAMES.index("k_slc")].double()
        errors.append(float((got - want).norm() / want.norm()))
    assert errors[1] < 0.5 * errors[0] < 5e-3, errors


def _order(rank: int, world: int, p: Problem) -> tuple[list[str], list[str]]:
    """What a forward and a backward pass do, in their order. φ: when the gradient of its first weights is there."""
    import torch.distributed as dist

    seen: list[str] = []
    fetch, give, wait = Plan.fetch, Plan.give, Give.wait

    def fetching(plan: Plan, *xs: torch.Tensor) -> Fetch:
        seen.append(f"{plan.name} sent")
        found = fetch(plan, *xs)
        arrived = found.wait

        def there() -> tuple[torch.Tensor, ...]:
            seen.append(f"{plan.name} there")
            return arrived()

        found.wait = there  # type: ignore[method-assign]
        return found

    def giving(plan: Plan, *grads: torch.Tensor) -> Give:
        seen.append(f"{plan.name} sent")
        return give(plan, *grads)

    def waiting(given: Give, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        seen.append(f"{given.plan.name} there")
        return wait(given, dtype)

    Plan.fetch, Plan.give, Give.wait = fetching, giving, waiting  # type: ignore[method-assign,assignment]
    group = Group(tuple(range(world)), rank, dist.group.WORLD)
    *leaves, upstream = rank_part(p, drawn(p), group, TOKENS)
    sequence = make_sequence(p.cu, p.sizes, group, torch.device("cpu"))
    leaves[TOKENS].register_hook(lambda grad: seen.append("φ"))
    out = nsa_of(p, leaves, sequence)
    forward = seen.copy()
    seen.clear()
    torch.autograd.grad(out, leaves, upstream)
    return forward, seen


def test_far_keys_and_gradients_travel_while_phi_and_its_gradients_are_computed() -> None:
    """Keys are sent before φ has what it reads, and waited for when compressed rows are home. Gradients are sent last:
    those of compressed rows have the links first."""
    keys = ["far sent", "raw sent", "raw there", "cmp sent", "cmp there", "far there"]
    gradients = ["far sent", "far there", "cmp sent", "cmp there", "far sent", "φ", "far there"]
    for forward, backward in run_ranks(2, _order, Problem(pack(256))):
        assert [word for word in forward if word in keys] == keys, forward
        assert [word for word in backward if word in gradients] == gradients, backward


class _Late:
    """An exchange that begins when it is waited for."""

    def __init__(self, begin: Callable[[], list[Any]]) -> None:
        self.begin = begin

    def wait(self) -> None:
        for work in self.begin():
            work.wait()


def _late(rank: int, world: int, p: Problem) -> list[torch.Tensor]:
    """Results of a rank, of which the last one sends far keys and gradients when it wants its own."""
    straight()
    launch = Plan.launch

    def launching(plan: Plan, *sides: Any) -> list[Any]:
        if plan.name == "far" and rank == world - 1:
            return [_Late(lambda: launch(plan, *sides))]
        return launch(plan, *sides)

    Plan.launch = launching  # type: ignore[method-assign,assignment]
    everyone = tuple(range(world))
    group = make_mesh(Placement(world, everyone, (), world, world), rank).context
    assert group is not None
    return nsa_shared(p, drawn(p), group).results


def test_far_keys_hold_up_no_others() -> None:
    """Where one rank is late with them, all else goes its way, and results are one rank's: far keys have a process
    group of their own, since messages of one group are matched by their order, and on a GPU follow one another."""
    p = Problem(pack(256))
    want = nsa_alone(p, drawn(p))
    for found, rows in zip(run_ranks(2, _late, p), zigzag(256, 2, p.sizes.slc_block), strict=True):
        for got, all_of_it in zip(found[: TOKENS + 1], want, strict=False):
            torch.testing.assert_close(got, all_of_it[rows.indices()], rtol=1e-9, atol=1e-11)


def _far_heads(rank: int, world: int, p: Problem, heads: int) -> tuple[int, int]:
    """The most heads whose far keys were in memory at a time, and the most bytes at the peak beyond the inputs."""
    import torch.distributed as dist

    straight()
    group = Group(tuple(range(world)), rank, dist.group.WORLD)
    *leaves, upstream = rank_part(p, drawn(p), group, TOKENS)
    sequence = make_sequence(p.cu, p.sizes, group, torch.device("cpu"), 32, 512)
    alive: list[weakref.ref[torch.Tensor]] = []
    most, fetch = 0, Plan.fetch

    def watched(plan: Plan, *xs: torch.Tensor) -> Fetch:
        nonlocal most
        found = fetch(plan, *xs)
        if plan.name == "far":
            alive.append(weakref.ref(found.buffers[0]))
            held = [buffer for ref in alive if (buffer := ref()) is not None]
            most = max(most, sum(buffer.shape[1] for buffer in held))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "fetch", watched)
        with allocated() as sizes:
            torch.autograd.grad(nsa_of(p, leaves, sequence, heads=heads), leaves, upstream)
    return most, max(accumulate(sizes))


def test_far_keys_of_two_heads_are_in_memory_where_one_is_computed_at_a_time() -> None:
    """Of many ranks, few queries and many keys: with their gradients they are most of what a rank holds."""
    p = Problem((0, 2048), BlockSizes(32, 16, 64, 4, 1, 2, 64), kv=6, group=1, dims=(32, 32), dtype=torch.float32)
    (some, low), (every, high) = (run_ranks(4, _far_heads, p, heads)[0] for heads in (1, 0))
    assert (some, every) == (2, 6)
    assert low < 0.6 * high


def _memory(rank: int, world: int, p: Problem) -> tuple[int, int]:
    """Bytes that a layer keeps for its backward pass, and its peak, both beyond its inputs."""
    import torch.distributed as dist

    straight()
    group = Group(tuple(range(world)), rank, dist.group.WORLD if world > 1 else None)
    *leaves, upstream = rank_part(p, drawn(p), group, TOKENS)
    sequence = make_sequence(p.cu, p.sizes, group, torch.device("cpu"), 16, 512)
    nsa_of(p, leaves, sequence)  # makes what layers share
    with allocated() as forward:
        out = nsa_of(p, leaves, sequence)
    with allocated() as backward:
        torch.autograd.grad(out, leaves, upstream)
    kept = sum(forward)
    return kept, max(*accumulate(forward), kept + max(accumulate(backward)))


@contextmanager
def allocated() -> Iterator[list[int]]:
    """Afterwards the list has the bytes of each allocation of memory by torch, negative where it was freed."""
    sizes: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        yield sizes
    assert found.profiler is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes += [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def test_memory_of_a_rank_falls_with_the_number_of_ranks() -> None:
    """What is kept is this rank's tokens and the short compressed keys; at the peak there are the selected branch's
    keys of all tokens too, and their gradients, few beside the queries of 16 heads each."""
    p = Problem((0, 2048), BlockSizes(32, 16, 64, 4, 1, 2, 64), group=16, dims=(16, 16), dtype=torch.float32)
    kept, peak = zip(*(map(max, zip(*run_ranks(n, _memory, p), strict=True)) for n in (1, 2, 4, 8)), strict=True)
    for i in range(1, 4):
        assert kept[i] < 0.55 * kept[i - 1]
        assert peak[i] < 0.75 * peak[i - 1]
