"""Hands jobs to a Ray cluster that runs already, ends them, and removes them."""

from __future__ import annotations

import hashlib
import re
import shlex
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote as escape

from shoal.jobs.kube.api import Unreachable
from shoal.jobs.kube.code import is_url, zip_folder
from shoal.jobs.kube.fit import check_gpus
from shoal.jobs.kube.manifest import STOPPING
from shoal.jobs.kube.options import JobOptions
from shoal.jobs.kube.parts import variables
from shoal.jobs.kube.work import RECIPE_FILE, Work
from shoal.jobs.ray_jobs.api import FIRST_PAUSE, TRIES, Object, RayCluster
from shoal.jobs.ray_jobs.status import KIND, RUN, summarize
from shoal.jobs.recipe_errors import quote
from shoal.workers.errors import ClusterRefused, InvalidInput, NotFound, ShoalError

LARGEST = 100_000_000  # bytes of code; Ray takes up to 500 MB, in one message
RECIPE = ".shoal/recipe.toml"  # in the folder that a job's command runs in

Told = Callable[[str], None]


def request(work: Work, options: JobOptions, told: Told = lambda said: None) -> tuple[Object, bytes | None]:
    """What Ray's job API is sent, and the .zip that goes before it as the job's working directory, if there is one.

    The command runs in a copy of that directory; the recipe stands in it. told: is given sentences on what was left
    out. Raises InvalidInput, NotFound.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", work.name, re.ASCII):
        raise InvalidInput(f"--name {quote(work.name)} is not a plain name: use letters, digits, '.', '_' and '-'")
    check_gpus(work, options)
    words, package, environment = list(work.command), None, dict[str, Any]()
    files = {}
    if work.recipe_toml is not None:
        files[RECIPE] = work.recipe_toml.encode()
        words = [RECIPE if word == RECIPE_FILE else word for word in words]
    if options.working_dir is not None and is_url(options.working_dir):
        if files:
            raise InvalidInput(
                f"--working-dir {quote(options.working_dir)} is a URL, and a training job's recipe travels in that "
                f"folder: name a folder here"
            )
        environment["working_dir"] = options.working_dir
    elif options.working_dir is not None or files:
        package = zip_folder(options.working_dir, told, LARGEST, files)
        environment["working_dir"] = f"gcs://{_package_name(package)}"
    told_env = {each["name"]: each["value"] for each in variables(options.env, ())[0]}
    # Ray kills a job that is told to end 3 seconds later, unless its supervisor, which has these too, is told this
    environment["env_vars"] = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOPPING), **told_env}
    body: Object = {
        "entrypoint": shlex.join(words),
        "submission_id": work.name,
        "metadata": {KIND: work.kind, RUN: work.run},
        "runtime_env": environment,
    }
    if work.ranks == 0:  # the command computes by itself
        body |= {"entrypoint_num_gpus": 1} if options.gpus_per_node else {"entrypoint_num_cpus": 1}
    return body, package


def submit(ray: RayCluster, work: Work, options: JobOptions, told: Told = lambda said: None) -> Object:
    """Submits a job, with its folder before it. Returns what Ray says of it. Raises ShoalError."""
    body, package = request(work, options, told)
    name = work.name
    taken = ClusterRefused(f"{ray} has a job {name} already: choose another --name")
    if _exists(ray, name):
        raise taken
    if package is not None:
        path = f"/api/packages/gcs/{_package_name(package)}"
        try:
            ray.get(path)
        except NotFound:
            ray.ask("PUT", path, package)
    pause = FIRST_PAUSE
    for attempt in range(TRIES):
        try:
            ray.ask("POST", "/api/jobs/", body)
            break
        except Unreachable:
            if _exists(ray, name):  # the answer was lost
                break
            if attempt == TRIES - 1:
                raise
            time.sleep(pause)  # a Ray that has just begun takes no jobs yet
            pause *= 2
        except ShoalError as error:
            raise (taken if "already exists" in str(error) else error) from None
    return ray.job(name)


def _exists(ray: RayCluster, name: str) -> bool:
    try:
        ray.job(name)
    except NotFound:
        return False
    return True


def _package_name(package: bytes) -> str:
    return f"_ray_pkg_{hashlib.sha256(package).hexdigest()[:32]}.zip"


def list_jobs(ray: RayCluster, everything: bool = False) -> list[Object]:
    """Jobs that Shoal submitted, newest first. everything: those of others too."""
    found = [
        job
        for job in ray.get("/api/jobs/") or []
        if job.get("submission_id") and (everything or KIND in (job.get("metadata") or {}))
    ]
    return sorted(found, key=lambda job: (job.get("start_time") or 0, job["submission_id"]), reverse=True)


def cancel(ray: RayCluster, name: str) -> str:
    """Tells a job to end; returns what was done. Raises ShoalError."""
    status = summarize(ray.job(name))
    if status.over:
        return f"{name} has ended already: {status.phase}"
    ray.ask("POST", f"/api/jobs/{escape(name, safe='')}/stop")
    if status.phase == "waiting":  # its supervisor, who ends it, has to begin first
        return f"{name} has not begun: Ray ends it as soon as there are resources for it to begin"
    return f"{name} was told to end: it saves a checkpoint first"


def delete(ray: RayCluster, name: str) -> None:
    """Makes Ray forget a job that has ended. Raises ShoalError."""
    status = summarize(ray.job(name))
    if not status.over:
        raise ClusterRefused(f"{name} is {status.phase}: end it first, by {ray.hint(f'cancel {name}')}")
    ray.ask("DELETE", f"/api/jobs/{escape(name, safe='')}")
