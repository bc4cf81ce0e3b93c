"""Writes schema.json, the part of KubeRay's CRDs that manifests are checked against, in a compact form.

    python -m shoal.jobs.kube.compact_schema FOLDER_OF_CRDS

FOLDER_OF_CRDS holds ``ray.io_rayjobs.yaml`` and ``ray.io_rayservices.yaml`` of KubeRay's ``config/crd/bases``. Kept:
the spec's types, required and known keys, bounds, enums. Dropped: descriptions, defaults, list types (which matter to a
merge), CEL rules (``rules.py`` has them) and the status. Parts that occur more than once, such as a pod's template, are
written once and referred to by their number.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

KEPT = (
    "type",
    "format",
    "required",
    "enum",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "pattern",
)
FLAGS = {
    "x-kubernetes-int-or-string": "int_or_string",
    "x-kubernetes-preserve-unknown-fields": "open",
    "nullable": "nullable",
}
SHORTEST = 80  # characters of a part that is worth a number


class Compactor:
    """Schemas with equal parts written once, in ``parts``."""

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self._numbers: dict[str, int] = {}

    def compact(self, schema: dict[str, Any]) -> Any:
        """The schema without what is dropped, or the number of a part that equals it."""
        found: dict[str, Any] = {key: schema[key] for key in KEPT if key in schema}
        found |= {short: True for long, short in FLAGS.items() if schema.get(long)}
        if "properties" in schema:
            found["keys"] = {key: self.compact(value) for key, value in schema["properties"].items()}
        if isinstance(schema.get("additionalProperties"), dict):
            found["values"] = self.compact(schema["additionalProperties"])
        if "items" in schema:
            found["items"] = self.compact(schema["items"])
        text = json.dumps(found, sort_keys=True)
        if len(text) < SHORTEST:
            return found
        if text not in self._numbers:
            self._numbers[text] = len(self.parts)
            self.parts.append(found)
        return self._numbers[text]


def main(folder: Path) -> None:
    """Reads the CRDs and writes schema.json beside this file."""
    compactor = Compactor()
    kinds = {}
    for plural in ("rayjobs", "rayservices"):
        crd = yaml.load((folder / f"ray.io_{plural}.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        served = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
        kinds[crd["spec"]["names"]["kind"]] = compactor.compact(
            served["schema"]["openAPIV3Schema"]["properties"]["spec"]
        )
    parts = ",\n".join(json.dumps(part, sort_keys=True, separators=(",", ":")) for part in compactor.parts)
    text = f'{{"kinds": {json.dumps(kinds)}, "parts": [\n{parts}\n]}}\n'
    Path(__file__).with_name("schema.json").write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
