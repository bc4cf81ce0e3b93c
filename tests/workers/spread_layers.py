"""Layers of experts that are spread over ranks, as cases, and what one rank computes of them; the equations beside."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import triton_on_cpu
from shared_inbox import SharedInbox
from torch import Tensor

from shoal.kernels.moe.gemms import Gemms
from shoal.kernels.moe.oracle import ffn
from shoal.workers.dispatch import Dispatcher
from shoal.workers.flight import PackedFlight
from shoal.workers.mesh import Group
from shoal.workers.routed import Pass, RoutedFFN

HIDDEN, INNER, SHARED = 16, 8, 2


@dataclass(frozen=True)
class Case:
    """tokens: of each rank. owners: the rank of each expert. only: the one expert that all choose first."""

    tokens: tuple[int, ...]
    owners: tuple[int, ...]
    top_k: int
    only: int | None = None
    always: int = 0
    """Last experts that every token chooses with gate 1: shared ones, dispatched."""
    seed: int = field(default=0)

    def experts_gates(self) -> tuple[Tensor, Tensor]:
        """Of all ranks' tokens; float64."""
        generator = torch.Generator().manual_seed(self.seed)
        total, routed = sum(self.tokens), len(self.owners) - self.always
        scores = torch.rand(total, routed, generator=generator, dtype=torch.float64)
        if self.only is not None:
            scores[:, self.only] += 1
        gates, experts = scores.topk(self.top_k, dim=1)
        last = torch.arange(routed, len(self.owners)).expand(total, -1)
        return torch.cat([experts, last], 1), torch.cat([gates, gates.new_ones(total, self.always)], 1)

    def tensors(self) -> list[Tensor]:
        """x, gate_up, down, the same of the shared experts, and the gradient of the output; float64."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        count, total = len(self.owners), sum(self.tokens)
        shapes = [
            (total, HIDDEN), (count, HIDDEN, 2 * INNER), (count, INNER, HIDDEN),
            (SHARED, HIDDEN, 2 * INNER), (SHARED, INNER, HIDDEN), (total, HIDDEN),
        ]  # fmt: skip
        return [torch.randn(s, generator=generator, dtype=torch.float64) * s[-1] ** -0.5 for s in shapes]


CASES = {
    "even": Case((12, 12), (0, 0, 0, 1, 1, 1), 2),
    "uneven tokens, and none": Case((3, 0, 21), (0, 1, 2, 0, 1, 2), 3),
    "a rank without experts": Case((6, 7, 8), (0, 0, 2, 2), 2),
    "experts on one rank only": Case((6, 7), (1, 1, 1), 2),
    "tokens on one rank only": Case((0, 9, 0), (0, 0, 2, 2), 2),
    "all to one expert": Case((9, 11), (0, 0, 1, 1), 1, only=3),
    "more choices than ranks": Case((10, 5), (0, 1, 0, 1, 1, 0, 1, 0), 6),
    "dispatched shared experts": Case((7, 4, 6), (0, 0, 1, 1, 2, 2, 0, 1), 2, always=2),
    "no tokens at all": Case((0, 0), (0, 1), 1),
}
BY_TRITON = ("uneven tokens, and none", "a rank without experts", "dispatched shared experts")
"""The interpreter takes long."""


def gemms(triton: bool) -> type[Gemms]:
    """Products by PyTorch, or by Triton in its interpreter."""
    if not triton:
        return Gemms
    triton_on_cpu.prepare()
    from shoal.kernels.moe.triton_gemms import TritonGemms

    return TritonGemms


def on_ranks(
    rank: int, world: int, case: Case, dtype: torch.dtype, triton: bool = False, folder: str = "", passes: int = 1
) -> dict[str, Any]:
    """What one rank computes of the case: its output, its gradients, and how many rows it sent.

    folder: for shared memory; without it, rows are exchanged. passes: how often, of which the last one counts.
    """
    kind = gemms(triton)
    experts, gates = case.experts_gates()
    mine = slice(sum(case.tokens[:rank]), sum(case.tokens[: rank + 1]))
    x, up, down, shared_up, shared_down, upstream = (t.to(dtype) for t in case.tensors())
    handle = dist.group.WORLD if world > 1 else None
    group, device = Group(tuple(range(world)), rank, handle), torch.device("cpu")
    box = None
    if folder:
        sizes = (max(case.tokens) + 3, HIDDEN, dtype, experts.shape[1], len(case.owners), device)
        box = SharedInbox(folder, group, *sizes)
    dispatcher = Dispatcher(group, case.owners, device, triton, box)
    local = list(dispatcher.local)
    leaves = [t.clone().requires_grad_() for t in (x[mine], gates[mine].to(dtype), shared_up, shared_down)]
    own = [t[local].requires_grad_() for t in (up, down)] if local else [None, None]
    for _ in range(passes):
        for leaf in (*leaves, *own):
            if leaf is not None:
                leaf.grad = None
        passing = Pass(dispatcher, kind, (own[0], own[1]), (leaves[2], leaves[3]))
        out, *_ = RoutedFFN.apply(passing, leaves[0], None, leaves[1], experts[mine], *own, *leaves[2:])
        counts = passing.flight.expert_counts()
        if folder:
            kept = [t for t in vars(passing.flight).values() if isinstance(t, Tensor)]
            assert all(t.nbytes == t.untyped_storage().nbytes() for t in kept), "a part of a letter keeps all of it"
        (out * upstream[mine]).sum().backward()
    for other in turns(dispatcher, kind, [leaves[0], leaves[1], *own, *leaves[2:]], experts[mine], 1 if folder else 2):
        assert torch.equal(other, out)
    for message in [] if box is None else box.said:  # one that is let go of before it was heard is lost
        message.wait()
    sent = sum(passing.flight.out) if isinstance(passing.flight, PackedFlight) else 0
    grads = [t.grad for t in leaves]
    result = {"out": out.detach(), "x": grads[0], "gates": grads[1], "shared": grads[2:], "counts": counts}
    stacks = [t.grad for t in own if t is not None and t.grad is not None]
    return result | {"own": {e: [stack[i] for stack in stacks] for i, e in enumerate(local)}, "sent": sent}


def turns(dispatcher: Dispatcher, kind: type[Gemms], leaves: list[Any], experts: Tensor, count: int) -> list[Tensor]:
    """Outputs of so many passes by turns, without gradients, as a step in halves is computed."""
    x, gates, up, down, shared_up, shared_down = leaves
    with torch.no_grad():
        passes = [Pass(dispatcher, kind, (up, down), (shared_up, shared_down)) for _ in range(count)]
        for one in passes:
            one.begin(x, gates, experts)
        return [one.end() for one in passes]


def oracle(case: Case) -> dict[str, Any]:
    """The same token by token and expert by expert, in float64."""
    experts, gates = case.experts_gates()
    x, up, down, shared_up, shared_down, upstream = case.tensors()
    leaves = [t.requires_grad_() for t in (x, gates, up, down, shared_up, shared_down)]
    rows = []
    for t in range(len(x)):
        row = sum((ffn(x[t], u, d) for u, d in zip(shared_up, shared_down, strict=True)), x.new_zeros(HIDDEN))
        for k, e in enumerate(experts[t].tolist()):
            row = row + gates[t, k] * ffn(x[t], up[e], down[e])
        rows.append(row)
    out = torch.stack(rows) if rows else x * 0
    grads = torch.autograd.grad((out * upstream).sum(), leaves, allow_unused=True, materialize_grads=True)
    counts = torch.bincount(experts.flatten(), minlength=len(case.owners))
    return {
        "out": out.detach(),
        "x": grads[0],
        "gates": grads[1],
        "own": grads[2:4],
        "shared": grads[4:],
        "counts": counts,
    }


def check(case: Case, results: list[dict[str, Any]], tolerance: float) -> None:
    want = oracle(case)
    error = 0.0

    def compare(got: Tensor, exact: Tensor) -> None:
        nonlocal error
        assert got.shape == exact.shape
        assert not got.isnan().any()
        error = max(error, float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)) if len(exact) else 0.0)

    for key in ("out", "x", "gates"):
        compare(torch.cat([r[key] for r in results]), want[key])
    for i in range(2):
        compare(sum(r["shared"][i].double() for r in results), want["shared"][i])
        own = {e: grads[i] for r in results for e, grads in r["own"].items()}
        compare(torch.stack([own[e] for e in range(len(case.owners))]), want["own"][i])
    assert error <= tolerance, error
    assert all(torch.equal(r["counts"], want["counts"]) for r in results)
