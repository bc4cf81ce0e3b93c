"""A checkpoint of DeepseekForCausalLM with random weights, as Hugging Face keeps one, and what its model computes.

Both are written from the published equations (DeepSeekMoE eq. 9-11, RoFormer eq. 34, RMSNorm, SwiGLU) and from the
names in the published checkpoint, and share no code with the project.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

SIZES: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "torch_dtype": "float32",
    "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "moe_intermediate_size": 12, "n_routed_experts": 8, "n_shared_experts": 2,
    "num_experts_per_tok": 3, "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": False,
    "scoring_func": "softmax", "hidden_act": "silu", "attention_bias": False, "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5, "rope_theta": 500.0, "rope_scaling": None, "tie_word_embeddings": False,
    "initializer_range": 0.02, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    narrow = hidden // heads * config["num_key_value_heads"]
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}

    def network(name: str, inner: int) -> None:
        out.update({f"{name}.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")})
        out[f"{name}.down_proj.weight"] = (hidden, inner)

    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        for part, size in (("q", hidden), ("k", narrow), ("v", narrow), ("o", hidden)):
            out[f"{at}.self_attn.{part}_proj.weight"] = (size, hidden)
        if config["n_routed_experts"] is None or i < config["first_k_dense_replace"]:
            network(f"{at}.mlp", config["intermediate_size"])
        else:
            inner = config["moe_intermediate_size"]
            for expert in range(config["n_routed_experts"]):
                network(f"{at}.mlp.experts.{expert}", inner)
            out[f"{at}.mlp.gate.weight"] = (config["n_routed_experts"], hidden)
            if config["n_shared_experts"]:
                network(f"{at}.mlp.shared_experts", inner * config["n_shared_experts"])
        out |= {f"{at}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    out["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (config["vocab_size"], hidden)
    return out


def write_folder(folder: Path, tokenizer: str, shards: int = 3, **changes: Any) -> Path:
    """A folder in ``shards`` files. changes: of config.json."""
    folder.mkdir(parents=True)
    config = {**SIZES, **changes}
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, config["torch_dtype"])
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.2 if len(shape) == 1 else shape[-1] ** -0.5 * 1.5)
        + (1 if len(shape) == 1 else 0)
        for name, shape in shapes_of(config).items()
    }
    place = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(place.values()):
        save_file({n: t.to(dtype) for n, t in tensors.items() if place[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tokenizer)
    return folder


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def logits(folder: Path, tokens: Tensor) -> Tensor:
    """``[T] -> [T, vocab]`` of one document, in float64, from the folder's files alone."""
    config = json.loads((folder / "config.json").read_text())
    w = {name: tensor.double() for name, tensor in read_tensors(folder).items()}
    heads, groups, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    dim, count = config["hidden_size"] // heads, len(tokens)
    angles = torch.arange(count)[:, None] * config["rope_theta"] ** (-torch.arange(0, dim, 2).double() / dim)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]

    def turn(x: Tensor) -> Tensor:  # [T, heads, dim]: number i is turned with number i + dim/2
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        one, two = x[..., : dim // 2], x[..., dim // 2 :]
        return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)

    def network(x: Tensor, name: str) -> Tensor:
        gate, up, down = (w[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def attend(x: Tensor, name: str) -> Tensor:
        q, k, v = (
            (x @ w[f"{name}.{part}_proj.weight"].T).view(count, n, dim)
            for part, n in (("q", heads), ("k", groups), ("v", groups))
        )
        q, k = turn(q), turn(k)
        out = torch.empty_like(q)
        for head in range(heads):
            group = head * groups // heads
            scores = q[:, head] @ k[:, group].T / dim**0.5
            seen = torch.ones(count, count, dtype=torch.bool).tril()
            out[:, head] = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, group]
        return out.flatten(1) @ w[f"{name}.o_proj.weight"].T

    def experts(x: Tensor, name: str) -> Tensor:
        scores = (x @ w[f"{name}.gate.weight"].T).softmax(-1)
        out = network(x, f"{name}.shared_experts") if config["n_shared_experts"] else torch.zeros_like(x)
        for t, row in enumerate(scores.tolist()):
            best = sorted(range(len(row)), key=lambda e: -row[e])[: config["num_experts_per_tok"]]
            whole = sum(row[e] for e in best) if config["norm_topk_prob"] and len(best) > 1 else 1.0
            out[t] += sum(row[e] / whole * network(x[t], f"{name}.experts.{e}") for e in best)
        return out

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        x = x + attend(norm(x, f"{at}.input_layernorm"), f"{at}.self_attn")
        sparse = f"{at}.mlp.gate.weight" in w
        x = x + (experts if sparse else network)(norm(x, f"{at}.post_attention_layernorm"), f"{at}.mlp")
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "model.norm") @ w[head].T
