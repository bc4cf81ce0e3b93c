"""``config.json`` of DeepseekForCausalLM (deepseek-moe-16b-base), as keys of a recipe and back. Imports no torch.

That model is DeepSeekMoE as the paper has it: attention with grouped keys, RoPE with the half-split pairing, RMSNorm,
softmax scores of which the chosen are gates as they are (or, with ``norm_topk_prob``, over their sum), and shared
experts. Its own code computes scores in the dtype of the weights; here they are float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.workers.config import Recipe
from shoal.workers.errors import InvalidInput, NotFound

Config = dict[str, Any]

CONFIG = "config.json"
MODEL_TYPE = "deepseek"
CODE = "deepseek-ai/deepseek-moe-16b-base"  # where Hugging Face finds the model's own code, as `auto_map` names it
# Keys that change what is computed, with the values that a recipe has words for; None: the key is missing.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "scoring_func": ("softmax", None),
    "topk_method": ("greedy", None),
    "n_group": (1, None),
    "routed_scaling_factor": (1, None),
    "moe_layer_freq": (1, None),
    "quantization_config": (None,),
}
# YaRN here has the parameters that its paper recommends (beta 32 and 1, a temperature of 0.1 ln s + 1).
_YARN = {"beta_fast": (32, None), "beta_slow": (1, None), "attention_factor": (None,), "truncate": (True, None)}
_YARN |= {"mscale": (None,), "mscale_all_dim": (None,)}


def read_config(folder: Path) -> Config:
    """``config.json`` of a checkpoint's folder. Raises NotFound, InvalidInput."""
    file = folder / CONFIG
    try:
        config = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(
            f"{folder} has no {CONFIG}: give the folder of a checkpoint, as `hf download {CODE} --local-dir FOLDER` "
            f"makes it"
        ) from None
    except OSError as error:
        raise InvalidInput(f"{file} cannot be read ({error.strerror}): make it readable") from None
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{file} is not valid JSON ({error}): restore it") from None
    if not isinstance(config, dict):
        raise InvalidInput(f"{file} holds no JSON object: restore it")
    return config


def keys_of(config: Config) -> dict[str, Any]:
    """Keys of a recipe, by dotted name, that say what the model is. Raises InvalidInput for one it has no words for."""
    _check_kind(config)
    for key, known in _KNOWN.items():
        _check_known(key, config.get(key), known)
    hidden, heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
    if hidden % heads or config.get("head_dim") not in (None, hidden // heads):
        raise InvalidInput(
            f"{CONFIG} has hidden_size={hidden}, num_attention_heads={heads} and "
            f"head_dim={config.get('head_dim')!r}, where a head of DeepseekForCausalLM is hidden_size over "
            f"num_attention_heads: correct it"
        )
    experts = _whole(config, "n_routed_experts", 0)
    top_k = _whole(config, "num_experts_per_tok", 0) if experts else 0
    return {
        "model.vocab": _whole(config, "vocab_size"),
        "model.layers": _whole(config, "num_hidden_layers"),
        "model.hidden": hidden,
        "model.heads": heads,
        "model.kv_heads": _whole(config, "num_key_value_heads", heads),
        "model.head_dim": hidden // heads,
        "model.value_dim": 0,
        "model.dense_layers": _whole(config, "first_k_dense_replace", 0) if experts else 0,
        "model.dense_hidden": _whole(config, "intermediate_size"),
        "model.context": _whole(config, "max_position_embeddings"),
        "model.norm_eps": _number(config, "rms_norm_eps", 1e-6),
        "model.tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "model.init_std": _number(config, "initializer_range", 0.02),
        **_rope(config),
        "attention.kind": "full",
        "moe.experts": experts,
        "moe.top_k": top_k,
        "moe.shared_experts": _whole(config, "n_shared_experts", 0) if experts else 0,
        "moe.expert_hidden": _whole(config, "moe_intermediate_size") if experts else 0,
        "moe.router": "softmax",
        # with one expert a token its code does not divide, whatever the key says
        "moe.normalize_gates": bool(config.get("norm_topk_prob", False)) and top_k > 1,
    }


def config_of(recipe: Recipe, dtype: str, bos: int, eos: int) -> Config:
    """``config.json`` of a recipe's model. Raises InvalidInput for a key that the format has no word for."""
    _check_expressible(recipe)
    m, moe, balance = recipe.model, recipe.moe, recipe.balance
    names = {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    }
    yarn = {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": m.rope_factor,
        "original_max_position_embeddings": m.rope_original,
    }
    return {
        "architectures": ["DeepseekForCausalLM"],
        "auto_map": {key: f"{CODE}--{name}" for key, name in names.items()},
        "model_type": MODEL_TYPE,
        "torch_dtype": dtype,
        "vocab_size": m.vocab,
        "hidden_size": m.hidden,
        "intermediate_size": m.dense_hidden or moe.expert_hidden,
        "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.kv_heads,
        "max_position_embeddings": m.context,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": m.norm_eps,
        "rope_theta": m.rope_base,
        "rope_scaling": yarn if m.rope_scaling == "yarn" else None,
        "tie_word_embeddings": m.tied_embeddings,
        "initializer_range": m.init_std,
        "n_routed_experts": moe.experts or None,
        "n_shared_experts": (moe.shared_experts or None) if moe.experts else None,
        "num_experts_per_tok": moe.top_k if moe.experts else None,
        "moe_intermediate_size": moe.expert_hidden or m.dense_hidden,
        "first_k_dense_replace": m.dense_layers,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": moe.normalize_gates,
        "routed_scaling_factor": 1.0,
        "aux_loss_alpha": balance.sequence or balance.expert,
        "seq_aux": bool(balance.sequence),
        "pretraining_tp": 1,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }


def _check_kind(config: Config) -> None:
    kind = config.get("model_type")
    latent = next((key for key in ("kv_lora_rank", "q_lora_rank") if config.get(key) is not None), None)
    if latent:
        raise InvalidInput(
            f"{CONFIG} has model_type={kind!r} with {latent}={config[latent]!r}: that is multi-head latent attention "
            f"(MLA), which this version cannot compute: import one of model_type {MODEL_TYPE!r}, such as {CODE}"
        )
    if kind != MODEL_TYPE:
        raise InvalidInput(
            f"{CONFIG} has model_type={kind!r}, and only {MODEL_TYPE!r} can be imported: give a checkpoint of it, "
            f"such as {CODE}"
        )


def _check_known(key: str, value: Any, known: tuple[Any, ...]) -> None:
    if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in known):
        only = "nothing of it: import a checkpoint without it"
        if known[0] is not None:
            only = f"{known[0]!r} alone: import a checkpoint that has it so"
        raise InvalidInput(f"{CONFIG} has {key}={value!r}, and this version knows {only}")


def _check_expressible(recipe: Recipe) -> None:
    m, moe, route = recipe.model, recipe.moe, recipe.route
    grouped = moe.experts and 0 < route.max_devices < recipe.balance.device_groups
    sizes = m.hidden // m.heads
    no_word: dict[str, tuple[bool, Any, str]] = {
        "attention.kind": (recipe.attention.kind != "full", recipe.attention.kind, "full attention"),
        "moe.router": (bool(moe.experts) and moe.router != "softmax", moe.router, "softmax scores"),
        "balance.bias_rate": (
            bool(moe.experts and recipe.balance.bias_rate),
            recipe.balance.bias_rate,
            "a choice of experts by their scores, without a bias",
        ),
        "route.max_devices": (bool(grouped), route.max_devices, "experts chosen from all groups"),
        "model.value_dim": (m.v_dim != m.head_dim, m.v_dim, f"values as long as keys, {m.head_dim}"),
        "model.head_dim": (m.head_dim * m.heads != m.hidden, m.head_dim, f"model.hidden / model.heads = {sizes}"),
    }
    for key, (wrong, value, only) in no_word.items():
        if wrong:
            raise InvalidInput(
                f"{key}={value!r} cannot be said in a config.json of DeepseekForCausalLM, which knows {only} alone: "
                f"serve this run with shoal serve, or export one that was trained with that"
            )


def _rope(config: Config) -> dict[str, Any]:
    """RoPE of ``rope_theta`` and ``rope_scaling``, or of ``rope_parameters``, which transformers 5 writes for both."""
    scaling: Config = {}
    for key in ("rope_parameters", "rope_scaling"):
        found = config.get(key) or {}
        if not isinstance(found, dict):
            raise InvalidInput(f"{CONFIG} has {key}={found!r}, which is not a table: restore the file")
        scaling |= found
    base = _number({**scaling, **config}, "rope_theta", 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    out = {"model.rope_base": base, "model.rope_scaling": "none", "model.rope_factor": 1.0, "model.rope_original": 0}
    if kind == "default":
        return out
    if kind != "yarn":
        raise InvalidInput(
            f"{CONFIG} has rope_scaling of type {kind!r}, and this version knows 'yarn' alone: "
            f"remove rope_scaling and lower max_position_embeddings to the context that was trained on"
        )
    for key, known in _YARN.items():
        _check_known(f"rope_scaling.{key}", scaling.get(key), known)
    factor, original = _number(scaling, "factor"), _whole(scaling, "original_max_position_embeddings")
    return out | {"model.rope_scaling": "yarn", "model.rope_factor": factor, "model.rope_original": original}


def _whole(config: Config, key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    least = 1 if default is None else 0
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidInput(
            f"{CONFIG} has {key}={value!r}, which is not a whole number of {least} or more: restore the file"
        )
    return value


def _number(config: Config, key: str, default: float | None = None) -> float:
    value = config.get(key)
    if value is None and default is not None:
        return default
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    except OverflowError:  # an integer beyond what a float holds
        pass
    raise InvalidInput(f"{CONFIG} has {key}={value!r}, which is not a number: restore the file")
