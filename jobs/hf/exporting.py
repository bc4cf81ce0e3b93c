"""A run's model, out: a folder that Hugging Face's DeepseekForCausalLM loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from shoal.jobs.data.publish import publishing
from shoal.jobs.data.tokenizer import SETTINGS, CorpusTokenizer
from shoal.jobs.hf.config import CONFIG, Config, config_of
from shoal.jobs.hf.files import BYTES, INDEX, Shards, TensorFiles, bytes_of, check_room
from shoal.jobs.hf.layout import units
from shoal.jobs.run_folder import TOKENIZER, RunFolder
from shoal.workers.checkpoint_files import TENSORS, checkpoint_path, read_state

SHARD_BYTES = 1 << 30  # of a file's tensors, which are in memory until it is written


@dataclass(frozen=True)
class Exported:
    """What came of it. notes: sentences on who can load it."""

    folder: Path
    step: int
    parameters: int
    dtype: str
    files: int
    bytes: int
    notes: tuple[str, ...]


def export_run(folder: RunFolder, step: int, target: Path, shard_bytes: int = SHARD_BYTES) -> Exported:
    """Writes ``target``, whole or not at all, from a run's checkpoint of ``step``, in the dtype that it has.

    Raises InvalidInput: for a model that the format cannot express, a damaged checkpoint, a disk without room, before
    anything is written.
    """
    recipe, tokenizer = folder.recipe(), folder.tokenizer()
    path = checkpoint_path(folder.path / "checkpoints", step)
    dtype = str(read_state(path).get("dtype", recipe.train.dtype))
    config = config_of(recipe, dtype, tokenizer.bos, tokenizer.eos)
    files = TensorFiles(sorted(path.glob(f"*{TENSORS}")), lambda name: name.startswith("model."))
    parts = list(units(recipe))
    ours = {name: shape for unit in parts for name, shape in unit.ours.items()}
    files.check(ours, str(folder.recipe_file))
    check_room(target, bytes_of(ours, dtype), "--to")
    with publishing(target, option="--to") as out:
        shards = Shards(out, shard_bytes)
        for unit in parts:
            for name, tensor in unit.to_theirs(files.read):
                shards.add(name, tensor)
        index = {"metadata": {"total_size": shards.bytes}, "weight_map": shards.number()}
        _write_json(out / INDEX, index)
        _write_tokenizer(out, folder, tokenizer, recipe.model.context)
        _write_json(out / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id")})
        _write_json(out / CONFIG, config)
    yarn = recipe.model.rope_scaling == "yarn"
    notes = ("rope_scaling is of type yarn: vLLM knows it, Hugging Face's code of this model does not",) if yarn else ()
    return Exported(target, step, shards.bytes // BYTES[dtype], dtype, len(shards.files), shards.bytes, notes)


def _write_tokenizer(out: Path, folder: RunFolder, tokenizer: CorpusTokenizer, context: int) -> None:
    """tokenizer.json and its settings. Where the run has none from elsewhere, the tokenizer is made to begin a text
    with bos, as prompts begin here."""
    settings = folder.path / SETTINGS
    text = tokenizer.tokenizer.to_str(pretty=True)
    if settings.is_file():
        (out / SETTINGS).write_bytes(settings.read_bytes())
        _write_json(out / TOKENIZER, _with_plain_merges(text))
        return
    theirs, bos = Tokenizer.from_str(text), tokenizer.name(tokenizer.bos)
    if theirs.encode("a").ids[:1] != [tokenizer.bos]:
        theirs.post_processor = TemplateProcessing(
            single=[f"{bos}:0", "$A:0"], pair=[f"{bos}:0", "$A:0", "$B:0"], special_tokens=[(bos, tokenizer.bos)]
        )
    _write_json(out / TOKENIZER, _with_plain_merges(theirs.to_str()))
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": tokenizer.name(tokenizer.eos),
        "pad_token": tokenizer.name(tokenizer.eos),
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    _write_json(out / SETTINGS, said)


def _with_plain_merges(text: str) -> Config:
    """A tokenizer whose merges are texts where they can be: pairs are not read by tokenizers before 0.20, which the
    transformers have that Hugging Face's code of the model was written for."""
    content: Config = json.loads(text)
    merges = content["model"].get("merges") or []
    if all(isinstance(pair, list) and not any(" " in part for part in pair) for pair in merges):
        content["model"] |= {"merges": [" ".join(pair) for pair in merges]} if merges else {}
    return content


def _write_json(file: Path, content: Config) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
