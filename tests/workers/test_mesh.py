"""Ranks that wait for one another, and how long."""

from __future__ import annotations

from datetime import timedelta

import torch
from ranks import run_ranks
from small import small_recipe

from shoal.workers import mesh as meshes
from shoal.workers.config import Recipe
from shoal.workers.errors import last_line
from shoal.workers.mesh import make_mesh
from shoal.workers.placement import Placement


def _waits(rank: int, world: int) -> str:
    """What a rank says that is alone in a collective; the others are there, and never come."""
    meshes.COLLECTIVE_TIMEOUT = timedelta(seconds=5)  # in which ranks of a busy machine find one another, too
    mesh = make_mesh(Placement.of(Recipe.model_validate(small_recipe(parallel__ranks=2))), rank)
    if rank == 0:
        try:
            mesh.dispatch.all_reduce(torch.zeros(1))
        except RuntimeError as error:
            return last_line(error)
    return ""


def test_a_rank_gives_up_waiting_for_others() -> None:
    """Long before PyTorch's own limit for gloo, half an hour, or that of the whole process group, 2 minutes here."""
    said, _ = run_ranks(2, _waits)
    assert "Timed out waiting 5000ms" in said


def test_an_error_of_cuda_is_named_and_not_what_pytorch_advises() -> None:
    error = (
        'ray::RankActor.run() (pid=7)\n  File "trainer.py", line 1\n'
        "torch.AcceleratorError: CUDA error: unspecified launch failure\n"
        "Search for `cudaErrorLaunchFailure' in https://docs.nvidia.com/cuda for more information.\n"
        "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
        "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
        "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
    )
    assert last_line(error) == "torch.AcceleratorError: CUDA error: unspecified launch failure"
