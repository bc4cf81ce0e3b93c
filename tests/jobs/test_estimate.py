"""The estimates against the papers' figures, and against counting by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from small import small_recipe

from shoal.jobs.estimate import estimate, keys_read
from shoal.jobs.recipe import load_recipe
from shoal.workers.config import AttentionTable, Recipe

BILLION = 1e9


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseekmoe-2b", 2.0, 0.3),  # DeepSeekMoE table 1
        ("gshard-2b", 2.0, 0.3),
        ("switch-2b", 2.0, 0.2),
        ("hash-2b", 2.0, 0.2),
        ("dense-0.2b", 0.2, 0.2),
        ("deepseekmoe-16b", 16.4, 2.8),  # section 5.1
        ("deepseekmoe-145b", 144.6, 22.2),  # section 7.1
    ],
)
def test_the_papers_parameters_come_out(name: str, total: float, active: float) -> None:
    parameters = estimate(load_recipe(name)).parameters
    assert round(parameters.total / BILLION, 1) == total
    assert round(parameters.active / BILLION, 1) == active


def test_nsa_27b_has_the_papers_size_and_no_other_expert_size_has() -> None:
    sizes = {
        hidden: round(estimate(load_recipe("nsa-27b", [f"moe.expert_hidden={hidden}"])).parameters.total / BILLION)
        for hidden in range(1280, 1793, 64)
    }
    assert [hidden for hidden, billions in sizes.items() if billions == 27] == [1472]
    assert load_recipe("nsa-27b").moe.expert_hidden == 1472


def test_the_papers_expert_parameters_come_out() -> None:
    """DeepSeekMoE table 2: 1.89B in all, 0.24B active."""
    p = estimate(load_recipe("deepseekmoe-2b")).parameters
    experts = p.routed_experts + p.shared_experts
    assert round(experts / BILLION, 2) == 1.89
    assert round((experts - p.unused) / BILLION, 2) == 0.24


@pytest.mark.parametrize(
    ("name", "sets", "tflops"),
    [
        ("dense-0.2b", [], 2.9),  # DeepSeekMoE table 1, per 2k tokens
        ("switch-2b", [], 2.9),
        ("hash-2b", [], 2.9),
        ("gshard-2b", [], 4.3),
        ("deepseekmoe-2b", [], 4.3),
        ("gshard-2b", ["moe.expert_hidden=5136"], 5.8),  # table 2, GShard x 1.5
        ("dense-0.2b", ["model.dense_hidden=54784"], 24.6),  # table 2, Dense x 16
        ("deepseekmoe-16b", [], 74.4),  # table 3, per 4k tokens
        ("deepseekmoe-145b", [], 585.6),  # table 6, per 4k tokens
    ],
)
def test_the_papers_flops_come_out(name: str, sets: list[str], tflops: float) -> None:
    """The paper counts forward and backward, and attention without its causal mask: all keys for each query."""
    recipe = load_recipe(name, sets)
    flops, length = estimate(recipe).flops, recipe.train.sequence
    unmasked = flops.attention * 2 * length / (length + 1)
    assert 3 * length * (flops.projections + unmasked) / 1e12 == pytest.approx(tflops, rel=0.025)


@pytest.mark.parametrize(("length", "tokens"), [(8192, 2048), (16384, 2560), (32768, 3584), (65536, 5632)])
def test_the_last_query_reads_as_many_keys_as_the_paper_says(length: int, tokens: int) -> None:
    """NSA table 4, tokens read by a decoding step (it counts one compressed block too many, a block's first d keys)."""
    attention = load_recipe("nsa-27b").attention
    last = sum(keys_read(attention, length).values()) - sum(keys_read(attention, length - 1).values())
    assert last == tokens - 1


@given(
    l_blocks=st.integers(1, 4),
    stride=st.integers(1, 8),
    slc_blocks=st.integers(0, 4),
    count=st.integers(3, 8),
    window=st.integers(1, 40),
    length=st.integers(1, 300),
)
def test_keys_read_is_what_counting_query_by_query_gives(
    l_blocks: int, stride: int, slc_blocks: int, count: int, window: int, length: int
) -> None:
    block, slc = l_blocks * stride, (l_blocks + slc_blocks) * stride
    a = AttentionTable(cmp_block=block, cmp_stride=stride, slc_block=slc, slc_count=count, window=window)
    cmp = selected = win = 0
    for t in range(length):
        cmp += sum(i + block <= t + 1 for i in range(0, length, stride))
        own = t // slc
        chosen = [own, *range(own)][:count]  # the query's own block and whichever others
        selected += sum(min(slc * (j + 1), t + 1) - slc * j for j in chosen)
        win += sum(0 <= t - key < window for key in range(length))
    assert keys_read(a, length) == {"cmp": cmp, "slc": selected, "win": win}


def test_parts_add_up_by_hand() -> None:
    """`tiny`, layer by layer, as the weights are shaped."""
    p = estimate(load_recipe("tiny")).parameters
    q, kv, out, gate = 128 * 4 * 32, 3 * 2 * 128 * 2 * 32, 4 * 32 * 128, 128 * 64 + 64 * 12
    assert p.attention == 4 * (q + kv + out + gate)
    assert p.compression == 4 * 2 * 2 * (16 * 32 + 16 * 32 * 64 + 64 * 32)
    assert p.embedding == 2 * 2048 * 128
    assert p.dense_ffn == 3 * 128 * 320
    assert (p.routed_experts, p.shared_experts) == (3 * 16 * 3 * 128 * 64, 3 * 3 * 128 * 64)
    assert (p.router, p.norms) == (3 * 16 * 128, 9 * 128)
    assert p.total - p.active == 3 * 12 * 3 * 128 * 64


def test_full_attention_of_the_mean_query_reads_half_the_keys() -> None:
    recipe = load_recipe("tiny-full")
    assert estimate(recipe).flops.attention == 2 * 4 * 4 * 64 * (512 + 1) / 2
    assert estimate(recipe).flops.compression == 0


def test_memory_follows_ranks_and_placement() -> None:
    tiny = estimate(load_recipe("tiny"))
    two = tiny.memory["colocated"]
    assert two.weights == 4 * (tiny.parameters.total - tiny.parameters.routed_experts // 2)
    shared = (tiny.parameters.total - tiny.parameters.routed_experts) // 2  # each keeps the moments of one half
    assert two.optimizer == 2 * 4 * (shared + tiny.parameters.routed_experts // 2)
    one = estimate(load_recipe("tiny", ["parallel.ranks=1"])).memory["colocated"]
    assert one.weights == 4 * tiny.parameters.total
    assert one.optimizer == 2 * one.weights  # float32 weights need no master copy
    apart = estimate(load_recipe("tiny", ["parallel.placement=2A:4F"])).memory
    assert apart["expert"].weights == tiny.parameters.routed_experts
    assert (apart["attention"].ranks, apart["expert"].ranks) == (2, 4)
    assert apart["attention"].weights == 4 * (tiny.parameters.total - tiny.parameters.routed_experts)


def test_sharded_dense_weights_are_whole_only_where_they_are_computed() -> None:
    """Of 24 layers, over 8 ranks that keep all experts each: what is outside blocks and two blocks, and an eighth."""
    sets = ["model.layers=24", "moe.experts=0", "model.dense_layers=24", "train.batch=8", "parallel.ranks=8"]
    whole, parts = (load_recipe("tiny", [*sets, f"parallel.shard_dense={on}"]) for on in ("false", "true"))
    p, held = estimate(parts).parameters, estimate(parts).memory["colocated"]
    block = (p.total - p.embedding - 128) // 24
    assert held.weights == 4 * (p.embedding + 128 + 2 * block + -(-p.total // 8))
    assert held.optimizer == 8 * -(-p.total // 8)
    before = estimate(whole).memory["colocated"]
    held_always = [m.weights + m.gradients + m.optimizer for m in (held, before)]
    assert held_always[0] < 0.5 * held_always[1]
    alone = [f"parallel.shard_dense={on}" for on in ("false", "true")]
    assert len({estimate(load_recipe("tiny", ["parallel.ranks=1", on])).memory["colocated"] for on in alone}) == 1
    short = estimate(load_recipe("tiny", [*sets, "parallel.shard_dense=true", "train.dtype=bfloat16"])).memory
    assert short["colocated"].weights == 2 * (p.embedding + 128 + 2 * block)  # the parts are float32 masters


def test_layers_computed_again_keep_their_input_and_one_of_them_the_rest() -> None:
    """Of `tiny`'s layers, the first of them dense, the last three are alike. There are two sequences a rank."""
    found = [estimate(load_recipe("tiny", [f"train.recompute={n}"])).memory["colocated"] for n in range(5)]
    kept = [memory.activations for memory in found]
    assert kept[0] > kept[1] > kept[2] and kept[1] - kept[2] == kept[2] - kept[3] == kept[3] - kept[4]
    hidden, layer = 4 * 512 * 2 * 128, kept[3] - kept[4]
    assert kept[4] >= 6 * hidden  # inputs, those of the last norm and the head
    assert found[4].step > kept[4] + layer  # one layer is there as a whole


def test_bfloat16_keeps_masters_their_gradients_and_both_moments_in_float32() -> None:
    memory = estimate(load_recipe("tiny", ["train.dtype=bfloat16", "parallel.ranks=1"])).memory["colocated"]
    assert (memory.gradients, memory.optimizer) == (2 * memory.weights, 6 * memory.weights)
    assert memory.total == memory.weights + memory.optimizer + memory.step
    several = ["train.dtype=bfloat16", "parallel.ranks=1", "train.accumulate=2", "train.batch=8"]
    memory = estimate(load_recipe("tiny", several)).memory["colocated"]
    assert memory.step > memory.gradients + memory.activations  # those of the first micro-batch wait for the second


def test_dispatched_shared_experts_lie_on_the_expert_ranks() -> None:
    sets = ["moe.shared=dispatched", "moe.shared_experts=2", "parallel.placement=1A:2F"]
    recipe = estimate(load_recipe("tiny", sets))
    p = recipe.parameters
    assert recipe.memory["expert"].weights == 4 * (p.routed_experts + p.shared_experts) // 2
    assert recipe.memory["attention"].weights == 4 * (p.total - p.routed_experts - p.shared_experts)


def _slots(rank: int, world: int, tables: dict[str, Any], folder: str) -> int:
    """Bytes of the memory in which others put this rank's rows, as a model to be trained asks for it."""
    from shared_inbox import SharedInbox

    from shoal.workers import symmetric
    from shoal.workers.inboxes import open_inbox
    from shoal.workers.mesh import make_mesh
    from shoal.workers.model import Transformer
    from shoal.workers.placement import Placement

    symmetric.inbox = lambda *sizes: SharedInbox(folder, *sizes)  # type: ignore[assignment]
    recipe = Recipe.model_validate(tables)
    model = Transformer(recipe, make_mesh(Placement.of(recipe), rank))
    said = open_inbox(model)
    file = Path(folder) / str(rank)
    assert said == "rows for other ranks' experts are put into their memory" or not file.exists()
    assert all(layer.dispatcher.inbox is not None for layer in model.moe_layers) == file.exists()
    return file.stat().st_size if file.exists() else 0


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__ranks": 4, "parallel__dispatch": "put"},
        {"parallel__ranks": 2, "parallel__context": 2, "moe__shared": "dispatched", "moe__shared_experts": 2},
        {"parallel__ranks": 2, "moe__top_k": 1},  # half the tokens need the other rank: they are exchanged
    ],
)
def test_slots_that_rows_are_put_into_are_counted_to_the_byte(changes: dict[str, Any], tmp_path: Path) -> None:
    tables = small_recipe(**{"moe__top_k": 4, "train__dtype": "float32", "parallel__device": "auto", **changes})
    found = run_ranks(changes["parallel__ranks"], _slots, tables, str(tmp_path))
    recipe = Recipe.model_validate(tables)
    memory = estimate(recipe).memory["colocated"]
    assert found == [memory.slots] * len(found)
    assert memory.total == memory.weights + memory.optimizer + memory.step + memory.slots
    assert bool(memory.slots) == (changes.get("moe__top_k") != 1)
    tables["parallel"]["dispatch"] = "exchanged"
    exchanged = estimate(Recipe.model_validate(tables)).memory["colocated"]
    assert (exchanged.slots, exchanged.step <= memory.step) == (0, True)  # only the tokens that are needed come


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("nsa-8k-small", ["train.accumulate=16"]),
        ("nsa-64k-small", ["parallel.context=1", "train.recompute=4"]),
    ],
)
def test_the_small_recipes_fit_two_gpus_and_one_as_they_say(name: str, alone: list[str]) -> None:
    """Of 80 GB, less what CUDA and buffers take; one GPU does not hold what two do without more settings."""
    for sets in ([], ["parallel.ranks=1", *alone]):
        assert estimate(load_recipe(name, sets)).memory["colocated"].total < 72 * BILLION
    assert (
        estimate(load_recipe(name, ["parallel.ranks=1", "parallel.context=1"])).memory["colocated"].total > 80 * BILLION
    )
