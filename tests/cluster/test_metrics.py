"""TrainMetrics against a real Ray: the values are read where Prometheus would read them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from exported import PATIENCE, address_of_metrics, read_run, wait_for_run

from shoal.cluster.local import ray_session
from shoal.cluster.metrics import LOAD_SERIES, TrainMetrics

DROPPED = 2.0  # seconds after which Ray drops a value that was not set again, with the fixture's interval


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The address of the node's metrics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        with ray_session(1, dashboard=False):
            yield address_of_metrics()


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Ray drops anything."""
    monkeypatch.setattr("shoal.cluster.metrics.REFRESH_SECONDS", 0.3)


@contextmanager
def running(run: str, steps: int = 0) -> Iterator[TrainMetrics]:
    """The metrics of a run that goes on."""
    metrics = TrainMetrics(run, steps)
    with metrics.kept():
        yield metrics


def test_a_run_can_be_read_from_the_node(endpoint: str) -> None:
    with running("tiny-1", 30) as metrics:
        _record_a_run(metrics)
        values = wait_for_run(
            endpoint,
            "tiny-1",
            {
                "train_loss": 7.25,
                "train_tokens_per_second": 1e4,
                "train_learning_rate": 3e-4,
                "train_grad_norm": 1.5,
                "expert_imbalance": 1.25,
                "train_step": 3,
                "train_tokens_total": 8192 + 4096,
                "eval_bits_per_byte": 3.5,
                "failures_total": 1,
                "train_steps": 30,
                "train_mfu": 0.4,
                "train_step_seconds": 0.5,
                "train_dispatch_seconds": 0.125,
                "train_part_seconds{forward}": 0.25,
                "device_load{1}": 1.5,
                "gate{2,selected}": 0.75,
                "expert_load{0,0}": 0.5,
                "expert_load{0,1}": 1.5,
                "expert_load{1,0}": 1.0,
                "expert_max_load{0}": 1.5,
                "expert_entropy{1}": 1.0,
                "layer_device_load{1,0}": 0.25,
                "context_coverage{1}": 0.625,
                "context_max_coverage{1}": 0.75,
                "context_bytes{0,gather}": 4096.0,
                "context_bytes{1,pull}": 640.0,
            },
        )
        assert "expert_load{2,0}" not in values


def _record_a_run(metrics: TrainMetrics) -> None:
    step = {
        "kind": "train",
        "learning_rate": 3e-4,
        "grad_norm": 1.5,
        "tokens_per_second": 1e4,
        "expert_imbalance": 1.25,
        "mfu": 0.4,
        "step_seconds": 0.5,
        "forward_seconds": 0.25,
        "dispatch_seconds": 0.125,
    }
    metrics.record(step | {"step": 1, "tokens": 4096, "loss": 8.0})
    metrics.record(step | {"step": 2, "tokens": 8192, "loss": 7.5})
    metrics.record({"kind": "event", "step": 2, "event": "recovered", "text": "rank 1 was killed"})
    metrics.record({"kind": "event", "step": 2, "event": "checkpoint", "text": "saved"})
    metrics.record(step | {"step": 2, "tokens": 4096, "loss": 7.75})
    metrics.record(step | {"step": 3, "tokens": 8192, "loss": 7.25, "grad_norm": None})
    metrics.record({"kind": "eval", "step": 3, "loss": 7.0, "bits_per_byte": 3.5})
    by_layer = {"load": [[0.5, 1.5], [1.0, 1.0]], "layer_devices": [[0.75, 1.25], [0.25, 1.75]]}
    metrics.record({"kind": "load", "step": 3, **by_layer, "devices": [0.5, 1.5]})
    metrics.record({"kind": "gates", "step": 3, "gates": [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.5, 0.75, 0.5]]})
    far = {"gather_bytes": [4096, 1024], "pull_bytes": [2048, 640], "pulled": [False, True]}
    metrics.record({"kind": "coverage", "step": 3, "coverage": [[1.0, 0.0], [0.5, 0.75]], **far})


def test_what_is_told_once_is_there_until_the_run_ends(endpoint: str) -> None:
    """A validation, say, with many minutes to the next one."""
    expected = {"eval_bits_per_byte": 3.5, "expert_load{0,1}": 1.5}
    with running("seldom") as metrics:
        metrics.record({"kind": "eval", "step": 3, "loss": 7.0, "bits_per_byte": 3.5})
        metrics.record({"kind": "load", "step": 3, "load": [[0.5, 1.5]]})
        wait_for_run(endpoint, "seldom", expected)
        end = time.monotonic() + 1.5 * DROPPED
        while time.monotonic() < end:
            wait_for_run(endpoint, "seldom", expected)
            time.sleep(0.2)
    end = time.monotonic() + PATIENCE
    while "eval_bits_per_byte" in read_run(endpoint, "seldom"):
        assert time.monotonic() < end, "it is still there"
        time.sleep(0.2)


def test_a_model_of_many_experts_does_not_flood_prometheus(endpoint: str) -> None:
    layers, experts = 59, 160
    load = [[1 + layer + expert / 1000 for expert in range(experts)] for layer in range(layers)]
    with running("big") as metrics:
        metrics.record({"kind": "load", "step": 1, "load": load})
        values = wait_for_run(endpoint, "big", {"expert_load{0,159}": 1.159})
    shown = [name for name in values if name.startswith("expert_load")]
    assert 3 * experts <= len(shown) <= LOAD_SERIES
    assert len(shown) % experts == 0
