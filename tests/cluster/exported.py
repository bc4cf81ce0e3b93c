"""Reads what runs and services export, where Prometheus would read it."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator, Mapping
from functools import wraps
from typing import Any

import pytest
import ray

PATIENCE = 60.0  # seconds; a machine may be busy
Series = dict[str, float]


def asynchronous(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Makes a test of a coroutine function."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 2 * PATIENCE))

    return run


def address_of_metrics() -> str:
    """Where the first node of the Ray that this process is in exports its metrics."""
    node = ray.nodes()[0]
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def exported(endpoint: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, without ``ray_shoal_``, tags and value of every series of ours; none as long as nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        text = opener.open(endpoint, timeout=5).read().decode()
    except OSError:
        return
    for name, tags, value in re.findall(r"^ray_shoal_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        yield name, dict(re.findall(r'(\w+)="([^"]*)"', tags)), float(value)


def read(endpoint: str, model: str) -> Series:
    """``{name{the other tags}: value}`` of what is exported for a model; the names without their common beginning."""
    values = {}
    for name, own, value in exported(endpoint):
        if name.startswith("serve_") and own["model"] == model:
            rest = ",".join(f"{key}={own[key]}" for key in ("finish", "le", "layer", "expert") if own.get(key))
            values[f"{name}{{{rest}}}".removeprefix("serve_") if rest else name.removeprefix("serve_")] = value
    return values


def read_run(endpoint: str, run: str) -> Series:
    """``{name{the other tags}: value}`` of what is exported for a run."""
    values = {}
    for name, own, value in exported(endpoint):
        if own.get("run") == run:
            keys = ("layer", "expert", "device", "part", "branch", "fetch")
            rest = ",".join(own[key] for key in keys if own.get(key))
            values[f"{name}{{{rest}}}" if rest else name] = value
    return values


def wait_for_run(endpoint: str, run: str, expected: Mapping[str, float]) -> Series:
    """Reads until a run's series have these values; fails with what it read last after a minute."""
    end = time.monotonic() + PATIENCE
    while True:
        values = read_run(endpoint, run)
        if all(values.get(key) == pytest.approx(value) for key, value in expected.items()):
            return values
        assert time.monotonic() < end, f"expected {expected}, the endpoint has {values}"
        time.sleep(0.2)


async def wait_for(
    endpoint: str,
    model: str,
    true: Callable[[Series], object],
    between: Callable[[], object] = lambda: None,
    pause: float = 0.1,
) -> Series:
    """Reads until ``true``, calling ``between`` and pausing between two looks; fails with what it read last after a
    minute."""
    end = time.monotonic() + PATIENCE
    while True:
        values = await asyncio.to_thread(read, endpoint, model)
        if true(values):
            return values
        assert time.monotonic() < end, f"the endpoint has {values}"
        between()
        await asyncio.sleep(pause)


async def wait_for_values(endpoint: str, model: str, expected: Mapping[str, float]) -> Series:
    """Reads until these series have these values."""
    return await wait_for(
        endpoint, model, lambda got: all(got.get(key) == pytest.approx(expected[key], rel=1e-12) for key in expected)
    )
