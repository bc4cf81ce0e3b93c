"""Several nodes, each a raylet of its own, one of which is lost in mid-training: the run ends with the same bits."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from rich.console import Console
from small import small_corpus, small_recipe
from trained import assert_same_bits, events, records

from shoal.cluster import supervisor
from shoal.cluster.group import RankGroup
from shoal.cluster.local import RaySession, ray_session
from shoal.cluster.supervisor import Supervisor
from shoal.jobs.report import RunReport
from shoal.workers.config import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, EVERY = 24, 6
# how soon a node that does not answer is given up: after 3 questions in a row, not the minute that Ray takes otherwise
IMPATIENT = {"period_ms": "1000", "timeout_ms": "3000", "failure_threshold": "3"}
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head without cores, and three nodes with room for one rank each, in the folder of RAY_TMPDIR."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in IMPATIENT.items():
            patch.setenv(f"RAY_health_check_{name}", value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(3):
            cluster.add_node(num_cpus=1)
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def train(nodes: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """Trains two ranks to the end; the folder of the run. heard: is given the records."""
    folder = tmp_path_factory.mktemp("nodes")
    corpus = small_corpus(folder)
    tables = {"train__dtype": "float32", "train__steps": STEPS, "checkpoint__every": EVERY, "parallel__ranks": 2}
    recipe = Recipe.model_validate(small_recipe(**tables))

    def of(session: RaySession, name: str, heard: Callable[[dict[str, Any]], None] = lambda record: None) -> Path:
        class Heard(RunReport):
            def record(self, record: dict[str, Any]) -> None:
                super().record(record)
                heard(record)

        run = folder / name
        run.mkdir()
        with Heard(run, STEPS, Console(quiet=True)) as report:
            assert Supervisor(recipe, corpus, run, report, session).run().step == STEPS
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", nodes.address)
        with ray_session(2) as session:
            yield lambda *arguments: of(session, *arguments)


@pytest.fixture(scope="module")
def undisturbed(train: Train) -> Path:
    run = train("undisturbed")
    assert events(run) == ["dispatch", "checkpoint"]
    return run


class Loss:
    """Makes groups, of which the first loses the node of its rank 1 in the middle of the run.

    lose: is given Ray's node and the process of the rank.
    """

    def __init__(self, nodes: Cluster, lose: Callable[[Any, psutil.Process], None]) -> None:
        self.lost: list[str] = []
        loss = self

        class Group(RankGroup):
            def connect(self) -> list[str]:
                self.known = self.pids()
                return super().connect()

            def call(self, method: str, *arguments: Any) -> list[Any]:
                references = super().call(method, *arguments)
                if method == "run" and arguments[0] > STEPS // 2 and not loss.lost:
                    places = ray.util.placement_group_table(self.place)["bundles_to_node_id"]
                    assert places[0] != places[1], "ranks are on nodes of their own"
                    (node,) = [each for each in nodes.worker_nodes if each.node_id == places[1]]
                    loss.lost.append(places[1])
                    lose(node, psutil.Process(self.known[1]))
                return references

        self.group = Group


def raylet_of(node: Any) -> Any:
    """The Popen of a node's raylet."""
    return node.all_processes["raylet"][0].process


def alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def test_another_node_takes_the_place_of_one_whose_raylet_is_killed(
    nodes: Cluster, train: Train, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rank ends with it, as Ray has it: within seconds, in which this small run would come to its end."""

    def kill(node: Any, rank: psutil.Process) -> None:
        raylet_of(node).kill()
        raylet_of(node).wait()  # a worker takes a raylet that nobody has waited for to be alive
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.wait(60)

    loss = Loss(nodes, kill)
    monkeypatch.setattr(supervisor, "RankGroup", loss.group)
    run = train("killed")
    assert loss.lost and events(run) == ["dispatch", "recovered", "checkpoint"]
    assert_same_bits(run, undisturbed, STEPS)
    assert loss.lost[0] not in alive() and len(alive()) == 3, "the head and two nodes are left"


def test_a_run_waits_for_the_node_that_replaces_one_which_no_longer_answers(
    nodes: Cluster, train: Train, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that stands still closes no connection: its peers wait in a collective until Ray gives the node up."""
    while len(alive()) > 3:  # where the test before did not run
        nodes.remove_node(nodes.worker_nodes.copy().pop())
    frozen: list[psutil.Process] = []

    def freeze(node: Any, rank: psutil.Process) -> None:
        raylet = psutil.Process(raylet_of(node).pid)
        for process in [raylet, rank, *raylet.children(recursive=True)]:
            process.send_signal(signal.SIGSTOP)
            frozen.append(process)

    def add_when_waited_for(record: dict[str, Any]) -> None:
        if record.get("event") == "waiting":
            nodes.add_node(num_cpus=1)

    loss = Loss(nodes, freeze)
    monkeypatch.setattr(supervisor, "RankGroup", loss.group)
    monkeypatch.setattr(supervisor, "QUIET", 1.0)
    try:
        run = train("frozen", add_when_waited_for)
    finally:
        for process in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    assert loss.lost[0] not in alive()
    assert events(run) == ["dispatch", "recovered", "waiting", "checkpoint"]
    assert "the node of rank 1 died" in records(run, "event")[1]["text"]
    assert_same_bits(run, undisturbed, STEPS)
