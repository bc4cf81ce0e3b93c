"""Ranks that measure cases: those that hang, or have no time left, cost no others."""

from __future__ import annotations

import signal
import time

import pytest

from shoal.jobs.bench import cases
from shoal.jobs.bench.cases import Patience, run_cases, tell


def measuring(rank: int, ranks: int, store: str, names: list[str], results: str) -> None:
    """Measures at once, but for ``hang``, which does not listen either; ``late`` fails when it was measured."""
    for index, name in enumerate(names):
        tell(rank, results, {"begins": index})
        if name == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(3600)
        tell(rank, results, {"case": index, "rows": [{"what": name}]})
        if name == "late":
            raise ValueError("let go too late")


@pytest.mark.slow
def test_a_case_that_hangs_is_left_out_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "GRACE", 0.2)
    said: list[str] = []
    found = dict(run_cases(measuring, 2, ["first", "hang", "last"], said.append, Patience(case=15)))
    assert list(found) == ["first", "last"]
    assert [line for line in said if line.startswith("left out")] == ["left out, 2 ranks, hang: not done after 15 s"]


def test_what_there_is_no_time_for_is_left_out() -> None:
    said: list[str] = []
    assert list(run_cases(measuring, 1, ["first", "last"], said.append, Patience(end=time.monotonic()))) == []
    assert said == ["left out, 1 rank, first, last: no time was left"]


def test_what_was_measured_before_its_ranks_failed_is_kept() -> None:
    said: list[str] = []
    found = dict(run_cases(measuring, 1, ["late", "last"], said.append))
    assert list(found) == ["late", "last"]
    assert "measured, then 1 rank, late: ValueError: let go too late" in said
