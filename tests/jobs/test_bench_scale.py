"""``shoal bench scale`` on a CPU: layers and training over two gloo ranks and on one, and what is written of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from shoal.jobs.bench.cases import Patience
from shoal.jobs.bench.command import environment
from shoal.jobs.bench.registry import Settings, draw
from shoal.jobs.bench.result import table
from shoal.jobs.bench.scale import PARTS, Scale, main, prepared, series_of
from shoal.jobs.bench.scale_cases import Case
from shoal.jobs.bench.scale_series import SequenceSeries, all_series
from shoal.jobs.bench.sequence_rank import Case as Layer
from shoal.workers.actor import RankActor
from shoal.workers.errors import UsageError

ALONE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "pydantic", "typer", "rich", "pyarrow", "tokenizers"):
            raise ImportError(name)
sys.meta_path.insert(0, Missing())
import shoal.jobs.bench.scale_rank
from shoal.jobs.bench.registry import Settings
from shoal.jobs.bench.scale import prepared
scale = prepared(("moe", "sequence"), [1, 2], False, Settings())
for case in scale.cases(1):
    scale.found[case] = {"ms": 1.0, "peak_bytes": 1, "peak_flops": 1.0, "itemsize": 2}
print(len(scale.rows()))
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of ``shoal bench scale``; without a GPU, also where there is one."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "shoal.jobs.cli.main", "bench", "scale", "--steps", "2"]
    for option in ("--out", "--plots", "--data-dir"):
        command += [option, str(folder)]
    subprocess.run(command, check=True, env=environment() | {"CUDA_VISIBLE_DEVICES": ""}, timeout=280)
    assert (folder / "scale-cpu.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "scale-cpu.json").read_text())


SAME = (("moe", "weak"), ("sequence", "weak"), ("sequence", "strong"))
"""Parts and modes whose efficiency is beside the time of a rank's part; others leave out what is shared out."""


def test_every_row_has_a_prediction_and_measured_ones_have_figures(result: Any) -> None:
    rows = [row for row in result["rows"] if "mode" in row]
    assert {(r["part"], r["mode"], r["ranks"], r["measured"]) for r in rows} == {
        (part, mode, ranks, ranks < 4)
        for part in ("moe", "sequence", "train")
        for mode in ("weak", "strong")
        for ranks in (1, 2, 4, 8)
    }
    for row in rows:
        assert row["predicted_ms"] > 0 and row["predicted_tokens_per_second"] > 0
        assert row["fitted"] == (row["ranks"] == 2)
        assert ("ms" in row) == ("efficiency" in row) == row["measured"]
        if row["measured"]:
            assert row["efficiency"] == row["ratio"] == pytest.approx(row["baseline_ms"] / row["ms"], rel=1e-4)
            assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["ms"] * 1e3, rel=1e-4)
            assert row["mfu"] > 0
        if row["measured"] and row["part"] == "train":
            assert len(row["device_loads"]) == row["steps"] and len(row["settling"]) == 1  # on a CPU
            assert all(1 <= load <= row["ranks"] + 1e-4 for load in (*row["device_loads"], *row["settling"]))
        if row["ranks"] == 1:
            assert row["predicted_ms"] == pytest.approx(row["ms"]) and row["predicted_bytes"] == 0
        if row["ranks"] == 1 or (row["measured"] and (row["part"], row["mode"]) in SAME):
            assert row["exposed_share"] == pytest.approx(max(0, 1 - row["efficiency"]), abs=1e-3)
        if row["measured"] and row["ranks"] > 1:
            assert (0 if row["part"] == "train" and "nsa" not in row["what"] else 1e-4) <= row["dispatch_share"] < 1
    assert {(r["part"], r["target"]) for r in rows if "target" in r} == {("moe", 0.92), ("train", 0.9)}
    assert result["notes"] == []


def test_the_utilisation_is_that_of_one_peak(result: Any) -> None:
    """A token of these costs as many FLOPs whatever their number, over the peak that the ranks measured."""
    rates: dict[tuple[str, int], set[float]] = {}
    for row in result["rows"]:
        if row.get("measured") and "mode" in row and (row["part"] == "moe" or "2b" in row["what"]):
            rate = row["mfu"] * row["ms"] * row["ranks"] / row["tokens"]
            rates.setdefault((row["what"], row["ranks"]), set()).add(rate)
    assert len(rates) == 7
    for found in rates.values():
        assert max(found) == pytest.approx(min(found), rel=1e-3)


def test_a_share_of_the_peak_is_the_ratio_of_its_own_row(result: Any) -> None:
    (share,) = [row for row in result["rows"] if row["what"] == "deepseekmoe-2b alone, small, utilisation"]
    (row,) = [row for row in result["rows"] if row["what"] == "deepseekmoe-2b alone, small"]  # one rank, weak, alone
    assert share["ratio"] == pytest.approx(row["mfu"], rel=1e-4) and share["ms"] == row["ms"]
    assert share["target"] == 0.40 and "target" not in row and not row["rows_put"]


def test_what_is_asked_for_at_2k_is_measured_by_one_rank_and_by_two() -> None:
    """As if one H100 trained on 202,200 tokens/s, which is 40.5 % of its peak, and two on 1.9 times as many."""
    scale = Scale(series_of(("train",), False), (1, 2), wanted=["2b at 2k", "64 experts at 2k"])
    measured = {ranks: {case.name: case for case in scale.cases(ranks)} for ranks in scale.ranks}
    alone, shared = "deepseekmoe-2b at 2k, 4 micro-batches", "deepseekmoe-2b with 64 experts at 2k, 12 micro-batches"
    assert [*measured[2]] == [shared]
    for ranks, speed in ((1, 202_200), (2, 1.9 * 202_200)):
        for case in measured[ranks].values():
            facts = {"ms": 1e3 * case.tokens / speed, "update_ms": 1.0, "peak_bytes": 1}
            scale.found[case] = {**facts, "peak_flops": 989e12, "itemsize": 2}
    rows = {(row["what"], row.get("ranks")): row for row in scale.rows() if row["what"].startswith((alone, shared))}
    assert {key[1] for key in rows if key[0] == alone} == {1}
    share, row, both = rows[f"{alone}, utilisation", 1], rows[alone, 1], rows[shared, 2]
    assert row["flops_per_token"] == pytest.approx(1.983e9, rel=1e-3)
    assert share["ratio"] == pytest.approx(row["mfu"]) == pytest.approx(0.405, abs=1e-3) and share["target"] == 0.40
    assert both["ratio"] == pytest.approx(0.95) and both["target"] == 0.95 and rows[shared, 8]["target"] == 0.90


def test_bytes_predicted_of_a_sequence_are_those_that_were_counted(result: Any) -> None:
    (row,) = [r for r in result["rows"] if r.get("what") == "NSA at 2k" and r.get("ranks") == 2]
    assert row["predicted_bytes"] == pytest.approx(row["bytes"], rel=1e-5) and row["bytes"] > 0


def test_two_ranks_lose_what_one_loses(result: Any) -> None:
    """Strong scaling trains on the same tokens."""
    losses = {(r["what"], r["ranks"]): r["losses"] for r in result["rows"] if "losses" in r and r["mode"] == "strong"}
    assert len(losses) == 6
    for what, ranks in losses:
        assert losses[what, ranks] == pytest.approx(losses[what, 1], rel=1e-4)


def test_constants_say_whether_they_are_fitted(result: Any) -> None:
    sources = {(r["what"], r["source"]) for r in result["rows"] if "source" in r}
    assert sources == {
        ("bytes a second between ranks", "measured"),
        ("a byte that travels, beyond that", "fitted"),
        ("an exchange, whatever its size", "fitted"),
    }


def _gathered(folder: Path, *documents: Any) -> subprocess.CompletedProcess[str]:
    """Of ``python -m shoal.jobs.bench.scale --gather``."""
    files = [folder / f"{i}.json" for i in range(len(documents))]
    for file, document in zip(files, documents, strict=True):
        file.write_text(json.dumps(document))
    return _called("--out", str(folder), "--gather", *map(str, files))


def _called(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Of ``python -m shoal.jobs.bench.scale``, in this process, which has imported what that takes."""
    command = ["scale", *arguments]
    out, err, code = StringIO(), StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", command)
        try:
            main()
        except SystemExit as end:
            assert isinstance(end.code, int)
            code = end.code
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def test_what_several_calls_measured_gives_the_rows_of_one(result: Any, tmp_path: Path) -> None:
    """Also where no call had both one rank and several; of what was measured twice the newer stands. Rows say of which
    call they are, and gathered once more they are the same."""
    one, two = ([f for f in result["facts"] if (f["ranks"] == 1) == alone] for alone in (True, False))
    older = [{**f, "ms": 2 * f["ms"]} for f in one]
    parts = [
        {**result, "rows": [], "facts": facts, "date": date, "commit": date[-1], "notes": [date]}
        for facts, date in ((two, "2026-02-03"), (older, "2026-02-01"), (one, "2026-02-02"))
    ]
    done = _gathered(tmp_path, *parts)
    assert done.returncode == 0, done.stderr
    gathered = json.loads((tmp_path / "scale-cpu.json").read_text())
    dated = [
        row | ({"date": "2026-02-02" if row["ranks"] == 1 else "2026-02-03"} if row.get("measured") else {})
        for row in result["rows"]
    ]
    assert gathered["rows"] == dated
    assert [(c["date"], c["commit"]) for c in gathered["gathered"]] == [(f"2026-02-0{i}", str(i)) for i in (1, 2, 3)]
    # the whole is as old as its newest part, not each of its facts
    twice = _gathered(tmp_path, gathered, {**parts[1], "date": "2026-02-02T12:00"})
    assert twice.returncode == 0, twice.stderr
    again = json.loads((tmp_path / "scale-cpu.json").read_text())
    assert len(again["gathered"]) == 4
    assert {row["date"] for row in again["rows"] if row.get("measured") and row["ranks"] == 1} == {"2026-02-02T12:00"}
    assert gathered["date"] == "2026-02-03" and gathered["notes"] == ["2026-02-01", "2026-02-02", "2026-02-03"]
    assert (tmp_path / "scale-cpu.png").exists()


def test_results_that_do_not_belong_together_are_not_gathered(result: Any, tmp_path: Path) -> None:
    cut = {key: value for key, value in result.items() if key != "facts"}
    done = _gathered(tmp_path, result, cut)
    assert done.returncode == 3 and "1.json is no result of bench scale with facts" in done.stderr
    done = _gathered(tmp_path, result, {**result, "device": "4 x NVIDIA H100, 64 cores, 512 GiB"})
    assert done.returncode == 3 and "4 x NVIDIA H100, in small" in done.stderr
    done = _gathered(tmp_path, {**result, "facts": [{**result["facts"][0], "case": "MoE layer, 3 tokens"}]})
    assert done.returncode == 3 and "MoE layer, 3 tokens on 1 was measured by another version" in done.stderr
    training = next(facts for facts in result["facts"] if "sets" in facts)
    assert training["recipe"] == "deepseekmoe-2b" and f"parallel.ranks={training['ranks']}" in training["sets"]
    other = {**training, "sets": [s for s in training["sets"] if "accumulate" not in s] + ["train.dtype='bfloat16'"]}
    done = _gathered(tmp_path, {**result, "facts": [other]})
    assert done.returncode == 3 and "was measured with train.dtype='bfloat16', no train.accumulate=" in done.stderr


def test_trainings_from_before_experts_settled_stand_beside_no_newer_ones(result: Any, tmp_path: Path) -> None:
    """A newer pair of ranks has no single rank beside it then; with older ones alone all is as it was."""
    older = [{key: value for key, value in facts.items() if key != "settling"} for facts in result["facts"]]
    alone = {**result, "date": "2026-02-01", "facts": [facts for facts in older if facts["ranks"] == 1]}
    two = {**result, "date": "2026-02-02", "facts": [facts for facts in result["facts"] if facts["ranks"] == 2]}
    assert _gathered(tmp_path, alone, two).returncode == 0
    gathered = json.loads((tmp_path / "scale-cpu.json").read_text())
    rows = {part: [row for row in gathered["rows"] if row["part"] == part and "ms" in row] for part in PARTS}
    several = [row for row in rows["train"] if "alone" not in row["what"]]  # what one rank alone trains has no others
    assert several and all(row["ranks"] == 2 and "efficiency" not in row for row in several)
    assert {row["ranks"] for row in rows["train"] if row not in several} == {1}
    assert {row["ranks"] for part in ("moe", "sequence") for row in rows[part]} == {1, 2}
    count = sum("losses" in facts and "alone" not in facts["case"] for facts in alone["facts"])
    assert len(gathered["notes"]) == count > 0
    assert all(" on 1 of 2026-02-01: " in note for note in gathered["notes"])

    assert _gathered(tmp_path, {**result, "facts": older}).returncode == 0
    gathered = json.loads((tmp_path / "scale-cpu.json").read_text())
    told, again = (
        {(row["what"], row.get("mode"), row.get("ranks")): row.get("ms") for row in each["rows"]}
        for each in (result, gathered)
    )
    assert again == told
    assert gathered["notes"] == []


def test_ranks_allocate_as_those_of_training_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of ``shoal bench scale``: what fits one must fit the other."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # is put back afterwards
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    Scale([], [1]).measure()
    assert os.environ["PYTORCH_ALLOC_CONF"] == RankActor.allocator


def test_no_two_cases_have_one_name() -> None:
    for small in (False, True):
        scale = Scale(series_of(PARTS, small), (1, 2, 4, 8))
        cases = {case for ranks in scale.ranks for case in scale.cases(ranks)}
        assert len({(case.ranks, str(case)) for case in cases}) == len(cases) > 20


def test_some_lines_are_measured_alone() -> None:
    scale = prepared(("serve",), [1, 2, 4], False, Settings(), "2A:2F,1A:1F")
    assert [str(case) for ranks in scale.ranks for case in scale.cases(ranks)] == [
        "1A:1F, 16 requests",
        "2A:2F, 32 requests",
    ]


def test_nothing_is_waited_for_without_an_end() -> None:
    """Also by ``shoal bench scale``, which has no options for it; where no time is left, nothing is begun."""
    assert 0 < prepared(("moe",), [1], True, Settings()).patience.left < 3600
    over = Patience(end=time.monotonic())
    scale = prepared(("moe", "serve"), [1], False, Settings(), patience=over)
    scale.measure()
    assert len(scale.notes) == 2 and all(note.endswith(": no time was left") for note in scale.notes)
    assert not scale.found


def test_a_million_tokens_are_trained_on_by_four_ranks_and_more() -> None:
    scale = Scale(series_of(("train",), False), (1, 2, 4, 8), wanted=["4 layers of 2048 at 1M"])
    assert {ranks: [case.tokens for case in scale.cases(ranks)][-1:] for ranks in scale.ranks} == {
        1: [65536],  # for the curve of one rank
        2: [],
        4: [1 << 20],
        8: [1 << 20],
    }


def test_the_result_is_shown(result: Any, tmp_path: Path) -> None:
    assert table(result).row_count == len(result["rows"])
    assert draw("scale", result, tmp_path) == tmp_path / "scale-cpu.png"


def test_layers_need_neither_pydantic_nor_ray() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_a_case_that_fails_is_left_out_with_a_sentence() -> None:
    good, bad = (SequenceSeries(Layer("nsa", 0, 1, heads=h, kv_heads=2, dim=16, repeats=1), 64, ()) for h in (4, 3))
    said: list[str] = []
    scale = Scale([bad, good], [1], said.append)
    seen: list[int] = []
    scale.measure(lambda: seen.append(len(scale.rows())))
    assert [row["measured"] for row in scale.rows()] == [True, False, False, False]
    assert seen == [4] and len(scale.notes) == 1
    assert scale.notes[0].startswith("left out, 1 rank, NSA, 64 tokens: ")


def test_unknown_parts_are_refused() -> None:
    with pytest.raises(UsageError, match="--parts dance is none of moe, sequence, train, serve"):
        prepared(("moe", "dance"), [1], True, Settings())
    with pytest.raises(UsageError, match="--only walk is in no name of these: MoE layer"):
        prepared(("moe",), [1], True, Settings(), "walk")
    only = prepared(("moe", "sequence"), [1], True, Settings(), "NSA,walk").series
    assert [each.part for each in only] == ["sequence"]
    assert [each.part for each in prepared(("moe", "sequence"), [1], True, Settings(), "NSA,").series] == ["sequence"]


def test_some_series_do_not_take_the_place_of_all(tmp_path: Path) -> None:
    some = ("--parts", "moe,sequence", "--only", "NSA", "--ranks", "1")
    done = _called("--device", "cpu", "--out", str(tmp_path), *some)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {f"scale-cpu-moe-sequence-some.{x}" for x in ("json", "png")}
    rows = json.loads((tmp_path / "scale-cpu-moe-sequence-some.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {"sequence"}


def test_full_sizes_are_possible_on_8_ranks_and_fit_80_gb() -> None:
    """Each training's recipe is allowed, and leaves room on a GPU of 80 GiB, 86 GB, by the estimate."""
    from shoal.jobs.bench.scale_cases import Training
    from shoal.jobs.estimate import estimate

    scale = Scale(all_series(False, None), (1, 2, 4, 8))
    for ranks in scale.ranks:
        cases: list[Case] = [case for case in scale.cases(ranks) if isinstance(case.sizes, Training)]
        assert len({case.name for case in cases}) == (7 if ranks == 1 else 6)
        for case in cases:
            assert isinstance(case.sizes, Training)
            recipe = case.sizes.load()
            assert recipe.parallel.ranks == ranks
            assert estimate(recipe).memory["colocated"].total < 78e9  # 40 sequences of 2k, which were seen to fit
    assert max(case.tokens for case in scale.cases(8) if case.name.startswith("4 layers")) == 1 << 20


def test_what_has_no_single_rank_beside_it_has_figures_alone(tmp_path: Path) -> None:
    """As where 1M tokens were trained over four ranks, and no other case of theirs was reached."""
    scale = Scale(series_of(("train",), False), (4,), wanted=["4 layers"])
    long = max(scale.cases(4), key=lambda case: case.tokens)
    scale.found[long] = {"ms": 8000.0, "peak_bytes": 7, "peak_flops": 1e15, "itemsize": 2, "dispatch_share": 0.1}
    (row,) = scale.rows()
    assert (row["tokens"], row["ranks"], row["measured"]) == (1 << 20, 4, True)
    assert row["tokens_per_second"] == pytest.approx((1 << 20) / 8)
    assert row["mfu"] == pytest.approx(row["flops_per_token"] * (1 << 20) / (8 * 4 * 1e15))
    assert not {"efficiency", "predicted_ms", "ratio"} & row.keys()
    result: Any = {"benchmark": "scale", "device": "cuda", "rows": [row]}
    assert draw("scale", result, tmp_path) == tmp_path / "scale.png"
