"""Two GPUs: answers outlive a rank that is killed while the other one waits for it in a CUDA graph, which nothing but
the end of its process gets it out of."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from served import ask, with_engines
from small import VOCAB, small_recipe
from trained import write_weights

from shoal.cluster.engines import Engines
from shoal.cluster.local import ray_session
from shoal.workers.config import Recipe
from shoal.workers.engine.request import Request, Sampling
from shoal.workers.model import Transformer

SIZES = {
    "model__hidden": 128, "model__heads": 8, "model__kv_heads": 2, "model__head_dim": 64, "model__value_dim": 64,
    "model__context": 4096, "moe__expert_hidden": 64, "train__dtype": "bfloat16", "attention__cmp_block": 32,
    "attention__cmp_stride": 16, "attention__slc_block": 64, "attention__window": 100,
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("placement", "victim"), [("colocated", 1), ("1A:1F", 1), ("1A:1F", 0)])
def test_streams_outlive_a_rank_that_is_killed_in_a_graph(placement: str, victim: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    model = Transformer(Recipe.model_validate(small_recipe(**SIZES))).eval()
    write_weights(model, tmp_path / "checkpoints", dtype="bfloat16")
    rng, count = random.Random(3), 300
    requests = [Request(f"r{i}", tuple(rng.randrange(VOCAB) for _ in range(20)), Sampling(count)) for i in range(6)]

    async def work(engines: Engines) -> None:
        killed: list[int] = []

        def kill(tokens: int) -> None:
            if tokens >= 100 and not killed:
                killed.append(pids[victim])
                os.kill(pids[victim], signal.SIGKILL)

        pids = engines.pids()
        asked = [ask(engines, r, kill if r.id == "r4" else lambda tokens: None) for r in requests]
        answers = await asyncio.wait_for(asyncio.gather(*asked), 240)
        assert [len(tokens) for tokens in answers] == [count] * len(requests)
        assert killed and engines.restarts == 1
        assert not set(engines.pids()) & set(pids)

    tables = small_recipe(**SIZES, parallel__ranks=2, parallel__device="cuda", parallel__placement=placement)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
        patch.setenv("NCCL_NVLS_ENABLE", "0")  # NVLink multicast wants rights that containers lack
        with ray_session(4, dashboard=False) as session:
            with_engines(tables, tmp_path / "checkpoints", session, work)
