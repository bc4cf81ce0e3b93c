"""``shoal`` in an empty folder that is also the home: a fixture of tests about commands."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from called import called

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture(name="here")
def here_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    """``shoal ARGUMENTS``: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SHOAL_PROFILES", raising=False)
    return partial(called, monkeypatch, capfd)
