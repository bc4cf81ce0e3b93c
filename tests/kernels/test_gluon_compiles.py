"""Kernels compile for Hopper and fit its shared memory, and ptxas lets the products of Gluon ones overlap; those that
write to pages round each product as PyTorch does, and those that begin ahead wait inside; without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shoal.kernels.nsa import BlockSizes

SHARED_MEMORY = 227 * 1024
KERNELS = {"_span_kernel": (2, 1), "_grad_kernel": (3, 1), "_gather_grad_kernel": (2, 0), "_importance_kernel": (2, 0)}
KERNELS |= {"_gemm_kernel": (5, 0), "_outer_kernel": (1, 0), "_mean_kernel": (2, 1), "_mean_grad_kernel": (2, 1)}
KERNELS |= {"_chunks_kernel": (2, 1), "_swap_kernel": (4, 2), "_hidden_kernel": (2, 1), "_hidden_grad_kernel": (2, 1)}
KERNELS |= {"_position_grad_kernel": (2, 1), "_key_grad_kernel": (2, 1)}
KERNELS |= {"_plan_kernel": (3, 3), "_before_kernel": (3, 3), "_pack_kernel": (1, 1), "_count_kernel": (1, 1)}
KERNELS |= {"_place_kernel": (2, 1), "_gates_kernel": (1, 1), "_home_kernel": (1, 1), "_expand_kernel": (2, 2)}
KERNELS |= {"_combine_kernel": (5, 5)}
KERNELS |= {"_address_kernel": (1, 1), "_choose_kernel": (2, 0), "_choose_backward_kernel": (4, 0)}
KERNELS |= {"_products_kernel": (2, 2), "_choices_kernel": (1, 1), "_add_norm_kernel": (1, 1)}
KERNELS |= {"_up_kernel": (1, 1), "_down_kernel": (1, 1), "_places_kernel": (2, 2), "compressed_rows_kernel": (2, 2)}
KERNELS |= {"choose_kernel": (2, 2), "pages_kernel": (2, 2), "_sum_kernel": (2, 2)}
KERNELS |= {"_parts_kernel": (3, 0), "_sum_parts_kernel": (3, 0), "_pieces_kernel": (2, 2), "_read_kernel": (2, 1)}
"""Of each kernel, how often it is launched in what users run, and in more shapes and types."""
AHEAD = {"compressed_rows_kernel", "choose_kernel", "pages_kernel", "_sum_kernel"}
AHEAD |= {"_parts_kernel", "_sum_parts_kernel", "_tokens_kernel"}
"""Those whose launches begin before the one before has ended."""
ROUNDING = {"_tokens_kernel": (2, 0), "_blocks_kernel": (1, 0), "_compressed_kernel": (1, 0), "_rotate_kernel": (4, 0)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them")
@pytest.mark.parametrize("more", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_kernel(tmp_path: Path, more: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("hopper_compiler.py")
    command = [sys.executable, str(script), *(["more"] if more else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    told = [line.split() for line in done.stdout.splitlines()]
    for name, counts in (KERNELS | ROUNDING).items():
        mine = [(int(shared), products) for kernel, shared, products, *_ in told if kernel == name]
        assert len(mine) == counts[more], (name, told)
        assert all(shared <= SHARED_MEMORY and products == "overlapped" for shared, products in mine), (name, mine)
        waits = ["ahead", "wait+launch_dependents"] if name in AHEAD else ["behind", "nothing"]
        assert all(line[4:] == waits for line in told if line[0] == name), (name, told)
    assert all(fused == "rounded" for kernel, _, _, fused, *_ in told if kernel in ROUNDING), told


def test_which_heads_each_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """96 and 192 dimensions can be left to Triton, to measure Gluon beside it."""
    gluon_span = pytest.importorskip("shoal.kernels.nsa.gluon_span")
    gluon_span_grad = pytest.importorskip("shoal.kernels.nsa.gluon_span_grad")
    gluon_gather_grad = pytest.importorskip("shoal.kernels.nsa.gluon_gather_grad")
    gluon_importance = pytest.importorskip("shoal.kernels.nsa.gluon_importance")
    sizes = BlockSizes(32, 16, 64, 16, 1, 2, 512)
    for module in (gluon_span, gluon_span_grad, gluon_importance):
        monkeypatch.setattr(module, "on_hopper", lambda x: True)
    for dim in (64, 96, 128, 192):
        q, k, v = (torch.zeros(8, heads, size, dtype=torch.bfloat16) for heads, size in ((32, dim), (2, dim), (2, 128)))
        for wide in (True, False):
            narrow = (64, 128, *((96, 192) if wide else ()))
            assert gluon_span.supported(q, k, v, wide=wide) == (dim in narrow)
            assert gluon_importance.supported(q, k, sizes, wide=wide) == (dim in narrow and dim != 96)
            assert gluon_span_grad.supported(q, v, wide=wide) == (dim in narrow[1:] and dim != 96)
            assert gluon_gather_grad.supported(q, v, 64, wide=wide) == (dim in narrow[1:] and dim != 96)


@pytest.mark.parametrize(("group", "count", "taken"), [(8, 3, False), (8, 4, True), (16, 2, True), (64, 1, True)])
def test_importance_wants_a_choice_as_long_as_its_tiles(
    monkeypatch: pytest.MonkeyPatch, group: int, count: int, taken: bool
) -> None:
    """A tile of 256 rows scores one document; queries of the next one must not have to choose yet."""
    gluon_importance = pytest.importorskip("shoal.kernels.nsa.gluon_importance")
    monkeypatch.setattr(gluon_importance, "on_hopper", lambda x: True)
    q, k = (torch.zeros(64, heads, 64, dtype=torch.bfloat16) for heads in (group, 1))
    assert gluon_importance.supported(q, k, BlockSizes(8, 8, 8, count, 0, 1, 16)) == taken
