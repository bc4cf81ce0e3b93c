"""Builds the commands of ``shoal job render`` and ``shoal job submit`` from one list of options.

A kind of job (train, …) is a function of ``JobOptions`` and of its own arguments; what is done with its manifest is
another function with options of its own. A command has the arguments of all three.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from shoal.jobs.cli.job_kinds import KINDS
from shoal.jobs.kube.options import OF_JOBS, OF_RAY, JobOptions, flag, panel_of, resolve_options
from shoal.jobs.kube.work import Work
from shoal.workers.errors import UsageError

Build = Callable[..., Work]
Finish = Callable[..., None]

_PROFILE = Annotated[
    str | None, typer.Option(help="Table of the profiles' file whose keys are options; default: `default`.")
]
_PROFILES = Annotated[
    Path | None, typer.Option(help="File of profiles; default: shoal-jobs.toml, ~/.config/shoal/jobs.toml.")
]


def command(build: Build, finish: Finish) -> Callable[..., None]:
    """A function that Typer makes a command of. finish: is given the Work, the JobOptions, and options of its own."""
    own, last = _parameters(build, 1), _parameters(finish, 2)
    cluster = _cluster_parameters()
    parameters = {each.name: each for each in [*own, *cluster, *last]}  # in this order in the help

    def run(**given: Any) -> None:
        said = {name: given[name] for name in JobOptions.model_fields}
        serves = build is KINDS["serve"]
        if serves:
            _refuse_for_services(said)
        options = resolve_options(said, given["profile"], given["profiles"])
        if options.ray_address is not None:
            options = _for_ray(options, said, serves)
        if serves:  # a queue of the profile, which would take the priority as well
            options = options.model_copy(update={"queue": None})
        work = build(options, **{each.name: given[each.name] for each in own})
        finish(work, options, **{each.name: given[each.name] for each in last})

    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: each.annotation for name, each in parameters.items()}
    run.__doc__ = build.__doc__
    return run


def _refuse_for_services(said: Mapping[str, Any]) -> None:
    """Options of the command line that a RayService has no place for; a profile may hold them, for jobs."""
    for name in OF_JOBS:
        if said[name] is not None:
            raise UsageError(f"{flag(name)} is for jobs, and a service has no place for it: leave it out")


def _for_ray(options: JobOptions, said: Mapping[str, Any], serves: bool) -> JobOptions:
    """Without what only Kubernetes has a place for, which a profile may hold; refused on the command line."""
    if serves:
        raise UsageError(
            "a service is no job of Ray's: run `shoal serve RUN` on the cluster, with RAY_ADDRESS=auto, or leave "
            "--ray-address out for a RayService"
        )
    for name in JobOptions.model_fields:
        if name not in OF_RAY and said[name] not in (None, []):
            raise UsageError(
                f"{flag(name)} is for Kubernetes, and --ray-address names a Ray that runs already: leave one of them "
                f"out"
            )
    return JobOptions(**{name: getattr(options, name) for name in OF_RAY})


def _parameters(function: Callable[..., Any], skipped: int) -> list[inspect.Parameter]:
    """A function's parameters after the first, with their annotations resolved."""
    hints = get_type_hints(function, include_extras=True)
    parameters = list(inspect.signature(function).parameters.values())[skipped:]
    return [each.replace(annotation=hints[each.name], kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]


def _cluster_parameters() -> list[inspect.Parameter]:
    found = [
        _parameter(name, _kind(field.annotation), field.description or "", panel_of(name))
        for name, field in JobOptions.model_fields.items()
    ]
    extra = {"profile": _PROFILE, "profiles": _PROFILES}
    return found + [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in extra.items()
    ]


def _parameter(name: str, kind: Any, help: str, panel: str) -> inspect.Parameter:
    optional: Any = kind | None
    names = f"{flag(name)}/--no-{flag(name)[2:]}" if kind is bool else flag(name)
    shown = typer.Option(names, help=_with_default(name, help), rich_help_panel=panel, show_default=False)
    annotation: Any = Annotated[optional, shown]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _kind(annotation: Any) -> Any:
    """What Typer reads: the type without None, and texts for choices, which the model checks in its own words."""
    if annotation in (int, str, bool) or annotation in (list[str], list[Path]):
        return annotation
    kinds = [each for each in get_args(annotation) if each is not type(None)]
    return int if int in kinds else str


def _with_default(name: str, help: str) -> str:
    """The line of help with the default and the choices that the model has."""
    field = JobOptions.model_fields[name]
    choices = [each for part in (field.annotation, *get_args(field.annotation)) for each in get_args(part)]
    texts = [each for each in choices if isinstance(each, str)]
    said = f" One of {', '.join(dict.fromkeys(texts))}." if texts else ""
    if field.default not in (None, False, []) and "default" not in help and not (field.default == 0 and "0:" in help):
        said += f" Default: {field.default}."
    return help + said
