"""TLS between the processes of Ray: every pod makes itself a certificate before Ray starts."""

from __future__ import annotations

from typing import Any

from shoal.jobs.kube.names import check_object
from shoal.workers.errors import InvalidInput

Object = dict[str, Any]
AUTHORITY, OWN = "/etc/ray/authority", "/etc/ray/tls"
DOMAIN = "cluster.local"
VARIABLES = {
    "RAY_USE_TLS": "1",
    "RAY_TLS_SERVER_CERT": f"{OWN}/tls.crt",
    "RAY_TLS_SERVER_KEY": f"{OWN}/tls.key",
    "RAY_TLS_CA_CERT": f"{OWN}/ca.crt",
}

# Ray's processes know each other by address, so no certificate made beforehand would do. The chart's pods run the same.
SCRIPT = """\
umask 077
cp "$AUTHORITY/tls.crt" "$OUT/ca.crt"
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$POD_IP" \\
  -keyout "$OUT/tls.key" -out "$OUT/tls.csr"
echo "subjectAltName=IP:$POD_IP,IP:127.0.0.1,$NAMES" > "$OUT/names"
openssl x509 -req -in "$OUT/tls.csr" -CA "$AUTHORITY/tls.crt" -CAkey "$AUTHORITY/tls.key" \\
  -set_serial "0x$(openssl rand -hex 16)" -days 3650 -extfile "$OUT/names" -out "$OUT/tls.crt"
"""


def variables() -> list[Object]:
    """Of a container whose Ray uses TLS."""
    return [{"name": key, "value": value} for key, value in VARIABLES.items()]


def mount() -> Object:
    """Of the pod's certificate in such a container."""
    return {"name": "ray-tls", "mountPath": OWN, "readOnly": True}


def add_certificate(pod: Object, secret: str) -> None:
    """Gives a pod's only container TLS, with a certificate that an init container signs.

    secret: a Secret with ``tls.crt`` and ``tls.key`` of a certificate authority, which that init container alone sees.

    Raises InvalidInput for a name that is none, and where ``--env`` or ``--secret`` sets a variable of TLS.
    """
    check_object(secret, "--tls-secret")
    (box,) = pod["containers"]
    for each in box.get("env", []):
        if each["name"] in VARIABLES:
            raise InvalidInput(f"{each['name']} is set by --tls-secret: leave it out of --env and --secret")
    box["env"] = [*variables(), *box.get("env", [])]
    box["volumeMounts"].append(mount())
    pod["volumes"] += [
        {"name": "ray-tls", "emptyDir": {"medium": "Memory"}},
        {"name": "ray-authority", "secret": {"secretName": secret}},
    ]
    amounts = {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"cpu": "500m", "memory": "128Mi"}}
    kept = {key: box[key] for key in ("image", "imagePullPolicy", "securityContext") if key in box}
    authority = {"name": "ray-authority", "mountPath": AUTHORITY, "readOnly": True}
    mounts = [authority, {"name": mount()["name"], "mountPath": OWN}]
    maker = {"name": "certificate", **kept, "resources": amounts, "env": _of_script(), "volumeMounts": mounts}
    pod["initContainers"] = [maker | {"command": ["sh", "-ceu"], "args": [SCRIPT]}]


def _of_script() -> list[Object]:
    """The script's variables. Workers know the head by the name of its Service; Kubernetes fills in the namespace."""
    fields = {"POD_IP": "status.podIP", "NAMESPACE": "metadata.namespace"}
    from_pod = [{"name": key, "valueFrom": {"fieldRef": {"fieldPath": path}}} for key, path in fields.items()]
    names = f"DNS:localhost,DNS:*.$(NAMESPACE).svc.{DOMAIN}"
    plain = {"NAMES": names, "AUTHORITY": AUTHORITY, "OUT": OWN}
    return from_pod + [{"name": key, "value": value} for key, value in plain.items()]
