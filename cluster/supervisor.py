"""Keeps a run going: starts its ranks, feeds them work, and after a death goes on from the last good checkpoint."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shoal.cluster.expert_placement import better_plan, moved, numbered, place
from shoal.cluster.group import PLACE_TIMEOUT, RankGroup, RankLost
from shoal.cluster.local import RaySession, heard
from shoal.cluster.metrics import TrainMetrics
from shoal.workers.checkpoint_files import last_good, wait_for_writers
from shoal.workers.config import Recipe
from shoal.workers.errors import InvalidInput, ShoalError, TrainingFailed
from shoal.workers.placement import Placement

QUIET = 10.0  # seconds to wait for room for the ranks before that is said
CALL_SECONDS = 1.0  # work in one call to the ranks; two calls are in flight, so that no rank waits for the driver
Record = dict[str, Any]


class Report(Protocol):
    """Where records go."""

    def record(self, record: Record) -> None:
        """Takes one record of metrics.jsonl's kinds."""

    def rewind(self, step: int) -> None:
        """What was recorded after ``step`` is void: the run goes on from there."""


@dataclass
class Stop:
    """A wish to stop: set by the first SIGINT, SIGTERM or SIGHUP. A second one raises KeyboardInterrupt, and with
    ``at_once`` the first one too."""

    signal: int = 0
    at_once: bool = False

    @property
    def name(self) -> str:
        """Of the signal, such as SIGINT."""
        return signal.Signals(self.signal).name

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Catches the signals for the time of a ``with`` block."""
        before = {s: signal.signal(s, self._caught) for s in (signal.SIGINT, *heard())}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _caught(self, number: int, _frame: object) -> None:
        again, self.signal = bool(self.signal), self.signal or number
        if again or self.at_once:
            raise KeyboardInterrupt


@dataclass
class Outcome:
    """How a run ended: the step it reached, whether it was stopped before its end, and a sample of its text."""

    step: int
    stopped: bool
    sample: list[int] = field(default_factory=list)


@dataclass
class SampleRequest:
    """Text to make at the end of a run: prompt tokens, how many new ones, and the options of ``workers.sample``."""

    prompt: list[int]
    count: int
    options: dict[str, Any]


class Supervisor:
    """Runs a recipe to its end in ``run_dir``, through the deaths of ranks.

    flops: FLOPs of training on a token, of which records then say how many the devices did (``mfu``).
    """

    def __init__(
        self, recipe: Recipe, corpus: Path, run_dir: Path, report: Report, session: RaySession, flops: float = 0.0
    ) -> None:
        self.recipe, self.corpus, self.report, self.session = recipe, corpus, report, session
        self.checkpoints = run_dir / "checkpoints"
        self.metrics = TrainMetrics(run_dir.name, recipe.train.steps)
        self.flops, self.peak, self.dispatch = flops, 0.0, ""
        self.stop = Stop()
        self.step = 0
        self.failures = 0
        self.resumed = False

    def run(self, sample: SampleRequest | None = None, resumed: bool = False) -> Outcome:
        """Trains to the last step, or until stopped. resumed: says where the run goes on from.

        Raises: ``TrainingFailed`` when the numbers are not finite, or ranks failed too often in a row;
        ``ShoalError`` of whatever the ranks refuse.
        """
        self.resumed = resumed
        with self.stop.listening(), self.metrics.kept():
            start = self._starting_point()
            if resumed:
                where = f"going on from step {start}" if start else "no checkpoint to go on from, starting from step 0"
                self._tell("resumed", where, start or 0)
            while True:
                try:
                    seconds = self.recipe.parallel.replace_seconds if self.failures else PLACE_TIMEOUT
                    with RankGroup(self.recipe, self.session, seconds=seconds, waiting=self._wait(seconds)) as group:
                        group.connect()
                        self.step = group.build(str(self.corpus.resolve()), str(self.checkpoints.resolve()), start)
                        if self.flops:
                            self.peak = sum(group.get(group.call("peak")))
                        self._tell_dispatch(group)
                        return self._train(group, sample)
                except RankLost as lost:
                    reached, before = self.step, start
                    start = self._starting_point()
                    if self.stop.signal:
                        return self._gave_up(str(lost), start or 0)
                    self._count_failure(str(lost), reached, before or 0, start or 0)

    def _tell_dispatch(self, group: RankGroup) -> None:
        """Says which way rows go to other ranks' experts: once, and again where other ranks go another one."""
        text = group.get(group.call("dispatch"))[0]
        if text not in ("", self.dispatch):
            self._tell("dispatch", text, self.step)
        self.dispatch = text

    def _wait(self, seconds: float) -> Callable[[float], None]:
        """What to do while the cluster has no room for the ranks, for up to ``seconds``."""
        told = False

        def waiting(waited: float) -> None:
            nonlocal told
            if self.stop.signal:
                raise RankLost("the cluster has no room for the ranks")
            if waited > QUIET and not told:
                told = True
                text = f"waiting up to {seconds:.0f} s for nodes with room for {self.recipe.parallel.ranks} ranks"
                self._tell("waiting", text, self.step)

        return waiting

    def _starting_point(self) -> int | None:
        """The step of the newest whole checkpoint, None for a fresh start; what was reported after it is void.

        Raises InvalidInput when a resumed run has checkpoints and none is whole: a fresh start would lose its history.
        """
        wait_for_writers(self.checkpoints)
        good, damaged = last_good(self.checkpoints)
        if self.resumed and damaged and not good:
            raise InvalidInput(
                f"{self.checkpoints} holds no whole checkpoint ({damaged[0]}): restore one, or start a new run"
            )
        step = good.step if good else None
        self.report.rewind(step or 0)
        for sentence in damaged:
            self._tell("damaged", sentence, step or 0)
        return step

    def _count_failure(self, why: str, reached: int, before: int, start: int) -> None:
        """Goes on after a failure, unless there were too many without a new checkpoint between them."""
        self.failures = 1 if start > before else self.failures + 1
        limit = self.recipe.parallel.max_failures
        if self.failures > limit:
            raise TrainingFailed(
                f"{self.failures} failures in a row without a new checkpoint, more than parallel.max_failures={limit} "
                f"(the last one: {why} at step {reached}): remove the cause, and --resume goes on from step {start}"
            )
        goes_on = f"going on from step {start} (failure {self.failures} of at most {limit} in a row)"
        self._tell("recovered", f"{why}: {goes_on}", start)

    def _gave_up(self, why: str, start: int) -> Outcome:
        """Ranks that die after the wish to stop are not started again; the newest checkpoint stands."""
        text = f"stopped by {self.stop.name} ({why}), the last checkpoint is of step {start}"
        self._tell("stopped", text, start)
        return Outcome(start, stopped=True)

    def _train(self, group: RankGroup, sample: SampleRequest | None) -> Outcome:
        total, every = self.recipe.train.steps, self.recipe.checkpoint.every
        often = self.recipe.parallel.rebalance_every if self.recipe.moe.experts else 0
        calls: deque[tuple[int, list[Any]]] = deque()
        submitted, pace, told = self.step, 1, False
        while self.step < total:
            # No call goes past a step that is saved: a checkpoint may stand only once its steps are on file here, for
            # whoever goes on from it does not compute them again.
            barrier = min(total, (self.step // every + 1) * every)
            if often:
                barrier = min(barrier, (self.step // often + 1) * often)
            while len(calls) < 2 and submitted < barrier and not self.stop.signal:
                due = submitted == self.step and submitted % every == 0
                submitted = min(barrier, submitted + pace)
                calls.append((submitted, group.call("run", submitted, due)))
            if self.stop.signal and not told:
                told = True
                self._tell("stopping", f"{self.stop.name}: saving, then stopping; again: at once", self.step)
            if not calls:
                return self._stopped(group)
            until, references = calls.popleft()
            seconds = self._take(group, group.get(references)[0])
            self.step = until
            # Before a checkpoint of this step is written: whoever goes on from it has the experts there already.
            if often and until % often == 0 and until < total:
                self._rebalance(group)
            if seconds:
                pace = max(1, int(CALL_SECONDS / seconds))
        group.get(group.call("save"))
        self._tell("checkpoint", f"checkpoint step-{self.step} written", self.step)
        text = group.get(group.call("sample", sample.prompt, sample.count, sample.options))[0] if sample else []
        return Outcome(self.step, stopped=False, sample=text)

    def _rebalance(self, group: RankGroup) -> None:
        """Moves experts where that evens out the load of ranks; nothing is in flight."""
        load, now = group.get(group.call("expert_load"))[0]
        placement, route, moe = Placement.of(self.recipe), self.recipe.route, self.recipe.moe
        places = placement.experts[: placement.set_size]
        together = moe.experts // self.recipe.balance.device_groups if route.max_devices else 1
        at = numbered([group.nodes[rank] for rank in places])
        plan = better_plan(load, now, at, lambda row: place(row, at, together))
        if text := moved(load, now, plan, len(places)):
            group.get(group.call("place_experts", plan))
            self._tell("rebalanced", text, self.step)

    def _take(self, group: RankGroup, records: list[Record]) -> float:
        """Reports records; returns the time of the last step in seconds, 0 when none was recorded."""
        seconds = 0.0
        for record in records:
            if self.peak and record["kind"] == "train":
                record["mfu"] = record["tokens_per_second"] * self.flops / self.peak
            self._tell_all(record)
            if record["kind"] == "train":
                seconds = max(1e-4, record["step_seconds"])
            if record.get("event") == "failed":
                with suppress(ShoalError):  # a checkpoint that could not be written as well is the lesser news
                    group.get(group.call("settle"))
                good, _ = last_good(self.checkpoints)
                where = f"checkpoint {good.path.name} is the last good one" if good else "there is no checkpoint yet"
                raise TrainingFailed(
                    f"training stopped at {record['text']}; {where}: lower train.learning_rate in a new run"
                )
        return seconds

    def _stopped(self, group: RankGroup) -> Outcome:
        step = int(group.get(group.call("save"))[0])
        written = f"checkpoint step-{step} written" if step else "before the first step"
        self._tell("stopped", f"stopped by {self.stop.name}, {written}", step)
        return Outcome(step, stopped=True)

    def _tell(self, event: str, text: str, step: int) -> None:
        self._tell_all({"kind": "event", "step": step, "event": event, "text": text})

    def _tell_all(self, record: Record) -> None:
        self.report.record(record)
        self.metrics.record(record)
