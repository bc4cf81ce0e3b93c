"""What ranks that share sequences chose of one another's pages, in a run's records, and how they fetch by it."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small import small_corpus, small_recipe

from shoal.kernels.nsa import nsa_attention
from shoal.kernels.nsa.oracle import Hyper, chosen_blocks, cmp_starts, slc_importance
from shoal.workers.config import Recipe
from shoal.workers.mesh import make_mesh
from shoal.workers.model import contexts
from shoal.workers.placement import Placement
from shoal.workers.pull import Fetching
from shoal.workers.sequence import Sequence, make_sequence
from shoal.workers.trainer import Trainer

LAYERS, PAGE = 3, 8
Ways = dict[str, dict[str, Any]]
Calls = list[tuple[torch.Tensor, torch.Tensor, tuple[int, ...], float]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("small"))


def _trainer(tables: dict[str, Any], corpus: Path | str, rank: int = 0, checkpoints: str | None = None) -> Trainer:
    recipe, folder = Recipe.model_validate(tables), Path(checkpoints) if checkpoints else None
    return Trainer(recipe, Path(corpus), folder, make_mesh(Placement.of(recipe), rank), torch.device("cpu"))


def _ways(rank: int, world: int, ways: Ways, corpus: str, steps: int) -> dict[str, list[dict[str, Any]]]:
    """Of each way to fetch the records of steps, with the bytes of far keys that arrived at this rank in each, and how
    often it was kept what heads of a layer had chosen."""
    torch.set_num_threads(1)
    return {fetch: _steps(_trainer(tables, corpus, rank), steps) for fetch, tables in ways.items()}


def _steps(trainer: Trainer, steps: int) -> list[dict[str, Any]]:
    made: dict[int, Sequence] = {}

    def remembered(*args: Any) -> Sequence:
        sequence = make_sequence(*args)
        if id(sequence) not in made:
            sequence.received.clear()
        made[id(sequence)] = sequence
        return sequence

    found, before, kept = [], 0, Counter[str]()
    keep = Fetching.keep

    def counting(*args: Any, **named: Any) -> None:
        kept["times"] += 1
        keep(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contexts, "make_sequence", remembered)
        patch.setattr(Fetching, "keep", counting)
        for _ in range(steps):
            record = trainer.train_step()
            arrived = sum(s.received["far"] + s.received["pages"] for s in made.values())
            found.append(record | {"received": arrived - before, "kept": kept.pop("times", 0)})
            before = arrived
    return found


def _calls(tables: dict[str, Any], corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Queries and compressed keys of each attention of one rank's first step, layer by layer, batch by batch."""
    calls: Calls = []

    def seen(q: torch.Tensor, k_cmp: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append((q.detach(), k_cmp.detach(), rest[6].cu_seqlens, rest[7]))
        return nsa_attention(q, k_cmp, *rest)

    monkeypatch.setattr(contexts, "nsa_attention", seen)
    _trainer(tables, corpus).train_step()
    return calls


def _chosen(call: tuple[torch.Tensor, torch.Tensor, tuple[int, ...], float], hyper: Hyper) -> list[list[set[int]]]:
    """Of each head of keys and each token of a pack the tokens whose selected keys it reads, by the paper's words."""
    q, k_cmp, cu, scale = call
    heads, first = k_cmp.shape[1], 0
    share = q.shape[1] // heads
    read: list[list[set[int]]] = [[set() for _ in range(len(q))] for _ in range(heads)]
    for start, stop in pairwise(cu):
        starts = cmp_starts(stop - start, hyper)
        for t in range(stop - start):
            ended = [first + i for i, s in enumerate(starts) if s + hyper.l - 1 <= t]
            for g in range(heads):
                scores = q[start + t, g * share : (g + 1) * share] @ k_cmp[ended, g].T
                weights = torch.softmax(scale * scores, dim=1).sum(0)
                blocks = chosen_blocks(slc_importance(weights, t // hyper.l_slc + 1, hyper), t, hyper)
                read[g][start + t] = {start + s for s in range(t + 1) if s // hyper.l_slc in blocks}
        first += len(starts)
    return read


def _counted(read: list[list[set[int]]], cu: tuple[int, ...], ranks: int) -> list[tuple[int, int, int, int]]:
    """Of each rank: pages of others that it reads, tokens of them; pages that it might read, tokens of them."""
    tokens = cu[-1]
    edges = [round(i * tokens / (2 * ranks) / PAGE) * PAGE for i in range(2 * ranks)] + [tokens]
    document = [i for i, (start, stop) in enumerate(pairwise(cu)) for _ in range(start, stop)]
    out = []
    for rank in range(ranks):
        mine = {t for i in (rank, 2 * ranks - 1 - rank) for t in range(edges[i], edges[i + 1])}
        last: dict[int, int] = {}
        for t in mine:
            last[document[t]] = max(t, last.get(document[t], 0))
        might = [t for d, stop in last.items() for t in range(cu[d], stop + 1) if t not in mine]
        pages = {t // PAGE for t in might}
        chosen = [{s // PAGE for t in mine for s in head[t] if s not in mine} for head in read]
        rows = sum(t // PAGE in some for some in chosen for t in might)
        out.append((sum(map(len, chosen)), rows, len(read) * len(pages), len(read) * len(might)))
    return out


LONG = ("2 groups of 2", "2A:2F")
CASES: dict[str, dict[str, Any]] = {
    "2 ranks share all, in three parts": {
        "parallel__ranks": 2,
        "parallel__context": 2,
        "train__accumulate": 3,
        "balance__over": "micro_batch",
    },
    "4 ranks share all, two layers computed again, head by head": {
        "parallel__ranks": 4,
        "parallel__context": 4,
        "train__recompute": 2,
        "parallel__context_heads": 1,
        "parallel__context_gradients": "float32",
    },
    "2A:2F": {
        "parallel__placement": "2A:2F",
        "parallel__context": 2,
        "train__accumulate": 6,
        "balance__over": "micro_batch",
    },
    "2 groups of 2": {"parallel__ranks": 4, "parallel__context": 2, "train__accumulate": 3},
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in CASES])
def test_coverage_in_records_is_that_of_the_blocks_that_were_chosen(
    corpus: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted anew from one rank's queries and compressed keys, by the paper's equations; bytes are those that came.
    Not at passes for experts' load alone, nor at those of layers that are computed again."""
    shape = {"model__context": 192, "train__sequence": 192, "train__batch": 6, "attention__slc_count": 4}
    tables = small_recipe(**shape, **CASES[name])
    p = Recipe.model_validate(tables).parallel
    groups, parts = p.attention_ranks // p.context, tables["train"].get("accumulate", 1)
    alone = small_recipe(**shape, train__accumulate=parts * groups, balance__over="micro_batch")
    calls = _calls(alone, corpus, monkeypatch)
    assert len(calls) == LAYERS * parts * groups
    hyper = Hyper(8, 4, PAGE, 4, 1, 2, 12)
    counts = torch.zeros(LAYERS, p.context, 4, dtype=torch.float64)
    for i, call in enumerate(calls):
        counts[i % LAYERS] += torch.tensor(_counted(_chosen(call, hyper), call[2], p.context))
    want = counts[..., 0] / counts[..., 2]
    assert 0 < want.min() < 0.9

    ways = {fetch: small_recipe(**shape, **CASES[name], parallel__context_fetch=fetch) for fetch in ("all", "chosen")}
    ranks = run_ranks(p.ranks, _ways, ways, str(corpus), 1)
    found = {fetch: [each[fetch] for each in ranks] for fetch in ways}
    for fetch, by in (("all", "gather_bytes"), ("chosen", "pull_bytes")):
        records = [record for (record,) in found[fetch]]
        for record in records:
            coverage = record["coverage"]
            assert torch.allclose(torch.tensor(coverage["coverage"], dtype=torch.float64), want, rtol=1e-12)
            assert coverage["pulled"] == [fetch == "chosen"] * LAYERS
            assert record["loss"] == found["all"][0][0]["loss"]
            assert record["grad_norm"] == found["all"][0][0]["grad_norm"]
        turns = 2 if "context_heads" in tables["parallel"] else 1
        kept = [LAYERS * parts * turns] * p.attention_ranks
        assert sorted(record["kept"] for record in records) == [0] * (p.ranks - p.attention_ranks) + kept
        assert sum(records[0]["coverage"][by]) * p.attention_ranks == sum(r["received"] for r in records)
    once = counts[..., 3].sum(1) * (8 + 6) * 8
    more = name == "2 groups of 2"  # a forward pass of its own counts experts' load
    times = torch.tensor([3.0 + more + (i < tables["train"].get("recompute", 0)) for i in range(LAYERS)])
    assert found["all"][0][0]["coverage"]["gather_bytes"] == (times * once / p.attention_ranks).tolist()


FEW: dict[str, Any] = {  # of a long sequence only forced blocks, and the next ones, are chosen
    "model__context": 512,
    "train__sequence": 512,
    "train__batch": 2,
    "attention__slc_count": 3,
    "parallel__ranks": 4,
    "parallel__context": 4,
    "train__steps": 4,
}


def test_layers_begin_to_pull_once_it_was_seen_to_move_less_than_half(corpus: Path) -> None:
    """A run's losses are the same bits whatever is fetched, and all ranks decide alike."""
    ways = {fetch: small_recipe(**FEW, parallel__context_fetch=fetch) for fetch in ("auto", "all", "chosen")}
    found = run_ranks(4, _ways, ways, str(corpus), 3)
    runs = {fetch: [each[fetch] for each in found] for fetch in ways}
    for fetch, ranks in runs.items():
        for records in ranks:
            for step, record in enumerate(records):
                for key in ("loss", "balance_loss", "grad_norm", "load"):
                    assert record[key] == runs["all"][0][step][key], (fetch, step, key)
    for records in runs["auto"]:
        assert [r["coverage"]["pulled"] for r in records] == [[False] * LAYERS, [True] * LAYERS, [True] * LAYERS]
    for step, like in ((0, "all"), (1, "chosen"), (2, "chosen")):
        received = [[records[step]["received"] for records in runs[fetch]] for fetch in ("auto", like)]
        assert received[0] == received[1]
    assert sum(r[1]["received"] for r in runs["auto"]) < 0.5 * sum(r[1]["received"] for r in runs["all"])


def _resumed(rank: int, world: int, tables: dict[str, Any], corpus: str, folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    first = _trainer(tables, corpus, rank, folder)
    records = [first.train_step() for _ in range(2)]
    first.save()
    first.settle()
    records.append(first.train_step())
    second = _trainer(tables, corpus, rank, folder)
    before = list(second.watch.coverage.pulls)
    second.restore(2)
    return {"before": before, "want": records[2], "got": second.train_step()}


def test_a_resumed_run_goes_on_pulling(corpus: Path, tmp_path: Path) -> None:
    for found in run_ranks(4, _resumed, small_recipe(**FEW), str(corpus), str(tmp_path)):
        want, got = found["want"], found["got"]
        assert found["before"] == [False] * LAYERS
        assert got["coverage"]["pulled"] == [True] * LAYERS
        for key in ("loss", "grad_norm", "coverage", "load", "gates"):
            assert got[key] == want[key], key


def _decided(rank: int, world: int, ways: Ways, corpus: str) -> dict[str, list[list[bool]]]:
    """Which layers pull after steps in which so many of 100 pages of 8 tokens were chosen at each of two places."""
    found: dict[str, list[list[bool]]] = {fetch: [] for fetch in ways}
    for fetch, tables in ways.items():
        coverage = _trainer(tables, corpus, rank).watch.coverage
        for pages in (10, 50, 49, 100):
            coverage.decide([pages, 8 * pages, 100, 800, 0] * (2 * LAYERS))
            found[fetch].append(coverage.pulls)
    return found


def test_layers_pull_while_that_moves_less_than_half(corpus: Path) -> None:
    pulls = {"auto": (True, False, True, False), "all": (False,) * 4, "chosen": (True,) * 4}
    shared = {"parallel__ranks": 2, "parallel__context": 2}
    ways = {fetch: small_recipe(**shared, parallel__context_fetch=fetch) for fetch in pulls}
    for found in run_ranks(2, _decided, ways, str(corpus)):
        assert found == {fetch: [[pull] * LAYERS for pull in each] for fetch, each in pulls.items()}


def test_steps_that_are_not_recorded_count_nothing(corpus: Path) -> None:
    """Nor do runs on one rank, whose records have no coverage at all."""
    tables = small_recipe(parallel__ranks=2, parallel__context=2, train__steps=400)
    for records in run_ranks(2, _advance, tables, str(corpus)):
        assert [[r["kind"] for r in step].count("coverage") for step in records] == [0, 1, 0]
    trainer = _trainer(small_recipe(), corpus)
    assert "coverage" not in [record["kind"] for record in trainer.advance()]


def _advance(rank: int, world: int, tables: dict[str, Any], corpus: str) -> list[list[dict[str, Any]]]:
    torch.set_num_threads(1)
    trainer = _trainer(tables, corpus, rank)
    return [trainer.advance() for _ in range(3)]
