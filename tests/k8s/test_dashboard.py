"""Ray's dashboard in a real browser, while Ray runs a job of ours: what a person sees there."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kube_operator import TOKEN, RayHead
from ports import free_port
from shell import steps_done
from small import small_corpus, small_recipe

from shoal.jobs.recipe import recipe_to_toml
from shoal.workers.config import Recipe

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDLESS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--no-proxy-server", "--no-first-run", "--window-size=1400,900")  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
]


class Browser:
    """One page of a headless Chromium, by its debugging protocol."""

    def __init__(self, folder: Path) -> None:
        import websocket

        port = free_port()
        command = [str(CHROMIUM), *NEEDLESS, f"--remote-debugging-port={port}", f"--user-data-dir={folder}",
                   "--remote-allow-origins=*", "about:blank"]  # fmt: skip
        self._log = (folder.parent / "chromium.log").open("wb")
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        opener, end = urllib.request.build_opener(urllib.request.ProxyHandler({})), time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                pages = json.loads(opener.open(f"http://127.0.0.1:{port}/json", timeout=5).read())
                if page := next((each for each in pages if each["type"] == "page"), None):
                    break
            assert self.process.poll() is None and time.monotonic() < end, "chromium did not start"
            time.sleep(0.1)
        self._socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=60)
        self._last = 0

    def call(self, method: str, **parameters: Any) -> Any:
        """Calls a method and waits for its result."""
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while (answer := json.loads(self._socket.recv())).get("id") != self._last:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def text(self) -> str:
        """What can be read on the page."""
        found = self.call("Runtime.evaluate", expression="document.body.innerText", returnByValue=True)
        return str(found["result"].get("value", ""))

    def wait_for(self, *words: str) -> str:
        """Waits until all of these are there; the page's text then."""
        end = time.monotonic() + 90
        while not all(word in (text := self.text()) for word in words):
            assert time.monotonic() < end, text
            time.sleep(0.3)
        return text

    def picture(self) -> bytes:
        """A PNG of what is seen."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        """Ends it."""
        self._socket.close()
        self.process.kill()
        self.process.wait()
        self._log.close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    (tmp_path / "profile").mkdir()
    found = Browser(tmp_path / "profile")
    yield found
    found.close()


@pytest.fixture
def ray(tmp_path: Path) -> Iterator[RayHead]:
    found = RayHead(tmp_path)
    yield found
    found.close()


def test_the_dashboard_shows_a_job_its_run_and_its_ranks(ray: RayHead, browser: Browser, tmp_path: Path) -> None:
    """SHOAL_SCREENSHOT names a file that the picture is written to, for the manual."""
    small_corpus(tmp_path)
    changes = {"train__dtype": "float32", "train__steps": 100_000, "data__corpus": "corpus", "parallel__ranks": 2}
    (tmp_path / "small.toml").write_text(recipe_to_toml(Recipe.model_validate(small_recipe(**changes))))
    # Ray runs it where it was started itself, which is where the recipe lies
    entrypoint, metadata = "shoal train --recipe small.toml --name first", {"shoal": "train", "run": "first"}
    body = {"entrypoint": entrypoint, "submission_id": "first-abcde", "metadata": metadata}
    end = time.monotonic() + 240
    while not ray.ask("POST", "/api/jobs/", body) and not ray.ask("GET", "/api/jobs/first-abcde"):
        assert time.monotonic() < end, "Ray takes no jobs"
        time.sleep(1)
    while steps_done(tmp_path / "runs" / "first") < 3:
        state = ray.ask("GET", "/api/jobs/first-abcde") or {}
        assert state.get("status") != "FAILED" and time.monotonic() < end, state
        time.sleep(0.5)

    url = f"http://127.0.0.1:{ray.port}"
    browser.call("Network.setCookie", name="ray-authentication-token", value=TOKEN, url=url)
    browser.call("Emulation.setDeviceMetricsOverride", width=1400, height=900, deviceScaleFactor=1, mobile=False)
    browser.call("Page.navigate", url=f"{url}/#/jobs")
    browser.wait_for("first-abcde", "RUNNING")
    browser.call("Page.navigate", url=f"{url}/#/jobs/first-abcde")
    browser.wait_for(entrypoint, "RUNNING", '"run": "first"', "first step after")
    picture = browser.picture()
    assert picture.startswith(b"\x89PNG")
    if where := os.environ.get("SHOAL_SCREENSHOT"):
        Path(where).write_bytes(picture)
    ray.ask("POST", "/api/jobs/first-abcde/stop")
