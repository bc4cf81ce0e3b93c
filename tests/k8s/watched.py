"""A real Prometheus, and the questions that dashboards and alerts ask of it."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from charted import CHART
from ports import free_port

RULES = CHART / "rules" / "shoal.yaml"
WINDOW = "30s"  # for Grafana's $__rate_interval, where Prometheus looks every second


def panels(name: str, **chosen: str) -> dict[str, str]:
    """The queries of a dashboard by panel and letter, with the variables of Grafana filled in."""
    found = {}
    for panel in json.loads((CHART / "dashboards" / f"{name}.json").read_text())["panels"]:
        for target in panel["targets"]:
            text = target["expr"].replace("$__rate_interval", WINDOW)
            for variable, value in chosen.items():
                text = text.replace(f"${variable}", value)
            assert "$" not in text
            found[f"{panel['title']} ({target['refId']})"] = text
    return found


def alerts(group: str) -> dict[str, str]:
    """What each alert of a group compares with its limit."""
    (rules,) = [each["rules"] for each in yaml.safe_load(RULES.read_text())["groups"] if each["name"] == group]
    found = {}
    for rule in rules:
        match = re.fullmatch(r"(.*) (?:[<>]=?|==) [0-9.]+", rule["expr"], re.DOTALL)
        assert match, f"{rule['alert']} does not end with a comparison"
        found[rule["alert"]] = match[1]
    return found


class Prometheus:
    """It reads what Ray's own list of targets names, every second."""

    def __init__(self, folder: Path, targets: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [
                {"job_name": "ray", "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "1s"}]}
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._log = (folder / "prometheus.log").open("wb")
        self.process = subprocess.Popen(
            ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'series'}",
             f"--web.listen-address={self.url.removeprefix('http://')}"],
            stdout=self._log, stderr=self._log,
        )  # fmt: skip

    def ask(self, query: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values of an instant query."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        data = urllib.parse.urlencode({"query": query}).encode()
        with opener.open(f"{self.url}/api/v1/query", data, timeout=30) as answer:
            result: list[Any] = json.loads(answer.read())["data"]["result"]
        return [(each["metric"], float(each["value"][1])) for each in result]

    def close(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.wait()
        self._log.close()


@contextmanager
def prometheus(folder: Path, ray: Path) -> Iterator[Prometheus]:
    """Prometheus, as soon as the Ray below the folder ``ray`` has said where its metrics are.

    Of its file and a link to that: where a link is watched, nothing tells that the file has changed.
    """
    end = time.monotonic() + 120
    name = "prom_metrics_service_discovery.json"
    while not (found := [file for file in ray.glob(f"**/{name}") if not file.is_symlink()]):
        assert time.monotonic() < end, "Ray names no targets"
        time.sleep(0.1)
    server = Prometheus(folder, found[0])
    try:
        yield server
    finally:
        server.close()


def unanswered(server: Prometheus, queries: dict[str, str]) -> dict[str, str]:
    """The queries without data. What is no number is no data; a query that Prometheus does not understand raises."""
    return {name: query for name, query in queries.items() if not any(v == v for _, v in server.ask(query))}
