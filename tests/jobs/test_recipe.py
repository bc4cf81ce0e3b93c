"""Recipes: what ships loads, what is written loads again, what is wrong is refused in one sentence."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.jobs.load import serving_recipe
from shoal.jobs.recipe import builtin_recipes, check_recipe, load_recipe, recipe_hash, recipe_to_toml
from shoal.jobs.run_folder import RunFolder
from shoal.workers.config import Recipe
from shoal.workers.errors import InvalidInput, NotFound, ShoalError, UsageError


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_recipe_of_the_package_loads_under_its_own_name(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


def test_the_recipes_that_are_promised_are_there() -> None:
    promised = {"tiny", "tiny-full", "deepseekmoe-2b", "deepseekmoe-16b", "deepseekmoe-145b", "nsa-27b"}
    assert promised | {"gshard-2b", "switch-2b", "hash-2b", "dense-0.2b"} <= set(builtin_recipes())


@pytest.mark.parametrize("name", builtin_recipes())
def test_a_written_recipe_loads_to_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    written = tmp_path / "recipe.toml"
    written.write_text(recipe_to_toml(recipe), encoding="utf-8")
    assert load_recipe(written) == recipe
    assert recipe_hash(load_recipe(written)) == recipe_hash(recipe)


@given(st.text(), st.text(min_size=1), st.floats(min_value=1e-300, max_value=1e300), st.integers(1, 2**63 - 1))
def test_any_text_and_number_survives_being_written(note: str, corpus: str, rate: float, steps: int) -> None:
    tables = tomllib.loads(recipe_to_toml(load_recipe("tiny")))
    tables["description"], tables["data"]["corpus"] = note, corpus
    tables["train"] |= {"learning_rate": rate, "steps": steps}
    recipe = check_recipe(tables)
    assert check_recipe(tomllib.loads(recipe_to_toml(recipe))) == recipe


def test_set_reads_toml_and_falls_back_to_text() -> None:
    recipe = load_recipe(
        "tiny",
        ["train.steps=7", "train.learning_rate = 1e-3", "model.tied_embeddings=false", "data.corpus=../some where"],
    )
    assert (recipe.train.steps, recipe.train.learning_rate) == (7, 1e-3)
    assert recipe.model.tied_embeddings is False
    assert recipe.data.corpus == "../some where"
    assert load_recipe("tiny", ['data.corpus="12"', "description=2024-01-01"]).data.corpus == "12"


def test_options_come_after_sets_and_none_leaves_the_recipe() -> None:
    recipe = load_recipe("tiny", ["train.steps=7"], {"train.steps": 9, "train.batch": None})
    assert (recipe.train.steps, recipe.train.batch) == (9, load_recipe("tiny").train.batch)


def test_a_placement_brings_its_own_ranks() -> None:
    assert load_recipe("tiny", ["parallel.placement=2A:4F"]).parallel.ranks == 6
    assert load_recipe("tiny", [], {"parallel.placement": "1A:1F"}).parallel.ranks == 2
    with pytest.raises(InvalidInput, match=r"names 6 ranks, but parallel\.ranks=4"):
        load_recipe("tiny", ["parallel.placement=2A:4F"], {"parallel.ranks": 4})


def test_the_hash_ignores_names_and_what_it_is_told_to() -> None:
    tiny = load_recipe("tiny")
    assert recipe_hash(tiny) == recipe_hash(load_recipe("tiny", ["name=other", "description=other"]))
    more_ranks = load_recipe("tiny", ["parallel.ranks=4"])
    assert recipe_hash(tiny) != recipe_hash(more_ranks)
    without = ("name", "description", "parallel")
    assert recipe_hash(tiny, without) == recipe_hash(more_ranks, without)


def test_extends_merges_key_by_key_from_a_file_beside(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('extends = "tiny"\ndescription = "base"\n[train]\nsteps = 5\nbatch = 4\n')
    child = tmp_path / "child.toml"
    child.write_text('extends = "base.toml"\n[train]\nbatch = 6\n[parallel]\nplacement = "3A:1F"\n')
    recipe = load_recipe(child)
    assert (recipe.train.steps, recipe.train.batch, recipe.train.sequence) == (5, 6, 512)
    assert (recipe.name, recipe.description, recipe.parallel.ranks) == ("child", "", 4)


def test_a_circle_of_extends_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text('extends = "./a.toml"\n')
    with pytest.raises(InvalidInput, match="extends itself"):
        load_recipe(tmp_path / "a.toml")


REFUSED = [
    ("model.hiden=256", "model.hiden=256", "did you mean model.hidden"),
    ("model.top_k=3", "model.top_k=3", "did you mean moe.top_k"),
    ("hidden=3", "hidden=3", "did you mean model.hidden"),
    ("modle.hidden=256", "modle", "did you mean model"),
    ("checkpoint.zzz=1", "checkpoint.zzz=1", "has the keys every, keep"),
    ("model.hidden=wide", "model.hidden='wide'", "set model.hidden to a whole number, at least 8"),
    ("model.hidden=1.5", "model.hidden=1.5", "a whole number"),
    ("train.steps=0", "train.steps=0", "set train.steps to at least 1"),
    ("train.beta1=1", "train.beta1=1", "set train.beta1 to less than 1"),
    ("train.learning_rate=inf", "train.learning_rate=inf", "finite"),
    ("attention.kind=sparse", "attention.kind='sparse'", "'nsa' or 'full'"),
    ("model.tied_embeddings=perhaps", "model.tied_embeddings='perhaps'", "true or false"),
    ("data.corpus=12", "data.corpus=12", "in quotes"),
    ("model=3", "model=3", "not a table"),
    ("name=A b", "name='A b'", "lower-case"),
    ("train.seed=0x8000000000000000", "train.seed=9223372036854775808", "64 bits"),
    ("moe.top_k=17", "moe.top_k=17", "moe.experts=16"),
    ("model.kv_heads=3", "model.kv_heads=3", "divisor of 4"),
    ("attention.cmp_block=12", "attention.cmp_block=12", "set attention.cmp_block to"),
    ("route.max_devices=2", "route.max_devices=2 is more than balance.device_groups=1", "number of devices"),
    ("parallel.ranks=3", "3 ", "set parallel.ranks or parallel.expert"),
    ("parallel.placement=2B", "parallel.placement='2B'", "2A:2F"),
    ("model.rope_scaling=yarn", "model.rope_original=0", "the one that the model was trained on"),
    ("model.rope_factor=4", "model.rope_factor=4", "set model.rope_scaling to 'yarn'"),
    ("parallel.context=3", "parallel.context=3 does not divide 2", "set parallel.context to a divisor of 2"),
    ("train.profile_at=-1", "train.profile_at=-1", "set train.profile_at to at least 0"),
    ("train.profile_steps=0", "train.profile_steps=0", "set train.profile_steps to at least 1"),
    ("train.profile_at=99999", "train.profile_at=99999 is after the last step", "or to 0 for no trace"),
]


@pytest.mark.parametrize(("change", "what", "remedy"), REFUSED, ids=[change for change, _, _ in REFUSED])
def test_a_wrong_value_is_refused_with_key_value_and_remedy(change: str, what: str, remedy: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_recipe("tiny", [change])
    message = str(caught.value)
    assert what in message
    assert remedy in message
    assert "\n" not in message


def test_steps_that_are_traced_lie_within_the_run() -> None:
    assert load_recipe("tiny", ["train.steps=10", "train.profile_at=9"]).train.profile_steps == 2
    with pytest.raises(InvalidInput, match=r"end at step 11, after train\.steps=10: set train\.profile_steps to 1 or"):
        load_recipe("tiny", ["train.steps=10", "train.profile_at=10"])


def test_a_missing_recipe_names_those_there_are() -> None:
    with pytest.raises(NotFound, match=r"'tinny'.*did you mean tiny; built in are .*nsa-27b"):
        load_recipe("tinny")
    with pytest.raises(NotFound, match=r"nowhere\.toml"):
        load_recipe("nowhere.toml")


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("[train]\nsteps = 1\n")
    with pytest.raises(InvalidInput, match=r"model is missing .*\(and 3 more problems\)"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[train]\nsteps = = 3\n", r"bad\.toml is not valid TOML.*line 2"),
        (b"\xff\xfe\x00", "not UTF-8 text at byte 0"),
        (b"steps = " + b"9" * 5000, "value too large"),
        (b"extends = 3\n", "extends=3"),
    ],
)
def test_a_bad_file_is_named_with_its_line(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    with pytest.raises(InvalidInput, match=says) as caught:
        load_recipe(file)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is a folder"):
        load_recipe(tmp_path)


def test_a_set_without_a_value_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"--set 'train.steps' is not of the form key=value"):
        load_recipe("tiny", ["train.steps"])


KEYS = [
    (table, key) for table, keys in load_recipe("tiny").model_dump().items() if isinstance(keys, dict) for key in keys
]
JUNK = st.one_of(
    st.integers(),
    st.integers(-3, 70),
    st.floats(),
    st.booleans(),
    st.text(max_size=80),
    st.sampled_from(["2A:2F", "0A:1F", "\u0663A:1F", "9" * 5000 + "A:1F", "full", "hash", 1 << 20000]),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
    st.none(),
)


@settings(max_examples=200)
@given(
    changed=st.lists(st.tuples(st.sampled_from(KEYS), JUNK), max_size=3),
    removed=st.lists(st.sampled_from(KEYS), max_size=2),
    added=st.lists(st.tuples(st.text(max_size=12), JUNK), max_size=1),
    tables=st.lists(st.tuples(st.sampled_from(sorted(Recipe.model_fields)), JUNK), max_size=1),
)
def test_any_mutation_loads_or_is_refused_in_one_sentence(changed, removed, added, tables) -> None:  # type: ignore[no-untyped-def]
    values = copy.deepcopy(load_recipe("tiny").model_dump())
    for (table, key), value in changed:
        values[table][key] = value
    for table, key in removed:
        values[table].pop(key, None)
    for key, value in added:
        values["train"][key] = value
    values |= dict(tables)
    try:
        recipe = check_recipe(values)
    except InvalidInput as refusal:
        message = str(refusal)
        assert message.isprintable()
        assert 10 < len(message) < 500
    else:
        assert check_recipe(tomllib.loads(recipe_to_toml(recipe))) == recipe


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_set_loads_or_is_refused_in_one_sentence(key: str, value: str) -> None:
    for text in (f"{key}={value}", f"train.{key}={value}", f"train.steps={value}", key):
        try:
            load_recipe("tiny", [text])
        except ShoalError as refusal:
            assert str(refusal).isprintable()


def test_segments_shorter_than_the_window_are_refused() -> None:
    """Four sequences of 512 tokens in 16 segments are 128 each: enough for a window of 64, not of 192."""
    shared = ["parallel.ranks=8", "parallel.context=8"]
    assert load_recipe("tiny", shared).parallel.context == 8
    wide = [*shared, "attention.window=192"]
    refusal = r"parallel\.context=8 .*segments of 128.*attention\.window=192: set train\.batch to 6$"
    with pytest.raises(InvalidInput, match=refusal):
        load_recipe("tiny", wide)
    assert load_recipe("tiny", [*wide, "train.batch=6"]).train.batch == 6
    with pytest.raises(InvalidInput, match=r"set train\.batch to 6, or train\.sequence to 768$"):
        load_recipe("tiny", [*wide, "model.context=1024"])
    assert load_recipe("tiny", [*wide, "model.context=1024", "train.sequence=768"]).train.sequence == 768
    # 525 tokens on average, of which the last segment has 500, since all begin at blocks of 64
    blocks = ["attention.slc_block=64", "attention.cmp_block=32", "attention.cmp_stride=16", "attention.window=512"]
    uneven = [*blocks, "parallel.ranks=2", "parallel.context=2", "model.context=4096", "train.batch=1"]
    with pytest.raises(InvalidInput, match=r"2100 tokens into segments of 500, .* train\.sequence to 2048$"):
        load_recipe("tiny", [*uneven, "train.sequence=2100"])
    assert load_recipe("tiny", [*uneven, "train.sequence=2048"]).train.sequence == 2048
    halves = ["parallel.ranks=4", "parallel.context=2", "attention.window=600", "train.accumulate=2"]
    with pytest.raises(InvalidInput, match=r"set train\.batch to 20$"):
        load_recipe("tiny", halves)
    assert load_recipe("tiny", [*halves, "train.batch=20"]).train.batch == 20
    with pytest.raises(InvalidInput, match=r"parallel\.context=3 does not divide 2 attention ranks"):
        load_recipe("tiny", ["parallel.placement=2A:4F", "parallel.context=3"])
    with pytest.raises(InvalidInput, match=r"5 sequences do not divide over 2 groups of 2 ranks"):
        load_recipe("tiny", ["parallel.ranks=4", "parallel.context=2", "train.batch=5"])


def test_shards_of_dense_weights_are_cut_from_the_hidden_size(tmp_path: Path) -> None:
    """Three ranks may serve what two have trained: they do not cut weights."""
    three = ["parallel.ranks=3", "parallel.expert=1", "train.batch=3", "parallel.shard_dense=true"]
    with pytest.raises(
        InvalidInput, match=r"model\.hidden=128 does not .* 3 attention ranks.*shard_dense=true.*: set parallel\.ranks"
    ):
        load_recipe("tiny", three)
    assert load_recipe("tiny", ["parallel.placement=2A:4F", "parallel.shard_dense=true"]).parallel.shard_dense
    run = RunFolder(tmp_path)
    made = load_recipe("tiny", ["parallel.shard_dense=true", "moe.experts=18"])
    run.recipe_file.write_text(recipe_to_toml(made), encoding="utf-8")
    assert not serving_recipe(run, None, 3, None).parallel.shard_dense


def test_what_a_hash_cannot_learn_and_too_few_devices_are_refused() -> None:
    for key in ("balance.sequence", "balance.z_loss", "balance.bias_rate", "route.max_devices"):
        with pytest.raises(InvalidInput, match=rf"{key}=1.* with moe\.router='hash'.*: set {key} to 0"):
            load_recipe("tiny-hash", [f"{key}=1"])
    with pytest.raises(InvalidInput, match=r"moe\.top_k=5 .*route\.max_devices=1 groups, 4: set .* to 2 or more"):
        load_recipe("tiny", ["balance.device_groups=4", "route.max_devices=1", "moe.top_k=5"])
    with pytest.raises(InvalidInput, match=r"balance\.z_loss=0\.1 with moe\.router='sigmoid'.*: set .* to 0"):
        load_recipe("tiny", ["moe.router=sigmoid", "balance.z_loss=0.1"])
    moving = ["balance.device_groups=1", "route.max_devices=1", "parallel.rebalance_every=5"]
    with pytest.raises(
        InvalidInput,
        match=r"parallel\.rebalance_every=5 .*set balance\.device_groups to a multiple of 2 \(with 2 itself none",
    ):
        load_recipe("tiny", moving)


def test_copies_that_would_take_a_token_beyond_its_ranks_are_refused() -> None:
    limited = ["moe.experts=24", "balance.device_groups=4", "route.max_devices=1", "parallel.ranks=4", "train.batch=24"]
    few = [*limited, "serve.expert_copies=5"]
    with pytest.raises(InvalidInput, match=r"serve\.expert_copies=5 .*each 6 experts.*: set serve\.exp.* to 6 or more"):
        load_recipe("tiny", few)
    assert load_recipe("tiny", [*few, "route.max_devices=4"]).serve.expert_copies == 5
    assert load_recipe("tiny", [*few, "parallel.ranks=8"]).serve.expert_copies == 5
    with pytest.raises(InvalidInput, match=r"device_groups=4 neither .* 6 expert ranks .*: set parallel\.ranks"):
        load_recipe("tiny", [*few, "parallel.ranks=6"])


def test_a_run_whose_experts_moved_in_groups_is_served_by_any_ranks(tmp_path: Path) -> None:
    """Two groups of experts lie on two ranks in training; four ranks that serve share them as any others."""
    moving = ["balance.device_groups=2", "route.max_devices=1", "parallel.rebalance_every=5"]
    run = RunFolder(tmp_path)
    run.recipe_file.write_text(recipe_to_toml(load_recipe("tiny", moving)), encoding="utf-8")
    assert serving_recipe(run, None, 4, None).parallel.rebalance_every == 0


def test_a_context_beyond_the_scaled_one_is_refused() -> None:
    scaled = ["model.rope_scaling=yarn", "model.rope_original=128", "model.rope_factor=2"]
    with pytest.raises(InvalidInput, match=r"model\.context=512 .*set model\.rope_factor to 4"):
        load_recipe("tiny", scaled)
    assert load_recipe("tiny", [*scaled, "model.rope_factor=4"]).model.rope_factor == 4
