"""config.json of DeepseekForCausalLM and recipes: each as the other, and what one of them has no word for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hf_folder import SIZES
from hypothesis import given
from hypothesis import strategies as st
from small import small_recipe

from shoal.jobs.hf.config import config_of, keys_of
from shoal.jobs.recipe import load_recipe
from shoal.workers.config import Recipe
from shoal.workers.errors import InvalidInput

# deepseek-ai/deepseek-moe-16b-base, config.json
PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 100000,
    "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 10944, "max_position_embeddings": 4096, "model_type": "deepseek",
    "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 28,
    "num_key_value_heads": 16, "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000,
    "scoring_func": "softmax", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 102400,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention__kind": "nsa"}, r"attention.kind='nsa' cannot be said in .* full attention alone: serve"),
        ({"moe__router": "sigmoid", "balance__expert": 0.0, "balance__device": 0.0}, r"moe.router='sigmoid' cannot be"),
        ({"moe__router": "hash", "moe__top_k": 1}, r"moe.router='hash' cannot be"),
        ({"balance__bias_rate": 0.01}, r"balance.bias_rate=0.01 cannot be said .*, without a bias alone: serve"),
        ({"route__max_devices": 2}, r"route.max_devices=2 cannot be"),
        ({"model__value_dim": 6}, r"model.value_dim=6 cannot be said .* values as long as keys, 8 alone"),
        ({"model__head_dim": 16}, r"model.head_dim=16 cannot be said .* model.hidden / model.heads = 8 alone"),
    ],
)
def test_what_the_format_has_no_word_for_is_not_exported(changes: dict[str, Any], said: str) -> None:
    tables = small_recipe(**{"attention__kind": "full", "model__value_dim": 0, **changes})
    with pytest.raises(InvalidInput, match=said):
        config_of(Recipe.model_validate(tables), "float32", 0, 1)


def test_the_published_config_is_the_papers_recipe_and_back() -> None:
    recipe, keys = load_recipe("deepseekmoe-16b"), keys_of(PUBLISHED)
    for key, value in keys.items():
        table, name = key.split(".")
        if key != "model.init_std":  # 0.006 in the paper
            assert getattr(getattr(recipe, table), name) == value, key
    config = config_of(recipe, "bfloat16", 100000, 100001)
    assert {key: config[key] for key in PUBLISHED} == {**PUBLISHED, "initializer_range": 0.006}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "factor", "x"]), inner),
)


@given(st.dictionaries(st.sampled_from([*SIZES, "head_dim", "kv_lora_rank", "rope_parameters"]), _JSON, max_size=3))
def test_any_value_of_a_config_is_taken_or_refused(changes: dict[str, Any]) -> None:
    try:
        keys = keys_of({**SIZES, **changes})
    except InvalidInput as refused:
        assert "\n" not in str(refused)
    else:
        assert keys["model.heads"] >= 1


@pytest.mark.parametrize("name", ["deepseekmoe-2b", "deepseekmoe-145b", "gshard-2b", "switch-2b", "dense-0.2b"])
def test_a_recipe_that_the_format_knows_comes_back_from_its_config(name: str) -> None:
    recipe = load_recipe(name)
    keys = keys_of(json.loads(json.dumps(config_of(recipe, "bfloat16", 0, 1))))
    unread = set() if recipe.model.dense_hidden else {"model.dense_hidden"}
    unread |= set() if recipe.moe.experts else {"model.dense_layers", "moe.expert_hidden"}
    for key, value in keys.items():
        table, own = key.split(".")
        assert key in unread or getattr(getattr(recipe, table), own) == value, key


def test_rope_is_read_as_newer_versions_of_transformers_write_it() -> None:
    config = {key: value for key, value in SIZES.items() if key not in ("rope_theta", "rope_scaling")}
    keys = keys_of({**config, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}})
    assert (keys["model.rope_base"], keys["model.rope_scaling"]) == (700.0, "none")
    yarn = {**YARN, "rope_type": "yarn", "rope_theta": 700.0}
    keys = keys_of({**config, "rope_parameters": yarn})
    assert (keys["model.rope_base"], keys["model.rope_factor"], keys["model.rope_original"]) == (700.0, 4.0, 32)
