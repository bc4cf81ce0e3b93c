"""``shoal job … --ray-address``: a real Ray with its dashboard and a token, and no Kubernetes."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from job_fixtures import Shell, here_fixture  # noqa: F401  # fixtures are found by their names
from kube_fixtures import until
from kube_operator import TOKEN, RayHead
from ray_cut import Way, way_to
from shell import shoal, started, steps_done, wait_until

from shoal.jobs.kube import work
from shoal.jobs.kube.options import JobOptions
from shoal.jobs.ray_jobs import api
from shoal.jobs.ray_jobs.api import RayCluster
from shoal.jobs.ray_jobs.submit import request
from shoal.jobs.ray_jobs.watch import logs
from shoal.jobs.recipe import check_recipe, load_recipe

RAY = ("--ray-address", "http://127.0.0.1:1")
CPU = ("--gpus-per-node", "0")
LINES = 100_000
SMALL = ("train.steps=60", "train.batch=2", "train.sequence=64", "train.eval_every=0", "checkpoint.every=5")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("submit", "train", *CPU, *RAY), 3, "--runs-dir is not given"),
        (("submit", "train", *CPU, *RAY, "--runs-dir", "runs"), 3, "--runs-dir 'runs' is not a path from the root"),
        (("submit", "train", *CPU, *RAY, "--image", "x"), 2, "--image is for Kubernetes, and --ray-address names"),
        (("submit", "train", *CPU, *RAY, "--volume", "a:/b"), 2, "--volume is for Kubernetes"),
        (("submit", "train", *CPU, *RAY, "--retries", "0"), 2, "--retries is for Kubernetes"),
        (("submit", "train", *CPU, *RAY, "--runs-dir", "/r", "-n", "team"), 2, "--namespace is for Kubernetes"),
        (("submit", "train", *CPU, *RAY, "--runs-dir", "/r", "--dry-run", "client"), 2, "--dry-run is for Kubernetes"),
        (("submit", "train", *CPU, *RAY, "--runs-dir", "/r", "--name", "a/b"), 3, "--name 'a/b' is not a plain name"),
        (("submit", "train", *RAY, "--runs-dir", "/r"), 3, "parallel.device='cpu', and the job asks for 1 GPU:"),
        (("submit", "serve", "first", *RAY), 2, "a service is no job of Ray's"),
        (("render", "train", *CPU, *RAY, "--runs-dir", "/r"), 2, "render writes manifests for Kubernetes"),
        (("submit", "train", *CPU, "--ray-address", "head:8265", "--runs-dir", "/r"), 3, "is not the address of a Ray"),
        (("submit", "train", *CPU, *RAY, "--runs-dir", "/r"), 4, "Ray at http://127.0.0.1:1 does not answer"),
        (("list", *RAY), 4, "Ray at http://127.0.0.1:1 does not answer (Connection refused)"),
        (("list", *RAY, "--context", "x"), 2, "--context is for Kubernetes"),
        (("logs", "x", "--ray-address", "ftp://a"), 3, "is not the address of a Ray dashboard"),
        (("status", "x", "--ray-address", "http://[::1"), 3, "is not the address of a Ray dashboard"),
        (("status", "", *RAY), 3, "NAME '' names no job: `shoal job list --ray-address"),
        (("dashboard", "x", "--no-browser", "--ray-address", "nonsense"), 3, "is not the address of a Ray dashboard"),
        (("dashboard", "x", "--no-browser", *RAY), 4, "Ray at http://127.0.0.1:1 does not answer"),
    ],
)
def test_what_cannot_be_done_on_a_running_ray_is_one_sentence(
    here: Shell, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, says: str
) -> None:
    monkeypatch.setattr(api, "FIRST_PAUSE", 0.01)
    found, out, err = here("job", *arguments)
    assert (found, out) == (code, ""), err
    assert says in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_request_holds_the_recipe_the_code_and_time_to_save(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 1\n")
    options = JobOptions(
        name="first", ray_address="http://head:8265", gpus_per_node=0, working_dir=str(tmp_path), env=["A=b c"]
    )
    asked = work.train(options, "tiny", ("parallel.ranks=2",), runs="/mnt/runs")
    body, package = request(asked, options)
    assert package is not None
    archive = zipfile.ZipFile(io.BytesIO(package))
    assert sorted(archive.namelist()) == [".shoal/recipe.toml", "mine.py"]
    recipe = check_recipe(tomllib.loads(archive.read(".shoal/recipe.toml").decode()))
    assert recipe == load_recipe("tiny", overrides={"parallel.ranks": 2})
    assert shlex.split(body["entrypoint"])[:4] == ["shoal", "train", "--recipe", ".shoal/recipe.toml"]
    assert body["entrypoint"].endswith("--runs-dir /mnt/runs --data-dir /mnt/data")
    assert body["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "90", "A": "b c"}
    assert body["metadata"] == {"shoal": "train", "run": "first"} and "entrypoint_num_cpus" not in body
    again, same = request(asked, options)
    assert (again, same) == (body, package), "the same files make the same package"


def test_a_profile_for_kubernetes_does_not_matter_to_a_running_ray(
    here: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "FIRST_PAUSE", 0.01)
    Path("shoal-jobs.toml").write_text('[default]\nimage = "team:1"\nvolume = ["runs:/mnt"]\ngpus-per-node = 0\n')
    code, _, err = here("job", "submit", "train", *RAY, "--runs-dir", "/r")
    assert code == 4 and "does not answer" in err


@pytest.mark.parametrize(
    ("address", "environ", "token"),
    [
        ("http://head:8265", {}, None),
        ("http://127.0.0.1:8265", {}, "kept"),
        ("http://head:8265", {"RAY_AUTH_MODE": "token"}, "kept"),
        ("http://head:8265", {"RAY_AUTH_TOKEN": "told\n"}, "told"),
        ("https://head", {"RAY_AUTH_TOKEN_PATH": "mine"}, "from"),
    ],
)
def test_a_token_goes_only_where_it_is_meant_to(
    here: Shell, monkeypatch: pytest.MonkeyPatch, address: str, environ: dict[str, str], token: str | None
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    Path(".ray").mkdir()
    Path(".ray/auth_token").write_text("kept")
    Path("mine").write_text("from")
    assert RayCluster(address).headers == ({"Authorization": f"Bearer {token}"} if token else {})


# A real Ray


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    head = RayHead(tmp_path_factory.mktemp("ray"))
    yield head
    head.close()


@pytest.fixture
def job(ray: RayHead, tmp_path: Path) -> Any:
    """``shoal job ARGUMENTS`` about that Ray."""

    def run(*arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        address = ("--ray-address", f"http://127.0.0.1:{ray.port}")
        return shoal("job", *arguments, *address, cwd=tmp_path, RAY_AUTH_TOKEN=token)

    return run


def begin(ray: RayHead, name: str, entrypoint: str) -> None:
    """A job that somebody else submits."""
    assert ray.ask("POST", "/api/jobs/", {"entrypoint": entrypoint, "submission_id": name})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_verbs_about_a_job_of_rays(ray: RayHead, job: Any) -> None:
    begin(ray, "seven", "bash -c 'echo one; echo two; exit 7'")
    result = job("wait", "seven", "--timeout", "120")
    assert result.returncode == 7 and "seven failed, exit code 7" in result.stdout, result.stderr
    whole = job("logs", "seven").stdout.splitlines()
    assert [line for line in whole if line in ("one", "two")] == ["one", "two"]
    # Ray's own line on the command may come behind the command's.
    last = whole[-1] + "\n"
    assert job("logs", "seven", "--tail", "1").stdout == job("logs", "-f", "seven", "--tail", "1").stdout == last
    assert job("logs", "seven", "--tail", "0").stdout == ""
    begin(ray, "killed", "bash -c 'kill -9 $$'")
    assert job("wait", "killed").returncode == 137
    begin(ray, "long", "sleep 600")
    result = job("wait", "long", "--timeout", "1")
    assert result.returncode == 124 and "long has not ended in the time given" in result.stderr
    assert f"`shoal job status long --ray-address http://127.0.0.1:{ray.port}`" in result.stderr
    result = job("delete", "long")
    assert result.returncode == 4 and "end it first" in result.stderr
    assert job("cancel", "long").stdout == "long was told to end: it saves a checkpoint first\n"
    assert job("wait", "long").returncode == 130
    assert job("cancel", "long").stdout == "long has ended already: stopped\n"
    assert json.loads(job("list", "-o", "json").stdout) == [], "they are others'"
    listed = json.loads(job("list", "--all", "-o", "json").stdout)
    assert [(each["name"], each["phase"]) for each in listed] == [
        ("long", "stopped"), ("killed", "failed"), ("seven", "failed"), ("ready", "succeeded")
    ]  # fmt: skip
    assert job("delete", "seven", "ghost").returncode == 5
    assert job("delete", "seven", "killed").returncode == 0
    assert [each["name"] for each in json.loads(job("list", "--all", "-o", "json").stdout)] == ["long", "ready"]
    result = job("status", "ghost")
    assert result.returncode == 5 and "there is no job ghost on Ray at" in result.stderr
    for token, says in (("wrong", "does not take the token"), (" ", "asks for a token, and none was sent")):
        result = job("list", token=token)
        assert result.returncode == 4 and says in result.stderr and "RAY_AUTH_TOKEN" in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_waits_for_resources_says_so(ray: RayHead, job: Any) -> None:
    body = {"entrypoint": "true", "submission_id": "greedy", "entrypoint_num_cpus": 1000}
    assert ray.ask("POST", "/api/jobs/", body)
    until(lambda: "waiting" in job("status", "greedy").stdout)
    result = job("status", "greedy", "-o", "json")
    assert "resources" in json.loads(result.stdout)["reasons"][0]
    result = job("logs", "greedy")
    assert result.returncode == 5 and "greedy is waiting and has no log" in result.stderr
    assert "greedy has not begun: Ray ends it as soon as" in job("cancel", "greedy").stdout
    assert job("wait", "greedy", "--timeout", "1").returncode == 124


def longer(lines: list[bytes], count: int) -> bool:
    return len(lines) > count


def refused_since(way: Way, count: int) -> bool:
    return way.refused > count


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_log_is_followed_through_a_dashboard_that_goes_away(ray: RayHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    code = f"import time\nfor i in range({LINES}):\n print('line', i)\n if i % 1000 == 0: time.sleep(0.02)"
    begin(ray, "chatty", f"python -u -c {shlex.quote(code)}")
    lines: list[bytes] = []
    with way_to(ray.port) as way:
        seen = RayCluster(f"http://127.0.0.1:{way.port}")
        thread = threading.Thread(target=lambda: logs(seen, "chatty", lines.append, follow=True), daemon=True)
        thread.start()
        for share in (LINES // 5, LINES // 2):
            until(partial(longer, lines, share))
            refused = way.refused
            way.cut()
            until(partial(refused_since, way, refused))
            way.mend()
        thread.join(240)
        assert not thread.is_alive()
    shown = [line for line in lines if line.startswith(b"line ")]
    assert shown == [f"line {index}\n".encode() for index in range(LINES)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_trains_with_local_code_is_cancelled_and_goes_on(ray: RayHead, job: Any, tmp_path: Path) -> None:
    runs, code = tmp_path / "runs", tmp_path / "code"
    code.mkdir()
    (code / "sitecustomize.py").write_text("print('local code is here')\n")
    sets = [part for each in SMALL for part in ("--set", each)]
    train = ("submit", "train", *CPU, *sets, "--runs-dir", str(runs), "--working-dir", str(code))
    result = job(*train, "--set", "parallel.ranks=2", "--name", "first")
    assert result.returncode == 0, result.stderr
    assert f"first submitted to Ray at http://127.0.0.1:{ray.port}: `shoal job status first --ray" in result.stdout
    result = job(*train, "--name", "first")
    assert result.returncode == 4 and "has a job first already: choose another --name" in result.stderr
    follow = ("job", "logs", "-f", "first", "--ray-address", f"http://127.0.0.1:{ray.port}")
    with started(*follow, cwd=tmp_path, RAY_AUTH_TOKEN=TOKEN) as following:
        wait_until(lambda: steps_done(runs / "first") >= 8, following)
        assert job("cancel", "first").returncode == 0
        assert job("wait", "first", "--timeout", "240").returncode == 130
        out, err = following.communicate(timeout=240)
        assert following.returncode == 0, err
    assert "local code is here" in out and "go on with: shoal train" in out, "it was given time to save"
    before = steps_done(runs / "first")
    assert 8 <= before < 60
    result = job(*train, "--name", "second", "--run", "first", "--wait", "--timeout", "400")
    assert result.returncode == 0, (result.stdout, result.stderr, job("logs", "second").stdout[-2000:])
    assert steps_done(runs / "first") == 60
    found = {each["name"]: each for each in json.loads(job("list", "-o", "json").stdout)}
    assert (found["first"]["phase"], found["second"]["phase"]) == ("stopped", "succeeded")
    assert found["second"]["run"] == "first" and found["second"]["kind"] == "train"
    result = job("resubmit", "first")
    assert result.returncode == 2 and "--run first to go on with its run" in result.stderr
    result = job("submit", "evaluate", "first", *CPU, "--runs-dir", str(runs), "--tokens", "500", "--wait")
    assert result.returncode == 0, (result.stdout, result.stderr)
