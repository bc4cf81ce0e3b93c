"""Decode steps over pages that Triton writes and reads: the pages that PyTorch leaves, and the same logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton_on_cpu
from test_engine_cache import model_of

triton_on_cpu.prepare()

from shoal.kernels.nsa.paged import PagedCache  # noqa: E402
from shoal.workers.engine.cache import make_caches, reach  # noqa: E402
from shoal.workers.engine.decode import DecodeSteps  # noqa: E402
from shoal.workers.engine.tables import Part  # noqa: E402

pytestmark = pytest.mark.skipif(triton_on_cpu.ON_GPU, reason="float32 in the interpreter; test_gpu_graphs.py has GPUs")
ATTENTION = {"cmp_block": 8, "cmp_stride": 4, "slc_block": 8, "slc_count": 4, "window": 12}
PAGES = 30


def step(backend: str) -> tuple[torch.Tensor, list[PagedCache]]:
    """Logits of three sequences, some of whose compressed rows end, in a step of four rows; and the caches."""
    model = model_of({**ATTENTION}, train__dtype="float32", moe__router="softmax")
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
    steps = DecodeSteps(model, of_layer, (PAGES, PAGES), 4, None, capture=False)
    with torch.inference_mode():
        return steps.logits(parts), caches


def test_pages_and_logits() -> None:
    (want, kept), (got, pages) = step("torch"), step("triton")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for name, before in vars(kept[0]).items():  # of the first layer: others see what attention rounded differently
        assert torch.equal(vars(pages[0])[name][:-1], before[:-1]), name
