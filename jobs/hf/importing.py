"""A checkpoint as Hugging Face keeps it, in: a run folder whose checkpoint of step 0 has the same numbers."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import shoal
from shoal.jobs.data.publish import publishing, sha256_file
from shoal.jobs.data.tokenizer import SETTINGS, CorpusTokenizer, load_tokenizer
from shoal.jobs.hf.config import CONFIG, Config, keys_of, read_config
from shoal.jobs.hf.files import DTYPES, Shards, TensorFiles, bytes_of, check_room, checkpoint_files
from shoal.jobs.hf.layout import Shapes, units
from shoal.jobs.recipe import load_recipe, parse_set, recipe_to_toml
from shoal.jobs.run_folder import IMPORTED, TOKENIZER
from shoal.workers import checkpoint_files as checkpoints
from shoal.workers.checkpoint import FILE_BYTES
from shoal.workers.config import Recipe
from shoal.workers.data.manifest import TokenizerEntry
from shoal.workers.errors import InvalidInput, NotFound, UsageError
from shoal.workers.model import Transformer
from shoal.workers.model.transformer import draw
from shoal.workers.weights import weights_of

BIAS = ".moe.bias"
BASE = "deepseekmoe-16b"  # what an imported recipe has of training
_ONE_RANK = {
    "parallel.ranks": 1,
    "parallel.placement": "colocated",
    "parallel.expert": 0,
    "parallel.context": 1,
    "train.initial": "",
    "train.dtype": "auto",  # the weights', unless --set says another
    "route.max_devices": 0,
    "balance.bias_rate": 0.0,
}


@dataclass(frozen=True)
class Imported:
    """What came of it. drawn: tensors that the checkpoint had not, and that were drawn. bytes: of all weights."""

    run: Path
    parameters: int
    dtype: str
    bytes: int
    drawn: int


def import_folder(
    source: Path, runs: Path, name: str | None = None, base: str = BASE, sets: Sequence[str] = ()
) -> Imported:
    """Makes the run ``runs/NAME``, whole or not at all, with a checkpoint of the model in ``source``.

    name: None for the folder's own. base: the recipe that says what config.json does not. Tensors are converted one
    after another; about two files of a checkpoint are in memory at once.

    Raises NotFound, InvalidInput and UsageError: for a model, a file or a disk that will not do, before anything is
    written.
    """
    config = read_config(source)
    name = name if name is not None else source.resolve().name.lower()
    if not name or Path(name).name != name:
        raise UsageError(f"--name {name!r} is not a plain folder name: the run's folder is --runs-dir/NAME")
    recipe = _recipe(config, source, base, sets)
    tokenizer = _tokenizer(source, config, recipe.model.vocab)
    files = TensorFiles(checkpoint_files(source), lambda key: not _ignored(key, recipe))
    parts = list(units(recipe))
    whence = f"{source / CONFIG}{', with --set,' if sets else ''}"
    files.check({key: shape for unit in parts for key, shape in unit.theirs.items()}, whence)
    dtype = _dtype(files, config, recipe)
    ours = weights_of(Transformer(recipe, device="meta"))
    shapes: Shapes = {key: tuple(empty.shape) for key, empty in ours.items()}
    target = runs / name
    check_room(target, bytes_of(shapes, dtype), "--runs-dir")
    with publishing(target, option="--name or --runs-dir") as folder:
        known = {key for unit in parts for key in unit.ours}
        others = {key: empty for key, empty in ours.items() if key not in known}
        tensors = _tensors(recipe, files, others, getattr(torch, dtype))
        written = _write_checkpoint(folder / "checkpoints", recipe, dtype, tensors)
        _write_identity(folder, source, recipe, tokenizer)
    drawn = sum(not key.endswith(BIAS) for key in others)
    return Imported(target, sum(empty.numel() for empty in ours.values()), dtype, written, drawn)


def _recipe(config: Config, source: Path, base: str, sets: Sequence[str]) -> Recipe:
    """The base recipe with config.json's model in it, and with what ``--set`` changes of both."""
    keys: dict[str, Any] = {**_ONE_RANK, **keys_of(config), "description": f"imported from {source.resolve().name}"}
    keys["train.sequence"] = min(load_recipe(base).train.sequence, keys["model.context"])
    for key in dict(parse_set(text) for text in sets):
        keys.pop(key, None)
    return load_recipe(base, sets, keys)


def _ignored(name: str, recipe: Recipe) -> bool:
    """Tensors that are no weights (old checkpoints have RoPE's rates), or that the model does not read."""
    return name.endswith(".rotary_emb.inv_freq") or (recipe.model.tied_embeddings and name == "lm_head.weight")


def _tokenizer(source: Path, config: Config, vocab: int) -> CorpusTokenizer:
    """Raises InvalidInput where it does not fit the model."""
    try:
        tokenizer = load_tokenizer(source / TOKENIZER)
    except NotFound:
        raise NotFound(f"{source} has no {TOKENIZER}: save the model's tokenizer there as a fast one") from None
    if tokenizer.size > vocab:
        raise InvalidInput(
            f"{source / TOKENIZER} has ids up to {tokenizer.size - 1}, and {CONFIG} has vocab_size={vocab}: "
            f"give the tokenizer of this model"
        )
    for key, found in (("bos_token_id", tokenizer.bos), ("eos_token_id", tokenizer.eos)):
        said = config.get(key)
        if isinstance(said, int) and said != found:
            raise InvalidInput(
                f"{CONFIG} has {key}={said}, and the tokenizer's is {found}, {tokenizer.name(found)!r}: "
                f"name the right one in {SETTINGS}, as {key.removesuffix('_id')}"
            )
    return tokenizer


def _dtype(files: TensorFiles, config: Config, recipe: Recipe) -> str:
    """The dtype of the imported weights: the recipe's, else config.json's, else that of the embedding.

    Raises InvalidInput where a tensor would have to be rounded, and nobody asked for that.
    """
    asked = recipe.train.dtype
    said = config.get("torch_dtype") or config.get("dtype") or files.stored["model.embed_tokens.weight"].dtype
    dtype = str(said).removeprefix("torch.") if asked == "auto" else asked
    for name, stored in files.stored.items():
        if stored.dtype not in DTYPES.values():
            raise InvalidInput(
                f"tensor {name!r} is {stored.dtype} in {stored.file}: give the checkpoint as it was before quantization"
            )
    if dtype not in ("bfloat16", "float32", "float64"):
        raise InvalidInput(
            f"{CONFIG} has torch_dtype={said!r}, in which this version does not compute: "
            f"add --set train.dtype=float32, or bfloat16 to round the weights"
        )
    kind = getattr(torch, dtype)
    for name, stored in files.stored.items():
        if asked == "auto" and torch.promote_types(getattr(torch, stored.dtype), kind) != kind:
            raise InvalidInput(
                f"tensor {name!r} is {stored.dtype} in {stored.file}, and {CONFIG} makes the model {dtype}: "
                f"add --set train.dtype={dtype} to round it, or --set train.dtype={stored.dtype}"
            )
    return dtype


def _tensors(
    recipe: Recipe, files: TensorFiles, others: dict[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint, one after another. others: those that are none of the files', without values;
    biases of the choice begin at 0, the rest is drawn."""
    for unit in units(recipe):
        for name, tensor in unit.to_ours(files.read):
            yield name, tensor.to(dtype)
    for name, empty in others.items():
        if name.endswith(BIAS):
            yield name, torch.zeros(empty.shape, dtype=empty.dtype)
            continue
        tensor = torch.empty(empty.shape, dtype=dtype)
        draw(recipe, name.removeprefix("model."), tensor)
        yield name, tensor


def _write_checkpoint(folder: Path, recipe: Recipe, dtype: str, tensors: Iterator[tuple[str, Tensor]]) -> int:
    """A checkpoint of step 0 with weights alone; their bytes."""
    folder.mkdir()
    state = {"step": 0, "seed": recipe.train.seed, "dtype": dtype, "weights_alone": True}
    state["biased"] = bool(recipe.balance.bias_rate)
    with checkpoints.draft(folder, 0) as drafted:
        shards = Shards(drafted, FILE_BYTES)
        for name, tensor in tensors:
            shards.add(name, tensor)
        shards.flush()
        entries = {checkpoints.STATE: checkpoints.write_json(drafted / checkpoints.STATE, json.dumps(state))}
        entries |= {file.name: checkpoints.digest(file, sync=True) for file in shards.files}
        software = {"shoal": shoal.__version__, "torch": torch.__version__, "python": platform.python_version()}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        checkpoints.publish(drafted, checkpoints.Manifest(step=0, time=now, world=1, software=software, files=entries))
    return shards.bytes


def _write_identity(folder: Path, source: Path, recipe: Recipe, tokenizer: CorpusTokenizer) -> None:
    """What a run has beside its checkpoints; of the tokenizer what a corpus has that is prepared with it."""
    (folder / TOKENIZER).write_text(tokenizer.tokenizer.to_str(pretty=True), "utf-8")
    if (source / SETTINGS).is_file():
        (folder / SETTINGS).write_bytes((source / SETTINGS).read_bytes())
    entry = TokenizerEntry(
        sha256=sha256_file(folder / TOKENIZER),
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        bos_token=tokenizer.name(tokenizer.bos),
        eos_token=tokenizer.name(tokenizer.eos),
        trained=False,
        added=tokenizer.added,
    )
    facts = {IMPORTED: str(source.resolve()), "tokenizer": entry.model_dump()}
    (folder / "run.json").write_text(json.dumps(facts), "utf-8")
    (folder / "recipe.toml").write_text(recipe_to_toml(recipe), "utf-8")  # with it, the folder is a run
