"""TrainMetrics against a real Ray: the values are read where Prometheus would read them."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

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
    node = ray.nodes()[0]
    yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ray.shutdown()


def read(endpoint: str) -> dict[tuple[str, str], float]:
    """``{(name, the tags that tell series apart): value}`` of everything that Shoal exports."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        text = opener.open(endpoint, timeout=5).read().decode()
    except OSError:
        return {}
    values = {}
    for name, tags, value in re.findall(r"^ray_(shoal_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        own = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        values[name, ",".join(own[key] for key in ("run", "layer", "expert") if own.get(key))] = float(value)
    return values


def wait_for(endpoint: str, expected: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """Reads until the endpoint says what is expected; fails with what it says after a minute."""
    end = time.monotonic() + 60
    while True:
        values = read(endpoint)
        if all(values.get(key) == pytest.approx(value) for key, value in expected.items()):
            return values
        assert time.monotonic() < end, f"expected {expected}, the endpoint has {values}"
        time.sleep(0.2)


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
    values = wait_for(
        endpoint,
        {
            ("shoal_train_loss", "tiny-1"): 7.25,
            ("shoal_train_tokens_per_second", "tiny-1"): 1e4,
            ("shoal_train_learning_rate", "tiny-1"): 3e-4,
            ("shoal_train_grad_norm", "tiny-1"): 1.5,
            ("shoal_expert_imbalance", "tiny-1"): 1.25,
            ("shoal_train_step", "tiny-1"): 3,
            ("shoal_train_tokens_total", "tiny-1"): 8192 + 4096,
            ("shoal_eval_bits_per_byte", "tiny-1"): 3.5,
            ("shoal_failures_total", "tiny-1"): 1,
            ("shoal_expert_load", "tiny-1,0,0"): 0.5,
            ("shoal_expert_load", "tiny-1,0,1"): 1.5,
            ("shoal_expert_load", "tiny-1,1,0"): 1.0,
        },
    )
    assert ("shoal_expert_load", "tiny-1,2,0") not in values


def test_a_model_of_many_experts_does_not_flood_prometheus(endpoint: str) -> None:
    layers, experts = 59, 160
    load = [[1 + layer + expert / 1000 for expert in range(experts)] for layer in range(layers)]
    TrainMetrics("big").record({"kind": "load", "step": 1, "load": load})
    values = wait_for(endpoint, {("shoal_expert_load", "big,0,159"): 1.159})
    shown = [tags for name, tags in values if name == "shoal_expert_load" and tags.startswith("big,")]
    assert 3 * experts <= len(shown) <= LOAD_SERIES
    assert len(shown) % experts == 0
