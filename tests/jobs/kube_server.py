"""A real API server of Kubernetes for tests: etcd and kube-apiserver on free ports, with KubeRay's CRDs.

``KUBEBUILDER_ASSETS`` names the folder of the two programs, as controller-runtime's envtest has it. The CRDs are taken
from ``SHOAL_KUBE`` (else ``../shared/kube`` beside the checkout): its ``crds/``, through its program
``crds-for-old-server``, if there is one. Without them the tests are skipped, and say what is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml
from ports import free_port

CHECKOUT = Path(__file__).parents[2]
KUBE = Path(os.environ.get("SHOAL_KUBE") or CHECKOUT.parent / "shared" / "kube")
TOKENS = {"admin": "system:masters", "nobody": ""}
PATIENCE = 120.0  # seconds to start, on a busy machine
KINDS = ("rayjobs", "rayclusters", "rayservices")


def missing() -> str | None:
    """Why there is no API server here, None when there can be one."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if not assets or not (Path(assets) / "kube-apiserver").exists():
        return "KUBEBUILDER_ASSETS does not name a folder with etcd and kube-apiserver"
    if shutil.which("openssl") is None:
        return "needs openssl"
    if not (KUBE / "crds").is_dir():
        return "there are no CRDs of KubeRay: set SHOAL_KUBE to a folder whose crds/ holds them"
    return None


def address_of_this_machine() -> str:
    """An address that is not loopback, which Kubernetes takes as an endpoint."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # no packet is sent
        return str(probe.getsockname()[0])


class ApiServer:
    """The two processes, and a kubeconfig with the contexts ``admin``, ``nobody`` and ``stranger``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.assets = folder, Path(os.environ["KUBEBUILDER_ASSETS"])
        self.port, self._etcd_port, self._peer_port = free_port(), free_port(), free_port()
        self.url, self.kubeconfig = f"https://127.0.0.1:{self.port}", folder / "kubeconfig"
        self._logs = [(folder / name).open("wb") for name in ("etcd.log", "apiserver.log")]
        self._make_keys()
        self._etcd = self._start_etcd()
        self._server = self._start_server()
        self._write_kubeconfig()
        self.wait_until_ready()

    def _make_keys(self) -> None:
        key = self.folder / "accounts.key"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True, timeout=60)
        rows = [f'{name}-token,{name},{name},"{group}"' for name, group in TOKENS.items()]
        (self.folder / "tokens.csv").write_text("\n".join(rows) + "\n")

    def _start_etcd(self) -> subprocess.Popen[bytes]:
        client, peer = f"http://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{self._peer_port}"
        command = [
            str(self.assets / "etcd"), "--data-dir", str(self.folder / "etcd"), "--listen-client-urls", client,
            "--advertise-client-urls", client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
            "--initial-cluster", f"default={peer}",
        ]  # fmt: skip
        return subprocess.Popen(command, stdout=self._logs[0], stderr=subprocess.STDOUT)

    def _start_server(self) -> subprocess.Popen[bytes]:
        keys = self.folder / "accounts.key"
        command = [
            str(self.assets / "kube-apiserver"), f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            f"--secure-port={self.port}", "--bind-address=127.0.0.1", f"--cert-dir={self.folder / 'certs'}",
            f"--advertise-address={address_of_this_machine()}", "--authorization-mode=RBAC",
            f"--token-auth-file={self.folder / 'tokens.csv'}", "--service-cluster-ip-range=10.96.0.0/24",
            "--service-account-issuer=https://tests", f"--service-account-key-file={keys}",
            f"--service-account-signing-key-file={keys}", "--disable-admission-plugins=ServiceAccount",
            "--endpoint-reconciler-type=none", "--profiling=false",
        ]  # fmt: skip
        return subprocess.Popen(command, stdout=self._logs[1], stderr=subprocess.STDOUT)

    def _write_kubeconfig(self) -> None:
        certificate = self.folder / "certs" / "apiserver.crt"
        self._until(certificate.exists)
        users = [*TOKENS, "stranger"]
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tests", "cluster": {"server": self.url, "certificate-authority": str(certificate)}}],
            "users": [{"name": name, "user": {"token": f"{name}-token"}} for name in users],
            "contexts": [{"name": name, "context": {"cluster": "tests", "user": name}} for name in users],
            "current-context": "admin",
        }
        self.kubeconfig.write_text(yaml.safe_dump(config))

    def _until(self, true: Any) -> None:
        end = time.monotonic() + PATIENCE
        while not true():
            for process, log in ((self._etcd, "etcd"), (self._server, "apiserver")):
                assert process.poll() is None, (self.folder / f"{log}.log").read_text()[-2000:]
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.05)

    def wait_until_ready(self) -> None:
        """Returns once it answers."""
        self._until(lambda: self.request("GET", "/readyz", quiet=True) == "ok")

    def request(
        self, method: str, path: str, body: Any = None, quiet: bool = False, content: str = "application/json"
    ) -> Any:
        """Asks as an administrator. quiet: None when it does not answer or refuses."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        headers = {"Authorization": "Bearer admin-token", "Content-Type": content}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            if quiet:
                return None
            raise AssertionError(f"{method} {path}: {error.read().decode()[:2000]}") from None
        except OSError:
            if quiet:
                return None
            raise
        return json.loads(text) if text.startswith("{") else text

    def patch_status(self, plural: str, namespace: str, name: str, status: Any) -> Any:
        """Sets the status of one of KubeRay's objects, as its operator does."""
        path = f"/apis/ray.io/v1/namespaces/{namespace}/{plural}/{name}/status"
        return self.request("PATCH", path, {"status": status}, content="application/merge-patch+json")

    def install_crds(self) -> None:
        """Makes KubeRay's CRDs, and returns once they are served."""
        converted, for_old = self.folder / "crds", KUBE / "crds-for-old-server"
        if for_old.exists():
            subprocess.run([sys.executable, str(for_old), str(converted)], check=True)
        else:
            converted = KUBE / "crds"
        for plural in KINDS:
            crd = yaml.load(
                (converted / f"ray.io_{plural}.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            )
            crd["spec"]["versions"] = [each for each in crd["spec"]["versions"] if each["name"] == "v1"]
            self.request("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", crd)
        for plural in KINDS:
            path = f"/apis/ray.io/v1/namespaces/default/{plural}"
            self._until(lambda path=path: self.request("GET", path, quiet=True) is not None)

    def kill(self) -> None:
        """Ends the API server at once, as a machine that goes away; etcd stays."""
        self._server.kill()
        self._server.wait()

    def start_again(self) -> None:
        """Starts it again where it was."""
        self._server = self._start_server()
        self.wait_until_ready()

    def close(self) -> None:
        """Ends both."""
        for process in (self._server, self._etcd):
            process.kill()
            process.wait()
        for log in self._logs:
            log.close()
