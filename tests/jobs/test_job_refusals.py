"""What ``shoal job render`` refuses: each in one sentence, with exit code 3 or 5, and nothing printed."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from job_fixtures import Shell, here_fixture  # noqa: F401  # fixtures are found by their names
from job_request import job_manifest

from shoal.jobs.cli.job import EXAMPLES
from shoal.jobs.cli.main import root
from shoal.jobs.kube.api import Cluster
from shoal.workers.errors import InvalidInput

VOLUME, LOCKED = ("--volume", "runs:/mnt"), ("--volume", "b:/mnt/o:ro")
CPU = (*VOLUME, "--gpus-per-node", "0")
RULES = "[{policy: DeleteSelf, condition: {jobStatus: FAILED}}]"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("train",), 3, "no --volume outlives the pods"),
        (("train", *VOLUME, "--gpus-per-node", "0", "--name", "Bad_Name"), 3, "'Bad_Name' is not a name in Kubernetes"),
        (("train", *VOLUME, "--gpus-per-node", "0", "--name", "a" * 48), 3, "48 characters, and KubeRay takes 47"),
        (("evaluate", "/elsewhere/first", *VOLUME), 3, "RUN '/elsewhere/first' is on no volume"),
        (("serve", "/elsewhere/first", *VOLUME, "--insecure"), 3, "RUN '/elsewhere/first' is on no volume"),
        (("evaluate", "first", *VOLUME, "--data", "/elsewhere"), 3, "--data '/elsewhere' is on no volume"),
        (("evaluate", "first", *VOLUME, "--data", "data/mine"), 3, "--data 'data/mine' is on no volume: name a folder"),
        (("train", *VOLUME), 3, "parallel.device='cpu', and the job asks for 1 GPU: "),
        (("train", *VOLUME, "--nodes", "0"), 3, "--nodes=0 cannot be used: it should be greater than or equal to 1"),
        (("train", *VOLUME, "--auth", "maybe"), 3, "--auth='maybe' cannot be used: it should be 'token' or 'off'"),
        (("train", *VOLUME, "--profile", "big"), 5, "there is no file of profiles"),
        (("evaluate", "first", *VOLUME, "--tls-secret", "Not_One"), 3, "--tls-secret"),
        (
            ("evaluate", "first", *VOLUME, "--tls-secret", "ca", "--env", "RAY_USE_TLS=0"),
            3,
            "RAY_USE_TLS is set by --tls-secret: leave it out of --env and --secret",
        ),
        (
            ("evaluate", "first", *VOLUME, "--volume", "secret/ca:/etc/ray/tls"),
            3,
            "something is mounted at /etc/ray/tls",
        ),
        (("train", *VOLUME, "--volume", "x:relative"), 3, "is not a volume: write CLAIM:/path"),
        (("train", *VOLUME, "--volume", "other:/mnt/"), 3, "something is mounted at /mnt already"),
        (("train", *VOLUME, "--gpus-per-node", "0", "--patch", "none.yaml"), 5, "--patch none.yaml does not exist"),
        (("train", *VOLUME, "--gpus-per-node", "0", "--toleration", "a:Never"), 3, "has the effect 'Never'"),
        (("train", *VOLUME, "--gpus-per-node", "0", "--working-dir", "none"), 5, "is not a folder"),
        (("train", *VOLUME, "--runs-dir", "/elsewhere"), 3, "--runs-dir '/elsewhere' is on no volume"),
        (
            ("train", *VOLUME, "--data", "data/mine"),
            3,
            "data.corpus='data/mine' is looked for below /mnt/data: say mine",
        ),
        (("train", *VOLUME, "--set", "data.corpus='../mine'"), 3, "below /mnt/data: say its name there, or give the"),
        (("train", *VOLUME, "--recipe", "tinny"), 5, "did you mean tiny"),
        (("train", *VOLUME, "--set", "train.stepz=1"), 3, "did you mean train.steps"),
        (("evaluate", "s3://me:secret@bucket/run", *VOLUME), 3, "the URL of a run at bucket has a password in it"),
        (("evaluate", "memory://run", *VOLUME), 3, "is not where the cluster's pods can read it: give s3://"),
        (("evaluate", "s3://b/r", *VOLUME, "--runs-dir", "/mnt"), 3, "--runs-dir '/mnt' is where names of runs are"),
        (("evaluate", "s3://b/r"), 3, "the corpus that the run is measured on is fetched from nowhere: add --volume"),
        (("evaluate", "", *VOLUME), 3, "RUN '' is not a run: give its name, its path on a --volume, or its URL"),
        (("generate", "s3://b/r", "--input", "/in.jsonl", "--output", "/o.jsonl"), 3, "add --volume CLAIM:/path and"),
        (("generate", "first", "--input", "/in.jsonl", "--output", "/mnt/o.jsonl", *VOLUME), 3, "is on no volume"),
        (("evaluate", "a'b", *VOLUME), 3, """RUN "a'b" holds "'", which Ray's shell would take for itself"""),
        (("evaluate", "first", *VOLUME, "--data", "/mnt/$HOME"), 3, "--data '/mnt/$HOME' holds '$'"),
        (
            ("generate", "r", "--input", "/mnt/*.jsonl", "--output", "/mnt/o.jsonl", *VOLUME),
            3,
            "--input '/mnt/*.jsonl'",
        ),
        (("generate", "r", "--input", "/mnt/i.jsonl", "--output", "/mnt/o;ls.jsonl", *VOLUME), 3, "holds ';'"),
        (("evaluate", "first", *VOLUME, "--runs-dir", "/mnt/a\nb", "--submission-mode", "HTTPMode"), 3, "holds '\\n'"),
        (("serve", "first", *VOLUME, "--env", "SHOAL_API_TOKEN=x"), 3, "would stand in the manifest for all to read"),
        (("evaluate", "first", *VOLUME, "--label", "ray.io/cluster=x"), 3, "ray.io/cluster is set by Shoal or KubeRay"),
        (("evaluate", "first", *VOLUME, "--label", "shoal/kind=x"), 3, "shoal/kind is set by Shoal or KubeRay"),
        (
            (
                "generate",
                "r",
                "--input",
                "/mnt/i.jsonl",
                "--output",
                "/mnt/o/o.jsonl",
                *VOLUME,
                "--volume",
                "b:/mnt/o:ro",
            ),
            3,
            "--output '/mnt/o/o.jsonl' is on a volume mounted read-only",
        ),
        (("train", "--volume", "runs:/mnt:ro"), 3, "--runs-dir '/mnt/runs' is on a volume mounted read-only"),
        (("serve", "first", *VOLUME, "--insecure", "--placement", "2B:2F"), 3, "is neither colocated nor nA:mF"),
        (("serve", "first", *VOLUME, "--insecure", "--placement", "0A:1F"), 3, "is neither colocated nor nA:mF"),
        (("serve", "first", *VOLUME, "--insecure", "--placement", "3A:3F"), 3, "1 nodes of 1 GPUs host 1 ranks"),
        (
            ("serve", "first", *VOLUME, "--insecure", "--placement", "1A:1F", "--gpus-per-node", "4"),
            3,
            "2 of 4 GPUs idle",
        ),
        (("serve", "first", *VOLUME), 3, "would be open to everyone in the cluster"),
        (("train", *CPU, "--image", "a b"), 3, "--image 'a b' is not an image"),
        (("train", *CPU, "--image", "shoal:"), 3, "--image 'shoal:' is not an image"),
        (("train", *CPU, "--image", "UP/Case"), 3, "--image 'UP/Case' is not an image"),
        (("train", *CPU, "--volume", "x:/etc/shoal/recipe"), 3, "something is mounted at /etc/shoal already"),
        (("train", *CPU, "--volume", "x:/dev//shm"), 3, "is not a volume: write CLAIM:/path"),
        (("train", *CPU, "--volume", "/a/../b:/x"), 3, "is not a volume: write CLAIM:/path"),
        (("train", *CPU, "--secret", "A=s:b@d"), 3, "'b@d' is not an entry of a Secret"),
        (("train", *CPU, "--secret", "A=s:k", "--secret", "A=t:k"), 3, "A is given by --secret twice"),
        (("train", *CPU, "--label", "kueue.x-k8s.io/queue-name=q"), 3, "is set by --queue: use that"),
        (("train", *CPU, "--run", "a" * 201), 3, "is not a plain name: use up to 200 letters"),
        (("train", *CPU, "--data", "/elsewhere/corpus"), 3, "data.corpus '/elsewhere/corpus' is on no volume"),
        (
            ("evaluate", "first", *VOLUME, "--gpus-per-node", "8"),
            3,
            "evaluate computes on one GPU, and would leave 7 of 8 idle",
        ),
    ],
)
def test_a_command_line_is_refused_in_one_sentence(
    arguments: tuple[str, ...], code: int, says: str, here: Shell
) -> None:
    found, out, err = here("job", "render", *arguments)
    assert (found, out) == (code, ""), err
    assert says in err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("page", "least"),
    [
        pytest.param((Path(__file__).parents[2] / "README.md").read_text(), 2, id="README.md"),
        pytest.param(EXAMPLES, 4, id="shoal job --help"),
        pytest.param(inspect.getdoc(root), 1, id="shoal --help"),
    ],
)
def test_what_a_newcomer_reads_first_is_not_refused(page: str, least: int, here: Shell) -> None:
    """Each `shoal job render` and `submit` that is written there in one line, of a Ray's jobs their recipe."""
    page = page.replace("--ray-address http://head:8265 --runs-dir /mnt/runs", "--volume runs:/mnt")
    commands = re.findall(r"^(?: *|- `)shoal job (?:render|submit) (.*?)`?$", page.replace(" --wait", ""), re.M)
    assert len(commands) >= least
    for command in commands:
        code, _, err = here("job", "render", *shlex.split(command, comments=True))
        assert code == 0, (command, err)


SERVE = ("serve", "first", *VOLUME, "--insecure")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*SERVE, "--retries", "0"), "--retries is for jobs, and a service has no place for it"),
        ((*SERVE, "--deadline", "9"), "--deadline is for jobs"),
        ((*SERVE, "--suspend"), "--suspend is for jobs"),
        ((*SERVE, "--ttl", "9"), "--ttl is for jobs"),
        ((*SERVE, "--submission-mode", "HTTPMode"), "--submission-mode is for jobs"),
        ((*SERVE, "--queue", "team-a"), "--queue is for jobs"),
        ((*SERVE, "--wait"), "a service has none"),
        (("train", *VOLUME, "--timeout", "9"), "--timeout is how long --wait waits: add --wait"),
        (("train", *VOLUME, "--wait", "--dry-run", "client"), "--wait waits for a job, and --dry-run submits none"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(arguments: tuple[str, ...], says: str, here: Shell) -> None:
    code, out, err = here("job", "submit", *arguments, "--gpus-per-node", "0")
    assert (code, out) == (2, "") and says in err


@pytest.mark.parametrize("corpus", ["stdlib", "mine", "team/mine", "/mnt/elsewhere/mine"])
def test_a_corpus_is_named_by_its_place_in_the_cluster(corpus: str) -> None:
    manifest = job_manifest(volume=["runs:/mnt"], sets=(f"data.corpus={corpus}",))
    head = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    assert f'corpus = "{corpus}"' in head["metadata"]["annotations"]["shoal/recipe"]


def test_a_profile_of_suspended_jobs_is_overruled(here: Shell) -> None:
    Path("shoal-jobs.toml").write_text("[default]\nsuspend = true\nttl = 9\n")
    cpu = ("--gpus-per-node", "0", *VOLUME)
    assert "suspend: true" in here("job", "render", "train", *cpu)[1]
    code, out, _ = here("job", "render", "train", *cpu, "--no-suspend")
    assert code == 0 and "suspend" not in out


def test_what_a_profile_holds_for_jobs_does_not_matter_to_a_service(here: Shell) -> None:
    Path("shoal-jobs.toml").write_text("[default]\nsuspend = true\nqueue = 'team-a'\npriority = 'high'\n")
    code, out, _ = here("job", "render", *SERVE)
    assert code == 0 and "kueue" not in out and "priorityClassName: high" in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"suspend": True, "patch": "spec: {shutdownAfterJobFinishes: false, ttlSecondsAfterFinished: 0}"}, "suspend"),
        ({"patch": "spec: {shutdownAfterJobFinishes: false}"}, "ttlSecondsAfterFinished=60 needs"),
        ({"patch": "spec: {submissionMode: K8sjobMode}"}, "submissionMode='K8sjobMode' cannot be used"),
        ({"submission_mode": "SidecarMode", "patch": "spec: {submitterConfig: {backoffLimit: 1}}"}, "submitterConfig"),
        ({"patch": f"spec: {{deletionStrategy: {{deletionRules: {RULES}}}}}"}, "exclude each other"),
        ({"patch": "spec: {deletionStrategy: {onSuccess: {policy: DeleteSelf}}}"}, "needs deletionRules, or both"),
        ({"ray_version": "2.40.0"}, "needs Ray 2.52.0 or later, and rayVersion is '2.40.0'"),
        ({"auth": "off", "auth_secret": "x"}, "--auth-secret is given with --auth off"),
        ({"patch": "metadata: {name: " + "b" * 50 + "}"}, "KubeRay takes 47"),
        ({"patch": "spec: {rayClusterSpec: {workerGroupSpecs: []}, entrypoint: ''}"}, "entrypoint is empty"),
        ({"patch": "spec: {backoffLimit: 1.5}"}, "is not a whole number"),
        ({"patch": "metadata: {labels: {a: 1}}"}, "is not text"),
        ({"patch": "metadata: {finalizers: [2026-08-01]}"}, "what JSON cannot say, such as a date"),
        ({"patch": "spec: &all {a: *all}"}, "what JSON cannot say"),
        ({"patch": "kind: Job"}, "a job is a RayJob or a RayService"),
        ({"patch": "statuss: {}"}, "statuss is not a field of a manifest"),
        (
            {"sets": ("parallel.ranks=3", "moe.experts=15", "train.batch=3"), "nodes": 2, "cpus_per_node": 1},
            "2 ranks a node",
        ),
        ({"shm": "64Mi"}, "--shm 64Mi does not fit"),
        ({"head_memory": "1Gi"}, "--head-memory 1Gi does not fit"),
    ],
)
def test_a_manifest_that_the_operator_would_refuse_is(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    if "patch" in options:
        (tmp_path / "patch.yaml").write_text(options["patch"])
        options = {**options, "patch": [tmp_path / "patch.yaml"]}
    with pytest.raises(InvalidInput) as refused:
        job_manifest(**options)
    assert says in str(refused.value)


def test_gpus_that_no_rank_would_use_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"would leave 6 of 8 GPUs idle"):
        job_manifest("deepseekmoe-2b", ("parallel.ranks=2",), gpus_per_node=8)
    with pytest.raises(InvalidInput, match=r"parallel.ranks=16 do not fit: 1 nodes of 8 GPUs host 8 ranks"):
        job_manifest("deepseekmoe-2b", ("parallel.ranks=16",), gpus_per_node=8)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[default]\nnods = 2\n", "'nods' is not an option of a job: did you mean nodes"),
        ("[default]\ngpus-per-nod = 2\n", "'gpus-per-nod' is not an option of a job: did you mean gpus-per-node"),
        ("[default]\nnodes = 'two'\n", "profile default of shoal-jobs.toml: nodes='two' cannot be used"),
        ("default = 3\n", "default=3 is not a table"),
        ("nodes = 2\n[default]\n", "nodes=2 is not a table: write it below the head of one"),
        ("[default\n", "cannot be read"),
    ],
)
def test_a_profile_that_says_nonsense_is_refused_with_its_place(text: str, says: str, here: Shell) -> None:
    Path("shoal-jobs.toml").write_text(text)
    code, _, err = here("job", "render", "train", *VOLUME)
    assert code == 3 and says in err


def test_a_file_of_profiles_of_which_nothing_would_hold_is_refused(here: Shell) -> None:
    Path("mine.toml").write_text("[big]\nnodes = 2\n")
    render = ("job", "render", "train", *VOLUME, "--profiles", "mine.toml")
    code, _, err = here(*render)
    assert code == 3 and "--profiles mine.toml has no table [default]: add --profile big" in err
    code, _, err = here(
        "job", "render", "train", *VOLUME, "--profiles", "mine.toml", "--profile", "big", "--nodes", "0"
    )
    assert code == 3 and err.startswith("error: --nodes=0 cannot be used")


def test_what_is_only_read_may_lie_on_a_read_only_volume(here: Shell) -> None:
    read_only = ("--volume", "runs:/mnt:ro")
    assert here("job", "render", "serve", "first", *read_only, "--secret", "SHOAL_API_TOKEN=tokens:api")[0] == 0
    files = ("--input", "/mnt/in.jsonl", "--output", "/mnt/out/a.jsonl")
    assert here("job", "render", "generate", "first", *read_only, "--volume", "out:/mnt/out", *files)[0] == 0


def kubeconfig(folder: Path, **more: Any) -> str:
    config = {
        "apiVersion": "v1", "kind": "Config", "users": [{"name": "me", "user": {"token": "x"}}],
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "contexts": [{"name": "lab", "context": {"cluster": "c", "user": "me", "namespace": "team"}}], **more,
    }  # fmt: skip
    (folder / "config").write_text(yaml.safe_dump(config))
    return str(folder / "config")


def test_a_kubeconfig_without_a_current_context_serves_a_named_one(
    here: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", kubeconfig(tmp_path))
    found = Cluster("lab")
    assert (found.namespace, found.host) == ("team", "http://127.0.0.1:1")
    code, _, err = here("job", "list", "--context", "moon")
    assert code == 5 and "--context 'moon' is not in the kubeconfig: it has lab" in err
    code, _, err = here("job", "list")
    assert code == 5 and "no kubeconfig can be used" in err


def test_a_pod_without_a_token_is_refused_in_one_sentence(
    here: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    code, _, err = here("job", "list")
    assert code == 5 and "no token of an account is mounted into this pod" in err and err.count("\n") == 1
