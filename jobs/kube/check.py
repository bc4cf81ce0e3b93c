"""All that is checked of a manifest before it leaves this machine, whoever wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shoal.jobs.kube.rules import check_rules
from shoal.jobs.kube.schema import check_spec
from shoal.jobs.recipe_errors import plain, quote
from shoal.workers.errors import InvalidInput

_TOP = ("apiVersion", "kind", "metadata", "spec")
_METADATA = ("name", "namespace", "labels", "annotations", "finalizers", "ownerReferences")


def check_manifest(manifest: dict[str, Any]) -> None:
    """Refuses what KubeRay's schema or its operator would refuse, and what an API server would drop without a word.

    Raises InvalidInput in one sentence.
    """
    kind = manifest.get("kind")
    if manifest.get("apiVersion") != "ray.io/v1" or kind not in ("RayJob", "RayService"):
        raise InvalidInput(
            f"apiVersion={quote(manifest.get('apiVersion'))}, kind={quote(kind)}: a job is a RayJob or a RayService "
            f"of ray.io/v1; leave both out of the patch"
        )
    _check_known(manifest, _TOP, "")
    metadata = manifest.get("metadata")
    if not isinstance(metadata, dict):
        raise InvalidInput(f"metadata={quote(metadata)} is not a table of keys: set metadata.name")
    _check_known(metadata, _METADATA, "metadata.")
    for key in ("name", "namespace"):
        if not isinstance(metadata.get(key, ""), str):
            raise InvalidInput(f"metadata.{key}={quote(metadata[key])} is not a text: write it in quotes")
    for key in ("labels", "annotations"):
        pairs = metadata.get(key, {})
        if not isinstance(pairs, dict):
            raise InvalidInput(f"metadata.{key}={quote(pairs)} is not a table of keys: write keys and values")
        for name, value in pairs.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise InvalidInput(f"metadata.{key}: {quote(name)}={quote(value)} is not text: write both in quotes")
    if not metadata.get("name"):
        raise InvalidInput("metadata.name is missing: set it")
    check_spec(kind, manifest.get("spec"))
    check_rules(manifest)


def _check_known(value: dict[Any, Any], known: Sequence[str], where: str) -> None:
    for key in value:
        if key not in known:
            raise InvalidInput(f"{where}{plain(key)} is not a field of a manifest: it may have {', '.join(known)}")
