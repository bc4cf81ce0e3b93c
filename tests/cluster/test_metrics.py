"""TrainMetrics against a real Ray: the values are read where Prometheus would read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from exported import address_of_metrics, wait_for_run

from shoal.cluster.metrics import LOAD_SERIES, TrainMetrics


@pytest.fixture(scope="module")
def endpoint(ray_temp_dir: Path) -> Iterator[str]:
    """The address of the node's metrics."""
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 * 2**20,
        _temp_dir=str(ray_temp_dir),
        _system_config={"metrics_report_interval_ms": 500},
    )
    yield address_of_metrics()
    ray.shutdown()


def test_a_run_can_be_read_from_the_node(endpoint: str) -> None:
    metrics = TrainMetrics("tiny-1")
    step = {
        "kind": "train",
        "learning_rate": 3e-4,
        "grad_norm": 1.5,
        "tokens_per_second": 1e4,
        "expert_imbalance": 1.25,
    }
    metrics.record(step | {"step": 1, "tokens": 4096, "loss": 8.0})
    metrics.record(step | {"step": 2, "tokens": 8192, "loss": 7.5})
    metrics.record({"kind": "event", "step": 2, "event": "recovered", "text": "rank 1 was killed"})
    metrics.record({"kind": "event", "step": 2, "event": "checkpoint", "text": "saved"})
    metrics.record(step | {"step": 2, "tokens": 4096, "loss": 7.75})
    metrics.record(step | {"step": 3, "tokens": 8192, "loss": 7.25, "grad_norm": None})
    metrics.record({"kind": "eval", "step": 3, "loss": 7.0, "bits_per_byte": 3.5})
    metrics.record({"kind": "load", "step": 3, "load": [[0.5, 1.5], [1.0, 1.0]]})
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
            "expert_load{0,0}": 0.5,
            "expert_load{0,1}": 1.5,
            "expert_load{1,0}": 1.0,
        },
    )
    assert "expert_load{2,0}" not in values


def test_a_model_of_many_experts_does_not_flood_prometheus(endpoint: str) -> None:
    layers, experts = 59, 160
    load = [[1 + layer + expert / 1000 for expert in range(experts)] for layer in range(layers)]
    TrainMetrics("big").record({"kind": "load", "step": 1, "load": load})
    values = wait_for_run(endpoint, "big", {"expert_load{0,159}": 1.159})
    shown = [name for name in values if name.startswith("expert_load")]
    assert 3 * experts <= len(shown) <= LOAD_SERIES
    assert len(shown) % experts == 0
