"""What every test stands on: one thread, fixed seeds, a short folder for Ray, poisoned memory under kernels."""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

KERNELS = Path(__file__).parent / "kernels"

# Triton's own functions are compiled, or interpreted, as this says while triton is first imported, which any of a
# dozen packages may do: it is said before them, or the tests of Triton kernels would be skipped.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Deterministic products need it, and PyTorch looks for it at the process's first product on a GPU, once for all.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Examples of a tensor test differ a hundredfold in size, so none has a deadline; pytest-timeout catches what hangs.
_common: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=20, **_common)
settings.register_profile("ci", max_examples=20, derandomize=True, **_common)
settings.register_profile("slow", max_examples=300, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where there is none; torch is imported only to find that out."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session", autouse=True)
def ray_temp_dir() -> Iterator[Path]:
    """Ray's folder in this session, for tests and the processes they start (as RAY_TMPDIR); no other Ray uses it.

    Ray puts Unix sockets about 75 characters below it and a socket's path ends at 107, so pytest's own is too long.
    """
    base = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="ray", dir=base if len(base) < 20 else "/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _served(folder: Path) -> Iterator[Any]:
    """A real API server with KubeRay's CRDs, see ``tests/jobs/kube_server.py``; skips, with the reason, without one."""
    from kube_server import ApiServer, missing

    if why := missing():
        pytest.skip(why)
    server = ApiServer(folder)
    try:
        server.install_crds()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The API server of all tests but those of the chart."""
    yield from _served(tmp_path_factory.mktemp("kube"))


@pytest.fixture(scope="session")
def chart_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Another one: tests of the chart install kinds of other operators, which tests of jobs miss or have as newer."""
    yield from _served(tmp_path_factory.mktemp("kube"))


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ray for up to four ranks of a service, and a cache of its own; files that want another Ray have their own."""
    from shoal.cluster.local import ray_session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        with ray_session(4, dashboard=False) as started:
            yield started


@pytest.fixture(autouse=True)
def deterministic() -> None:
    """Fixed seeds, and one thread for torch; neither torch nor numpy is imported for tests that do not use it."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
        torch.manual_seed(0)


def _poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
    """``allocate``, with NaN (integers: the largest value) in what it leaves undefined."""
    import torch

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        tensor = allocate(*args, **kwargs)
        if kwargs.get("out") is not None or tensor.is_meta:
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.fill_(float("nan"))
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

    return poisoned


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under tests/kernels, memory that a kernel asks for and never writes holds NaN, not the zeros of a fresh page.

    torch's own ``fill_uninitialized_memory`` acts only under deterministic algorithms, which are other algorithms.
    """
    if not request.path.is_relative_to(KERNELS):
        return
    import torch

    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ]:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
