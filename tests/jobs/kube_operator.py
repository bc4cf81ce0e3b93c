"""A small operator for tests: it does with RayJobs what KubeRay does, on one Ray cluster of this machine.

A new RayJob gets a cluster's name, the Service and the Secret of its Ray, a submitter's pod with the log, and its
entrypoint is handed to Ray; what Ray says of it is written to its status. A suspended one loses its Ray job, and is
handed to Ray anew when it is not suspended any more.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from kube_kubelet import Kubelet, Log, make_pod, set_pod
from kube_server import ApiServer, address_of_this_machine
from ports import free_port

TOKEN = "a-token-of-forty-characters-for-the-tests"
API_TOKEN = "a-token-that-clients-of-a-service-send"
RECIPE = "/etc/shoal/recipe/recipe.toml"
PATIENCE = 180.0


class RayHead:
    """A Ray cluster of one node whose dashboard asks for a token, reachable by this machine's own address."""

    def __init__(self, folder: Path, cpus: int = 4) -> None:
        self.port = free_port()
        self._log = (folder / "ray.log").open("wb")
        tools = str(Path(sys.executable).parent)
        env = {
            **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_JOB_STOP_WAIT_TIME_S": "90",
            "SHOAL_API_TOKEN": API_TOKEN,
            "PATH": f"{tools}:{os.environ['PATH']}",
        }  # fmt: skip
        command = [
            f"{tools}/ray", "start", "--head", "--block", "--port=0", "--dashboard-host=0.0.0.0",
            f"--dashboard-port={self.port}", f"--dashboard-agent-listen-port={free_port()}",
            f"--ray-client-server-port={free_port()}", f"--num-cpus={cpus}", "--object-store-memory=100000000",
            "--disable-usage-stats", f"--temp-dir={os.environ['RAY_TMPDIR']}/head",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, env=env, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder
        )
        end = time.monotonic() + PATIENCE
        while self.ask("GET", "/api/version") is None:
            assert self._process.poll() is None and time.monotonic() < end, (folder / "ray.log").read_text()[-3000:]
            time.sleep(0.1)
        # its agent, who takes jobs, begins a while after the dashboard answers
        while self.ask("POST", "/api/jobs/", {"entrypoint": "true", "submission_id": "ready"}) is None:
            assert time.monotonic() < end, "Ray takes no job"
            time.sleep(0.1)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Ray's answer, None when there is none or it refuses."""
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read())
        except (urllib.error.HTTPError, OSError):
            return None

    def put(self, path: str, body: Any) -> int:
        """Sends a body; the status of the answer."""
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="PUT")
        with urllib.request.urlopen(request, timeout=120) as answer:
            return int(answer.status)

    def close(self) -> None:
        """Ends all of its processes, which are in its session."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self._process.pid).children(recursive=True)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        self._process.wait()
        self._log.close()


class Operator(threading.Thread):
    """Looks after the RayJobs of one namespace until it is closed."""

    def __init__(self, server: ApiServer, kubelet: Kubelet, ray: RayHead, namespace: str, folder: Path) -> None:
        super().__init__(daemon=True)
        self._server, self._kubelet, self._ray, self._folder = server, kubelet, ray, folder
        self._namespace, self._path = namespace, f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._closing = threading.Event()
        self._attempts = 0
        self.failure: Exception | None = None
        self.start()

    def run(self) -> None:
        """The loop of every operator: look, compare, act."""
        try:
            while not self._closing.wait(0.2):
                for job in self._server.request("GET", self._path)["items"]:
                    self._look_after(job)
        except Exception as error:
            self.failure = error

    def _look_after(self, job: Any) -> None:
        name, status = job["metadata"]["name"], job.get("status") or {}
        state = status.get("jobDeploymentStatus", "")
        if state in ("Complete", "Failed"):
            return
        if job["spec"].get("suspend"):
            if state in ("Initializing", "Running"):
                self._ray.ask("POST", f"/api/jobs/{status['jobId']}/stop")
                self._copy_log(status["jobId"], ended=True)
                path = f"/api/v1/namespaces/{self._namespace}/pods/{status['jobId']}"
                self._server.request("DELETE", path, {"gracePeriodSeconds": 0})
            self._tell(name, {"jobDeploymentStatus": "Suspended", "jobStatus": "", "jobId": "", "rayClusterName": ""})
        elif state in ("", "Suspended"):
            self._begin(name, job)
        else:
            self._follow(name, status["jobId"])

    def _tell(self, name: str, status: dict[str, Any]) -> None:
        self._server.patch_status("rayjobs", self._namespace, name, {k: v or None for k, v in status.items()})

    def _begin(self, name: str, job: Any) -> None:
        self._attempts += 1
        cluster, identity = f"{name}-c{self._attempts}", f"{name}-{self._attempts}"
        core = f"/api/v1/namespaces/{self._namespace}"
        secret = {"metadata": {"name": cluster}, "data": {"auth_token": base64.b64encode(TOKEN.encode()).decode()}}
        self._server.request("POST", f"{core}/secrets", secret)
        service, port = f"{cluster}-head-svc", self._ray.port
        spec = {"ports": [{"name": "dashboard", "port": port}], "clusterIP": "None"}
        self._server.request("POST", f"{core}/services", {"metadata": {"name": service}, "spec": spec})
        # the API server's proxy goes to addresses of pods alone
        head, address = f"{cluster}-head", address_of_this_machine()
        labels = {"ray.io/cluster": cluster, "ray.io/node-type": "head"}
        ips: dict[str, Any] = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}
        make_pod(self._server, self._namespace, head, labels, {"running": {}}, self._kubelet.node, "ray-head", **ips)
        target = {"kind": "Pod", "name": head, "namespace": self._namespace}
        ports = [{"name": "dashboard", "port": port}]
        subset = {"addresses": [{"ip": address, "targetRef": target}], "ports": ports}
        self._server.request("POST", f"{core}/endpoints", {"metadata": {"name": service}, "subsets": [subset]})
        # what the pod's mounts would do: the recipe in the head's annotation is a file
        pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
        recipe = self._folder / f"{identity}.toml"
        recipe.write_text((pod["metadata"].get("annotations") or {}).get("shoal/recipe", ""))
        entrypoint = job["spec"]["entrypoint"].replace(RECIPE, str(recipe))
        if job["spec"].get("submissionMode") != "HTTPMode":  # the submitter's shell, then `ray job submit`
            entrypoint = subprocess.list2cmdline(shlex.split(entrypoint))
        body = {"entrypoint": entrypoint, "submission_id": identity, "metadata": job["spec"].get("metadata")}
        assert self._ray.ask("POST", "/api/jobs/", body), f"Ray did not take {identity}"
        self._kubelet.logs[identity] = Log()
        running: dict[str, Any] = {"running": {}}
        make_pod(
            self._server, self._namespace, identity, {"job-name": name}, running, self._kubelet.node, phase="Running"
        )
        url = f"{service}.{self._namespace}.svc.cluster.local:{port}"
        told = {"jobDeploymentStatus": "Running", "jobStatus": "PENDING", "jobId": identity}
        self._tell(name, {**told, "rayClusterName": cluster, "dashboardURL": url})

    def _follow(self, name: str, identity: str) -> None:
        said = self._ray.ask("GET", f"/api/jobs/{identity}")
        if said is None:
            return
        over = said["status"] in ("SUCCEEDED", "FAILED", "STOPPED")
        self._copy_log(identity, over)
        told = {"jobStatus": said["status"], "jobDeploymentStatus": "Running", "message": said.get("message")}
        if over:  # a submitter's pod ends with 1 whatever the job's own exit code is
            failed = said["status"] == "FAILED"
            told |= {"jobDeploymentStatus": "Failed", "reason": "AppFailed"} if failed else {}
            told |= {} if failed else {"jobDeploymentStatus": "Complete"}
            state = {"terminated": {"exitCode": int(failed)}}
            set_pod(self._server, self._namespace, identity, state, phase="Failed" if failed else "Succeeded")
        self._tell(name, told)

    def _copy_log(self, identity: str, ended: bool) -> None:
        text, log = "", self._kubelet.logs[identity]
        until = time.monotonic() + 60
        while not text and time.monotonic() < until:  # a busy Ray may not answer; Ray itself writes the first lines
            text = (self._ray.ask("GET", f"/api/jobs/{identity}/logs") or {}).get("logs") or ""
            if not ended:
                break
        lines = text.splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n") and not ended:
            lines.pop()
        for index in range(len(log.lines), len(lines)):
            log.write(lines[index].rstrip("\n"), index)
        log.ended = ended

    def close(self) -> None:
        """Ends it. Raises what went wrong in it."""
        self._closing.set()
        self.join(60)
        if self.failure:
            raise self.failure
