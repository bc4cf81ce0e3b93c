"""Two GPUs: attention over a sequence that both share gives what one GPU gives, outputs and all gradients, in bf16.

Needs no Ray and no recipe: ``pytest -m gpu tests/workers/test_gpu_sequence.py`` on a machine with two GPUs. On two
ranks of the CPU the same functions run in float32, eight times smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from ranks import asked_for, run_ranks
from sequences import (
    FULL_NAMES,
    NSA_NAMES,
    TOKENS,
    Problem,
    drawn,
    full_alone,
    full_drawn,
    full_shared,
    nsa_alone,
    nsa_shared,
    own_rows,
)
from torch import Tensor

from shoal.kernels.nsa import BlockSizes
from shoal.workers import volume
from shoal.workers.mesh import Group, make_mesh
from shoal.workers.placement import Placement
from shoal.workers.sequence import zigzag
from shoal.workers.volume import Shape, nsa_volume

Errors = dict[str, float]
SHRINK = 8
"""How many times smaller everything is on a CPU."""
BOUNDS = {"cuda": (5e-3, 1.2e-2), "cpu": (3e-5, 3e-5)}
"""Relative errors of an output and of gradients, in bf16 those of the kernels' tests."""
WORSE = 1.25
"""How much further from float64 two GPUs may be than one, where that is further than the bounds."""


@dataclass(frozen=True)
class Case:
    """Documents of a pack, and heads. kind: ``nsa``, or of full attention ``ring`` or ``gather``. all_blocks: every
    query reads all blocks of its document, so that no rounding decides which, and float64 can tell who is right.
    straight: far keys are not packed, as those of long sequences are not. heads: of keys, that are computed at a time;
    0: all."""

    lengths: tuple[int, ...]
    kind: str = "nsa"
    kv: int = 2
    group: int = 4
    dims: tuple[int, int] = (128, 128)
    window: int = 104
    all_blocks: bool = True
    pull: bool = False
    wide: bool = False
    straight: bool = False
    heads: int = 0

    def problem(self, device: str) -> Problem:
        """On a GPU in bf16, on a CPU in float32 and small. φ in float32 where blocks are chosen: whether products of
        half the rows have the same bits depends on their shapes, and so would the choice."""
        by = 1 if device == "cuda" else SHRINK
        return Problem(
            cu=tuple(accumulate((-(-n // by) for n in self.lengths), initial=0)),
            sizes=BlockSizes(32 // by, 16 // by, 64 // by, 16, 1, 2, self.window // by),
            kv=self.kv,
            group=self.group,
            dims=(self.dims[0] // by, self.dims[1] // by),
            dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            device=device,
            phi=None if self.all_blocks else torch.float32,
        )


CASES = {
    "one document": Case((1024,)),
    "uneven documents": Case((700, 1, 63, 64, 900), group=16),
    "many short documents": Case((75,) * 20),
    "all tokens on one rank": Case((60,)),
    "d_qk 192, d_v 128": Case((700, 300, 24), dims=(192, 128)),
    "gradients in float32": Case((900, 1000), wide=True),
    "16k": Case((9000, 7384), group=16, window=512, all_blocks=False),
    "uneven documents, far keys straight": Case((700, 1, 63, 64, 900), group=16, straight=True),
    "16k, chosen blocks": Case((16384,), group=16, window=512, all_blocks=False, pull=True, wide=True),
    "chosen blocks of two documents": Case((3000, 1000), all_blocks=False, pull=True),
    "a head at a time": Case((700, 1, 63, 64, 900), group=16, heads=1),
    "a head at a time, far keys straight": Case((700, 1, 63, 64, 900), group=16, straight=True, heads=1),
    "two of three heads at a time": Case((900, 1000), kv=3, wide=True, straight=True, heads=2),
    "one document, a head at a time": Case((1024,), heads=1),
    "16k, a head at a time": Case((9000, 7384), group=16, window=512, all_blocks=False, straight=True, heads=1),
    "16k, chosen blocks, a head at a time": Case(
        (16384,), group=16, window=512, all_blocks=False, pull=True, wide=True, straight=True, heads=1
    ),
    "full, ring": Case((2048,), "ring", group=16),
    "full, ring, d_qk 192, d_v 128": Case((2048,), "ring", dims=(192, 128)),
    "full, gathered": Case((700, 1, 63, 64, 900), "gather", group=16),
    "full, gathered, many short documents": Case((75,) * 20, "gather"),
    "full, gathered, d_qk 192, d_v 128": Case((700, 300, 24), "gather", dims=(192, 128)),
}


def on_rank(rank: int, world: int, device: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Of each case of that name what this rank found."""
    torch.set_num_threads(1 if device == "cpu" else 4)
    group = everyone(rank, world, device)
    return {name: measured(CASES[name], group, device) for name in names}


def everyone(rank: int, world: int, device: str) -> Group:
    """All ranks as one context group, made as a run makes it."""
    ranks = tuple(range(world))
    group = make_mesh(Placement(world, ranks, (), world, world), rank, device).context
    assert group is not None
    return group


def on_one_of_four(rank: int, world: int, device: str) -> Errors:
    """Two of the ranks exchange rows before the others have done anything."""
    p = Case((128, *(64,) * 6)).problem(device)  # segments of one block, and the first document lies in two of them
    group = everyone(rank, world, device)
    args = drawn(p)
    shared, at = nsa_shared(p, args, group), own_rows(p, group)
    return relative(NSA_NAMES[: TOKENS + 1], shared.results[: TOKENS + 1], own(nsa_alone(p, args), at)[: TOKENS + 1])


def measured(case: Case, group: Group, device: str) -> dict[str, Any]:
    """Errors of this rank's results by name: beside one rank's, and of both beside float64 where that tells."""
    p = case.problem(device)
    nsa = case.kind == "nsa"
    args, names = (drawn(p), NSA_NAMES) if nsa else (full_drawn(p), FULL_NAMES)
    facts: dict[str, Any] = {"p": p}
    if nsa:
        packed, volume.PACKED = volume.PACKED, -1 if case.straight else volume.PACKED
        shared = nsa_shared(p, args, group, pull=case.pull, wide=case.wide, heads=case.heads)
        volume.PACKED = packed
        mine, alone = shared.results, nsa_alone(p, args)
        facts |= {"coverage": shared.coverage, "turns": shared.turns, "total": shared.total}
        facts["gluon"] = device == "cuda" and takes_gluon(args, p.sizes.slc_block)
    else:
        mine, _ = full_shared(p, args, group, ring=case.kind == "ring")
        alone = full_alone(p, args)
    # Of weights each rank has a part of the gradient; where it made no block an expanded zero, which has to be whole.
    mine = [x if i <= TOKENS else group.all_reduce(x.float().contiguous()) for i, x in enumerate(mine)]
    at = own_rows(p, group)
    alone = own(alone, at)
    facts["errors"] = relative(names, mine, alone)
    if case.all_blocks:
        exact = [x.cpu().double() for x in args]
        want = own(nsa_alone(p, exact) if nsa else full_alone(p, exact), at.cpu())
        facts["exact"], facts["one"] = relative(names, mine, want), relative(names, alone, want)
    return facts


def own(results: list[Tensor], at: Tensor) -> list[Tensor]:
    return [x[at] if i <= TOKENS else x for i, x in enumerate(results)]


def relative(names: Sequence[str], got: list[Tensor], want: list[Tensor]) -> Errors:
    """``‖got - want‖ / ‖want‖`` of each, infinite where not all is finite, or something stands where nothing should."""
    errors = {}
    for name, a, b in zip(names, got, want, strict=True):
        off, size = (a.cpu().double() - b.cpu().double()).norm(), b.double().norm().cpu()
        errors[name] = float(off / size) if off.isfinite() and size else float("inf") if off else 0.0
    return errors


def takes_gluon(args: list[Tensor], block: int) -> bool:
    """Whether all three kernels for Hopper take these, which are taken then."""
    from shoal.kernels.nsa import gluon_gather_grad, gluon_span

    q, k, v = args[0], args[3], args[4]
    return gluon_span.supported(q, k, v) and gluon_gather_grad.supported(q, v, block)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, device: str) -> list[dict[str, dict[str, Any]]]:
    """What both ranks found; all cases that were asked for in one go, since starting processes and NCCL takes long."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    wanted = {each["name"] for each in asked_for(request, device=device) if "name" in each}
    return run_ranks(2, on_rank, device, sorted(wanted, key=list(CASES).index), device=device)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(device: str, found: list[dict[str, dict[str, Any]]], name: str) -> None:
    """Within rounding of one GPU's results in bf16, and no further from float64 than those."""
    case = CASES[name]
    for rank, results in enumerate(found):
        facts = results[name]
        for what, error in facts["errors"].items():
            bound = BOUNDS[device][what != "out"]
            assert error <= bound, (rank, what, error)
            if case.all_blocks:
                exact, one = facts["exact"][what], facts["one"][what]
                assert exact <= max(bound, WORSE * one), (rank, what, exact, one)
        if device == "cuda" and case.window == 512 and torch.cuda.get_device_capability() == (9, 0):
            assert facts["gluon"], "the kernels for Hopper do not take these shapes"
        if case.kind == "nsa":
            step = case.heads or case.kv
            assert facts["turns"] == [min(step, case.kv - first) for first in range(0, case.kv, step)]


ONE_DOCUMENT = ("one document", "16k, chosen blocks")


@pytest.mark.parametrize("name", [*ONE_DOCUMENT, *(f"{name}, a head at a time" for name in ONE_DOCUMENT)])
def test_bytes_are_those_of_the_formula(found: list[dict[str, dict[str, Any]]], name: str) -> None:
    """Of one document, as it is, and with chosen blocks and gradients in float32, where it is a bound but for pages."""
    for rank, results in enumerate(found):
        facts, pull = results[name], CASES[name].pull
        p: Problem = facts["p"]
        shape = Shape(p.kv, p.dims, p.dtype.itemsize, 4 if pull else p.dtype.itemsize)
        model = nsa_volume(p.cu, zigzag(p.cu[-1], 2, p.sizes.slc_block), rank, shape, p.sizes)
        total = {k: model["forward"][k] + model["backward"][k] for k in model["forward"]}
        if not pull:
            assert facts["total"] == total
            continue
        got = dict(facts["total"])
        assert 0 < facts["coverage"] <= 1
        assert 0 < got.pop("far") <= total.pop("far")
        assert got.pop("pages") == p.kv * -(-p.cu[-1] // p.sizes.slc_block)
        assert got == total


def test_the_first_exchange_may_be_of_some_ranks(device: str) -> None:
    """NCCL connects a group's ranks in its first call, which all of them have to make."""
    if device == "cuda" and torch.cuda.device_count() < 4:
        pytest.skip("needs four CUDA GPUs")
    for errors in run_ranks(4, on_one_of_four, device, device=device):
        assert errors.pop("out") <= BOUNDS[device][0]
        assert max(errors.values()) <= BOUNDS[device][1], errors
