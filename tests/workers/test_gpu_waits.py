"""On a GPU, the host waits in a training step where the step's numbers are read, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_corpus, small_recipe
from torch import Tensor

from shoal.workers.config import Recipe
from shoal.workers.mesh import make_mesh
from shoal.workers.placement import Placement
from shoal.workers.trainer import Trainer

pytestmark = pytest.mark.gpu
READS = {"Trainer._totals", "StepWatch.totals"}
"""Who may read from the GPU in a step: loss and norm, which the update needs, and what is recorded at some steps."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("small"))


@contextmanager
def waits_are_errors(reads: set[str]) -> Iterator[None]:
    """Within it an operation for which the host waits is an error, but for lists made of a GPU's tensors: who makes
    them is added to ``reads``."""
    to_list = torch.Tensor.tolist

    def read(tensor: Tensor) -> Any:
        if not tensor.is_cuda:
            return to_list(tensor)
        code = sys._getframe(1).f_code
        reads.add(getattr(code, "co_qualname", code.co_name))
        torch.cuda.set_sync_debug_mode("default")
        try:
            return to_list(tensor)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", read)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


SIZES = {"attention__cmp_block": 8, "attention__cmp_stride": 4, "attention__slc_block": 16}
CASES: dict[str, dict[str, Any]] = {
    "nsa": {},
    "nsa, layers computed again, micro-batches, all losses": {
        "train__recompute": 2,
        "train__accumulate": 2,
        "balance__sequence": 0.01,
        "balance__z_loss": 0.001,
        "balance__bias_rate": 0.001,
        "balance__over": "global_batch",
    },
    "full attention": {"attention__kind": "full"},
    "dispatched shared experts": {"moe__shared": "dispatched"},
}


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_its_numbers_alone(corpus: Path, case: str) -> None:
    """Of NSA and experts in bfloat16, on one GPU, from the batch to the update of the weights; each step has a new
    pack of documents. The first steps, which compile and allocate, may wait."""
    changes = {
        "model__head_dim": 16,
        "model__value_dim": 16,
        "model__context": 256,
        "train__sequence": 256,
        "train__batch": 32,  # so many tokens that the embedding's gradient is made by a sort
        "train__dtype": "bfloat16",
        "parallel__device": "auto",
        **SIZES,
        **CASES[case],
    }
    recipe = Recipe.model_validate(small_recipe(**changes))
    trainer = Trainer(recipe, corpus, None, make_mesh(Placement.of(recipe)), torch.device("cuda"))
    for _ in range(3):
        trainer.train_step()
    reads: set[str] = set()
    with waits_are_errors(reads):
        records = [trainer.train_step() for _ in range(3)]
    assert all(record["loss"] > 0 for record in records)
    assert "Trainer._totals" in reads
    assert reads <= READS


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_waits_are_seen() -> None:
    """That this way of looking sees a host that waits, in a backward pass too."""

    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * grads[0].sum().item()

    x = torch.ones(4, device="cuda", requires_grad=True)
    out = Waits.apply(x).sum()
    with waits_are_errors(set()):
        with pytest.raises(RuntimeError, match="synchronizing"):
            x.sum().item()
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.arange(3).to("cuda")
        with pytest.raises(RuntimeError, match="synchronizing"):
            out.backward()
