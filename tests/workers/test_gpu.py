"""On a GPU: bfloat16 follows float32, float32 follows the CPU, deterministic runs give the same bits; and the paged
caches of serving give the logits of a training forward."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from small import VOCAB, small_corpus, small_recipe
from test_engine_cache import Cached, model_of, whole

from shoal.workers.config import Recipe
from shoal.workers.mesh import make_mesh
from shoal.workers.placement import Placement
from shoal.workers.trainer import Trainer

pytestmark = pytest.mark.gpu
STEPS = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("small"))


def _losses(corpus: Path, device: str, steps: int = STEPS, **changes: Any) -> list[float]:
    recipe = Recipe.model_validate(small_recipe(**changes))
    trainer = Trainer(recipe, corpus, None, make_mesh(Placement.of(recipe)), torch.device(device))
    try:
        return [trainer.train_step()["loss"] for _ in range(steps)] + [trainer.evaluate()["loss"]]
    finally:
        torch.use_deterministic_algorithms(False)


def test_bfloat16_follows_float32(corpus: Path) -> None:
    """bfloat16 rounds to 8 bits: the loss of a step within 1 %, and of 40 steps, which fall by a third, within 3 %."""
    exact, rounded = (_losses(corpus, "cuda", train__dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert rounded[0] == pytest.approx(exact[0], rel=0.01)
    assert rounded == pytest.approx(exact, rel=0.03)
    assert exact[-1] < 0.67 * exact[0]


def test_float32_follows_the_cpu(corpus: Path) -> None:
    """From the same weights: each kind of device draws its own at the start."""
    recipe = Recipe.model_validate(small_recipe(train__dtype="float32"))
    cpu, gpu = (
        Trainer(recipe, corpus, None, make_mesh(Placement.of(recipe)), torch.device(name)) for name in ("cpu", "cuda")
    )
    theirs = cpu.tensors()
    for name, tensor in gpu.tensors().items():
        tensor.copy_(theirs[name])
    for _ in range(3):
        assert gpu.train_step()["loss"] == pytest.approx(cpu.train_step()["loss"], rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_triton_follows_torch(corpus: Path, dtype: str) -> None:
    """The losses of a few steps in which both choose blocks: what differs is rounding."""
    sizes = {"cmp_block": 8, "cmp_stride": 4, "slc_block": 16, "slc_count": 4, "window": 12}
    changes = {f"attention__{key}": value for key, value in sizes.items()} | {
        "model__head_dim": 16,
        "model__value_dim": 16,
        "model__context": 256,
        "train__sequence": 256,
        "parallel__device": "auto",
    }
    mine, theirs = (
        _losses(corpus, "cuda", 10, train__dtype=dtype, attention__backend=backend, **changes)
        for backend in ("triton", "torch")
    )
    assert mine == pytest.approx(theirs, rel=1e-4 if dtype == "float32" else 0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_runs_give_the_same_bits(dtype: str, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    first, second = (_losses(corpus, "cuda", train__dtype=dtype, train__deterministic=True) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("kind", ["nsa", "full"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
@torch.no_grad()
def test_paged_caches_give_the_logits_of_a_training_forward(kind: str, dtype: str, tolerance: float) -> None:
    """In chunks, then token by token, with another sequence beside it. Where rounding swaps an expert or a block for
    an equally good one a position differs by more: hence the median over the positions."""
    attention = {"kind": kind, "cmp_block": 32, "cmp_stride": 16, "slc_block": 64, "slc_count": 4, "window": 100}
    model = model_of(attention, "cuda", train__dtype=dtype, model__context=1024, model__head_dim=64, model__hidden=128)
    rng = random.Random(4)
    texts = [[rng.randrange(VOCAB) for _ in range(n)] for n in (700, 333)]
    cached = Cached(model, texts, rng)
    for first, second in ((500, 100), (150, 200), *[(1, 1)] * 33):
        cached.compute({0: first, 1: second})
    for text, rows in zip(texts, cached.hidden, strict=True):
        got = model.logits(torch.cat(rows)).double()
        want = model.logits(whole(model, text[: len(got)])).double()
        assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).median() < tolerance
