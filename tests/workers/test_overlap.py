"""What a layer launches while its rows are on their way: shared experts, forward and backward, and weight gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from shoal.kernels.moe.gemms import Gemms
from shoal.workers import flight
from shoal.workers.dispatch import Dispatcher
from shoal.workers.mesh import Group
from shoal.workers.routed import Pass, RoutedFFN
from shoal.workers.transfer import Exchange, Moment

TOKENS, HIDDEN, INNER, EXPERTS = 12, 16, 8, 4


def _launched(rank: int, world: int) -> tuple[list[str], list[str]]:
    """What a rank launches, in order, forward and backward, and the moments after which rows may leave."""
    said: list[str] = []

    class WatchedMoment(Moment):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.place = len(said)
            said.append("moment")

    class WatchedExchange(Exchange):
        def __init__(self, group: Group, rows: Tensor, send: list[int], receive: list[int], after: Moment) -> None:
            super().__init__(group, rows, send, receive, after)
            assert isinstance(after, WatchedMoment)
            said[after.place] = "rows may leave"

        def wait(self) -> Tensor:
            said.append("rows are awaited")
            return super().wait()

    class WatchedGemms(Gemms):
        def rows_by_weight(self, rows: Tensor, weight: Tensor) -> Tensor:
            said.append(self._of("product"))
            return super().rows_by_weight(rows, weight)

        def rows_by_rows(self, left: Tensor, right: Tensor) -> Tensor:
            said.append(self._of("weight gradient"))
            return super().rows_by_rows(left, right)

        def _of(self, what: str) -> str:
            return f"{'shared' if self.ends is None else 'routed'} {what}"

    flight.Exchange, flight.Moment = WatchedExchange, WatchedMoment  # type: ignore[misc, attr-defined]
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, HIDDEN), (TOKENS, 2), (2, HIDDEN, 2 * INNER), (2, INNER, HIDDEN)]
    shapes += [(1, HIDDEN, 2 * INNER), (1, INNER, HIDDEN)]
    x, gates, *weights = (torch.randn(s, generator=generator).requires_grad_() for s in shapes)
    experts = torch.rand(TOKENS, EXPERTS, generator=generator).topk(2).indices
    group = Group((0, 1), rank, dist.group.WORLD)
    dispatcher = Dispatcher(group, (0, 0, 1, 1), torch.device("cpu"))
    passing = Pass(dispatcher, WatchedGemms, (weights[0], weights[1]), (weights[2], weights[3]))
    out, *_ = RoutedFFN.apply(passing, x, None, gates, experts, *weights)
    forward = [each for each in said if each != "moment"]
    said.clear()
    out.sum().backward()
    return forward, [each for each in said if each != "moment"]


def _between(launched: list[str], exchange: int) -> list[str]:
    """What is launched between the moment after which rows of this exchange may leave, and the wait for them."""
    leave = [i for i, each in enumerate(launched) if each == "rows may leave"][exchange]
    wait = [i for i, each in enumerate(launched) if each == "rows are awaited"][exchange]
    return launched[leave + 1 : wait]


def test_shared_experts_and_weight_gradients_are_launched_while_rows_travel() -> None:
    """On a GPU all of it runs beside the rows: these wait for the moment alone, on a stream of their own."""
    for forward, backward in run_ranks(2, _launched):
        assert _between(forward, 0) == ["shared product"]  # before tokens have come
        assert _between(forward, 1) == ["shared product"]  # before results have
        assert sorted(_between(backward, 0)) == ["shared product"] * 2 + ["shared weight gradient"] * 2
        assert _between(backward, 1) == ["routed weight gradient"]
