"""The command line as a shell sees it: exit codes, one line on standard error, JSON, and what is imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shell import shoal_here

import shoal
from shoal.jobs.cli.main import COMMANDS, Lazy
from shoal.jobs.recipe import load_recipe, recipe_to_toml

SHOAL = [sys.executable, "-m", "shoal.jobs.cli.main"]
HEAVY = ("torch", "ray", "pydantic", "pyarrow", "tokenizers", "matplotlib", "numpy", "safetensors")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``shoal ARGUMENTS`` in a process of its own."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("SHOAL_")}
    env |= {"PYTHONIOENCODING": "utf-8", "COLUMNS": "120", **environment}
    return subprocess.run([*SHOAL, *arguments], capture_output=True, text=True, encoding="utf-8", env=env, timeout=120)


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    out = python(
        "import sys\n"
        "from shoal.jobs.cli.main import main\n"
        "sys.argv = ['shoal', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    for command in ("train", "generate", "evaluate", "data", "config", "runs", "doctor", "bench"):
        assert f" {command} " in out
    assert "Examples" in out
    assert "HEAVY []" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_answers_help_with_the_line_that_lists_it(command: str, tmp_path: Path) -> None:
    result = shoal_here(command, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert COMMANDS[command].help.split(";")[0].rstrip(".") in " ".join(result.stdout.split())


def test_what_goes_wrong_in_the_module_of_a_command_is_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        Lazy("nowhere:app", "", "").load("x")


def test_the_driver_checks_a_recipe_without_torch_or_ray() -> None:
    out = python(
        "import sys\n"
        "from shoal.jobs.cli.main import app\n"
        "try:\n    app(['config', 'show', 'nsa-27b'])\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "print('HEAVY', [name for name in ('torch', 'ray') if name in sys.modules])\n"
    )
    assert "HEAVY []" in out


def test_a_recipe_that_no_gpu_of_80_gib_holds_is_shown_with_the_keys_with_which_one_does(tmp_path: Path) -> None:
    shown = shoal_here("config", "show", "nsa-27b", cwd=tmp_path).stdout
    keys = re.search(r"80 GiB does not hold a rank; with ((?:--set \S+ )+)it does", shown)
    assert keys, shown
    assert "80 GiB" not in shoal_here("config", "show", "nsa-27b", *keys[1].split(), cwd=tmp_path).stdout
    assert "80 GiB" not in shoal_here("config", "show", "tiny", cwd=tmp_path).stdout


def test_the_console_script_is_there_and_prints_the_version() -> None:
    script = Path(sys.executable).with_name("shoal")
    result = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, f"shoal {shoal.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["config", "show", "tinny"], 5, "error: recipe 'tinny' is neither a file nor built in: did you mean tiny;"),
        (["config", "check", "no/such.toml"], 5, "error: recipe 'no/such.toml'"),
        (["config", "show", "tiny", "--set", "model.hiden=3"], 3, "did you mean model.hidden"),
        (["config", "show", "tiny", "--set", "moe.top_k=99"], 3, "moe.top_k=99"),
        (["config", "show", "tiny", "--set", "model.hidden"], 2, "is not of the form key=value"),
        (["runs", "show", "none", "--runs-dir", "nowhere"], 5, "error: run 'none' is neither a run's folder"),
    ],
)
def test_a_mistake_is_one_line_on_standard_error_with_its_exit_code(
    arguments: list[str], code: int, says: str, tmp_path: Path
) -> None:
    result = shoal_here(*arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (code, "")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["confg"], "Did you mean 'config'"),
        (["config", "shwo"], "Did you mean 'show'"),
        (["config", "show"], "RECIPE"),
        (["config", "show", "tiny", "-o", "yaml"], "yaml"),
        (["config", "show", "tiny", "--sets", "a=1"], "--set"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], says: str, tmp_path: Path) -> None:
    result = shoal_here(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert says in result.stderr


def test_config_show_prints_the_papers_figures_as_json(tmp_path: Path) -> None:
    data = json.loads(shoal_here("config", "show", "deepseekmoe-16b", "-o", "json", cwd=tmp_path).stdout)
    assert round(data["parameters"]["total"] / 1e9, 1) == 16.4
    assert round(data["parameters"]["active"] / 1e9, 1) == 2.8
    assert data["recipe"]["moe"]["experts"] == 64
    assert data["flops_per_token"]["training"] == 3 * data["flops_per_token"]["forward"]
    rank = data["memory_per_rank"]["colocated"]
    assert rank["total"] == sum(rank[part] for part in ("weights", "optimizer", "step"))
    assert rank["step"] > max(rank["gradients"], rank["activations"]) > 0


def test_config_show_as_a_table_for_people(tmp_path: Path) -> None:
    sets = ("--set", "parallel.placement=8A:128F")
    out = shoal_here("config", "show", "deepseekmoe-145b", *sets, cwd=tmp_path).stdout
    for text in ("144.6B total", "22.2B active", 'placement="8A:128F"', "routed experts", "attention", "GiB"):
        assert text in out


def test_no_word_of_a_recipe_s_costs_is_broken_at_80_columns(tmp_path: Path) -> None:
    out = shoal_here("config", "show", "nsa-64k-small", cwd=tmp_path, COLUMNS="80").stdout
    costs = out[out.index("GiB a rank") :].split()
    assert {"colocated", "ranks", "weights", "optimizer", "gradients", "activations", "slots"} <= {*costs}


def test_config_show_as_toml_is_a_recipe_again(tmp_path: Path) -> None:
    out = shoal_here("config", "show", "nsa-27b", "--set", "train.steps=3", "-o", "toml", cwd=tmp_path).stdout
    assert tomllib.loads(out)["train"]["steps"] == 3
    file = tmp_path / "mine.toml"
    file.write_text(out, encoding="utf-8")
    assert load_recipe(file) == load_recipe("nsa-27b", ["train.steps=3"])
    assert "is valid" in shoal_here("config", "check", str(file), cwd=tmp_path).stdout


def test_config_list_names_every_recipe(tmp_path: Path) -> None:
    rows = json.loads(shoal_here("config", "list", "-o", "json", cwd=tmp_path).stdout)
    assert {row["name"]: round(row["total"] / 1e9) for row in rows}["nsa-27b"] == 27
    assert "nsa-27b" in shoal_here("config", "list", cwd=tmp_path).stdout


def test_a_recipe_of_pure_ascii_terminals_can_be_refused_too() -> None:
    result = run("config", "show", "tiny", "--set", "data.corpüs=ä", PYTHONIOENCODING="ascii")
    assert result.returncode == 3
    assert result.stderr.startswith("error: data.corp")


UNEXPECTED = "from shoal.jobs.cli.common import exit_codes\nwith exit_codes():\n    {}\n"


@pytest.mark.parametrize(
    ("statement", "code", "stderr"),
    [
        ("1 / 0", 1, "error: unexpected ZeroDivisionError: division by zero (SHOAL_TRACEBACK=1 shows where)\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("from shoal.workers.errors import *; raise ClusterRefused('no rank')", 4, "error: no rank\n"),
        ("raise SystemExit(124)", 124, ""),
        (
            "raise PermissionError(13, 'Permission denied', 'runs/a')",
            3,
            "error: runs/a cannot be used (Permission denied): free or unlock its disk, or name another place\n",
        ),
    ],
)
def test_every_end_has_its_exit_code_and_no_traceback(statement: str, code: int, stderr: str) -> None:
    env = {key: value for key, value in os.environ.items() if key != "SHOAL_TRACEBACK"}
    command = [sys.executable, "-c", UNEXPECTED.format(statement)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert (result.returncode, result.stderr) == (code, stderr)


def test_a_traceback_is_shown_when_asked_for() -> None:
    command = [sys.executable, "-c", UNEXPECTED.format("1 / 0")]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "SHOAL_TRACEBACK": "1"}, timeout=60
    )
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_a_reader_that_goes_away_is_no_error_worth_words() -> None:
    process = subprocess.Popen([*SHOAL, "config", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()  # before the first byte: every write meets a closed pipe
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_under_the_output_is_said_in_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run([*SHOAL, "config", "list"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 3
    assert result.stderr.startswith("error: standard output cannot be used (No space left on device)")
    assert result.stderr.count("\n") == 1


def test_completion_knows_commands_and_recipes() -> None:
    commands = run(
        "", _SHOAL_COMPLETE="complete_bash", COMP_WORDS="shoal co", COMP_CWORD="1", _TYPER_COMPLETE_ARGS="shoal co"
    )
    assert "config" in commands.stdout
    recipes = run(
        "", _SHOAL_COMPLETE="complete_bash", COMP_WORDS="shoal config show nsa", COMP_CWORD="3",
        _TYPER_COMPLETE_ARGS="shoal config show nsa",
    )  # fmt: skip
    assert "nsa-27b" in recipes.stdout


@pytest.mark.parametrize(
    "command", ["generate", "evaluate", "serve", "bench serve", "runs show", "train --resume --name"]
)
def test_completion_knows_runs_where_a_run_is_named(command: str, tmp_path: Path) -> None:
    for name in ("first", "fish"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.toml").write_text(recipe_to_toml(load_recipe("tiny")))
    words = f"shoal {command} fi"
    result = run(
        "", _SHOAL_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")),
        SHOAL_RUNS=str(tmp_path),
    )  # fmt: skip
    assert set(result.stdout.split()) == {"first", "fish"}


def test_no_command_has_one_flag_for_two_options() -> None:
    """The later one of them would take the value, and the other one could not be given."""

    def doubled(command: Any, path: str) -> Iterator[str]:
        flags = [flag for option in command.params for flag in (*option.opts, *option.secondary_opts)]
        yield from (f"{path} {flag}" for flag in set(flags) if flags.count(flag) > 1)
        for name, below in getattr(command, "commands", {}).items():
            yield from doubled(below, f"{path} {name}")

    for name, command in COMMANDS.items():
        assert list(doubled(command.load(name), name)) == []
