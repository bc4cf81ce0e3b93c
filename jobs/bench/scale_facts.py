"""What ``shoal bench scale`` measured, as its JSON keeps it: read again, with that of other calls, it gives their rows.

A case is known by its ranks and its name, as :class:`~shoal.jobs.bench.scale_cases.Case` says it. Trainings and servers
have their ``recipe`` and its settings, ``sets``, with what was measured; results of before do not say them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.jobs.bench.result import Document
from shoal.workers.errors import InvalidInput

if TYPE_CHECKING:
    from shoal.jobs.bench.scale_cases import Case, Facts

ABOUT = ("device", "software", "commit", "dirty", "date")
"""Of a document, what is that of the last one where several are gathered; :func:`calls_of` has it of each."""


def told(found: Mapping[Case, Facts]) -> list[dict[str, Any]]:
    """For the JSON: of each case its ranks, its name, and what was measured."""
    return [{"ranks": case.ranks, "case": str(case), **facts} for case, facts in found.items()]


def read(paths: Sequence[Path]) -> list[Document]:
    """Results, the oldest first. Raises InvalidInput for a file that is none, and for those of different GPUs."""
    documents = []
    for path in paths:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            document["facts"], document["small"], document["date"], document["device"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInput(
                f"--gather {path} is no result of bench scale with facts ({error!r}): leave it out"
            ) from None
        documents.append(document)
    documents.sort(key=lambda document: str(document["date"]))
    kinds = {_gpus(document["device"]) + ", in small" * document["small"] for document in documents}
    if len(kinds) > 1:
        raise InvalidInput(
            f"--gather was given results of {' and of '.join(sorted(kinds))}: name those of one kind of machine"
        )
    return documents


def calls_of(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """Of each call that documents come from, the oldest first, what ``ABOUT`` names."""
    calls = [each for document in documents for each in document.get("gathered", [{k: document[k] for k in ABOUT}])]
    return sorted(calls, key=lambda call: str(call["date"]))


def _gpus(device: str) -> str:
    """A machine without its cores and its memory, which may grow."""
    return device.partition(",")[0]


def unsettled(found: Mapping[Case, Facts]) -> list[Case]:
    """Trainings that began with small embeddings, so that experts were uneven, of whose name there are others: these
    say how experts settled, and are no measure for those, nor those for these."""
    newer = {case.name for case, facts in found.items() if "settling" in facts}
    return [case for case, facts in found.items() if case.name in newer and "settling" not in facts]


def found_in(documents: Sequence[Document], cases: Iterable[Case]) -> dict[Case, Facts]:
    """What was measured of each case, the newest of several, and as ``date`` that of its call. Raises InvalidInput for
    what is no case, or one of other settings."""
    known = {(case.ranks, str(case)): case for case in cases}
    found: dict[Case, Facts] = {}
    for document in documents:
        for fact in document["facts"]:
            key = fact["ranks"], fact["case"]
            if key not in known:
                raise InvalidInput(f"{key[1]} on {key[0]} was measured by another version: measure it again")
            case, date = known[key], str(fact.get("date", document["date"]))
            if others := _others(case, fact):
                raise InvalidInput(f"{key[1]} on {key[0]} was measured with {others}: measure it again")
            if case not in found or date >= found[case]["date"]:
                mine = {name: value for name, value in fact.items() if name not in ("ranks", "case")}
                found[case] = mine | {"date": date}
    return found


def _others(case: Case, fact: Facts) -> str:
    """The settings of what was measured that are not the case's, in words; of steps there may be any number."""
    if "sets" not in fact:
        return ""
    mine, its = ({f"recipe {of['recipe']}", *of["sets"]} for of in (case.settings, fact))
    known = {each.partition("=")[0] for each in its}
    others = [*sorted(its - mine), *sorted(f"no {each}" for each in mine - its if each.partition("=")[0] not in known)]
    return ", ".join(each for each in others if "train.steps=" not in each)
