"""The engines of a model over its ranks, as one: requests are shared out, and outlive ranks that die."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any

from shoal.cluster.group import RankGroup, RankLost
from shoal.cluster.local import RaySession
from shoal.cluster.served_experts import ServedExperts
from shoal.workers.checkpoint_files import checkpoint_path, read_state
from shoal.workers.config import Recipe
from shoal.workers.engine.actor import THREADS, EngineActor
from shoal.workers.engine.request import NOT_FINITE, EngineEnded, Finish, Load, Output, Request
from shoal.workers.errors import ClusterRefused, InvalidInput, ShoalError, last_line
from shoal.workers.expert_plan import Plan
from shoal.workers.placement import Placement
from shoal.workers.run_store import checkpoints_here

NEWS_SECONDS = 10.0  # how long a call for news waits for some
logger = logging.getLogger(__name__)


@dataclass
class Flight:
    """A request under way.

    request: under the id that the ranks know it by. tokens: what its stream has been given, or is about to be. rank:
    who works on it. submitted: the call that handed it to the rank. crashes: ends of ranks since its last token.
    """

    request: Request
    tokens: list[int] = field(default_factory=list)
    news: asyncio.Queue[Output | ShoalError] = field(default_factory=asyncio.Queue)
    rank: int = -1
    submitted: Any = None
    crashes: int = 0

    @property
    def left(self) -> int:
        """Tokens that it may still take to compute."""
        return len(self.request.prompt) + self.request.sampling.max_tokens - len(self.tokens)


class Engines:
    """The Client of a model's ranks. When one of them dies all are started again, and every request under way is
    computed again from its tokens: its stream goes on where it was, and no token is reported twice.

    Called from one event loop. More than ``parallel.max_failures`` failures in a row, without a new token between
    them, end it: ``dead`` then says why. A request that saw so many without a token of its own is given up, since it
    may be the cause.
    """

    def __init__(self, recipe: Recipe, checkpoints: str, step: int, session: RaySession) -> None:
        self.recipe, self.checkpoints, self.step, self.session = recipe, checkpoints, step, session
        self.flights: dict[str, Flight] = {}
        self.failures = self.restarts = 0
        self._names: set[str] = set()
        self._count = itertools.count()
        self._group: RankGroup | None = None
        self._ready = asyncio.Event()
        self.dead: ShoalError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._cancels: set[asyncio.Task[None]] = set()
        self._recovery: asyncio.Task[None] | None = None
        self._broken: Exception | None = None  # why the present ranks are of no use any more
        self._hurt = asyncio.Event()
        self._last = Load()
        place = Placement.of(recipe)
        # of each dispatch group, the rank that knows which experts its tokens chose
        self._leaders = [next((r for r in g if r in place.experts), g[0]) for g in place.dispatch_groups()]
        several = bool(place.experts) and place.set_size > 1  # over which experts lie
        self.experts = ServedExperts(recipe) if recipe.serve.expert_copies and several else None

    async def start(self) -> None:
        """Places the ranks and loads their weights. Raises ShoalError when that cannot be done."""
        try:
            await self._open()
        except RankLost as lost:
            raise ClusterRefused(f"the ranks did not start ({lost}): Ray's logs say more") from None
        self._ready.set()

    async def close(self) -> None:
        """Ends the ranks, and every stream. Ranks that are being started are waited for, and then ended."""
        self._give_up(ClusterRefused("the engines were ended: start them again"))
        if self._recovery:
            await self._recovery
        await self._close_group()

    def pids(self) -> list[int]:
        """Process ids of the ranks."""
        return self._group.pids() if self._group else []

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """See Client."""
        await self._settled()
        if request.id in self._names:
            raise InvalidInput(f"request id {request.id!r} is in use: give each request its own")
        # Known to the ranks by a number that never comes again: news of a request that was cancelled find nobody.
        flight = Flight(replace(request, id=str(next(self._count))))
        self._names.add(request.id)
        self.flights[flight.request.id] = flight
        ended = False
        try:
            await self._submit(flight)
            while not ended:
                output = await flight.news.get()
                if isinstance(output, ShoalError):
                    ended = True
                    raise output
                ended = output.finish is not None
                if output.finish is Finish.error:
                    raise ClusterRefused(NOT_FINITE)
                yield output._replace(request=request.id)
        finally:
            self._names.discard(request.id)
            self.flights.pop(flight.request.id, None)
            if not ended:
                self._cancel(flight)

    async def load(self) -> Load:
        """See Client. While the ranks are started again, what was known before; then totals begin at 0 again."""
        if self.dead:
            raise self.dead
        if self._group and self._ready.is_set():
            try:
                asked = [*self._attention, *self._leaders]
                loads = await asyncio.gather(*(self._group.actors[rank].load.remote() for rank in asked))
                count = len(self._attention)
                self._last = _sum(loads[:count], loads[count:], self.experts)
            except _ray_errors():
                pass  # the watchers see it too, and do something about it
        return self._last

    @property
    def _attention(self) -> range:
        return range(self.recipe.parallel.attention_ranks)

    async def _settled(self) -> None:
        """Waits until the ranks work. Raises once they are gone for good."""
        while not self._ready.is_set():
            await self._ready.wait()
        if self.dead:
            raise self.dead

    # Ranks

    async def _open(self) -> None:
        starting = asyncio.create_task(asyncio.to_thread(self._start_ranks))
        try:
            group = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The thread goes on: what it starts must be ended too.
            for started in await asyncio.gather(starting, return_exceptions=True):
                if isinstance(started, RankGroup):
                    await asyncio.to_thread(started.close)
            raise
        self._group, self._broken = group, None
        self._hurt.clear()
        for rank in self._attention:
            self._begin(self._deliver(group, rank))
        for actor in group.actors:
            self._begin(self._watch(group, actor))
        if self.experts and self.recipe.serve.rebalance_seconds:
            self._begin(self._rebalance(group, self.experts))

    def _start_ranks(self) -> RankGroup:
        group = RankGroup(self.recipe, self.session, EngineActor, THREADS)
        try:
            group.connect()
            plan = self._plan(group.nodes)
            options = (self.recipe.model_dump(), self.checkpoints, self.step, group.device, plan)
            group.get(group.call("open", *options))
        except BaseException:
            group.close()
            raise
        return group

    def _plan(self, nodes: list[str]) -> Plan | None:
        """Where experts and their copies lie to begin with; None: in equal runs. nodes: of each rank."""
        if self.experts is None:
            return None
        state = read_state(checkpoint_path(checkpoints_here(self.checkpoints, self.step), self.step))
        return self.experts.first(nodes, state.get("expert_load"))  # imported checkpoints have none, and older ones

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
                        self.failures = flight.crashes = 0
                        if output.finish is not None:  # also where nobody has read that yet: nothing is left to compute
                            del self.flights[output.request]
        except _ray_errors() as error:
            self._lost(group, error)

    async def _watch(self, group: RankGroup, actor: Any) -> None:
        try:
            await actor.watch.remote()
        except _ray_errors() as error:
            self._lost(group, error)

    async def _rebalance(self, group: RankGroup, experts: ServedExperts) -> None:
        """Moves copies of experts to where the load of late wants them."""
        try:
            while True:
                await asyncio.sleep(self.recipe.serve.rebalance_seconds)
                loads = await asyncio.gather(*(group.actors[rank].load.remote() for rank in self._leaders))
                experts.count(_expert_tokens(loads))
                if plan := await asyncio.to_thread(experts.better):
                    await asyncio.gather(*(actor.place_experts.remote(plan) for actor in group.actors))
                    logger.warning(experts.took(plan))  # what is less is not shown unless somebody asks for it
        except _ray_errors() as error:
            self._lost(group, error)

    async def _close_group(self) -> None:
        tasks, group, self._group = list(self._tasks), self._group, None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if group:
            await asyncio.to_thread(group.close)

    # Failures

    def _lost(self, group: RankGroup, error: Exception) -> None:
        """A rank is gone: the first who notices starts all of them again."""
        if group is not self._group or self.dead:
            return
        self._broken = self._broken or error
        self._hurt.set()
        if not self._recovery or self._recovery.done():
            self._ready.clear()
            self._recovery = asyncio.create_task(self._recover())

    async def _recover(self) -> None:
        try:
            while self._broken is not None and not self.dead:
                self._count_failure(last_line(self._broken))
                await self._close_group()
                try:
                    await self._open()
                    await self._again()
                except _failures() as lost:
                    self._broken = lost
            self.restarts += 1
            self._last = Load()  # totals of ranks that are gone
            self._ready.set()
        except ShoalError as refusal:
            self._give_up(refusal)
            await self._close_group()
        except Exception as error:
            self._give_up(ClusterRefused(f"the ranks could not be started again ({last_line(error)})"))
            await self._close_group()

    def _count_failure(self, why: str) -> None:
        """Raises ClusterRefused after too many in a row; gives up the requests that saw too many."""
        self.failures += 1
        limit = self.recipe.parallel.max_failures
        if self.failures > limit:
            raise ClusterRefused(
                f"the ranks failed {self.failures} times in a row, more than parallel.max_failures={limit} "
                f"(the last time: {why}): remove the cause and start again"
            )
        for name, flight in list(self.flights.items()):
            flight.crashes += flight.rank >= 0
            flight.rank = -1
            if flight.crashes >= max(2, limit):
                del self.flights[name]
                refusal = f"the ranks failed {flight.crashes} times while they worked on this request ({why})"
                flight.news.put_nowait(ClusterRefused(f"{refusal}: it is not tried again"))

    async def _again(self) -> None:
        """Submits everything under way to the new ranks, with the tokens that were reported."""
        flights = list(self.flights.values())
        placed = asyncio.gather(*(self._place(f, again=True) for f in flights), return_exceptions=True)
        hurt = asyncio.create_task(self._hurt.wait())
        either: set[asyncio.Future[Any]] = {placed, hurt}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        hurt.cancel()
        if not placed.done():  # another rank is gone: some would not answer before their collectives time out
            placed.cancel()
            await asyncio.gather(placed, return_exceptions=True)
            return
        answers = placed.result()
        for flight, answer in zip(flights, answers, strict=True):
            refusal = getattr(answer, "cause", None)
            if isinstance(refusal, ShoalError):
                flight.news.put_nowait(refusal)
            elif isinstance(answer, Exception):
                raise answer

    def _give_up(self, refusal: ShoalError) -> None:
        self.dead = self.dead or refusal
        self._ready.set()
        for flight in self.flights.values():
            flight.news.put_nowait(refusal)

    # Requests

    async def _submit(self, flight: Flight) -> None:
        """Raises the ShoalError of a rank that refuses the request. A rank that is gone is left to the recovery."""
        import ray

        try:
            await self._place(flight)
        except _ray_errors() as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, ShoalError):
                raise cause from None
            if not isinstance(error, ray.exceptions.RayActorError) and not isinstance(cause, EngineEnded):
                raise ClusterRefused(f"a rank could not take the request ({last_line(error)})") from None

    def _place(self, flight: Flight, again: bool = False) -> Any:
        """Gives a request to the rank that has least to do; returns the call's answer, to be awaited."""
        assert self._group is not None
        busy = dict.fromkeys(self._attention, 0)
        for other in self.flights.values():
            if other.rank in busy and other is not flight:
                busy[other.rank] += other.left
        flight.rank = min(busy, key=lambda rank: busy[rank])
        request = replace(flight.request, generated=(*flight.request.generated, *flight.tokens))
        flight.submitted = self._group.actors[flight.rank].submit.remote(request, again)
        return _answer(flight.submitted)

    def _cancel(self, flight: Flight) -> None:
        """Asks the rank to forget a request; nobody waits for the answer."""
        if self._group and flight.rank >= 0:
            task = asyncio.create_task(self._forget(self._group.actors[flight.rank], flight))
            self._cancels.add(task)
            task.add_done_callback(self._cancels.discard)

    async def _forget(self, actor: Any, flight: Flight) -> None:
        with suppress(*_ray_errors()):
            await flight.submitted  # a rank answers many calls at once: a cancel may overtake its request
            await actor.cancel.remote(flight.request.id)


async def _answer(reference: Any) -> None:
    await reference


def _ray_errors() -> tuple[type[Exception], ...]:
    import ray

    return (ray.exceptions.RayError,)


def _failures() -> tuple[type[Exception], ...]:
    """What says that the ranks did not come up, or went."""
    return (RankLost, *_ray_errors())


def _sum(loads: list[Load], leaders: list[Load], experts: ServedExperts | None) -> Load:
    """All ranks with attention together. leaders: of ranks that speak for the experts of their dispatch group."""
    totals = {f.name: sum(getattr(load, f.name) for load in loads) for f in fields(Load) if f.name != "expert_tokens"}
    if experts:
        totals |= {"rebalances_total": experts.rebalances, "rank_load": experts.rank_load}
    return Load(**totals, expert_tokens=_expert_tokens(leaders))


def _expert_tokens(leaders: list[Load]) -> tuple[tuple[int, ...], ...]:
    layers = zip(*(load.expert_tokens for load in leaders), strict=False)
    return tuple(tuple(map(sum, zip(*ranks, strict=True))) for ranks in layers)
