"""Which variants of its kernels Triton compiles for prompts: those that an engine prepares, whatever comes later."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton_on_cpu
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

triton_on_cpu.prepare()

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402
from triton.runtime.jit import KernelParam, create_function_from_signature  # noqa: E402

from shoal.kernels.moe import triton_fan, triton_rows, triton_sort  # noqa: E402
from shoal.kernels.moe.layer import moe_layer  # noqa: E402
from shoal.kernels.moe.triton_gemms import TritonGemms  # noqa: E402
from shoal.kernels.moe.triton_tiles import tiles_of  # noqa: E402
from shoal.kernels.nsa.layout import BlockSizes  # noqa: E402
from shoal.kernels.nsa.paged import DecodeTables, make_cache  # noqa: E402
from shoal.kernels.nsa.paged_store import Heads, Phi  # noqa: E402
from shoal.kernels.nsa.triton_paged import triton_paged_decode, triton_paged_prefill  # noqa: E402
from shoal.kernels.nsa.triton_store import triton_store_compressed, triton_store_tokens  # noqa: E402
from shoal.workers.config import Recipe  # noqa: E402
from shoal.workers.dispatch import Dispatcher  # noqa: E402
from shoal.workers.engine.cache import reach  # noqa: E402
from shoal.workers.engine.tables import Part, StepTables, over_page_0, sizes_of, warm_parts  # noqa: E402
from shoal.workers.mesh import Group  # noqa: E402
from shoal.workers.transfer import Letters  # noqa: E402

pytestmark = pytest.mark.skipif(triton_on_cpu.ON_GPU, reason="launches are recorded in the interpreter's place")

RECIPE = Recipe.model_validate(
    {
        "model": {
            "vocab": 16, "hidden": 32, "layers": 1, "heads": 8, "kv_heads": 2, "head_dim": 16, "value_dim": 16,
            "context": 4096, "dense_layers": 0, "dense_hidden": 32,
        },
        "attention": {"cmp_block": 8, "cmp_stride": 4, "slc_block": 16, "slc_count": 16, "window": 120},
        "moe": {"experts": 8, "top_k": 3, "shared_experts": 2, "expert_hidden": 16},
        "train": {"steps": 1, "batch": 1, "sequence": 64, "learning_rate": 1e-3},
    }
)  # fmt: skip
STEP, SEQUENCES = 512, 40


class Unread(TritonGemms):
    """Products of the right shape that ask no count."""

    def __init__(self, ends: Tensor | None) -> None:
        self.ends = ends

    def rows_by_weight(self, rows: Tensor, weight: Tensor) -> Tensor:
        return rows.new_empty(len(rows), weight.shape[-1])


Variants = dict[str, set[tuple[Any, ...]]]


@pytest.fixture(scope="module")
def variants() -> Iterator[Variants]:
    """Of each kernel that is launched, how Triton would compile it for Hopper; nothing is computed."""
    found: Variants = defaultdict(set)
    backend, run = CUDABackend(GPUTarget("cuda", 90, 32)), InterpretedFunction.run

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        signature = inspect.signature(kernel.fn)
        options = {k: constants.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion") if k in constants}
        plain, anywhere = (
            kernel.kwargs.get(each) or () for each in ("do_not_specialize", "do_not_specialize_on_alignment")
        )
        params = [KernelParam(i, p, n in plain, n in anywhere) for i, (n, p) in enumerate(signature.parameters.items())]
        _, key, _ = create_function_from_signature(signature, params, backend)(*args, **constants)
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        found[name].add((*map(str, key), *options.items()))

    InterpretedFunction.run = record
    yield found
    InterpretedFunction.run = run


def launch(parts: list[Part]) -> None:
    """The kernels of a layer of a step. (Values are never read: only how large things are.)"""
    m, moe, sizes, dtype = RECIPE.model, RECIPE.moe, sizes_of(RECIPE), torch.bfloat16
    cache = make_cache(1, 1, m.kv_heads, (m.head_dim, m.v_dim), sizes, dtype, torch.device("cpu"))
    t = StepTables(RECIPE, parts, dtype, torch.device("cpu"))
    count = len(t.tokens)
    gates = torch.empty(count, m.heads, 3, dtype=dtype)
    each = ((m.heads, m.head_dim), (3, m.kv_heads, m.head_dim), (3, m.kv_heads, m.v_dim))
    heads = Heads(*(torch.empty(count, *shape, dtype=dtype) for shape in each))
    q = triton_store_tokens(heads, t.rotation, cache, t.far, t.near)
    if t.compressed:
        kv, dim, block = m.kv_heads, m.head_dim, sizes.cmp_block
        weights = (kv, block, dim), (kv, block * dim, 2 * dim), (kv, 2 * dim, dim)
        phi = Phi(*(torch.empty(shape, dtype=dtype) for shape in weights))
        triton_store_compressed(t.compressed, cache, (phi, phi))
    for rows, d in t.whole:
        triton_paged_decode(q[rows], gates[rows], cache, d, sizes, 1.0)
    for rows, p, far, near in t.prefill:
        first = p.near_start * sizes.slc_block
        triton_paged_prefill(q[rows], gates[rows], cache, p.start, far, near, first, sizes, 1.0)
    inner, hidden = moe.expert_hidden, m.hidden
    x, ends = torch.empty(count, hidden, dtype=dtype), torch.zeros(moe.experts, dtype=torch.int32)
    tiles_of(ends, count * moe.top_k, 128)
    shapes = [(8, hidden), (8, hidden, 2 * inner), (8, inner, hidden), (hidden, 4 * inner), (2 * inner, hidden)]
    centroids, up, down, *shared = (torch.empty(shape, dtype=dtype) for shape in shapes)
    moe_layer(x, centroids, up, down, (shared[0], shared[1]), moe.top_k, kind=Unread)


@pytest.fixture(scope="module")
def prepared(variants: Variants) -> Variants:
    for parts in warm_parts(RECIPE, STEP, reach(RECIPE), SEQUENCES):
        launch(parts)
    return {name: set(each) for name, each in variants.items()}


def test_few_variants_are_prepared(prepared: Variants) -> None:
    """A kernel has one for each way in which it is used, those that choose blocks one for each size of a list."""
    assert {name: len(each) for name, each in prepared.items() if len(each) > 1} == {
        "triton_choose._top_kernel": 5,  # lists of up to 16, 32 … 256 blocks
        "triton_paged_choose.choose_kernel": 5,
        "triton_paged_copy._copy_kernel": 2,  # a page's tokens, or the compressed rows that end in it
        "triton_paged_sum._sum_kernel": 3,  # up to 16, 32, 64 partial outputs
        "triton_route._choose_kernel": 2,  # one tile of tokens, which sorts them as well, or more
        "triton_rows._swiglu_kernel": 2,  # routed and shared experts
        "triton_span._span_kernel": 3,  # compressed keys, the window, forced blocks in two spans
    }
    assert len(prepared) > 15


@given(
    start=st.integers(0, 4000),
    count=st.integers(9, STEP),
    singles=st.lists(st.integers(0, 4095), max_size=SEQUENCES - 1),
)
def test_no_prompt_needs_another_variant(
    prepared: Variants, variants: Variants, start: int, count: int, singles: list[int]
) -> None:
    page, back = sizes_of(RECIPE).slc_block, reach(RECIPE)
    count = min(count, RECIPE.model.context - start)
    launch([over_page_0(at, n, page, back, 16) for at, n in (*((s, 1) for s in singles), (start, count))])
    assert {name: each - prepared.get(name, set()) for name, each in variants.items() if each - prepared[name]} == {}


def test_no_length_of_a_sequence_needs_another_choice(variants: Variants) -> None:
    """Up to 2M tokens, of pages of 64, for which lengths are prepared that are powers of two."""
    sizes = BlockSizes(32, 16, 64, 16, 1, 2, 512)
    cache = make_cache(1, 1, 1, (16, 16), sizes, torch.bfloat16, torch.device("cpu"))
    q, at = torch.empty(1, 2, 16, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    found = []
    for lengths in ([1 << i for i in range(16)], [3, 70, 520, 1025, 4097, 5000, 8193, 12287, 12288, 16385, 32767]):
        for pages in lengths:
            tables = DecodeTables(at, at.new_zeros(1, 1, pages), at.new_zeros(1, 1, 9), at, sizes)
            triton_paged_decode(q, q.new_empty(1, 2, 3), cache, tables, sizes, 1.0)
        found.append(set(variants["triton_paged_choose.choose_kernel"]))
    assert len(found[0]) > 5 and found[1] == found[0]


def test_rows_that_come_need_no_other_variant_whatever_their_number(variants: Variants) -> None:
    """Words behind rows begin anywhere, those of no rows at address 0: a rank that compiles holds up all others."""
    tokens, choices, hidden = 37, 7, 64
    ints = lambda *shape: torch.zeros(shape, dtype=torch.int32)  # noqa: E731
    dispatcher = Dispatcher(Group((0, 1), 0), [0, 0, 1, 1], torch.device("cpu"), triton=True)
    before = {name: set(each) for name, each in variants.items()}
    counts = []
    for came in (5, 0, 1, 16):
        x, gates, slots = torch.zeros(tokens, hidden), torch.zeros(tokens, choices), ints(tokens, choices)
        letters = Letters.empty(came, x, 2 * choices)
        travels = triton_fan.plan(slots, gates, dispatcher.ways)
        going = Letters.empty(tokens, x, 2 * choices)
        home = triton_fan.pack(travels, x, gates, dispatcher.ways, going.rows, going.behind).rows
        all_gates, fan, _ = triton_sort.sort(slots, gates, letters.behind, 0, 2, (tokens + came) * choices)
        rows = triton_rows.expand(x, fan.rows, x.new_empty(len(fan.order), hidden), letters.rows)
        triton_rows.combine(rows, fan.rows[tokens:], all_gates[tokens:], some=True, out=letters.rows)
        triton_sort.gates_of_rows(torch.zeros(len(rows)), fan.rows)
        triton_fan.gates_at_home(gates, letters.behind, home, slots, dispatcher.ways)
        new = {name: each - before.get(name, set()) for name, each in variants.items()}
        counts.append({name: len(each) for name, each in new.items() if each})
    assert len(counts[0]) > 6 and counts == counts[:1] * 4
