"""What ``shoal bench scale`` predicts: bytes against those that real ranks exchange, and the limits of the model."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from shoal.jobs.bench.dispatch_ranks import Bench, Sizes
from shoal.jobs.bench.scale_cases import Training
from shoal.jobs.bench.scale_model import (
    Attention,
    Curve,
    Experts,
    Link,
    Plan,
    Travel,
    dispatch_travels,
    fit,
    replica_travels,
    rows_to_others,
    sequence_travels,
)
from shoal.jobs.bench.scale_series import MoESeries, step_travels
from shoal.jobs.bench.sequence_rank import SIZES
from shoal.jobs.estimate import count_parameters
from shoal.workers.sequence import zigzag
from shoal.workers.volume import Shape, nsa_volume

SETS = (
    "model.layers=2", "model.hidden=64", "model.heads=4", "model.kv_heads=4", "model.head_dim=16", "model.vocab=512",
    "moe.experts=64", "moe.expert_hidden=32", "model.context=128", "train.sequence=128", "train.batch=8",
    "train.accumulate=2", "train.steps=1", "train.recompute=1", "train.warmup=0", "parallel.ranks=2",
    "parallel.expert=2", "parallel.device=cpu", "data.shuffle_tokens=8192",
)  # fmt: skip
NVLINK = Link(3e11)


@pytest.mark.parametrize(("experts", "top_k", "ranks"), [(8, 3, 2), (8, 3, 4), (8, 2, 8), (6, 6, 3)])
def test_rows_are_those_of_all_choices_counted(experts: int, top_k: int, ranks: int) -> None:
    size = experts // ranks
    choices = list(combinations(range(experts), top_k))
    others = [len({e // size for e in chosen} - {0}) for chosen in choices]
    assert rows_to_others(10, ranks, experts, top_k) == pytest.approx(10 * sum(others) / len(choices))


class Counted:
    """Bytes that collectives of this process hand over: rows by all-to-all, and what is summed or sent on."""

    def __init__(self) -> None:
        self.rows = self.replicas = 0
        exchange, reduce, broadcast = dist.all_to_all_single, dist.reduce, dist.broadcast

        def exchanged(out: torch.Tensor, *args: Any, **options: Any) -> Any:
            self.rows += out.nbytes
            return exchange(out, *args, **options)

        def passed(call: Any) -> Any:
            def counting(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
                self.replicas += tensor.nbytes
                return call(tensor, *args, **options)

            return counting

        for name, call in (
            ("all_to_all_single", exchanged),
            ("reduce", passed(reduce)),
            ("broadcast", passed(broadcast)),
        ):
            setattr(dist, name, call)


def _layer(rank: int, world: int, sizes: Sizes) -> int:
    """Bytes of rows that a layer receives, forward and backward."""
    from shoal.workers.mesh import Group

    bench = Bench(Group(tuple(range(world)), rank, dist.group.WORLD), torch.device("cpu"), sizes)
    call = bench.layers(sizes.tokens[0])["layer, all_to_all"][1]
    counted = Counted()
    call()
    return counted.rows


def _step(rank: int, world: int, corpus: str) -> tuple[int, int]:
    """Bytes of rows, and of replicas, of one step of training."""
    from shoal.jobs.bench.context_rank import train

    counted = Counted()
    list(train(Training("deepseekmoe-2b", SETS, 1).load(), Path(corpus), rank, torch.device("cpu"), 0.0, 1))
    return counted.rows, counted.replicas


def _putting(rank: int, world: int, corpus: str, folder: str, sets: tuple[str, ...]) -> tuple[int, int]:
    """Bytes of rows that this rank exchanges, and that it puts into memory which the ranks share, without counts."""
    from shared_inbox import SharedInbox

    from shoal.jobs.bench.context_rank import train
    from shoal.workers import symmetric
    from shoal.workers.slots import LETTER

    put = 0

    class Box(SharedInbox):
        def put(self, part: int, rank: int, values: torch.Tensor) -> None:
            nonlocal put
            put += values.nbytes - self.counts()[0].nbytes * (part == LETTER)
            super().put(part, rank, values)

    boxes: list[Box] = []

    def inbox(*sizes: Any) -> Box:
        boxes.append(Box(folder, *sizes))
        return boxes[0]

    symmetric.inbox = inbox  # type: ignore[assignment]
    counted = Counted()
    records = train(Training("deepseekmoe-2b", sets, 1).load(), Path(corpus), rank, torch.device("cpu"), 0.0, 1)
    assert [record["rows_put"] for record in records] == [True]
    for message in boxes[0].said:  # one that is let go of before it was heard is lost
        message.wait()
    return counted.rows, put


def test_bytes_of_a_layer_are_those_that_ranks_receive() -> None:
    """Of tokens that choose all experts to the byte; of random ones nearly, since a router's choices are not even."""
    for experts, top_k, tolerance in ((4, 4, 0.0), (64, 6, 0.01)):
        sizes = Sizes((512,), hidden=30, inner=16, experts=experts, top_k=top_k, shared=1, paths=("all_to_all",))
        layer = MoESeries(sizes, "all_to_all", 512, 512).layer(4)
        travels = dispatch_travels(layer, 512, 2, 0.0)
        received = run_ranks(2, _layer, sizes)
        assert sum(received) / 2 == pytest.approx(Plan(0.0, tuple(travels)).bytes, rel=tolerance, abs=0)


def test_bytes_of_a_step_are_those_that_ranks_exchange(tmp_path: Path) -> None:
    """Accumulation counts loads in a forward pass of its own, and a layer is computed again: rows travel for both."""
    from shoal.jobs.bench.context import long_document

    recipe = Training("deepseekmoe-2b", SETS, 1).load()
    found = run_ranks(2, _step, str(long_document(tmp_path, 50_000)))
    parameters = 64 * (2 * 512 + 5) + 2 * 64 * 64 * 4 + 2 * 64 * 64 + 2 * 3 * 64 * 32  # all but routed experts
    assert [replicas for _, replicas in found] == [parameters * 8] * 2
    assert Plan(0.0, tuple(replica_travels(parameters, 2, 4, 4, 1 << 16))).bytes == pytest.approx(parameters * 8)
    rows = sum(rows for rows, _ in found) / 2
    assert Plan(0.0, tuple(step_travels(recipe, 0.0, 4))).bytes == pytest.approx(rows + parameters * 8, rel=0.02)


@pytest.mark.parametrize(("ranks", "put"), [(2, True), (4, True), (8, False)])
def test_rows_of_training_are_predicted_the_way_they_go(ranks: int, put: bool) -> None:
    """Of 64 experts all rows are put on up to four GPUs, beyond that those needed are exchanged."""
    sets = ("moe.experts=64", f"parallel.ranks={ranks}", f"parallel.expert={ranks}", "parallel.device=cuda")
    ways = ((*sets, f"parallel.dispatch={way}") for way in ("auto", "exchanged"))
    auto, exchanged = (Plan(0.0, tuple(step_travels(Training("deepseekmoe-2b", w, 1).load(), 0.0, 2))) for w in ways)
    assert (auto.bytes > exchanged.bytes) == put and (auto.bytes == exchanged.bytes) == (not put)


def test_bytes_of_a_step_are_those_that_ranks_put(tmp_path: Path) -> None:
    """All rows of each pass, whichever experts they choose; 0.88 of them are needed, so that is the default."""
    from shoal.jobs.bench.context import long_document

    sets = (*SETS, "moe.top_k=3", "parallel.device=auto", "train.dtype=float32")
    found = run_ranks(2, _putting, str(long_document(tmp_path, 50_000)), str(tmp_path), sets)
    assert [exchanged for exchanged, _ in found] == [0, 0]

    def predicted(*more: str) -> float:
        return Plan(0.0, tuple(step_travels(Training("deepseekmoe-2b", (*sets, *more), 1).load(), 0.0, 4))).bytes

    recipe = Training("deepseekmoe-2b", sets, 1).load()
    replicas = count_parameters(recipe).total - count_parameters(recipe).routed_experts
    assert {put for _, put in found} == {predicted() - replicas * 8}
    assert predicted("parallel.dispatch=exchanged") < predicted() == predicted("parallel.dispatch=put")


@pytest.mark.parametrize("ends", [(0, 8192), (0, 2048, 4096, 6144, 8192)])
def test_keys_of_sequences_are_those_of_the_rank_that_receives_most(ends: tuple[int, ...]) -> None:
    layer = Attention(Shape(2, (16, 16), 2, 4), SIZES, 100.0, 60.0, 10.0)
    owned = zigzag(8192, 4, SIZES.slc_block)
    volumes = [nsa_volume(ends, owned, rank, layer.shape, SIZES) for rank in range(4)]
    most = max(sum(sum(phase.values()) for phase in volume.values()) for volume in volumes)
    travels = sequence_travels(layer, 8192, 4, 0.0, sequences=len(ends) - 1)
    assert Plan(0.0, tuple(travels)).bytes == most


def test_without_others_nothing_travels() -> None:
    layer = Experts(2048, 1408, 64, 6, 2, 2)
    attention = Attention(Shape(2, (16, 16), 2, 4), SIZES, 100.0, 60.0, 10.0)
    assert dispatch_travels(layer, 16384, 1, 1e-15) == sequence_travels(attention, 8192, 1, 1e-15) == []
    assert replica_travels(1e9, 1, 4, 2, 1 << 26) == []
    assert Plan(0.25).seconds(Link(1.0, 1.0, 1.0)) == 0.25


@given(st.floats(1e8, 1e13), st.floats(1, 100), st.sampled_from([2, 4, 8, 16]))
def test_a_faster_link_never_makes_it_slower(bandwidth: float, times: float, ranks: int) -> None:
    travels = tuple(dispatch_travels(Experts(2048, 1408, 64, 6, 2, 2), 16384, ranks, 1e-15))
    plan = Plan(0.01, travels)
    slow, fast = plan.seconds(Link(bandwidth)), plan.seconds(Link(bandwidth * times))
    assert 0.01 <= fast <= slow
    assert plan.seconds(Link(1e30)) == pytest.approx(0.01)
    assert Plan(0.01, tuple(Travel(t.bytes, 1e9) for t in travels)).seconds(Link(bandwidth)) == 0.01


def test_weak_efficiency_falls_with_ranks_while_rows_grow() -> None:
    layer = Experts(2048, 1408, 64, 6, 2, 2)
    link = Link(3e11, 5e-12, 1e-4)
    seconds = [Plan(0.012, tuple(dispatch_travels(layer, 16384, n, 1e-15))).seconds(link) for n in (1, 2, 4, 8)]
    assert seconds == sorted(seconds) and seconds[0] == 0.012


def test_constants_are_found_again() -> None:
    layer = Experts(2048, 1408, 64, 6, 2, 2)
    plans = [Plan(t * 7e-7, tuple(dispatch_travels(layer, t, 2, 1e-15))) for t in (4096, 16384)]
    link = Link(3e11, 6e-12, 2e-4)
    found = fit(plans, [plan.seconds(link) for plan in plans], 3e11)
    assert (found.per_byte, found.per_travel) == pytest.approx((6e-12, 2e-4))
    assert fit(plans, [plan.compute / 2 for plan in plans], 3e11) == NVLINK  # faster than computing: nothing to add
    assert fit([], [], 3e11) == NVLINK


def test_curves_go_through_what_was_measured() -> None:
    curve = Curve.through({65536: 0.0941, 262144: 0.8623})
    assert curve(65536) == 0.0941
    a, b = curve.constants
    assert a * 262144 + b * 262144**2 == pytest.approx(0.8623)
    assert 4 < curve(1 << 20) / curve(1 << 18) < 16
    assert Curve.through({100: 2.0})(300) == pytest.approx(6.0)
    assert Curve.through({100: 2.0, 200: 3.0}, (0, 1))(400) == pytest.approx(5.0)
    with pytest.raises(ValueError, match="no time"):
        Curve.through({})
