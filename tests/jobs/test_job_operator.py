"""Nothing that KubeRay's operator refuses gets past, judged by the operator itself: live, and by verdicts it gave.

``kuberay/verdicts.json`` holds random mutations of two valid manifests with what the validation of KubeRay (commit
feeaf72 of August 2026) said to each. Where KUBERAY_VALIDATE names a build of ``kuberay/validate.go``, it is asked about
fresh ones as well, and ``python tests/jobs/test_job_operator.py`` records them anew.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from job_mutations import ENV, NAMES, REMOVED, VERSIONS, Edit, Operator, edited, job_edits, service_edits
from job_request import job_manifest, service_manifest

from shoal.jobs.kube.check import check_manifest
from shoal.workers.errors import InvalidInput

VERDICTS = Path(__file__).parent / "kuberay" / "verdicts.json"
BASES = {"job": lambda: job_manifest("deepseekmoe-2b", gpus_per_node=2), "service": service_manifest}


def refusal(manifest: dict[str, Any]) -> str:
    """Our own, empty for none."""
    try:
        check_manifest(manifest)
    except InvalidInput as error:
        return str(error)
    return ""


def test_what_the_operator_refused_is_refused() -> None:
    recorded = json.loads(VERDICTS.read_text())
    bases = recorded["bases"]
    assert all(refusal(base) == "" for base in bases.values())
    refused = [case for case in recorded["cases"] if case[2]]
    assert len(refused) >= 200
    missed = [(edits, verdict) for base, edits, verdict in refused if not refusal(edited(bases[base], edits))]
    assert missed == []


def test_what_the_operator_takes_is_taken_but_for_a_few_rules() -> None:
    """Those of the schema, which the operator leaves to the API server, and the ones that ``rules`` has beside it."""
    recorded = json.loads(VERDICTS.read_text())
    taken = [edited(recorded["bases"][base], edits) for base, edits, verdict in recorded["cases"] if not verdict]
    stricter = (
        r"rayVersion='.*' is not a release of Ray", r"Config\.upgradeStrategy is for clusters of their own",
        r"managedBy='.*' is nobody", r"deletionRules has 0 entries", r"submissionMode='.*' cannot be used",
        r"upgradeStrategy\.type='.*' is not one of its values", r"submitterConfig\.backoffLimit is less than nothing",
    )  # fmt: skip
    refused = [said for said in map(refusal, taken) if said]
    assert [said for said in refused if not any(re.search(rule, said) for rule in stricter)] == []
    assert len(taken) >= 100 and len(refused) <= len(taken) // 8


@pytest.fixture(scope="module")
def operator() -> Iterator[Operator]:
    program = os.environ.get("KUBERAY_VALIDATE")
    if not program:
        pytest.skip("KUBERAY_VALIDATE does not name a build of tests/jobs/kuberay/validate.go")
    found = Operator(program)
    yield found
    found.close()


@pytest.mark.parametrize("kind", BASES)
def test_the_operator_refuses_no_manifest_that_is_let_through(kind: str, operator: Operator) -> None:
    base = BASES[kind]()

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(edits=job_edits if kind == "job" else service_edits)
    def no_refusal(edits: list[Edit]) -> None:
        manifest = edited(base, edits)
        assert operator.refusal(manifest) == "" or refusal(manifest)

    no_refusal()


requests = st.fixed_dictionaries(
    {},
    optional={
        "name": st.one_of(st.sampled_from(NAMES), st.text(max_size=50)),
        "ray_version": st.sampled_from([each for each in VERSIONS if each != REMOVED]),
        "submission_mode": st.sampled_from(["K8sJobMode", "HTTPMode", "SidecarMode"]),
        "suspend": st.booleans(),
        "ttl": st.sampled_from([-1, 0, 60]),
        "retries": st.sampled_from([-1, 0, 3]),
        "deadline": st.sampled_from([0, 1, 60]),
        "auth": st.sampled_from(["token", "off"]),
        "auth_secret": st.sampled_from(["secret", "Not A Name"]),
        "nodes": st.sampled_from([0, 1, 4]),
        "label": st.lists(st.sampled_from(["a=b", "a=b c", "a b=c", "x/y=", "=b"]), max_size=2),
        "env": st.lists(st.sampled_from([f"{name}=1" for name in ENV]), max_size=2),
        "queue": st.sampled_from(["team-a", "Team A"]),
        "service_account": st.sampled_from(["trainer", "-"]),
    },
)


def test_the_operator_takes_every_request_that_is_rendered(operator: Operator) -> None:
    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(options=requests)
    def taken(options: dict[str, Any]) -> None:
        try:
            manifest = job_manifest(**options)
        except InvalidInput:
            return
        assert operator.refusal(manifest) == ""

    taken()


def record(program: str, count: int) -> None:
    """Writes verdicts.json: ``count`` mutations of each base."""
    bases = {name: make() for name, make in BASES.items()}
    operator, cases = Operator(program), list[str]()
    for name, edits_of in (("job", job_edits), ("service", service_edits)):
        judge(operator, name, bases[name], edits_of, count, cases)
    operator.close()
    text = ",\n".join(cases)
    VERDICTS.write_text(f'{{"bases": {json.dumps(bases)}, "cases": [\n{text}\n]}}\n')


def judge(operator: Operator, name: str, base: Any, edits_of: Any, count: int, cases: list[str]) -> None:
    """Adds ``count`` cases of one base to ``cases``, each as JSON."""

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(edits=edits_of)
    def ask(edits: list[Edit]) -> None:
        cases.append(json.dumps([name, edits, operator.refusal(edited(base, edits))], ensure_ascii=False))

    ask()


if __name__ == "__main__":
    record(os.environ["KUBERAY_VALIDATE"], 300)
