"""Decode steps of few rows, over pages that Triton writes and reads: the pages that PyTorch leaves, the same logits,
the same choices of experts."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import triton_on_cpu
from test_engine_cache import model_of

triton_on_cpu.prepare()

from shoal.kernels.few import MOST  # noqa: E402
from shoal.kernels.nsa.paged import PagedCache  # noqa: E402
from shoal.workers.engine import decode  # noqa: E402
from shoal.workers.engine.cache import make_caches, reach  # noqa: E402
from shoal.workers.engine.decode import DecodeSteps, Rows, RowTables  # noqa: E402
from shoal.workers.engine.few import few_stages  # noqa: E402
from shoal.workers.engine.tables import Part  # noqa: E402
from shoal.workers.model.attention import rotation_rates  # noqa: E402

pytestmark = pytest.mark.skipif(triton_on_cpu.ON_GPU, reason="float32 in the interpreter; test_gpu_graphs.py has GPUs")
ATTENTION = {"cmp_block": 8, "cmp_stride": 4, "slc_block": 8, "slc_count": 4, "window": 12}
PAGES = 30


def step(
    backend: str, whole: bool = False, dtype: str = "float32", **changes: Any
) -> tuple[torch.Tensor, list[PagedCache], torch.Tensor]:
    """Logits of three sequences, some of whose compressed rows end, in a step of four rows; the caches, and how often
    experts were chosen. whole: layers of experts in one piece."""
    model = model_of({**ATTENTION}, train__dtype=dtype, moe__router="softmax", **changes)
    for layer in model.moe_layers:
        layer.whole = whole
    attention = model.recipe.attention.model_copy(update={"backend": backend})
    model.recipe = model.recipe.model_copy(update={"attention": attention})
    caches = make_caches(model.recipe, PAGES + 1, PAGES + 1, model.dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for cache in caches:
        for kept in vars(cache).values():
            kept.normal_(generator=generator)
    parts, page = [], ATTENTION["slc_block"]
    order = np.random.default_rng(2).permutation(PAGES)
    for i, start in enumerate((47, 3, 28)):
        near_start, own = max(0, start - reach(model.recipe)) // page, order[10 * i : 10 * i + start // page + 1]
        parts.append(Part((5 + i,), start, own, PAGES - 1 - own[near_start:], near_start))
    blocks: list[Any] = list(model.layers)
    of_layer = {block.attention: cache for block, cache in zip(blocks, caches, strict=True)}
    counted = torch.zeros(len(model.moe_layers), model.recipe.moe.experts, dtype=torch.int64)
    steps = DecodeSteps(model, of_layer, (PAGES, PAGES), 4, counted, capture=False)
    with torch.inference_mode():
        return steps.logits(parts), caches, counted


UNEVEN: dict[str, Any] = {"moe__shared_experts": 0, "moe__normalize_gates": True, "balance__bias_rate": 0.1}


@pytest.mark.parametrize(
    ("few", "changes"),
    [
        (MOST, {"whole": False}),
        (0, {"whole": True}),
        (MOST, {"whole": True, **UNEVEN}),
        pytest.param(0, {"whole": False}, marks=pytest.mark.slow),
        pytest.param(MOST, {"whole": True}, marks=pytest.mark.slow),
        pytest.param(0, {"whole": True, **UNEVEN}, marks=pytest.mark.slow),
    ],
)
def test_pages_and_logits(few: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With experts that are computed where choices stand, or by the layer that other steps have."""
    monkeypatch.setattr(decode, "FEW", few)
    (want, kept, chosen), (got, pages, counted) = step("torch", **changes | {"whole": False}), step("triton", **changes)
    assert torch.equal(counted, chosen)
    assert chosen.sum() > 0
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for name, before in vars(kept[0]).items():  # of the first layer: others see what attention rounded differently
        torch.testing.assert_close(vars(pages[0])[name][:-1], before[:-1])


def test_the_same_steps_in_other_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows in PyTorch's operations and float64: nothing but the order of sums is another."""
    want, kept, chosen = step("torch", dtype="float64")
    monkeypatch.setattr(decode, "FEW", MOST)
    monkeypatch.setattr(decode, "by_triton", lambda model, caches: True)
    monkeypatch.setattr(decode, "few_stages", partial(few_stages, triton=False))
    for whole in (False, True):
        got, pages, counted = step("torch", whole, "float64")
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        assert torch.equal(counted, chosen)
        for cache, before in zip(pages, kept, strict=True):
            for name, rows in vars(before).items():
                torch.testing.assert_close(vars(cache)[name][:-1], rows[:-1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    "scaling", [{}, {"model__rope_scaling": "yarn", "model__rope_factor": 3.0, "model__rope_original": 32}]
)
def test_tables_in_one_launch(compress: bool, scaling: dict[str, Any]) -> None:
    """Those of PyTorch's operations, to the last bit, of rows at all places of a page."""
    model, page = model_of({**ATTENTION}, **scaling), ATTENTION["slc_block"]
    positions = torch.tensor([0, 3, 6, 7, 8, 31, 47, 62, 63, 0])
    near_start = (positions - reach(model.recipe)).clamp(min=0) // page
    near_start[-1] = 0
    generator = torch.Generator().manual_seed(1)
    far, near = (torch.randint(PAGES, (len(positions), n), generator=generator) for n in (8, 4))
    rows = Rows(positions, positions, positions, near_start, near, far)
    want = RowTables(model, rows, compress, PAGES)
    got = RowTables(model, rows, compress, PAGES, rotation_rates(model.recipe.model, torch.device("cpu")))

    def same(a: Any, b: Any) -> None:
        if isinstance(a, tuple):
            assert len(a) == len(b)
            for pair in zip(a, b, strict=True):
                same(*pair)
        elif isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        else:
            assert a == b

    (_, tables), (_, others) = got.whole[0], want.whole[0]
    same((got.far, got.near, got.rotation), (want.far, want.near, want.rotation))
    same(tuple(getattr(tables, f.name) for f in fields(tables)), tuple(getattr(others, f.name) for f in fields(others)))
    assert (got.compressed is not None) == (want.compressed is not None) == compress
    if got.compressed and want.compressed:
        same(tuple(vars(got.compressed).values()), tuple(vars(want.compressed).values()))
