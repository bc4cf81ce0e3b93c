"""``shoal bench serve``: loads one after another, the plain loop beside them, what is refused, written and shown."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_server import MIX, TEXT, Server, serving
from rich.console import Console
from shell import processes_in, shoal, shoal_here
from small import small_corpus, small_recipe

from shoal.jobs.bench import serve_view
from shoal.jobs.bench.ending import CUT, cut_in_order
from shoal.jobs.bench.load import Limits, Shape, clock
from shoal.jobs.bench.registry import Settings, measure
from shoal.jobs.bench.result import document
from shoal.jobs.bench.serve import PLAIN, Level, ServeSettings, beside, rows, run
from shoal.workers.config import Recipe
from shoal.workers.errors import ClusterRefused, InvalidInput, NotFound, ShoalError, UsageError


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as own:
        yield own


def settings(server: Server, **changes: Any) -> ServeSettings:
    known: dict[str, Any] = {
        "say": lambda text: None, "url": server.url, "mix": MIX, "limits": Limits(requests=6),
        "levels": (Level(concurrency=2), Level(rate=100.0)), "warmup": 3,
    }  # fmt: skip
    return ServeSettings(**known | changes)


# The benchmark


def test_each_load_is_measured_alone_and_after_its_warm_up(server: Server) -> None:
    at_once, a_second = list(run(settings(server)))
    assert (at_once["concurrency"], a_second["rate"]) == (2, 100.0)
    for row in (at_once, a_second):
        assert (row["requests"], row["failed"], row["warmup"], row["server"]) == (6, 0, 3, server.url)
        assert row["ms"] == pytest.approx(1e3 / row["output_tokens_per_second"])
        assert row["mix"] == "8:4*3,20:12*1"
    bodies = [seen.body for seen in server.seen]
    assert len(bodies) == 1 + 2 * (3 + 6)
    assert bodies[0]["max_tokens"] == 12  # the largest shape, before anything is measured
    assert {body["model"] for body in bodies} == {"fish"}
    assert len({(body["prompt"], body["seed"]) for body in bodies}) == len(bodies)
    for row, measured in ((at_once, bodies[4:10]), (a_second, bodies[13:])):
        assert row["mean_output_tokens"] == pytest.approx(statistics.fmean(body["max_tokens"] for body in measured))


def test_a_seed_gives_the_same_requests(server: Server) -> None:
    asked = []
    for seed in (1, 1, 2):
        server.seen.clear()
        list(run(settings(server, seed=seed, levels=(Level(concurrency=1),))))
        asked.append([seen.body for seen in server.seen[1:]])
    assert asked[0] == asked[1]
    assert asked[0] != asked[2]


def test_loads_that_were_measured_when_it_is_cut_off_are_a_result(server: Server, tmp_path: Path) -> None:
    def say(text: str) -> None:
        if text.startswith("2 at once"):
            signal.raise_signal(signal.SIGTERM)

    with cut_in_order():
        result = measure("serve", settings(server, say=say))
    assert (result["benchmark"], result["notes"]) == ("serve-cut", [CUT])
    (row,) = result["rows"]
    assert row["concurrency"] == 2 and row["ms"] > 0
    serve_view.draw(result, tmp_path / "serve-cut.png")
    assert (tmp_path / "serve-cut.png").read_bytes().startswith(b"\x89PNG")


def test_failures_are_counted_and_the_rest_is_measured(server: Server) -> None:
    server.fail = [0, 0, 0, 0, 429, 0, 503, 429]  # of a check, three of warm-up and six measured
    (row,) = list(run(settings(server, levels=(Level(concurrency=1),))))
    assert (row["requests"], row["failed"], row["errors"]) == (6, 3, {"429": 2, "503": 1})


def test_text_comes_from_the_file_that_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "sea.txt").write_text(TEXT)
    list(run(settings(server, text=tmp_path / "sea.txt")))
    assert all(seen.body["prompt"] in TEXT for seen in server.seen)


def test_a_token_is_sent(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "secret"
    (tmp_path / "token").write_text("secret\n")
    list(run(settings(server, token_file=tmp_path / "token")))
    monkeypatch.setenv("SHOAL_API_TOKEN", "other")
    server.token = "other"
    list(run(settings(server)))
    assert {seen.token for seen in server.seen} == {"Bearer secret", "Bearer other"}


def test_what_cannot_work_is_refused_before_the_load(server: Server, tmp_path: Path) -> None:
    def refused(error: type[ShoalError], says: str, **changes: Any) -> None:
        with pytest.raises(error, match=says):
            list(run(settings(server, **changes)))
        assert len(server.seen) <= 1

    refused(UsageError, "name the run to serve", url=None)
    refused(UsageError, "name its run as well", baseline=True)
    refused(UsageError, "--against compares", against="other")
    refused(NotFound, "no run", run=str(tmp_path / "no run"))
    refused(NotFound, "--token-file .* cannot be read", token_file=tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    refused(InvalidInput, "--token-file .* is empty", token_file=tmp_path / "empty")
    refused(InvalidInput, "longer --text", text=tmp_path / "empty")
    refused(NotFound, "--text .* cannot be read", text=tmp_path / "none")
    (tmp_path / "latin").write_bytes(TEXT.encode() + b"\xe9")
    refused(NotFound, "UTF-8", text=tmp_path / "latin")
    refused(ClusterRefused, "cannot be reached", url="http://127.0.0.1:9/v1")
    refused(ClusterRefused, "404", url=f"{server.url}/nothing")
    server.model = ""
    refused(ClusterRefused, "--model")
    server.fail = [400]
    refused(ClusterRefused, r"first request \(400: .*no room", model="fish")
    server.token = "secret"
    server.seen.clear()
    refused(ClusterRefused, r"401.*--token-file")
    with pytest.raises(UsageError):
        measure("serve", Settings())


def test_a_load_that_is_not_answered_at_all_is_no_result(server: Server) -> None:
    server.fail = [0, 0, 0, 0, *[429] * 6]
    with pytest.raises(ClusterRefused, match=r"none of 6 requests, 2 at once, gave a token \(429: .*no room"):
        list(run(settings(server)))


def test_the_ratio_to_the_plain_loop_is_one_of_tokens_a_second() -> None:
    plain = {"what": f"an output token, {PLAIN}", "ms": 10.0, "requests": 2, "output_tokens_per_second": 100.0}
    found = [(Level(concurrency=n), {"output_tokens_per_second": 100.0 * n}) for n in (1, 4)]
    one, four, last = rows(found, plain, {})
    assert (one["ratio"], four["ratio"], four["baseline"]) == (1.0, 4.0, PLAIN)
    assert last is plain
    assert "ratio" not in rows(found, None, {})[0]


# A run of one's own


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a checkpoint of its first step."""
    import torch

    from shoal.jobs.run_folder import RunFolder, write_identity
    from shoal.workers.mesh import make_mesh
    from shoal.workers.placement import Placement
    from shoal.workers.trainer import Trainer

    here = tmp_path_factory.mktemp("here")
    corpus, folder = small_corpus(here), RunFolder(here / "runs" / "first")
    recipe = Recipe.model_validate(small_recipe(train__dtype="float32", data__corpus=str(corpus), parallel__threads=1))
    folder.path.mkdir(parents=True)
    write_identity(folder, recipe, corpus, "")
    trainer = Trainer(recipe, corpus, folder.path / "checkpoints", make_mesh(Placement.of(recipe)), torch.device("cpu"))
    trainer.advance()
    trainer.save()
    trainer.settle()
    return folder.path


def test_the_plain_loop_answers_the_prompts_of_the_first_load(server: Server, trained: Path) -> None:
    said: list[str] = []
    asked = settings(
        server, run="first", runs_dir=trained.parent, baseline=True, say=said.append, levels=(Level(concurrency=1),),
        limits=Limits(requests=8), warmup=0,
    )  # fmt: skip
    begin = clock()
    at_once, plain = list(run(asked))
    took = clock() - begin
    prompts = [seen.body for seen in server.seen[1:]]
    assert (plain["requests"], plain["threads"]) == (8, 1)
    tokens = round(plain["seconds"] * plain["output_tokens_per_second"])
    # the plain loop counts no eos, which may come first
    assert 0 < tokens <= sum(body["max_tokens"] for body in prompts)
    assert plain["ms"] == pytest.approx(1e3 * plain["seconds"] / tokens)
    assert plain["seconds"] < took
    assert at_once["ratio"] == pytest.approx(plain["ms"] / at_once["ms"])
    assert any("on 1 thread" in line for line in said)
    documents = "\n".join(path.read_text() for path in (trained.parents[1] / "texts").iterdir())
    assert all(" ".join(body["prompt"].split()[1:4]) in documents for body in prompts)


def test_a_mix_that_does_not_fit_into_the_runs_context_is_refused(server: Server, trained: Path) -> None:
    for mix, fits in (((Shape(40, 23),), True), ((Shape(8, 4), Shape(40, 24)), False)):
        asked = settings(server, run=str(trained), mix=mix, levels=(Level(concurrency=1),))
        if fits:
            list(run(asked))
        else:
            with pytest.raises(InvalidInput, match=r"--mix 40:24 .* context of 64"):
                list(run(asked))


def test_a_server_that_cannot_start_is_named_with_its_last_words(trained: Path) -> None:
    broken = trained.with_name("broken")
    broken.mkdir()
    for name in ("recipe.toml", "run.json"):
        shutil.copy(trained / name, broken / name)
    asked = ServeSettings(say=lambda text: None, run=str(broken), mix=MIX)
    with pytest.raises(ClusterRefused, match=r"serve .*broken .*has no whole checkpoint"):
        list(run(asked))


def test_a_run_that_was_never_trained_is_a_whole_run(trained: Path, tmp_path: Path) -> None:
    """Its model is the recipe's own at the start, and a name that is taken is refused."""
    import torch

    from shoal.jobs.bench.untrained import STEP, make
    from shoal.jobs.load import choose_step, load_trained
    from shoal.workers.model import Transformer

    recipe = trained / "recipe.toml"
    folder = make("raw", str(recipe), ["model.layers=2", "balance.bias_rate=0.01", "parallel.device=cpu"], tmp_path)
    step, damaged = choose_step(folder, None)
    assert (step, damaged) == (STEP, [])
    loaded = load_trained(folder, step, folder.recipe())
    assert loaded.recipe.model.layers == 2
    assert loaded.folder.tokenizer().size == 300
    device = next(loaded.model.parameters()).device
    if not torch.cuda.is_available():  # each kind of device draws numbers of its own
        fresh = dict(Transformer(folder.recipe(), device=device).named_parameters())
        for name, weight in loaded.model.named_parameters():
            assert torch.equal(weight, fresh[name].to(weight.dtype)), name
    with pytest.raises(InvalidInput, match="raw exists"):
        make("raw", str(recipe), [], tmp_path)


@pytest.mark.slow
def test_two_runs_are_served_alike_and_compared(trained: Path, tmp_path: Path) -> None:
    loads = ("--concurrency", "1,3", "--requests", "4", "--mix", "8:4,20:12", "--set", "serve.sequences=2")
    other = trained.with_name("other")
    shutil.copytree(trained, other)
    result = shoal(
        "bench", "serve", str(trained), "--against", str(other), "--workers", "1", *loads, "-o", "json", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    ours, theirs = (json.loads(result.stdout)["rows"][at : at + 2] for at in (0, 2))
    for row, base in zip(ours, theirs, strict=True):
        assert (row["requests"], row["failed"], base["requests"], base["failed"]) == (4, 0, 4, 0)
        assert base["server"] == f"shoal serve {other} --workers=1 --set=serve.sequences=2" == row["baseline"]
        assert row["concurrency"] == base["concurrency"]
        assert row["mean_prompt_tokens"] == base["mean_prompt_tokens"]  # the same requests
        assert row["ratio"] == pytest.approx(base["ms"] / row["ms"], rel=1e-4)
    assert not processes_in(trained) + processes_in(other)


@pytest.mark.slow
def test_the_server_of_a_run_is_started_measured_and_ended(trained: Path, tmp_path: Path) -> None:
    loads = ("--concurrency", "1,3", "--requests", "4", "--mix", "8:4,20:12", "--baseline")
    result = shoal("bench", "serve", str(trained), *loads, "-o", "json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    one, three, plain = json.loads(result.stdout)["rows"]
    for row in (one, three):
        assert (row["requests"], row["failed"], row["server"]) == (4, 0, f"shoal serve {trained}")
        assert row["baseline_ms"] == plain["ms"]
        assert 0 < row["ttft_ms"]["p50"] <= row["request_ms"]["p50"]
        assert 1 <= row["mean_output_tokens"] <= 12
    assert not processes_in(trained)


# What is shown


def test_the_table_has_a_line_a_load_with_medians_and_99th_percentiles(server: Server) -> None:
    server.fail = [0, 0, 0, 0, 429]
    measured = list(run(settings(server, levels=(Level(concurrency=1), Level(rate=50.0)))))
    plain = {"what": f"an output token, {PLAIN}", "ms": 10.0, "requests": 2, "output_tokens_per_second": 100.0}
    console = Console(width=120)
    with console.capture() as text:
        console.print(serve_view.table(document("serve", [*measured, plain], ())))
    lines = text.get().splitlines()
    at_once = next(line for line in lines if line.startswith("1 at once"))
    assert "1 x 429" in at_once
    figures = [measured[0][key][p] for key in ("ttft_ms", "tpot_ms", "request_ms") for p in ("p50", "p99")]
    shown = [float(text.replace(",", "")) for text in at_once.split()[-6:]]
    assert shown == pytest.approx([*figures[:4], *(ms / 1e3 for ms in figures[4:])], rel=0.05, abs=0.005)
    assert any(line.startswith("50 a second") for line in lines)
    assert next(line for line in lines if line.startswith(PLAIN)).split()[-2:] == ["2", "100"]


def test_the_second_servers_loads_stand_below_its_name(server: Server, tmp_path: Path) -> None:
    measured = list(run(settings(server, levels=(Level(concurrency=1), Level(concurrency=2)))))
    theirs = [{**row, "server": "shoal serve other"} for row in measured]
    ours = beside(measured, [{**row, "ms": 2 * row["ms"]} for row in theirs])
    assert [row["ratio"] for row in ours] == pytest.approx([2.0, 2.0])
    result = document("serve", [*ours, *theirs], ())
    console = Console(width=200)
    with console.capture() as text:
        console.print(serve_view.table(result))
    firsts = [" ".join(line.split()[:3]) for line in text.get().splitlines()]
    assert firsts[-5:] == ["1 at once", "2 at once", "shoal serve other", "1 at once", "2 at once"]
    # cut off, the second server has answered one load
    some = [*beside(measured, theirs[:1]), *theirs[:1]]
    assert ["baseline" in row for row in some] == [True, False, False]
    for rows_of in ([*ours, *theirs], some):
        serve_view.draw({**result, "rows": rows_of}, tmp_path / "two.png")
        assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "two.png").unlink()


def test_the_command_writes_its_result_and_a_picture(server: Server, tmp_path: Path) -> None:
    loads = ("--concurrency", "1,3", "--rate", "40", "--requests", "5", "--mix", "8:4,20:1")
    result = shoal("bench", "serve", "--url", server.url, *loads, "-o", "json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    file, picture = tmp_path / "benchmarks/results/serve.json", tmp_path / "benchmarks/serve.png"
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted([file, picture])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert result.stdout == file.read_text(encoding="utf-8")
    found = json.loads(result.stdout)
    assert [row["what"] for row in found["rows"]] == [
        f"an output token, {load}" for load in ("1 at once", "3 at once", "40 a second")
    ]
    assert [row["requests"] for row in found["rows"]] == [5, 5, 5]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "name the run to serve"),
        (["--concurrency", "1,x"], 2, "--concurrency '1,x'"),
        (["--concurrency", "1.5"], 2, "whole numbers"),
        (["--rate", "0"], 2, "--rate '0'"),
        (["--mix", "12"], 2, "--mix '12'"),
        (["nothing"], 5, "start one with shoal train"),
        (["--url", "http://127.0.0.1:9/v1", "--workers", "2"], 2, "name the run to serve"),
        (["--url", "http://127.0.0.1:9/v1", "--requests", "1"], 4, "cannot be reached"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], code: int, says: str, tmp_path: Path) -> None:
    result = shoal_here("bench", "serve", *arguments, cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert says in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
