"""A small corpus and a small recipe for tests that train: every part of a large one, in milliseconds a step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from shoal.jobs.data.prepare import PrepareOptions, prepare
from shoal.jobs.data.readers import ReadOptions, open_inputs
from shoal.workers.config import Recipe

VOCAB = 300


def small_corpus(folder: Path, longest: int = 400) -> Path:
    """Documents of 1 word to so many, some shorter than a block and some longer than a row."""
    rng = random.Random(0)
    words = ["shoal", "fish", "net", "sea", "of", "the", "a", "swims", "deep", "blue", "tide", "and", "rows"]
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for i in range(120):
        text = " ".join(rng.choice(words) for _ in range(rng.choice([1, 3, 20, 60, longest])))
        (texts / f"{i:03}.txt").write_text(f"{i} {text}\n")
    out = folder / "corpus"
    prepare(open_inputs([texts], ReadOptions()), out, PrepareOptions(vocabulary=VOCAB, val_fraction=0.1))
    return out


def small_recipe(**changes: Any) -> dict[str, Any]:
    """Tables of a recipe; ``changes`` are values by dotted key with the dot written as two underscores."""
    tables: dict[str, Any] = {
        "name": "small",
        "model": {
            "vocab": VOCAB,
            "layers": 3,
            "hidden": 32,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "value_dim": 6,
            "dense_layers": 1,
            "dense_hidden": 48,
            "context": 64,
            "init_std": 0.05,
        },
        "attention": {"cmp_block": 8, "cmp_stride": 4, "slc_block": 8, "slc_count": 4, "window": 12},
        "moe": {"experts": 8, "top_k": 3, "shared_experts": 2, "expert_hidden": 16},
        "balance": {"expert": 0.05, "device": 0.05, "device_groups": 4},
        # the default would read the small corpus a hundred times before the first step
        "data": {"shuffle_tokens": 4096},
        "train": {
            "steps": 20,
            "batch": 8,
            "sequence": 64,
            "learning_rate": 5e-3,
            "warmup": 3,
            "schedule": "cosine",
            "dtype": "float64",
            "eval_tokens": 400,
        },
        "parallel": {"device": "cpu"},
        "checkpoint": {"every": 5, "keep": 3},
    }
    for key, value in changes.items():
        table, _, name = key.partition("__")
        tables.setdefault(table, {})[name] = value
    Recipe.model_validate(tables)
    return tables
