"""Requests for jobs on Kubernetes that tests begin with."""

from __future__ import annotations

from typing import Any

from shoal.jobs.kube import work
from shoal.jobs.kube.manifest import checked_objects
from shoal.jobs.kube.options import resolve_options

Object = dict[str, Any]


def job_manifest(recipe: str = "tiny", sets: tuple[str, ...] = (), **options: Any) -> Object:
    """A training job's checked manifest; on CPUs unless told otherwise."""
    given = {"name": "first", "volume": ["runs:/mnt/shoal"], "gpus_per_node": 0, **options}
    resolved = resolve_options(given)
    return checked_objects(work.train(resolved, recipe, sets), resolved)[-1]


def service_manifest(**options: Any) -> Object:
    """A service's checked manifest."""
    given = {"name": "served", "volume": ["runs:/mnt/shoal"], "secret": ["SHOAL_API_TOKEN=tokens:one"], **options}
    resolved = resolve_options(given)
    return checked_objects(work.serve(resolved, "first"), resolved)[-1]
