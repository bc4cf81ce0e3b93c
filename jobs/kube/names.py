"""What Kubernetes takes as names, keys and values, and how long a job's name may be."""

from __future__ import annotations

import re
import secrets

from shoal.jobs.recipe_errors import quote
from shoal.workers.errors import InvalidInput

# KubeRay derives the cluster's name from the job's, the pods' from the cluster's, and refuses what would not fit 63.
LONGEST_NAME = 47
_LABEL_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?", re.ASCII)  # RFC 1035: letters first
_OBJECT_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", re.ASCII)
_QUALIFIED = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?", re.ASCII)
_ENTRY = re.compile(r"[-._a-zA-Z0-9]{1,253}", re.ASCII)
# registry:port/path/name:tag@digest
_IMAGE = re.compile(
    r"(?=.{1,512}$)([A-Za-z0-9.-]+(:\d+)?/)?([a-z0-9]+([._-]+[a-z0-9]+)*/)*[a-z0-9]+([._-]+[a-z0-9]+)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@[A-Za-z0-9+._-]+:[0-9a-fA-F]{32,})?",
    re.ASCII,
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def check_name(name: str, what: str = "--name") -> None:
    """Refuses a name that the operator would: it must be an RFC 1035 label of at most 47 characters."""
    if len(name) > LONGEST_NAME:
        raise InvalidInput(
            f"{what} {quote(name)} has {len(name)} characters, and KubeRay takes {LONGEST_NAME}: shorten it"
        )
    if not _LABEL_NAME.fullmatch(name):
        raise InvalidInput(
            f"{what} {quote(name)} is not a name in Kubernetes: use lower-case letters, digits and '-', "
            f"a letter first, and no '-' at the end"
        )


def fresh_name(stem: str) -> str:
    """A name that begins with ``stem`` and that no other job has."""
    plain = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")
    if not plain[:1].isalpha():
        plain = f"job-{plain}".rstrip("-")
    return f"{plain[: LONGEST_NAME - 6].rstrip('-')}-{secrets.token_hex(3)[:5]}"


def check_object(name: str, what: str) -> None:
    """Refuses what is not the name of a Secret, a claim, a ServiceAccount (RFC 1123 subdomain)."""
    if len(name) > 253 or not _OBJECT_NAME.fullmatch(name):
        raise InvalidInput(f"{what} {quote(name)} is not a name in Kubernetes: use lower-case letters, digits, '-'")


def check_image(image: str, what: str) -> None:
    """Refuses what no registry could have as an image."""
    if not _IMAGE.fullmatch(image):
        raise InvalidInput(f"{what} {quote(image)} is not an image: write, say, registry/shoal:1.0")


def check_entry(name: str, what: str) -> None:
    """Refuses what is not the name of an entry of a Secret."""
    if not _ENTRY.fullmatch(name):
        raise InvalidInput(f"{what}: {quote(name)} is not an entry of a Secret: use letters, digits, '-', '_' and '.'")


def check_variable(name: str, what: str) -> None:
    """Refuses what is not the name of an environment variable."""
    if not _VARIABLE.fullmatch(name):
        raise InvalidInput(f"{what} {quote(name)} is not the name of a variable: use letters, digits and '_'")


def why_no_label_key(key: str) -> str | None:
    """Why ``key`` is not the key of a label, None when it is one."""
    prefix, slash, name = key.rpartition("/")
    if slash and (not prefix or len(prefix) > 253 or not _OBJECT_NAME.fullmatch(prefix)):
        return "what stands before '/' must be a DNS name"
    if not name or len(name) > 63 or not _QUALIFIED.fullmatch(name):
        return "use up to 63 letters, digits, '-', '_' and '.', a letter or digit at both ends"
    return None


def why_no_label_value(value: str) -> str | None:
    """Why ``value`` is not the value of a label, None when it is one."""
    if value and (len(value) > 63 or not _QUALIFIED.fullmatch(value)):
        return "use up to 63 letters, digits, '-', '_' and '.', a letter or digit at both ends"
    return None


def check_label(key: str, value: str, what: str) -> None:
    """Refuses a pair that Kubernetes does not take as a label."""
    if why := why_no_label_key(key):
        raise InvalidInput(f"{what}: {quote(key)} is not the key of a label: {why}")
    if why := why_no_label_value(value):
        raise InvalidInput(f"{what}: {quote(value)} is not the value of a label: {why}")
