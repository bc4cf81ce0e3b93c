"""The kernels of a DeepSeekMoE-16B layer one by one, beside what bytes and FLOPs alone would take.

``python -m shoal.jobs.bench.moe_parts [tokens]``: a table on a GPU machine, for whoever works on the kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shoal.jobs.bench.moe_layers import EXPERTS, HIDDEN, INNER, SHARED, TOP_K, Problem, problem
from shoal.kernels.moe import triton_rows
from shoal.kernels.moe.gemms import Gemms, side_by_side
from shoal.kernels.moe.gluon_gemms import GluonGemms
from shoal.kernels.moe.triton_gemms import TritonGemms
from shoal.kernels.moe.triton_route import choose, choose_backward

BYTES, FLOPS = 3.0e12, 790e12
"""Of an H100, a second: memory as measured, and dense bf16 products at the clock that they run at."""

Part = tuple[str, float, float, Callable[[], object]]
"""Name, GB moved, TFLOP, call."""


def main() -> None:
    """Prints the table. A second argument measures only parts whose names have it in them."""
    from triton.testing import do_bench

    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 65536
    p = problem(tokens)
    for name, gigabytes, tflop, call in parts(p):
        if len(sys.argv) > 2 and sys.argv[2] not in name:
            continue
        predicted = max(gigabytes * 1e12 / BYTES, tflop * 1e15 / FLOPS)
        try:
            ms = do_bench(call, warmup=30, rep=100, return_mode="median")
        except Exception as error:  # one part that fails must not hide the others
            print(f"{name:44} {type(error).__name__}: {str(error).splitlines()[:1]}")
            continue
        rate = f"{tflop / ms * 1e3:6.0f} TFLOP/s" if tflop else f"{gigabytes / ms:6.2f} TB/s"
        print(f"{name:44} predicted {predicted:7.3f} ms, measured {ms:7.3f} ms, {rate}", flush=True)


def parts(p: Problem) -> Iterator[Part]:
    """All parts of the layer, forward and backward."""
    x, centroids, gate_up, down = (t.detach() for t in p.inputs[:4])
    tokens, rows = len(x), len(x) * TOP_K
    x_gb, h_gb, f_gb = tokens * HIDDEN * 2e-9, rows * HIDDEN * 2e-9, rows * INNER * 2e-9
    up_tf, down_tf = rows * HIDDEN * INNER * 4e-12, rows * HIDDEN * INNER * 2e-12
    choice = choose(x, centroids, TOP_K)
    row_grads, sum_grads = torch.randn(rows, device="cuda"), torch.randn(EXPERTS, device="cuda")
    yield "router, choice and sort", x_gb, 0, lambda: choose(x, centroids, TOP_K)
    yield "expand", x_gb + h_gb, 0, lambda: triton_rows.expand(x, choice.rows)
    sorted_rows = triton_rows.expand(x, choice.rows)
    hidden, act = TritonGemms(choice.ends).up(sorted_rows, gate_up)
    yield "swiglu", 3 * f_gb, 0, lambda: triton_rows.swiglu(hidden)
    yield "swiglu backward", 6 * f_gb, 0, lambda: triton_rows.swiglu_backward(hidden, act, choice.gates, choice.order)
    yield "combine", h_gb + 2 * x_gb, 0, lambda: triton_rows.combine(sorted_rows, choice.rows, choice.gates, x)
    d_logits = choose_backward(choice, row_grads, sum_grads, x.dtype, score="softmax", normalize=False)
    backward = lambda: choose_backward(choice, row_grads, sum_grads, x.dtype, score="softmax", normalize=False)  # noqa: E731
    yield "router backward", tokens * EXPERTS * 6e-9, 0, backward
    yield "router weight gradient", x_gb, 0, lambda: d_logits.T @ x
    last = lambda: triton_rows.combine(sorted_rows, choice.rows, None, x, d_logits, centroids)  # noqa: E731
    yield "combine of gradients, with the router's", h_gb + 2 * x_gb, 0, last
    tables = (choice.gates, choice.order)
    for kind in (TritonGemms, GluonGemms):
        products = kind(choice.ends)
        yield from _products("routed", products, sorted_rows, gate_up, down, hidden, act, up_tf, down_tf, *tables)
    shared_up, shared_down = side_by_side(p.shared_up.detach()), p.shared_down.detach().flatten(0, 1)
    yield "shared experts' weights side by side", shared_up.nbytes * 2e-9, 0, lambda: side_by_side(p.shared_up.detach())
    wide, wide_act = TritonGemms(None).up(x, shared_up)
    share = SHARED / TOP_K
    sizes = (up_tf * share, down_tf * share)
    for kind in (TritonGemms, GluonGemms):
        yield from _products("shared", kind(None), x, shared_up, shared_down, wide, wide_act, *sizes, None, None)


def _products(
    name: str,
    gemms: Gemms,
    rows: Tensor,
    up: Tensor,
    down: Tensor,
    hidden: Tensor,
    act: Tensor,
    up_tf: float,
    down_tf: float,
    gates: Tensor | None,
    order: Tensor | None,
) -> Iterator[Part]:
    name = f"{name}, {type(gemms).__name__.removesuffix('Gemms')}"
    yield f"{name}: up", 0, up_tf, lambda: gemms.rows_by_weight(rows, up)
    yield f"{name}: up with swiglu", 0, up_tf, lambda: gemms.up(rows, up)
    yield f"{name}: down", 0, down_tf, lambda: gemms.rows_by_weight(act, down)
    yield f"{name}: gradient of act", 0, down_tf, lambda: gemms.rows_by_weight(rows, down.transpose(-1, -2))
    yield (
        f"{name}: gradient of act with swiglu",
        0,
        down_tf,
        lambda: gemms.act_backward(rows, down, hidden, gates, order),
    )
    yield f"{name}: gradient of rows", 0, up_tf, lambda: gemms.rows_by_weight(hidden, up.transpose(-1, -2))
    yield f"{name}: gradient of up", 0, up_tf, lambda: gemms.rows_by_rows(rows, hidden)
    yield f"{name}: gradient of down", 0, down_tf, lambda: gemms.rows_by_rows(act, rows)


if __name__ == "__main__":
    main()
