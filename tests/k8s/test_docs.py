"""docs/kubernetes.md says what its commands print."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from charted import CHART
from documented import PAGE, replayed, steady
from kube_server import ApiServer

pytestmark = pytest.mark.skipif(not all(map(shutil.which, ("helm", "kubectl"))), reason="needs helm and kubectl")


@pytest.mark.slow
def test_the_page_on_kubernetes_says_what_its_commands_print(chart_server: ApiServer, tmp_path: Path) -> None:
    text = PAGE.read_text()
    again = replayed(text, chart_server, tmp_path)
    assert steady(again) == steady(text), "run python tests/k8s/documented.py, and read what has changed"


def test_what_the_page_leads_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target
    picture = PAGE.parent / "ray-dashboard.png"
    assert picture.stat().st_size < 200_000 and picture.read_bytes().startswith(b"\x89PNG")
    assert "docs/kubernetes.md" in (CHART.parents[1] / "README.md").read_text()
