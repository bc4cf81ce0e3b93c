"""A service's figures as Ray metrics, for the Ray dashboard and Prometheus; Ray puts ``ray_`` before each name.

Every metric has the tag ``model``. A counter appears with its first increment, a gauge and a duration at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from ray.util.metrics import Counter, Gauge

from shoal.cluster.metrics import LOAD_SERIES, LastingGauge, shown
from shoal.cluster.served_experts import chosen_since
from shoal.workers.engine.request import Load

PREFIX = "shoal_serve_"

# Fields of Load. The rest of its fields are not for export, or have names of their own below.
GAUGES = {
    "waiting": "Requests in the queue",
    "running": "Requests that are computed, together",
    "capacity": "Requests that can be computed together; 0 when the engines are gone",
    "pages": "Pages of the cache",
    "pages_used": "Pages of the cache that requests hold",
    "pages_cached": "Pages of the cache that no request holds, kept for prompts that begin alike",
    "rank_load": "Tokens of the busiest rank's experts over a fair share, mean of layers; 0 where nobody measures it",
}
COUNTERS = {
    "steps_total": "Steps, added up over the attention ranks",
    "step_seconds_total": "Seconds in steps, added up over the attention ranks",
    "prompt_tokens_total": "Prompt tokens computed",
    "cached_tokens_total": "Prompt tokens not computed, because the prefix cache had them",
    "generated_tokens_total": "Tokens generated",
    "preemptions_total": "Requests that had to give their pages to others, and were computed again",
    "proposed_tokens_total": "Tokens guessed",
    "accepted_tokens_total": "Tokens guessed right",
    "rebalances_total": "Times that copies of experts moved to even out the load of ranks",
}

# Upper bounds of the buckets, in seconds: from a step on a fast GPU to a long answer on a slow CPU.
BOUNDS = tuple(float(f"{digit}e{power}") for power in range(-3, 3) for digit in (1, 2.5, 5))

# Tokens of an expert, on average, from which its load is told: chance alone then moves it by about 10%.
ENOUGH = 100


class Durations:
    """A histogram of seconds as Prometheus has them: ``_bucket{le=…}``, ``_sum`` and ``_count``, all exact.

    They are gauges to Ray. Its own Histogram makes a sum of bucket midpoints, and to the name of a Counter it adds
    ``_total``; a Gauge keeps its name, and ``rate`` and ``histogram_quantile`` ask for names and numbers only.
    """

    def __init__(self, name: str, text: str, model: str) -> None:
        self.sum = 0.0
        self._counts = [0] * (len(BOUNDS) + 1)
        self._bounds = [*(f"{bound:g}" for bound in BOUNDS), "+Inf"]
        self._bucket = _gauge(f"{name}_bucket", text, model, "le")
        self._sum = _gauge(f"{name}_sum", text, model)
        self._count = _gauge(f"{name}_count", text, model)

    @property
    def count(self) -> int:
        """How many were observed."""
        return sum(self._counts)

    def observe(self, seconds: float, times: int = 1) -> None:
        """Adds a duration that was there ``times`` times; ``flush`` exports it."""
        self._counts[bisect_left(BOUNDS, seconds)] += times
        self.sum += seconds * times

    def flush(self) -> None:
        """Hands what was observed to Ray: some 50 µs."""
        for bound, count in zip(self._bounds, accumulate(self._counts), strict=True):
            self._bucket.set(count, tags={"le": bound})
        self._sum.set(self.sum)
        self._count.set(self.count)


class ServeMetrics:
    """Exports from this process, which must be connected to Ray. Not thread-safe.

    first: seconds from a request to its first token (TTFT). each: seconds for every token after it (TPOT). whole:
    seconds to the end of an answer that was not cut short.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self.first = self._durations("ttft_seconds", "Time to a request's first token")
        self.each = self._durations("tpot_seconds", "Time for a token after a request's first")
        self.whole = self._durations("request_seconds", "Time to the end of a request that was answered")
        self._gauges = {key: _gauge(PREFIX + key, text, model) for key, text in GAUGES.items()}
        self._counters = {key: _counter(PREFIX + key, text, model) for key, text in COUNTERS.items()}
        self._step_tokens = _gauge(
            f"{PREFIX}step_tokens", "Tokens of a rank's step, prompt and generated: mean of the last seconds", model
        )
        self._step_sequences = _gauge(
            f"{PREFIX}step_sequences", "Requests that a rank's step gave a token: mean of the last seconds", model
        )
        share = "Tokens of an expert, as a multiple of a fair share"
        self._experts = _lasting(f"{PREFIX}expert_load", share, model, "layer", "expert")
        busiest = "Load of a layer's busiest expert over the mean"
        self._busiest = _lasting(f"{PREFIX}expert_max_load", busiest, model, "layer")
        self._ended = _counter(f"{PREFIX}requests_total", "Requests, by how they ended", model, "finish")
        self._restarted = _counter(f"{PREFIX}restarts_total", "Times that all ranks were started again", model)
        self._was = Load()
        self._told: Sequence[Sequence[int]] = ()  # expert_tokens when the load of experts was told last
        self._restarts = 0

    def ended(self, finish: str) -> None:
        """Counts a request: ``stop``, ``length``, ``cancelled``, ``refused`` or ``error``."""
        self._ended.inc(tags={"finish": finish})

    def flush(self) -> None:
        """Hands the durations to Ray, and what is seldom told once more: Ray soon drops what is not set again."""
        self._experts.again()
        self._busiest.again()
        for durations in (self.first, self.each, self.whole):
            durations.flush()

    def show(self, load: Load) -> None:
        """Exports how busy the engines are now."""
        for key, gauge in self._gauges.items():
            gauge.set(getattr(load, key))

    def count(self, load: Load, restarts: int) -> None:
        """Exports what the engines did since the last call.

        restarts: how often all ranks were started again until now; the totals of ``load`` then began at 0 again, which
        those of a counter never do.
        """
        if restarts != self._restarts:
            self._was, self._told = Load(), ()
        done = {key: getattr(load, key) - getattr(self._was, key) for key in COUNTERS}
        for key, counter in self._counters.items():
            if done[key] > 0:
                counter.inc(done[key])
        if restarts > self._restarts:
            self._restarted.inc(restarts - self._restarts)
        self._was, self._restarts = load, restarts
        self._set_step(done)
        self._set_experts(load.expert_tokens)

    def _set_step(self, done: dict[str, float]) -> None:
        steps, generated = max(1, done["steps_total"]), done["generated_tokens_total"]
        self._step_tokens.set((done["prompt_tokens_total"] + generated) / steps)
        # Of the tokens that a step gives a request, all but one are guesses that came true. Those behind the end of a
        # text were accepted, and not generated.
        self._step_sequences.set(max(0, generated - done["accepted_tokens_total"]) / steps)

    def _set_experts(self, tokens: Sequence[Sequence[int]]) -> None:
        """tokens: ``[MoE layers][experts]`` since the ranks were started. Of each layer the busiest expert is shown, of
        experts one by one at most ``LOAD_SERIES``, of layers evenly apart; of the tokens since the last time, once
        there are enough of them to tell."""
        new = chosen_since(self._told, tokens, ENOUGH)
        if not new:
            return
        fair = [sum(row) / len(row) for row in new]
        for layer, row in enumerate(new):
            self._busiest.set(max(row) / fair[layer], tags={"layer": str(layer)})
        for layer, some in shown(new):
            for expert, count in enumerate(some[:LOAD_SERIES]):
                self._experts.set(count / fair[layer], tags={"layer": str(layer), "expert": str(expert)})
        self._told = tokens

    def _durations(self, name: str, text: str) -> Durations:
        return Durations(PREFIX + name, f"{text}, in seconds", self._model)


def _gauge(name: str, text: str, model: str, *tags: str) -> Gauge:
    gauge = Gauge(name, description=text, tag_keys=("model", *tags))
    gauge.set_default_tags({"model": model})
    return gauge


def _lasting(name: str, text: str, model: str, *tags: str) -> LastingGauge:
    gauge = LastingGauge(name, text, "model", *tags)
    gauge.set_default_tags({"model": model})
    return gauge


def _counter(name: str, text: str, model: str, *tags: str) -> Counter:
    counter = Counter(name, description=text, tag_keys=("model", *tags))
    counter.set_default_tags({"model": model})
    return counter
