"""``shoal`` in the test's own process: a twentieth of a second where a process of its own takes half of one."""

from __future__ import annotations

import sys

import pytest

from shoal.jobs.cli.main import main


def called(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """``shoal ARGUMENTS``: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["shoal", *arguments])
    capfd.readouterr()
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    return (code, *capfd.readouterr())
