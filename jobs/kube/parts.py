"""Options written as text (``CLAIM:/path``, ``KEY=VALUE``) as the parts of a pod that they stand for."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.jobs.kube.names import check_entry, check_label, check_object, check_variable
from shoal.jobs.recipe_errors import quote
from shoal.workers.errors import InvalidInput

Object = dict[str, Any]

_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_VOLUME = "write CLAIM:/path, CLAIM:/path:ro, secret/NAME:/path, configmap/NAME:/path or /host/path:/path"
_PREFIXES = ("ray.io/", "shoal/")  # of labels that the operator and this program select by
_QUEUE = {"kueue.x-k8s.io/queue-name": "--queue", "kueue.x-k8s.io/priority-class": "--priority"}
_RESERVED = ("/dev/shm", "/etc/shoal", "/var/cache/shoal", "/etc/ray/tls", "/etc/ray/authority")


@dataclass(frozen=True)
class Volume:
    """A volume of a pod. ``shared``: it outlives the pod, and other pods see what is written to it."""

    name: str
    path: str
    source: Object
    read_only: bool
    shared: bool

    def mount(self) -> Object:
        """As a container mounts it."""
        return {"name": self.name, "mountPath": self.path} | ({"readOnly": True} if self.read_only else {})

    def declare(self) -> Object:
        """As a pod declares it."""
        return {"name": self.name, **self.source}


def volumes(texts: Sequence[str]) -> list[Volume]:
    """``--volume``. Raises InvalidInput for a text of another form, or a path that is mounted twice."""
    found: list[Volume] = []
    for index, text in enumerate(texts):
        volume = _volume(text, f"volume-{index}")
        taken = [each.path for each in found if each.path == volume.path]
        taken += [path for path in _RESERVED if f"{volume.path}/".startswith(f"{path}/")]
        if taken:
            raise InvalidInput(f"--volume {quote(text)}: something is mounted at {taken[0]} already: choose another")
        found.append(volume)
    return found


def _volume(text: str, name: str) -> Volume:
    source, _, rest = text.partition(":")
    path, _, mode = rest.partition(":")
    path = path.rstrip("/") or path
    plain = path.startswith("/") and path != "/" and path == posixpath.normpath(path) and path.isprintable()
    climbs = ".." in source.split("/")
    if not source or climbs or not plain or mode not in ("", "ro"):
        raise InvalidInput(f"--volume {quote(text)} is not a volume: {_VOLUME}")
    what = f"--volume {quote(text)}: "
    if source.startswith("/"):
        return Volume(name, path, {"hostPath": {"path": source}}, mode == "ro", shared=True)
    kind, slash, object_name = source.partition("/")
    if not slash:
        check_object(source, f"{what}the claim")
        read = {"readOnly": True} if mode == "ro" else {}
        return Volume(name, path, {"persistentVolumeClaim": {"claimName": source, **read}}, mode == "ro", shared=True)
    check_object(object_name, f"{what}the {kind}")
    if kind == "secret":
        return Volume(name, path, {"secret": {"secretName": object_name}}, True, shared=False)
    if kind == "configmap":
        return Volume(name, path, {"configMap": {"name": object_name}}, True, shared=False)
    raise InvalidInput(f"--volume {quote(text)} is not a volume: {_VOLUME}")


def pairs(texts: Sequence[str], what: str) -> dict[str, str]:
    """``KEY=VALUE`` texts. Raises InvalidInput."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InvalidInput(f"{what} {quote(text)} is not of the form KEY=VALUE: write, say, {what} key=value")
        found[key] = value
    return found


def labels(texts: Sequence[str], what: str) -> dict[str, str]:
    """``KEY=VALUE`` texts that are labels. Raises InvalidInput."""
    found = pairs(texts, what)
    for key, value in found.items():
        check_label(key, value, what)
    return found


def own_labels(texts: Sequence[str]) -> dict[str, str]:
    """``--label``. Raises InvalidInput, also for a label that is not a person's to set."""
    found = labels(texts, "--label")
    for key, value in found.items():
        if key in _QUEUE:
            raise InvalidInput(f"--label {quote(f'{key}={value}')} is set by {_QUEUE[key]}: use that")
        if key.startswith(_PREFIXES) or key == "app.kubernetes.io/managed-by":
            raise InvalidInput(
                f"--label {quote(f'{key}={value}')}: {key} is set by Shoal or KubeRay: choose another key"
            )
    return found


def variables(env: Sequence[str], secrets: Sequence[str]) -> tuple[list[Object], list[Object]]:
    """``env`` and ``envFrom`` of a container, of ``--env`` and ``--secret``. Raises InvalidInput."""
    plain = pairs(env, "--env")
    for key in plain:
        check_variable(key, "--env")
    found: list[Object] = [{"name": key, "value": value} for key, value in plain.items()]
    whole: list[Object] = []
    for text in secrets:
        key, equals, place = text.partition("=")
        if not equals:
            check_object(text, "--secret")
            whole.append({"secretRef": {"name": text}})
            continue
        name, colon, entry = place.partition(":")
        if not colon or not entry:
            raise InvalidInput(f"--secret {quote(text)} is not a variable from a Secret: write KEY=SECRET:ENTRY")
        check_variable(key, "--secret")
        check_object(name, "--secret")
        check_entry(entry, f"--secret {quote(text)}")
        if key in plain:
            raise InvalidInput(f"{key} is given by --env and by --secret: leave one of them out")
        if any(each["name"] == key for each in found):
            raise InvalidInput(f"{key} is given by --secret twice: leave one of them out")
        found.append({"name": key, "valueFrom": {"secretKeyRef": {"name": name, "key": entry}}})
    return found, whole


def tolerations(texts: Sequence[str]) -> list[Object]:
    """``--toleration``: KEY[=VALUE][:EFFECT]. Raises InvalidInput."""
    found = []
    for text in texts:
        rest, colon, effect = text.rpartition(":")
        if not colon:
            rest, effect = text, ""
        if colon and effect not in _EFFECTS:
            raise InvalidInput(
                f"--toleration {quote(text)} has the effect {quote(effect)}: use {', '.join(_EFFECTS)}, or leave it out"
            )
        key, equals, value = rest.partition("=")
        check_label(key, value, f"--toleration {quote(text)}")
        toleration: Object = {"key": key, "operator": "Equal" if equals else "Exists"}
        toleration |= {"value": value} if equals else {}
        found.append(toleration | ({"effect": effect} if effect else {}))
    return found
