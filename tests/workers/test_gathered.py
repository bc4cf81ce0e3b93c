"""Steps of one shape, as CUDA graphs have them: each rank's own tokens get what the equations say, whatever stands in
other rows; also with tokens and experts on different ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from spread_layers import BY_TRITON, CASES, Case, gemms, oracle
from torch import Tensor

from shoal.workers.dispatch import Dispatcher
from shoal.workers.gathered import ApartFlight, GatheredFlight, Live
from shoal.workers.mesh import Group
from shoal.workers.routed import Pass

APART = {
    "one and one": Case((9, 0), (1, 1, 1, 1), 2),
    "two and one, copies of shared experts": Case((3, 8, 0), (2, 2, 2, 2, 2), 2, always=2),
    "one and two": Case((7, 0, 0), (2, 1, 1, 2, 2, 1), 3),
    "two and three": Case((2, 5, 0, 0, 0), (2, 3, 4, 2, 3, 4), 2, only=3),
    "experts in between": Case((0, 4, 0, 6), (2, 0, 2, 0), 2),
}
"""Tokens and experts on different ranks, in steps of one shape."""


def _of_one_shape(rank: int, world: int, case: Case, triton: bool, apart: bool) -> tuple[Tensor, Tensor]:
    """Output and chosen experts of a pass in which each rank has as many rows as the one with most tokens; apart: those
    without experts."""
    kind = gemms(triton)
    experts, gates = case.experts_gates()
    mine, most = slice(sum(case.tokens[:rank]), sum(case.tokens[: rank + 1])), max(case.tokens)
    sources = [r for r in range(world) if r not in case.owners] if apart else None
    count = most if sources is None or rank in sources else 0
    x, up, down, shared_up, shared_down, _ = (t.float() if triton else t for t in case.tensors())
    x, experts, gates = (
        torch.cat([t[mine], t.new_full((count - case.tokens[rank], t.shape[1]), 1)]) for t in (x, experts, gates)
    )
    group = Group(tuple(range(world)), rank, dist.group.WORLD)
    dispatcher = Dispatcher(group, case.owners, x.device, triton, sources=sources)
    own, live = list(dispatcher.local), Live((torch.arange(count) < case.tokens[rank]).long(), most)
    weights = (up[own], down[own]) if own else (None, None)
    passing = Pass(dispatcher, kind, weights, (shared_up, shared_down), case.always, live=live)
    routed = slice(0, case.top_k)
    with torch.no_grad():
        passing.begin(x, gates[:, routed].to(x.dtype), experts[:, routed].contiguous())
        out = passing.end()
    assert type(passing.flight) is (ApartFlight if apart else GatheredFlight)
    return out[: case.tokens[rank]], passing.flight.chosen()


@pytest.mark.parametrize(
    ("name", "triton"), [(n, False) for n in CASES if any(CASES[n].tokens)] + [(n, True) for n in BY_TRITON]
)
def test_rows_of_one_shape_equal_the_equations(name: str, triton: bool) -> None:
    """Those of each rank's own tokens; other rows, whatever stands in them, choose no expert."""
    case = CASES[name]
    found = run_ranks(len(case.tokens), _of_one_shape, case, triton, False)
    got, want = torch.cat([out for out, _ in found]).double(), oracle(case)["out"]
    assert (got - want).norm() <= (1e-6 if triton else 2e-15) * want.norm()
    rows = torch.arange(max(case.tokens))[None] < torch.tensor(case.tokens)[:, None]
    for _, chosen in found:
        assert (chosen[~rows.flatten()] == -1).all()
        assert torch.equal(chosen[rows.flatten()].long(), case.experts_gates()[0])


@pytest.mark.parametrize(("name", "triton"), [(n, False) for n in APART] + [("two and three", True)])
def test_rows_of_one_shape_cross_to_ranks_of_experts(name: str, triton: bool) -> None:
    """All of which know what all tokens chose; ranks without tokens have no results."""
    case = APART[name]
    found = run_ranks(len(case.tokens), _of_one_shape, case, triton, True)
    got, want = torch.cat([out for out, _ in found]).double(), oracle(case)["out"]
    assert (got - want).norm() <= (1e-6 if triton else 2e-15) * want.norm()
    sources = [rank for rank in range(len(found)) if rank not in case.owners]
    counts = torch.tensor([case.tokens[rank] for rank in sources])
    rows = (torch.arange(max(case.tokens))[None] < counts[:, None]).flatten()
    for rank, (_, chosen) in enumerate(found):
        if rank in sources:
            assert not len(chosen)
        else:
            assert (chosen[~rows] == -1).all()
            assert torch.equal(chosen[rows].long(), case.experts_gates()[0])
