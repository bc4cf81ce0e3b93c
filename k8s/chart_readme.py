"""Writes chart/README.md from chart/values.yaml: a row for every value with a comment that begins with ``# --``.

python k8s/chart_readme.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "chart"
HEAD = """# The chart `shoal`

{description}. KubeRay's operator (1.4 or later; 1.5.1 for `rayTokenAuth`) is a prerequisite, and not part of it.

```
helm install demo k8s/chart --set image.repository=registry.example/shoal,storage.claim=runs,service.run=first
helm test demo
```

The run lies on the claim `runs`, below `runs/`. `kind: RayCluster` installs a cluster that waits for jobs instead, and
`kind: Jobs` what jobs share that bring their clusters along. [docs/kubernetes.md](../../docs/kubernetes.md) uses both,
and `ci/` has files of values for each.

## Values

Written from the comments of values.yaml by `python k8s/chart_readme.py`.

| key | what it is | default |
|---|---|---|
"""


def commented(text: str) -> dict[str, str]:
    """Comments by the dotted key that follows each."""
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []  # the keys that the present line lies below, with their indents
    comment = ""
    for line in text.splitlines():
        bare = line.strip()
        if bare.startswith("# --"):
            comment = bare.removeprefix("# --").strip()
        elif bare.startswith("#") and comment:
            comment += f" {bare.removeprefix('#').strip()}"
        elif match := re.match(r"( *)([A-Za-z]+):", line):
            indent = len(match[1])
            above = [each for each in above if each[0] < indent] + [(indent, match[2])]
            if comment:
                found[".".join(key for _, key in above)] = comment
            comment = ""
    return found


def readme() -> str:
    """The whole of chart/README.md."""
    text = (CHART / "values.yaml").read_text()
    values, chart = yaml.safe_load(text), yaml.safe_load((CHART / "Chart.yaml").read_text())
    rows = [f"| `{key}` | {what} | `{_shown(values, key)}` |" for key, what in commented(text).items()]
    return HEAD.format(description=chart["description"]) + "\n".join(rows) + "\n"


def _shown(values: Any, key: str) -> str:
    for part in key.split("."):
        values = values[part]
    return json.dumps(values)


if __name__ == "__main__":
    (CHART / "README.md").write_text(readme())
