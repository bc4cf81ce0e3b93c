"""Dashboards and alerts: every query is asked of a real Prometheus that reads the metrics of a real run."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from charted import CHART
from ports import free_ports
from shell import started
from small import small_corpus, small_recipe
from watched import RULES, alerts, panels, prometheus, unanswered

from shoal.jobs.recipe import recipe_to_toml
from shoal.workers.config import Recipe

FAST = {"RAY_metrics_report_interval_ms": "500"}
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (package prometheus)")
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus")


def test_the_dashboards_are_what_their_tables_say() -> None:
    scope = runpy.run_path(str(CHART.parent / "chart_dashboards.py"))
    there = {path.name: path.read_text() for path in (CHART / "dashboards").iterdir()}
    assert there == scope["dashboards"](), "run python k8s/chart_dashboards.py"


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    for arguments in (("check", "rules", str(RULES)), ("test", "rules", str(Path(__file__).parent / "alerts.yaml"))):
        result = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its corpus."""
    folder = tmp_path_factory.mktemp("here")
    corpus = small_corpus(folder)
    changes = {"train__dtype": "float32", "train__steps": 100_000, "train__eval_every": 20, "model__context": 128}
    changes |= {"data__corpus": str(corpus), "parallel__ranks": 2, "parallel__context": 2, "checkpoint__every": 50}
    recipe = small_recipe(**changes)
    (folder / "small.toml").write_text(recipe_to_toml(Recipe.model_validate(recipe)))
    return folder


@pytest.fixture
def temporary() -> Iterator[Path]:
    """TMPDIR of a command. Short, since Ray's sockets lie in it."""
    folder = Path("/tmp", f"watch{os.getpid()}")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def until_answered(left: Callable[[], dict[str, str]], process: subprocess.Popen[str]) -> None:
    """Waits until no query is without data; fails with those that are."""
    end = time.monotonic() + 300  # on busy cores, too
    while missing := left():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, json.dumps(missing, indent=1)
        time.sleep(1)


@pytest.fixture(scope="module")
def run(here: Path) -> Path:
    """Where the run lies."""
    return here / "runs" / "first"


@needs_prometheus
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_panel_and_alert_of_training_has_data_of_a_run(
    here: Path, run: Path, temporary: Path, tmp_path: Path
) -> None:
    command = ("train", "--recipe", "small.toml", "--name", "first")
    queries = panels("training", run="first") | alerts("shoal-training")
    with started(*command, cwd=here, TMPDIR=str(temporary), **FAST) as process:
        with prometheus(tmp_path, temporary) as server:
            until_answered(lambda: _unready(server) or unanswered(server, queries), process)
            told = {labels["part"] for labels, _ in server.ask(queries["Time of a step, by part (A)"])}
            assert told == {"data", "forward", "backward", "reduce", "update"}
            assert {labels["device"] for labels, _ in server.ask(queries["Load of devices (A)"])} == {"0", "1"}
            ((_, mfu),) = server.ask(queries["Model FLOPs utilisation (A)"])
            assert 0 < mfu < 1
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=240)
    assert process.returncode == 130, stderr


@needs_prometheus
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_panel_and_alert_of_serving_has_data_of_a_service(
    here: Path, run: Path, temporary: Path, tmp_path: Path
) -> None:
    if not run.exists():
        pytest.skip("needs the run of the test of training")
    port, grpc_port = free_ports()
    options = ("--port", str(port), "--grpc-port", str(grpc_port), "--set", "serve.speculate=2")
    queries = panels("serving", model="first") | alerts("shoal-serving")
    ended = threading.Event()

    def talk() -> None:
        body = {"model": "first", "prompt": "shoal fish net sea " * 12, "max_tokens": 12}
        while not ended.wait(0.05):
            try:
                httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
            except httpx.TransportError:  # it is not there yet
                time.sleep(0.5)

    talking = threading.Thread(target=talk)
    talking.start()
    try:
        with started("serve", "first", *options, cwd=here, TMPDIR=str(temporary), **FAST) as process:
            with prometheus(tmp_path, temporary) as server:
                until_answered(lambda: _unready(server) or unanswered(server, queries), process)
                ((_, hits),) = server.ask(queries["Prefix hits (A)"])
                assert 0 < hits < 1, "the same prompt again and again"
            ended.set()
            os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=240)
    finally:
        ended.set()
        talking.join()


def _unready(server: object) -> dict[str, str]:
    """What to wait for as long as Prometheus does not answer."""
    try:
        httpx.get(f"{server.url}/-/ready", timeout=5).raise_for_status()  # type: ignore[attr-defined]
    except httpx.HTTPError as error:
        return {"Prometheus": str(error)}
    return {}
