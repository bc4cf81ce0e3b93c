"""Two GPUs: dense weights in shards train as whole ones do, over NCCL and in bf16, and leave memory free.

Needs no Ray: ``pytest tests/workers/test_gpu_shards.py`` on a machine with two GPUs.
"""

from __future__ import annotations

import gc
import pickle
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small import small_corpus, small_recipe

from shoal.workers.config import Recipe
from shoal.workers.mesh import make_mesh
from shoal.workers.placement import Placement
from shoal.workers.trainer import Trainer

SIZES: dict[str, Any] = {
    "model__layers": 6, "model__dense_layers": 3, "model__hidden": 256, "model__dense_hidden": 16384,
    "model__head_dim": 64, "model__value_dim": 64, "train__dtype": "bfloat16", "train__accumulate": 2,
    "train__recompute": 2, "parallel__ranks": 2, "parallel__device": "auto",
}  # fmt: skip


def _allocated(device: str) -> int:
    """Bytes of what is still used: a trainer that was let go of has circles of references."""
    gc.collect()
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def on_rank(rank: int, port: int, folder: str, corpus: Path, device: str) -> None:
    """Leaves, for whole weights and for shards, losses of 6 steps, the last two of them resumed, and bytes held."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=120))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=2)
    results = {}
    for sharded in (False, True):
        recipe = Recipe.model_validate(small_recipe(parallel__shard_dense=sharded, **SIZES))
        mesh = make_mesh(Placement.of(recipe), rank, device)

        def trainer(recipe: Recipe = recipe, mesh: Any = mesh, name: str = f"sharded-{sharded}") -> Trainer:
            return Trainer(recipe, corpus, Path(folder) / name, mesh, torch.device(device))

        before = _allocated(device)
        first = trainer()
        losses = [first.train_step()["loss"] for _ in range(4)] + [first.evaluate()["loss"]]
        held = _allocated(device) - before
        first.save()
        first.settle()
        del first
        again = trainer()
        again.restore(4)
        losses += [again.train_step()["loss"] for _ in range(2)]
        del again
        results[sharded] = losses, held
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.gpu
def test_two_gpus_train_shards_as_whole_weights(tmp_path: Path) -> None:
    """Losses within 1 %: gradients are the same but for atomic additions. Of a dense weight a rank holds 6 bytes, half
    of its master and moments, where it held the weight too, 8 bytes; libraries keep some memory beside that."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=120), wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (store.port, folder, small_corpus(tmp_path), "cuda")
        mp.start_processes(on_rank, arguments, nprocs=2, start_method="spawn")
        results = [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(2)]
    for result in results:
        (whole, before), (parts, after) = result[False], result[True]
        assert parts == pytest.approx(whole, rel=0.01)
        assert after < 0.9 * before
