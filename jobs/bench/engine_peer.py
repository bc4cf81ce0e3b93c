"""Decode of the same shape by transformers' continuous batching, over random weights: what the engine stands beside.

Its classes for Qwen's mixture of experts have DeepSeekMoE's parts: fine-grained experts, computed as grouped products,
shared ones and a dense first layer; their shared experts have a gate, a product with one column more. Attention is what
transformers chooses: FlashAttention where that is installed, else PyTorch's.

Prompts have all but their last token in common, which transformers' cache of prefixes computes once, and sequences part
from one another by that token: so decode at a long context is reached in seconds, and all start in one step. Each step
nevertheless reads the keys of each sequence, once for each that has them.

It runs in a process of its own, ``python -m shoal.jobs.bench.engine_peer``, whose memory is gone afterwards and whose
end, whatever it is, ends no benchmark. That reads what is asked of it as JSON, and writes a line of JSON a measurement.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from shoal.jobs.bench.command import environment
from shoal.workers.config import Recipe

TOKENS = 256  # of a batch; masks have a row for each
PAGE = 256  # tokens of transformers' pages
PATIENCE = 150.0  # seconds that all of it may take
REFUSED = "refused"


class PeerError(Exception):
    """transformers is not there, or does not do what is asked of it."""


@dataclass(frozen=True)
class Decoded:
    """Milliseconds of a decode step of so many sequences at once, their attention, and the version that did it."""

    at_once: int
    ms: float
    attention: str
    version: str


def decode_steps(
    recipe: Recipe, device: str, context: int, counts: Sequence[int], steps: int, warm: int, say: Callable[[str], None]
) -> list[Decoded]:
    """Decode at ``context`` tokens, a multiple of a page, for one number of sequences after the other.

    ``steps``: the median is taken over so many, after ``warm`` ones. Where transformers is not there, refuses or takes
    too long, it is told by ``say``, and that number of sequences and those after it are left out.
    """
    asked = {"recipe": recipe.model_dump(mode="json"), "device": device, "context": context, "counts": list(counts)}
    found = []
    for line in _lines(json.dumps(asked | {"steps": steps, "warm": warm})):
        if REFUSED in line:
            say(f"transformers' continuous batching, {context} tokens: {line[REFUSED]}")
            break
        found.append(each := Decoded(**line))
        say(f"transformers {each.version}, {context} tokens, {each.at_once} at once: {each.ms:.2f} ms a step")
    return found


def _lines(asked: str) -> list[dict[str, Any]]:
    """What the process wrote, and why it ended where that was too early."""
    command = [sys.executable, "-m", "shoal.jobs.bench.engine_peer"]
    env = environment() | {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # so that as many sequences fit as can
        "HF_HUB_OFFLINE": "1",  # nothing is to be fetched
    }
    try:
        result = subprocess.run(command, input=asked, capture_output=True, text=True, env=env, timeout=PATIENCE)
        said, end = result.stdout, f"it ended with {result.returncode}, {result.stderr.strip()[-200:]}"
        failed = result.returncode != 0
    except subprocess.TimeoutExpired as e:
        out = e.stdout or b""
        said, end, failed = out.decode() if isinstance(out, bytes) else out, f"not done after {PATIENCE:.0f} s", True
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{") and line.endswith("}")]
    return [*lines, {REFUSED: end}] if failed else lines


def main() -> None:
    """Measures what standard input asks for."""
    asked = json.load(sys.stdin)
    recipe, at_once = Recipe.model_validate(asked["recipe"]), 0
    try:
        model, version = _model(recipe, asked["device"])
        for at_once in asked["counts"]:
            ms, attention = _step_ms(
                model, recipe.model.vocab, asked["context"], at_once, asked["steps"], asked["warm"]
            )
            print(json.dumps(asdict(Decoded(at_once, ms, attention, version))), flush=True)
            _free(asked["device"])
    except Exception as e:  # of foreign code: any
        where = f"{at_once} at once: " if at_once else ""
        print(json.dumps({REFUSED: where + " ".join(str(e).split())[:200]}), flush=True)
        os._exit(0)  # its threads may go on for as long as they like


def _model(recipe: Recipe, device: str) -> tuple[Any, str]:
    """A model of the recipe's shape, made where it computes, in bfloat16 on a GPU; and transformers' version."""
    import torch

    try:
        transformers = importlib.import_module("transformers")
        config = transformers.Qwen2MoeConfig(**_shape(recipe))
    except (ImportError, AttributeError) as e:
        raise PeerError(f"transformers with its mixture of experts cannot be imported ({e})") from e
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if device == "cpu":
        torch.set_num_threads(1)  # as many as the engine has there
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    return model.eval(), transformers.__version__


def _shape(recipe: Recipe) -> dict[str, Any]:
    """The recipe in the words of transformers' configuration."""
    m, moe = recipe.model, recipe.moe
    return {
        "vocab_size": m.vocab,
        "num_hidden_layers": m.layers,
        "hidden_size": m.hidden,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.kv_heads,
        "head_dim": m.head_dim,
        "qkv_bias": False,
        "mlp_only_layers": list(range(m.dense_layers)),
        "intermediate_size": m.dense_hidden,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_hidden,
        "shared_expert_intermediate_size": moe.shared_experts * moe.expert_hidden,
        "max_position_embeddings": m.context + PAGE,
        "initializer_range": m.init_std,
        "rms_norm_eps": m.norm_eps,
        "tie_word_embeddings": m.tied_embeddings,
    }


def _step_ms(model: Any, vocab: int, context: int, at_once: int, steps: int, warm: int) -> tuple[float, str]:
    """Median milliseconds of a step of ``at_once`` sequences, by the times at which their tokens came; the attention
    that was computed: transformers changes what it was asked for while it batches."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    if context % PAGE:
        raise PeerError(f"a context of {context} is no multiple of its pages of {PAGE}")
    answer = warm + steps + 3  # sequences may start a step or two apart
    rng = random.Random(at_once)
    prefix = [rng.randrange(vocab) for _ in range(context)]
    prompts = [[*prefix, token] for token in rng.sample(range(vocab), at_once)]
    sampling = GenerationConfig(max_new_tokens=answer, do_sample=True, top_k=0, eos_token_id=-1)
    # a batch reads as many tokens as there is room for in the cache, be they shared or not
    room = math.ceil(at_once * (context + answer) / PAGE) + 2
    batching = ContinuousBatchingConfig(num_blocks=room, max_batch_tokens=max(TOKENS, at_once))
    with model.continuous_batching_context_manager(
        generation_config=sampling, continuous_batching_config=batching
    ) as manager:
        _generate(manager, [prefix], 1)
        times = _generate(manager, prompts, answer)
        attention = model.config._attn_implementation
    return _median_ms(times, warm), attention


def _generate(manager: Any, prompts: list[list[int]], answer: int) -> list[list[float]]:
    """When each prompt's tokens came, in seconds. Raises PeerError where one does not get all of them."""
    manager.add_requests(prompts, max_new_tokens=answer, record_timestamps=True)
    times: list[list[float]] = []
    while len(times) < len(prompts):
        output = manager.get_result(timeout=1)
        if output is None:
            if not manager.is_running():
                raise PeerError(f"{len(prompts) - len(times)} of {len(prompts)} requests have no answer")
        elif output.error is not None or len(output.timestamps) != answer:
            raise PeerError(output.error or f"{len(output.timestamps)} tokens instead of {answer}")
        else:
            times.append(output.timestamps)
    return times


def _median_ms(times: list[list[float]], warm: int) -> float:
    """The median between two tokens of the last one to start, while all of them generate; the first ``warm`` not.

    Raises PeerError where sequences did not all take part in each step.
    """
    began, end = max(each[0] for each in times), min(each[-1] for each in times)
    counts = [sum(began <= at <= end for at in each) for each in times]
    last = next(each for each in times if each[0] == began)
    gaps = [1000 * (after - before) for before, after in pairwise(last) if after <= end][warm:]
    if max(counts) - min(counts) > 1 or not gaps:
        raise PeerError(f"{len(times)} sequences did not generate at one time")
    return statistics.median(gaps)


def _free(device: str) -> None:
    gc.collect()  # managers and what failed refer to themselves
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
