"""A run's figures as Ray metrics, for the Ray dashboard and Prometheus; Ray puts ``ray_`` before each name."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ray.util.metrics import Counter, Gauge

from shoal.workers.records import GATES, PARTS, coverage_figures, spread

# A series per expert is kept by Prometheus for weeks: a model of many layers shows some of them.
LOAD_SERIES = 1024
REFRESH_SECONDS = 5.0  # half of the 10 s between two reports of Ray

GAUGES = {
    "loss": ("shoal_train_loss", "Training loss of the last step, in nats per token"),
    "tokens_per_second": ("shoal_train_tokens_per_second", "Training speed, in tokens per second over all ranks"),
    "learning_rate": ("shoal_train_learning_rate", "Learning rate of the last step"),
    "grad_norm": ("shoal_train_grad_norm", "Norm of the gradient before clipping"),
    "expert_imbalance": ("shoal_expert_imbalance", "Load of the busiest expert, as a multiple of a fair share"),
    "step": ("shoal_train_step", "Steps done"),
    "balance_loss": ("shoal_train_balance_loss", "Balance loss of the last step"),
    "step_seconds": ("shoal_train_step_seconds", "Time of the last step, in seconds"),
    "dispatch_seconds": (
        "shoal_train_dispatch_seconds",
        "Time for which rank 0 waited in its last step for rows on their way to experts or back, in seconds",
    ),
    "mfu": ("shoal_train_mfu", "Model FLOPs of the last step, as a share of what the devices could do in its time"),
}


class LastingGauge(Gauge):
    """A gauge that remembers what it was set to. Ray drops a value that was not set during its last two reports."""

    def __init__(self, name: str, text: str, *tags: str) -> None:
        super().__init__(name, description=text, tag_keys=tags)
        self._values: dict[tuple[tuple[str, str], ...], float] = {}

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:  # type: ignore[override]
        """As Gauge's."""
        super().set(value, tags or {})
        self._values[tuple((tags or {}).items())] = value

    def again(self) -> None:
        """Sets every value again; from any thread."""
        for tags, value in list(self._values.items()):
            super().set(value, dict(tags))


class TrainMetrics:
    """Exports records (as RunReport takes them) from this process, which must be connected to Ray.

    Every metric has the tag ``run``. Only gauges and counters: the sum of Ray's histograms is made of bucket midpoints.
    """

    def __init__(self, run: str, steps: int = 0) -> None:
        self._run, self._total = run, steps
        self._train = {key: self._gauge(name, text) for key, (name, text) in GAUGES.items()}
        self._bits = self._gauge("shoal_eval_bits_per_byte", "Validation loss, in bits per byte of text")
        self._load = self._gauge(
            "shoal_expert_load", "Tokens of an expert, as a multiple of a fair share", "layer", "expert"
        )
        self._parts = self._gauge("shoal_train_part_seconds", "Time of a part of the last step, in seconds", "part")
        self._device = self._gauge(
            "shoal_device_load", "Tokens of an expert rank, as a multiple of a fair share", "device"
        )
        self._layer_device = self._gauge(
            "shoal_layer_device_load",
            "Tokens of an expert rank in one layer, as a multiple of a fair share",
            "layer",
            "device",
        )
        self._busiest = self._gauge("shoal_expert_max_load", "Load of a layer's busiest expert over the mean", "layer")
        self._entropy = self._gauge(
            "shoal_expert_entropy", "Entropy of a layer's load over experts, as a share of its maximum", "layer"
        )
        self._gate = self._gauge(
            "shoal_gate", "Mean gate of a branch of sparse attention, between 0 and 1", "layer", "branch"
        )
        chose = "Pages at other ranks that a rank's queries chose, as a share of those they might read"
        self._coverage = self._gauge("shoal_context_coverage", f"{chose}, mean over ranks", "layer")
        self._most_coverage = self._gauge("shoal_context_max_coverage", f"{chose}, of the rank with most", "layer")
        self._far_bytes = self._gauge(
            "shoal_context_bytes",
            "Bytes of the selected branch that a rank receives in a step, if by gather, if by pull",
            "layer",
            "fetch",
        )
        self._steps = self._gauge("shoal_train_steps", "Steps of the whole run")
        by_layer = (self._load, self._layer_device, self._busiest, self._entropy, self._gate)
        shared = (self._coverage, self._most_coverage, self._far_bytes)
        self._seldom = (self._bits, self._parts, self._device, self._steps, *by_layer, *shared)
        self._tokens = self._counter("shoal_train_tokens_total", "Tokens trained on; a repeated step counts again")
        self._failures = self._counter("shoal_failures_total", "Failures that the run recovered from")
        self._last_tokens = 0

    @contextmanager
    def kept(self) -> Iterator[None]:
        """For the time of a ``with`` block what is seldom told, such as a validation, does not vanish in between."""
        ended = threading.Event()
        if self._total:
            self._steps.set(self._total)

        def refresh() -> None:
            while not ended.wait(REFRESH_SECONDS):
                for gauge in (*self._train.values(), *self._seldom):
                    gauge.again()

        thread = threading.Thread(target=refresh, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def record(self, record: Mapping[str, Any]) -> None:
        """Takes one record; kinds and keys that are not exported are passed over."""
        kind = record["kind"]
        if kind == "train":
            for key, gauge in self._train.items():
                if record.get(key) is not None:
                    gauge.set(record[key])
            for part in PARTS:
                if record.get(f"{part}_seconds") is not None:
                    self._parts.set(record[f"{part}_seconds"], tags={"part": part})
            self._count_tokens(record.get("tokens") or 0)
        elif kind == "eval" and record.get("bits_per_byte") is not None:
            self._bits.set(record["bits_per_byte"])
        elif kind == "load":
            self._set_load(record["load"])
            for device, load in enumerate(record.get("devices") or ()):
                self._device.set(load, tags={"device": str(device)})
            for layer, row in shown(record.get("layer_devices") or ()):
                for device, load in enumerate(row):
                    self._layer_device.set(load, tags={"layer": str(layer), "device": str(device)})
        elif kind == "gates":
            for layer, gates in enumerate(record["gates"]):
                for branch, gate in zip(GATES, gates, strict=True):
                    self._gate.set(gate, tags={"layer": str(layer), "branch": branch})
        elif kind == "coverage":
            for layer, figures in enumerate(coverage_figures(record)):
                self._coverage.set(figures["mean"], tags={"layer": str(layer)})
                self._most_coverage.set(figures["max"], tags={"layer": str(layer)})
                for fetch in ("gather", "pull"):
                    self._far_bytes.set(figures[f"{fetch}_bytes"], tags={"layer": str(layer), "fetch": fetch})
        elif kind == "event" and record["event"] == "recovered":
            self._failures.inc()

    def _count_tokens(self, position: int) -> None:
        """``position``: tokens since the first step. It falls when a run goes back to a checkpoint, a counter never."""
        if position > self._last_tokens:
            self._tokens.inc(position - self._last_tokens)
        self._last_tokens = position

    def _set_load(self, load: list[list[float]]) -> None:
        """load: ``[MoE layers][experts]``; of experts, some are shown."""
        for layer, row in enumerate(load):
            if figures := spread(row):
                self._busiest.set(figures["max"], tags={"layer": str(layer)})
                self._entropy.set(figures["entropy"], tags={"layer": str(layer)})
        for layer, some in shown(load):
            for expert, value in enumerate(some[:LOAD_SERIES]):
                self._load.set(value, tags={"layer": str(layer), "expert": str(expert)})

    def _gauge(self, name: str, text: str, *tags: str) -> LastingGauge:
        gauge = LastingGauge(name, text, "run", *tags)
        gauge.set_default_tags({"run": self._run})
        return gauge

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(name, description=text, tag_keys=("run",))
        counter.set_default_tags({"run": self._run})
        return counter


def shown(layers: Sequence[Sequence[float]]) -> Iterator[tuple[int, Sequence[float]]]:
    """Layers evenly apart, by their number, of at most ``LOAD_SERIES`` values together."""
    width = max(1, len(layers[0])) if layers else 1
    stride = -(-len(layers) // max(1, LOAD_SERIES // width)) or 1
    yield from ((layer, layers[layer]) for layer in range(0, len(layers), stride))
