"""The image without an engine to build it: its Dockerfile linted, its steps run in an environment of their own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from charted import CHART, SERVICE, pods_of, rendered

CHECKOUT = Path(__file__).parents[2]
DOCKERFILE = CHECKOUT / "k8s" / "image" / "Dockerfile"
HADOLINT = Path(sys.executable).parent / "hadolint"
Stage = list[tuple[str, str]]


def stages() -> dict[str, Stage]:
    """Instructions and their arguments of each stage, by its name, those of the stages that it begins with first."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    found: dict[str, Stage] = {}
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        instruction, _, arguments = line.partition(" ")
        if instruction == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", arguments).groups()  # type: ignore[union-attr]
            found[name] = list(found.get(base, [("FROM", base)]))
        else:
            list(found.values())[-1].append((instruction, arguments))
    return found


@pytest.mark.skipif(not HADOLINT.exists(), reason="needs pip install -e '.[deploy]'")
def test_the_linter_has_nothing_to_say() -> None:
    result = subprocess.run([HADOLINT, DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_each_target_is_pinned_needs_no_root_and_has_what_pods_want(target: str) -> None:
    steps = stages()[target]
    base = next(arguments for instruction, arguments in steps if instruction == "FROM")
    assert re.search(r":\d+\.\d+\.\d+", base), "a base is named by its whole version"
    user = [arguments for instruction, arguments in steps if instruction == "USER"][-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "Kubernetes must see that it is not root"
    if shutil.which("helm"):
        wanted = pods_of(rendered(SERVICE))[0]["spec"]["securityContext"]
        assert user == f"{wanted['runAsUser']}:{wanted['runAsGroup']}"
    installed = {
        w for instruction, text in steps if instruction == "RUN" and "apt-get install" in text for w in text.split()
    }
    # KubeRay's commands and probes, the chart's certificates, Triton
    assert {"bash", "wget", "openssl", "gcc"} <= installed and "ca-certificates" in installed
    assert ("libibverbs1" in installed) is (target == "cuda")


def test_what_is_copied_is_there_and_is_not_ignored() -> None:
    """The context is what .dockerignore lets through: a path that it leaves out fails the build."""
    kept = {
        line[1:] for line in (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    steps = [step for stage in stages().values() for step in stage]
    sources = {source for name, text in steps if name == "COPY" for source in shlex.split(text)[:-1]}
    assert sources and sources <= kept
    assert [source for source in sources if not (CHECKOUT / source).exists()] == []


def test_the_versions_of_ray_python_and_shoal_agree() -> None:
    ray = re.search(r"^ray==(\S+)$", (CHECKOUT / "constraints.txt").read_text(), re.MULTILINE)
    assert ray and yaml.safe_load((CHART / "values.yaml").read_text())["rayVersion"] == ray[1]
    from shoal import __version__

    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__
    assert f"shoal:{__version__}" in DOCKERFILE.read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("extras", "module"), [(None, "kubernetes"), ("serve,s3", "s3fs")])
def test_the_steps_of_the_image_install_a_shoal_that_works(extras: str | None, module: str, tmp_path: Path) -> None:
    """The wheel's stage and the script that both targets run, with this machine's index instead of PyTorch's own."""
    for target in ("cpu", "cuda"):
        told = [text for instruction, text in stages()[target] if instruction == "ARG"]
        assert [text.partition("=")[0] for text in told] == ["TORCH_INDEX", "EXTRAS"]
    wheels, here = tmp_path / "wheels", tmp_path / "opt"
    (wheel_step,) = [text for instruction, text in stages()["wheel"] if text.startswith("pip wheel")]
    context = tmp_path / "src"
    context.mkdir()
    for instruction, text in stages()["wheel"]:
        if instruction == "COPY":
            *sources, target = shlex.split(text)
            for source in sources:
                where = context / target if target != "./" else context
                subprocess.run(["cp", "-a", CHECKOUT / source, where], check=True)
    command = wheel_step.replace("/wheels", str(wheels))
    subprocess.run([sys.executable, "-m", *shlex.split(command)], cwd=context, check=True, capture_output=True)
    (wheel,) = wheels.glob("shoal-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "shoal/jobs/recipes/tiny.toml" in names and "shoal/workers/trainer.py" in names

    here.mkdir()
    for name in ("constraints.txt", "k8s/image/install"):
        shutil.copy(CHECKOUT / name, here)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    bin_folder = tmp_path / "venv" / "bin"
    env = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "COMPILE": "no"}
    env.pop("PYTHONPATH", None)
    env |= {"EXTRAS": extras} if extras else {}
    result = subprocess.run([here / "install", wheels], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    for line in ("shoal config list", "ray --version", f"python -c 'import shoal.jobs.serve.deployed, {module}'"):
        done = subprocess.run(shlex.split(line), cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
