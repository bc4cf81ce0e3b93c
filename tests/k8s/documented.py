"""docs/kubernetes.md as it runs: its ``console`` blocks are given to a shell, against a real API server.

``python tests/k8s/documented.py`` (KUBEBUILDER_ASSETS, SHOAL_KUBE and PATH as for the tests) writes what the commands
print now into the page.

No nodes are there, and no operator: what they would do stands in comments of the page, each a request to the API server
(``<!-- PATCH /apis/… {…} -->``), where ``{uid:NAME}`` is the uid of the RayJob NAME.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path += [str(Path(__file__).parents[1] / "jobs"), str(Path(__file__).parent)]

from charted import CHART, install_others
from kube_server import ApiServer

PAGE = CHART.parents[1] / "docs" / "kubernetes.md"
NAMESPACE = "team"
COMMENT = re.compile(r"<!-- (GET|POST|PATCH|DELETE) (\S+) ?(.*?) -->", re.DOTALL)
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
# what differs from one time to the next: times, and how long ago something was
VARIES = re.compile(r"\d{4}-\d\d-\d\dT[\d:]+Z|\w{3} \w{3} +\d+ \d\d:\d\d:\d\d \d{4}|\b\d+[smh]\b")


def replayed(text: str, server: ApiServer, folder: Path) -> str:
    """The page with what its commands print now."""
    install_others(server)
    for name in ("k8s", "docs"):
        (folder / name).symlink_to(CHART.parents[1] / name)
    out, at = "", 0
    for match in sorted([*COMMENT.finditer(text), *BLOCK.finditer(text)], key=lambda each: each.start()):
        out += text[at : match.start()]
        at = match.end()
        if match.re is COMMENT:
            try:
                _request(server, *match.groups())
            except AssertionError as error:
                raise AssertionError(f"{out[-3000:]}\n{error}") from None
            out += match[0]
        else:
            commands = [_run(command, server, folder) for command in _commands(match[1])]
            out += "```console\n" + "".join(commands) + "```"
    return out + text[at:]


def _request(server: ApiServer, method: str, path: str, body: str) -> None:
    def uid(match: re.Match[str]) -> str:
        found = server.request("GET", f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs/{match[1]}")
        return str(found["metadata"]["uid"])

    content = "application/merge-patch+json" if method == "PATCH" else "application/json"
    data = json.loads(re.sub(r"\{uid:([a-z0-9-]+)\}", uid, body)) if body else None
    server.request(method, path, data, content=content)


def _commands(block: str) -> Iterator[str]:
    """Commands of a block, with the lines that go on with them: after a backslash, or up to the END of a document."""
    lines = iter(block.splitlines())
    for line in lines:
        if line.startswith("$ "):
            command = line[2:]
            while command.endswith("\\"):
                command += "\n" + next(lines)
            while "<<END" in command and not command.endswith("\nEND"):
                command += "\n" + next(lines)
            yield command


def _run(command: str, server: ApiServer, folder: Path) -> str:
    env = os.environ | {
        "KUBECONFIG": str(server.kubeconfig),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "120",
        "NO_COLOR": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    # helm and kubectl complain of what a server of 2020 does not know
    errors = subprocess.DEVNULL if command.startswith(("helm", "kubectl")) else subprocess.STDOUT
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=120
    )
    lines = [line.rstrip() for line in done.stdout.rstrip("\n").splitlines()]
    return "".join(f"{line}\n" for line in (f"$ {command}", *lines))


def steady(text: str) -> str:
    """A page without what differs from one time to the next."""
    return re.sub(r" +\n", "\n", re.sub(r"[ ─]{2,}", "  ", VARIES.sub("…", text)))


def main() -> None:
    """Writes the page anew."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as here:
        server = ApiServer(Path(folder))
        try:
            server.install_crds()
            PAGE.write_text(replayed(PAGE.read_text(), server, Path(here)))
        finally:
            server.close()


if __name__ == "__main__":
    main()
