"""Models in from Hugging Face's DeepseekForCausalLM and out to it: the same numbers, and mistakes in one sentence."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folder import SIZES, logits, read_tensors, write_folder
from safetensors.torch import load_file, save_file
from shell import shoal_here
from small import small_corpus, small_recipe
from torch import Tensor

from shoal.jobs.data.tokenizer import load_tokenizer, train_tokenizer
from shoal.jobs.hf.exporting import export_run
from shoal.jobs.hf.files import check_room
from shoal.jobs.hf.importing import import_folder
from shoal.jobs.recipe import load_recipe, recipe_to_toml
from shoal.jobs.run_folder import RunFolder, new_run, write_identity
from shoal.workers.config import Recipe
from shoal.workers.data.batch import PackedBatch
from shoal.workers.errors import InvalidInput, NotFound, ShoalError, UsageError
from shoal.workers.mesh import make_mesh
from shoal.workers.model import Transformer
from shoal.workers.model.feedforward import named_views
from shoal.workers.placement import Placement
from shoal.workers.trainer import Trainer
from shoal.workers.weights import load_model

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.fixture(scope="module")
def tokenizer() -> str:
    return train_tokenizer(["def main(): return the blue deep sea, fish and net " * 20], 300).tokenizer.to_str()


@pytest.fixture(scope="module")
def source(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that no test changes."""
    return write_folder(tmp_path_factory.mktemp("hf") / "model", tokenizer)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("small"))


def tokens_of(recipe: Recipe) -> Tensor:
    return torch.randint(recipe.model.vocab, (80,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def computed(run: Path, step: int = 0) -> Tensor:
    """What the run's model makes of a document, ``[80, vocab]``."""
    folder = RunFolder(run)
    model = load_model(folder.recipe(), run / "checkpoints", step)
    tokens = tokens_of(model.recipe)
    return model.logits(model(PackedBatch(tokens, tokens, torch.arange(80), (0, 80))))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": True, "num_key_value_heads": 4},
        {"tie_word_embeddings": True, "n_shared_experts": 3},
        {"num_experts_per_tok": 1, "norm_topk_prob": True, "first_k_dense_replace": 0, "n_shared_experts": None},
        {"n_routed_experts": None, "num_key_value_heads": 1},
    ],
    ids=["grouped keys", "normalised gates", "tied", "one expert", "dense"],
)
def test_an_imported_model_computes_the_published_equations(
    changes: dict[str, Any], tokenizer: str, tmp_path: Path
) -> None:
    """In float64, from weights in float32; then its export has the bits and the words that came in."""
    folder = write_folder(tmp_path / "in", tokenizer, **changes)
    made = import_folder(folder, tmp_path, "wide", sets=["train.dtype=float64"])
    out = computed(made.run)
    torch.testing.assert_close(out, logits(folder, tokens_of(RunFolder(made.run).recipe())), rtol=1e-9, atol=1e-9)
    run = import_folder(folder, tmp_path, "same").run
    exported = export_run(RunFolder(run), 0, tmp_path / "out", shard_bytes=30_000)
    assert_same(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    want = {**SIZES, **changes, "norm_topk_prob": changes.get("norm_topk_prob", False)}
    if changes.get("num_experts_per_tok") == 1:
        want["norm_topk_prob"] = False  # no code divides by the sum there
    if changes.get("n_routed_experts", 8) is None:  # nothing reads these then
        for key in ("n_shared_experts", "num_experts_per_tok", "first_k_dense_replace", "moe_intermediate_size"):
            want.pop(key), config.pop(key)
    assert {key: config[key] for key in want} == want
    assert exported.parameters == made.parameters and exported.files > 1


def assert_same(one: Path, two: Path) -> None:
    """The same tensors bit by bit; each is where the index of ``two`` says."""
    mine, theirs = read_tensors(one), read_tensors(two)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    index = json.loads((two / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in theirs.values())
    assert index["weight_map"].keys() == theirs.keys()
    assert all(name in load_file(two / file) for name, file in index["weight_map"].items())


def test_bfloat16_keeps_its_bits_and_a_folder_with_one_file_is_read(tokenizer: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", tokenizer, shards=1, torch_dtype="bfloat16")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    made = import_folder(folder, tmp_path / "runs")
    assert (made.run, made.dtype, made.drawn) == (tmp_path / "runs" / "in", "bfloat16", 0)
    export_run(RunFolder(made.run), 0, tmp_path / "out")
    assert_same(folder, tmp_path / "out")
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "out").iterdir())


def _trained(corpus: Path, runs: Path, name: str, **changes: Any) -> Path:
    """A run with a checkpoint after one step of real training."""
    sizes = {"attention__kind": "full", "model__value_dim": 0, "train__dtype": "bfloat16", **changes}
    recipe = Recipe.model_validate(small_recipe(**sizes))
    folder = new_run(runs, name, recipe)
    write_identity(folder, recipe, corpus, "")
    mesh = make_mesh(Placement.of(recipe))
    trainer = Trainer(recipe, corpus, folder.path / "checkpoints", mesh, torch.device("cpu"))
    trainer.advance()
    trainer.save()
    trainer.settle()
    return folder.path


def test_a_trained_model_that_is_exported_and_imported_gives_the_same_logits(corpus: Path, tmp_path: Path) -> None:
    """Its checkpoint has masters and moments too, which stay behind; one with YaRN comes back as well."""
    yarn: dict[str, Any] = {"rope_scaling": "yarn", "rope_factor": 2.0, "rope_original": 64}
    for name, scaling in (("plain", {}), ("yarn", yarn)):
        run = _trained(corpus, tmp_path, name, **{f"model__{key}": value for key, value in scaling.items()})
        said = export_run(RunFolder(run), 1, tmp_path / f"{name}-hf")
        assert bool(said.notes) == bool(scaling)
        back = import_folder(tmp_path / f"{name}-hf", tmp_path, f"{name}-back").run
        assert torch.equal(computed(back), computed(run, 1))
        assert scaling.items() <= RunFolder(back).recipe().model.model_dump().items()


def test_nsa_begins_with_the_keys_and_values_of_full_attention(source: Path, tmp_path: Path) -> None:
    """Each branch has them; φ and gates are drawn as a new model's are."""
    sets = ["attention.kind=nsa", "attention.slc_block=32", "attention.slc_count=4", "balance.bias_rate=0.01"]
    made = import_folder(source, tmp_path, "nsa", sets=sets)
    theirs, recipe = read_tensors(source), RunFolder(made.run).recipe()
    model = load_model(recipe, made.run / "checkpoints", 0)
    new = {name: p if i is None else p[i] for name, p, i in named_views(Transformer(model.recipe))}
    drawn = 0
    for name, parameter, i in named_views(model):
        tensor = parameter if i is None else parameter[i]
        if name.endswith((".wk.weight", ".wv.weight")):
            kind = name[-len("k.weight")]
            one = theirs[f"model.{name.replace(f'attention.w{kind}', f'self_attn.{kind}_proj')}"]
            assert torch.equal(tensor, torch.cat([one] * 3))
        elif ".compress_" in name or ".attention.gate_" in name:
            assert torch.equal(tensor, new[name])
            drawn += 1
    assert made.drawn == drawn == 3 * 8  # two layers' biases begin at 0
    assert computed(made.run).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_type": "deepseek_v2", "kv_lora_rank": 512},
            r"model_type='deepseek_v2' with kv_lora_rank=512: .*latent",
        ),
        ({"model_type": "llama"}, r"model_type='llama', and only 'deepseek' can be imported: give"),
        (
            {"scoring_func": "sigmoid"},
            r"scoring_func='sigmoid', and this version knows 'softmax' alone: import",
        ),
        ({"moe_layer_freq": 2}, r"moe_layer_freq=2, .* knows 1 alone: import"),
        ({"routed_scaling_factor": 2.5}, r"routed_scaling_factor=2.5, .* knows 1 alone: import"),
        ({"attention_bias": True}, r"attention_bias=True, .* knows False alone: import"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=.* knows nothing of it: import"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling of type 'linear', .*'yarn' alone: remove"),
        ({"rope_scaling": {**YARN, "beta_fast": 8}}, r"rope_scaling.beta_fast=8, .* knows 32 alone: import"),
        ({"head_dim": 16}, r"hidden_size=32, num_attention_heads=4 and head_dim=16, .*: correct it"),
        ({"hidden_size": "wide"}, r"hidden_size='wide', which is not a whole number of 1 or more: restore the file"),
        ({"vocab_size": 294}, r"has ids up to 294, and config.json has vocab_size=294: give the tokenizer"),
        ({"eos_token_id": 5}, r"eos_token_id=5, and the tokenizer's is 1, '<\|eos\|>': name the right one in"),
        ({"num_experts_per_tok": 9}, r"moe.top_k=9 is not between 1 and moe.experts=8"),
        ({"torch_dtype": "float16"}, r"torch_dtype='float16', in which .*: add --set train.dtype=float32"),
        (
            {"torch_dtype": "bfloat16"},
            r"tensor 'model\.\S+' is float32 in .*, and config.json makes the model bfloat16: add",
        ),
        ({"hidden_size": 64}, r"tensor 'model.embed_tokens.weight' is \[320, 32\] in .*makes it \[320, 64\]: correct"),
        (
            {"num_hidden_layers": 4},
            r"tensor 'model.layers.3.\S+' is missing, which .*config.json says there is: restore",
        ),
        ({"num_hidden_layers": 2}, r"tensor 'model.layers.2.\S+' in .* is none that .*config.json speaks of: remove"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_be_is_refused_and_nothing_is_left(
    changes: dict[str, Any], said: str, source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    shutil.copytree(source, folder)
    (folder / "config.json").write_text(json.dumps({**SIZES, **changes}))
    with pytest.raises(InvalidInput, match=said) as refused:
        import_folder(folder, tmp_path / "runs")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_files_that_are_damaged_or_missing_are_named(source: Path, tmp_path: Path) -> None:
    def changed(name: str, content: bytes | None) -> Iterator[Path]:
        folder = tmp_path / f"in-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(source, folder)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        yield folder

    shard, index = "model-00002-of-00003.safetensors", "model.safetensors.index.json"
    half = (source / shard).read_bytes()[:-100]
    outside = json.dumps({"weight_map": {"x": "../x.safetensors"}}).encode()
    cases: list[tuple[str, bytes | None, type[ShoalError], str]] = [
        (shard, half, InvalidInput, f"{shard} is damaged or no safetensors file .*: fetch it again"),
        (shard, None, NotFound, f"{shard} is missing, which {index} names: fetch it"),
        (shard, (source / "model-00001-of-00003.safetensors").read_bytes(), InvalidInput, "tensor .* is in .* and in"),
        (index, None, NotFound, f"has neither {index} nor model.safetensors: give"),
        (index, outside, InvalidInput, f"{index} names no files of its folder in weight_map: restore it"),
        ("config.json", None, NotFound, "has no config.json: give the folder of a checkpoint, as `hf download"),
        ("config.json", b"{", InvalidInput, "config.json is not valid JSON"),
        ("tokenizer.json", None, NotFound, "has no tokenizer.json: save"),
        ("tokenizer.json", b"{}", InvalidInput, "tokenizer.json is not a tokenizer.json"),
    ]
    for name, content, kind, said in cases:
        for folder in changed(name, content):
            with pytest.raises(kind, match=said):
                import_folder(folder, tmp_path / "runs", "x")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(
        InvalidInput, match=r"x needs \d+\.\d GB, and .* are free there: free some space .* another --to"
    ):
        check_room(tmp_path / "x", 1 << 60, "--to")
    with pytest.raises(UsageError, match="--name 'a/b' is not a plain folder name"):
        import_folder(source, tmp_path / "runs", "a/b")


def test_a_disk_that_is_full_before_the_end_leaves_nothing(source: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # the weights take 500 kB
    try:
        with pytest.raises(InvalidInput, match=r"runs/x cannot be written \(File too large\): free some space there"):
            import_folder(source, tmp_path / "runs", "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "runs").iterdir()) == []


def test_weights_that_are_rounded_only_where_that_is_asked_for(source: Path, tmp_path: Path) -> None:
    run = import_folder(source, tmp_path, "round", sets=["train.dtype=bfloat16"]).run
    export_run(RunFolder(run), 0, tmp_path / "out")
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    base = tmp_path / "base.toml"  # what it says of training a model of its own is not asked of this one
    base.write_text(recipe_to_toml(load_recipe("tiny", ["train.dtype=bfloat16"])))
    assert import_folder(source, tmp_path, "kept", str(base)).dtype == "float32"


def test_the_commands_from_a_folder_to_text_and_back(source: Path, tmp_path: Path) -> None:
    """import, generate, a corpus with the run's tokenizer, evaluate, export; and what does not go with an import."""
    for i in range(30):
        text = tmp_path / "texts" / f"{i}.txt"
        text.parent.mkdir(exist_ok=True)
        text.write_text(f"{i} the blue deep sea, fish and net\n" * 3)

    def ok(*arguments: str) -> str:
        result = shoal_here(*arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "parameters, float32" in ok("import", "hf", str(source), "--name", "mine")
    assert len(json.loads(ok("generate", "mine", "--prompt", "the sea", "--tokens", "4", "-o", "json"))["text"]) > 0
    ok("data", "prepare", "texts", "--tokenizer", "runs/mine/tokenizer.json", "--out", "corpus")
    said = json.loads(ok("evaluate", "mine", "--data", "corpus", "-o", "json"))
    assert said["step"] == 0 and 3 < said["loss"] < 20
    exported = json.loads(ok("export", "mine", "--to", "out", "-o", "json"))
    assert (exported["folder"], exported["format"], exported["step"]) == ("out", "hf", 0)
    assert_same(source, tmp_path / "out")
    refusals = [
        (3, "mine was imported from .* has no corpus: .*--data, .* --from mine", ("evaluate", "mine")),
        (3, "has no corpus", ("train", "--resume", "--name", "mine")),
        (
            3,
            "runs/mine exists already: choose another --name or --runs-dir\n",
            ("import", "hf", str(source), "--name", "mine"),
        ),
        (3, "out exists already: choose another --to\n", ("export", "mine", "--to", "out")),
        (5, "run 'other' is neither", ("export", "other", "--to", "x")),
        (2, "", ("export", "mine", "--to", "x", "--format", "gguf")),
    ]
    for code, words, command in refusals:
        result = shoal_here(*command, cwd=tmp_path)
        assert result.returncode == code, (command, result.stderr)
        assert re.search(words, result.stderr), result.stderr


def test_huggingface_reads_the_tokenizer_and_begins_a_text_as_we_do(corpus: Path, tmp_path: Path) -> None:
    """One that was trained here, whose file says nothing of bos; and older releases read it, which know no pairs."""
    transformers = pytest.importorskip("transformers")
    run = _trained(corpus, tmp_path, "run")
    export_run(RunFolder(run), 1, tmp_path / "out")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    own = RunFolder(run).tokenizer()
    text = "the blue fish\n  swims, 42 nets deep"
    assert theirs(text).input_ids == own.prompt(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (own.bos, own.eos)
    merges = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["merges"]
    assert merges and all(isinstance(merge, str) for merge in merges)


@pytest.mark.parametrize("named", ["published", "beside"])
def test_a_published_tokenizers_ends_are_found(named: str, source: Path, tmp_path: Path) -> None:
    """DeepSeek's by their names; any other by tokenizer_config.json, which goes with the run and out again. A corpus
    that is prepared with the run's tokenizer is one for the run."""
    bos, eos = {"published": ("<\uff5cbegin▁of▁sentence\uff5c>", "<\uff5cend▁of▁sentence\uff5c>")}.get(
        named, ("<A>", "<Z>")
    )
    folder = tmp_path / "in"
    shutil.copytree(source, folder)
    text = (folder / "tokenizer.json").read_text().replace("<|bos|>", bos).replace("<|eos|>", eos)
    (folder / "tokenizer.json").write_text(text)
    if named == "beside":
        settings = {"bos_token": {"content": bos}, "eos_token": eos, "chat_template": "{{ messages }}"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    run = import_folder(folder, tmp_path / "runs").run
    own = RunFolder(run).tokenizer()
    assert (own.bos, own.eos, own.added, own.size) == (0, 1, (), 295)
    assert load_tokenizer(run / "tokenizer.json").bos == 0
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"{i} fish")
    shoal_here("data", "prepare", "texts", "--tokenizer", str(run / "tokenizer.json"), "--out", "c", cwd=tmp_path)
    assert (tmp_path / "c" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    tuned = new_run(tmp_path / "runs", "tuned", RunFolder(run).recipe())  # as training goes on from it, on that corpus
    write_identity(tuned, RunFolder(run).recipe(), tmp_path / "c", "")
    shutil.copytree(run / "checkpoints", tuned.path / "checkpoints")
    for each in (RunFolder(run), tuned):
        found = load_tokenizer(each.path / "tokenizer.json")
        assert (found.bos, found.eos, found.added) == (0, 1, ())
        out = tmp_path / f"{each.name}-hf"
        export_run(each, 0, out)
        if named == "beside":
            assert json.loads((out / "tokenizer_config.json").read_text()) == settings
        assert json.loads((out / "config.json").read_text())["eos_token_id"] == 1


def test_an_import_and_an_export_that_are_told_to_end_leave_nothing(source: Path, tmp_path: Path) -> None:
    """SIGTERM while tensors are written, as Ctrl-C then."""
    import_folder(source, tmp_path / "runs", "whole")
    code = (
        "import signal, sys; import shoal.jobs.hf.importing, shoal.jobs.hf.exporting\n"
        "from shoal.jobs.cli.main import main\n"
        "module = sys.modules['shoal.jobs.hf.' + sys.argv.pop(1)]\n"
        "module.Shards.add = lambda *_: signal.raise_signal(signal.SIGTERM)\n"
        "main()\n"
    )
    for module, arguments in (
        ("importing", ("import", "hf", str(source), "--name", "half")),
        ("exporting", ("export", "whole", "--to", "runs/half")),
    ):
        command = [sys.executable, "-c", code, module, *arguments]
        told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert told.returncode == 130, told.stderr
        assert [path.name for path in (tmp_path / "runs").iterdir()] == ["whole"]


def test_an_export_of_a_damaged_checkpoint_names_the_tensor(source: Path, tmp_path: Path) -> None:
    run = import_folder(source, tmp_path, "run").run
    (run / "recipe.toml").write_text(recipe_to_toml(load_recipe(run / "recipe.toml", ["moe.expert_hidden=16"])))
    with pytest.raises(InvalidInput, match=r"tensor 'model.layers.1.moe.experts.0.gate_up' is .*makes it \[32, 32\]"):
        export_run(RunFolder(run), 0, tmp_path / "out")
    file = next((run / "checkpoints" / "step-0").glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    (run / "recipe.toml").write_text(recipe_to_toml(load_recipe(run / "recipe.toml", ["moe.expert_hidden=12"])))
    with pytest.raises(InvalidInput, match=r"tensor 'model.norm.weight' is missing, which .*recipe.toml says there is"):
        export_run(RunFolder(run), 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()
