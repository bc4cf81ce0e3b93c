"""The engines of a model over its ranks, as one: requests are shared out, and outlive ranks that die."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, field, fields, replace
from typing import Any

from shoal.cluster.group import RankGroup, RankLost
from shoal.cluster.local import RaySession
from shoal.workers.config import Recipe
from shoal.workers.engine.actor import THREADS, EngineActor
from shoal.workers.engine.request import Load, Output, Request
from shoal.workers.errors import ClusterRefused, ShoalError
from shoal.workers.placement import Placement

NEWS_SECONDS = 10.0  # how long a call for news waits for some


@dataclass
class Flight:
    """A request under way: what its stream has been given, or is to be told; and the rank that works on it."""

    request: Request
    rank: int = -1
    tokens: list[int] = field(default_factory=list)
    news: asyncio.Queue[Output | Exception] = field(default_factory=asyncio.Queue)

    @property
    def left(self) -> int:
        """Tokens that it may still take to compute."""
        return len(self.request.prompt) + self.request.sampling.max_tokens - len(self.tokens)


class Engines:
    """The Client of a model's ranks. When one of them dies all are started again, and every request under way is
    computed again from its tokens: its stream goes on where it was, and no token is reported twice.

    Called from one event loop. More than ``parallel.max_failures`` failures in a row, without a new token between
    them, end it.
    """

    def __init__(self, recipe: Recipe, checkpoints: str, step: int, session: RaySession) -> None:
        self.recipe, self.checkpoints, self.step, self.session = recipe, checkpoints, step, session
        self.flights: dict[str, Flight] = {}
        self.failures = self.restarts = 0
        self.parameters = 0
        self._group: RankGroup | None = None
        self._ready = asyncio.Event()
        self._dead: ShoalError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._recovery: asyncio.Task[None] | None = None
        self._broken: Exception | None = None  # why the present ranks are of no use any more
        self._last = Load()
        self._groups = Placement.of(recipe).dispatch_groups()

    async def start(self) -> None:
        """Places the ranks and loads their weights. Raises ShoalError when that cannot be done."""
        try:
            await self._open()
        except RankLost as lost:
            raise ClusterRefused(f"the ranks did not start ({lost}): Ray's logs say more") from None
        self._ready.set()

    async def close(self) -> None:
        """Ends the ranks."""
        self._dead = self._dead or ClusterRefused("the engines were ended: start them again")
        if self._recovery:
            self._recovery.cancel()
        await self._close_group()

    def pids(self) -> list[int]:
        """Process ids of the ranks."""
        return self._group.pids() if self._group else []

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """See Client."""
        flight = Flight(request)
        await self._settled()
        if request.id in self.flights:
            raise ValueError(f"request id {request.id!r} is in use")
        self.flights[request.id] = flight
        try:
            await self._submit(flight)
            while True:
                output = await flight.news.get()
                if isinstance(output, Exception):
                    raise output
                yield output
                if output.finish:
                    flight.rank = -1
                    return
        finally:
            del self.flights[request.id]
            self._cancel(flight)

    async def load(self) -> Load:
        """See Client. While the ranks are started again, what was known before."""
        if self._dead:
            raise self._dead
        if self._group and self._ready.is_set():
            try:
                loads = await asyncio.gather(*(self._group.actors[r].load.remote() for r in self._attention))
                self._last = _sum(loads, [group[0] for group in self._groups])
            except _ray_errors():
                pass  # the watchers see it too, and do something about it
        return self._last

    @property
    def _attention(self) -> range:
        return range(self.recipe.parallel.attention_ranks)

    async def _settled(self) -> None:
        """Waits until the ranks work. Raises once they are gone for good."""
        await self._ready.wait()
        if self._dead:
            raise self._dead

    async def _open(self) -> None:
        self._group, self._broken = await asyncio.to_thread(self._start_ranks), None
        for rank in self._attention:
            self._begin(self._deliver(self._group, rank))
        for actor in self._group.actors:
            self._begin(self._watch(self._group, actor))

    def _start_ranks(self) -> RankGroup:
        group = RankGroup(self.recipe, self.session, EngineActor, THREADS)
        try:
            group.connect()
            options = (self.recipe.model_dump(), self.checkpoints, self.step, group.device)
            counts = group.get(group.call("open", *options))
        except BaseException:
            group.close()
            raise
        self.parameters = sum(counts)
        return group

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _deliver(self, group: RankGroup, rank: int) -> None:
        """Hands the news of a rank to the streams."""
        try:
            while True:
                for output in await group.actors[rank].take.remote(NEWS_SECONDS):
                    flight = self.flights.get(output.request)
                    if flight and flight.rank == rank:
                        flight.tokens += [token.id for token in output.tokens]
                        flight.news.put_nowait(output)
                        self.failures = 0
        except _ray_errors() as error:
            self._lost(group, error)

    async def _watch(self, group: RankGroup, actor: Any) -> None:
        try:
            await actor.watch.remote()
        except _ray_errors() as error:
            self._lost(group, error)

    def _lost(self, group: RankGroup, error: Exception) -> None:
        """A rank is gone: the first who notices starts all of them again."""
        if group is not self._group or self._dead:
            return
        self._broken = self._broken or error
        if not self._recovery or self._recovery.done():
            self._ready.clear()
            self._recovery = asyncio.create_task(self._recover())

    async def _recover(self) -> None:
        why = _last_line(self._broken)
        while True:
            self.failures += 1
            limit = self.recipe.parallel.max_failures
            try:
                if self.failures > limit:
                    raise ClusterRefused(
                        f"the ranks failed {self.failures} times in a row, more than parallel.max_failures={limit} "
                        f"(the last time: {why}): remove the cause and start again"
                    )
                await self._close_group()
                await self._open()
                await self._again()
                if self._broken is None:
                    self.restarts += 1
                    self._ready.set()
                    return
                why = _last_line(self._broken)
            except _failures() as lost:
                why = _last_line(lost)
            except ShoalError as refusal:
                self._give_up(refusal)
                return

    async def _again(self) -> None:
        """Submits everything under way to the new ranks, with the tokens that were reported."""
        for flight in self.flights.values():
            flight.rank = -1
        for flight in list(self.flights.values()):
            if flight.request.id in self.flights:  # it may have been closed meanwhile
                await self._place(flight, again=True)
                if flight.request.id not in self.flights:
                    self._cancel(flight)

    def _give_up(self, refusal: ShoalError) -> None:
        self._dead = refusal
        self._ready.set()
        for flight in self.flights.values():
            flight.news.put_nowait(refusal)

    async def _close_group(self) -> None:
        tasks, group, self._group = list(self._tasks), self._group, None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if group:
            await asyncio.to_thread(group.close)

    async def _submit(self, flight: Flight) -> None:
        try:
            await self._place(flight)
        except _ray_errors() as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, ShoalError):
                raise cause from None
            # The rank is gone: the request is among those that are submitted again.

    async def _place(self, flight: Flight, again: bool = False) -> None:
        """Gives a request to the rank that has least to do."""
        group = self._group
        if group is None:
            return  # being started again
        busy = dict.fromkeys(self._attention, 0)
        for other in self.flights.values():
            if other.rank in busy and other is not flight:
                busy[other.rank] += other.left
        flight.rank = min(busy, key=lambda rank: busy[rank])
        request = replace(flight.request, generated=(*flight.request.generated, *flight.tokens))
        await group.actors[flight.rank].submit.remote(request, again)

    def _cancel(self, flight: Flight) -> None:
        """Asks the rank to forget a request; nobody waits for the answer."""
        if self._group and flight.rank >= 0 and self._ready.is_set():
            self._group.actors[flight.rank].cancel.remote(flight.request.id)


def _ray_errors() -> tuple[type[Exception], ...]:
    import ray

    return (ray.exceptions.RayError,)


def _failures() -> tuple[type[Exception], ...]:
    """What says that the ranks did not come up, or went."""
    return (RankLost, *_ray_errors())


def _last_line(error: Exception | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _sum(loads: list[Load], leaders: list[int]) -> Load:
    """All ranks together. leaders: ranks that speak for the experts of their dispatch group, whose counts are alike."""
    totals = {f.name: sum(getattr(load, f.name) for load in loads) for f in fields(Load) if f.name != "expert_tokens"}
    layers = zip(*(loads[rank].expert_tokens for rank in leaders), strict=False)
    return Load(**totals, expert_tokens=tuple(tuple(map(sum, zip(*ranks, strict=True))) for ranks in layers))
