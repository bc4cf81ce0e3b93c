"""Compiles the Gluon kernels, those of dispatch, of few rows, and those that read and write pages, for Hopper on a
machine without a GPU, with the ptxas that Triton brings along.

``python hopper_compiler.py`` calls what the package calls, with tensors of the CPU; launches compile and go no further.
It compiles every kernel; ``python hopper_compiler.py more`` the same ones for other shapes and types.
Prints a line for each kernel: its name, bytes of shared memory, whether ptxas had to serialize matrix products, whether
a product and a sum became one operation, whether its launch may begin before the one before has ended, and whether it
waits for that one and lets the next begin.
A program of its own, since Triton must not have been told to interpret.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from io import StringIO
from itertools import accumulate
from typing import Any

import torch
import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction

from shoal.kernels import hopper, launches
from shoal.kernels.nsa import BlockSizes

HOPPER = GPUTarget("cuda", 90, 32)
COMPILED = ("triton_address", "triton_fan", "triton_sort", "triton_rows", "triton_store", "triton_rope", "triton_few",
            "triton_places", "triton_paged", "triton_paged_choose", "triton_paged_parts", "triton_paged_sum",
            "triton_mean", "triton_phi", "triton_phi_grad", "triton_read", "triton_route", "triton_tiles",
            "triton_pieces")  # fmt: skip
"""Modules of Triton kernels that are compiled as well."""
PAPER = BlockSizes(32, 16, 64, 16, 1, 2, 512)
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "launch_pdl")


def compile_for_hopper(kernel: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
    """In the place of ``JITFunction.run``: compiles a kernel for these arguments."""
    gluon = isinstance(kernel, GluonJITFunction)
    if not gluon and kernel.__module__.rpartition(".")[2] not in COMPILED:
        return
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    options = {name: given.pop(name) for name in OPTIONS if name in given}
    signature, constants, attributes = {}, {}, {}
    for index, param in enumerate(kernel.params):
        value = given[param.name]
        kind, key = "constexpr", None
        if not param.is_constexpr:
            specialize = not param.do_not_specialize
            kind, key = native_specialize_impl(CUDABackend, value, param.is_const, specialize, specialize)
        signature[param.name] = kind
        if kind == "constexpr":
            constants[index,] = value
        elif isinstance(key, str) and "D" in key:
            attributes[index,] = CUDABackend.parse_attr(key)
    source = (GluonASTSource if gluon else ASTSource)(kernel, signature, constants, attributes)
    with redirect_stdout(StringIO()) as told:
        compiled = triton.compile(source, target=HOPPER, options=options)
    words = told.getvalue()
    assert kernel.__name__ in words, "nothing was heard of ptxas"
    slow = any(code in words for code in ("C7510", "C7512", "C7514"))
    ptx, products = compiled.asm["ptx"], "serialized" if slow else "overlapped"
    fused = "fused" if "fma." in ptx else "rounded"
    launched = "ahead" if options.get("launch_pdl") else "behind"
    waits = "+".join(name for name in ("wait", "launch_dependents") if f"griddepcontrol.{name}" in ptx) or "nothing"
    print(kernel.__name__, compiled.metadata.shared, products, fused, launched, waits, flush=True)


def attention(kv: int, group: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    """Forward and backward, all branches, of two documents."""
    from shoal.kernels.nsa import make_layout
    from shoal.kernels.nsa.gluon_gather_grad import block_parts
    from shoal.kernels.nsa.gluon_importance import block_scores
    from shoal.kernels.nsa.gluon_span import gluon_span_attention
    from shoal.kernels.nsa.gluon_span_grad import gluon_span_backward
    from shoal.kernels.nsa.triton_inverse import Inverse
    from shoal.kernels.nsa.triton_mean import triton_compress_mean
    from shoal.kernels.nsa.triton_phi_grad import triton_compress
    from shoal.kernels.nsa.triton_read import pages_read
    from shoal.kernels.nsa.triton_span_grad import Grads
    from shoal.kernels.nsa.triton_tables import make_tables

    tokens, heads, choices = 256, kv * group, 16
    layout = make_layout(tuple(accumulate([100, 156], initial=0)), BlockSizes(32, 16, 64, choices, 1, 2, 128), "cpu")
    tables = make_tables(layout)
    q, d_out = (torch.zeros(tokens, heads, dim, dtype=dtype) for dim in dims)
    k, v = (torch.zeros(tokens, kv, dim, dtype=dtype) for dim in dims)
    base = torch.zeros(tokens, heads)
    grads = Grads(*(torch.zeros(x.shape) for x in (q, k, v)))
    triton_compress_mean(k.clone().requires_grad_(), layout).sum().backward()
    shapes = (32, dims[0]), (32 * dims[0], 2 * dims[0]), (2 * dims[0], dims[0])
    position, w1, w2 = (k.new_zeros(kv, *shape).requires_grad_() for shape in shapes)
    triton_compress(k.clone().requires_grad_(), position, w1, w2, layout).sum().backward()
    pages_read(torch.zeros(tokens, kv, choices, dtype=torch.int32), tables)
    gluon_span_attention(q, k, v, tables.window, 0.1)
    gluon_span_backward(q, k, v, d_out, base, base, tables.window, tables.window_seen, 0.1, grads)
    if group >= 16:
        block_scores(q, k, base, tables, 0.1, torch.zeros(2, kv, tokens, 4), 0, tokens)
        numbers = torch.zeros(kv + 1, dtype=torch.int32)
        inverse = Inverse(tokens, 1, 64, numbers, numbers.new_zeros(1, 64), numbers)
        part = q.new_zeros(tokens, choices, heads, dims[0])
        block_parts(
            q, k, v, d_out, base, base, part, inverse, numbers[1:].view(kv, 1), numbers[:1], tables, 0.1, grads, 0
        )


def experts() -> None:
    """The products of a layer: up with SwiGLU, down, and their gradients."""
    from shoal.kernels.moe.gluon_gemms import GluonGemms

    rows, hidden, inner, count = 512, 256, 192, 4
    products = GluonGemms(torch.full((count,), rows, dtype=torch.int32))
    x = torch.zeros(rows, hidden, dtype=torch.bfloat16)
    gate_up, down = x.new_zeros(count, hidden, 2 * inner), x.new_zeros(count, inner, hidden)
    hidden_rows, act = products.up(x, gate_up)
    products.rows_by_weight(act, down)
    products.act_backward(x, down, hidden_rows, torch.ones(rows), torch.arange(rows, dtype=torch.int32))
    products.rows_by_rows(x, hidden_rows)
    together = x.new_zeros(2, hidden, 256)
    hidden_rows, _ = GluonGemms(None).up(x, together)
    GluonGemms(None).up_backward(hidden_rows, together)


def routing(tokens: int) -> None:
    """Choices, sorted or not, and their gradients, those of the balance sums among them or not."""
    from shoal.kernels.moe.triton_route import choose, choose_backward

    x, centroids = torch.zeros(tokens, 256, dtype=torch.bfloat16), torch.zeros(64, 256, dtype=torch.bfloat16)
    for sort in (True, False):
        choice = choose(x, centroids, 6, sort=sort)
        for sums in (torch.zeros(64), None):
            choose_backward(choice, torch.zeros(tokens * 6), sums, x.dtype, score="softmax", normalize=False)


def writing_pages(kv: int, group: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    """What tokens and compressed rows write to the paged cache; RoPE."""
    from shoal.kernels.nsa.paged import make_cache
    from shoal.kernels.nsa.paged_store import Compressed, Heads, Phi
    from shoal.kernels.nsa.triton_phi import triton_compress_few
    from shoal.kernels.nsa.triton_store import triton_store_compressed, triton_store_tokens
    from shoal.kernels.triton_rope import triton_rotate

    cache = make_cache(1, 1, kv, dims, PAPER, dtype, torch.device("cpu"))
    x, angles = torch.zeros(3, dtype=dtype), torch.zeros(3, dims[0] // 2)
    numbers = torch.zeros(3, 32, dtype=torch.int64)
    heads = Heads(x.new_zeros(3, kv * group, dims[0]), *(x.new_zeros(3, 3, kv, dim) for dim in dims))
    triton_store_tokens(heads, (angles, angles), cache, numbers[:, :kv].clone(), numbers[:, :kv].clone())
    phi = [Phi(*(x.new_zeros(kv, *shape) for shape in ((32, dim), (32 * dim, 8), (8, dim)))) for dim in dims]
    new = Compressed(numbers[:, :kv].clone(), numbers, numbers, (angles, angles))
    triton_store_compressed(new, cache, (phi[0], phi[1]))
    phi = [Phi(*(x.new_zeros(kv, *shape) for shape in ((32, d), (32 * d, 2 * d), (2 * d, d)))) for d in dims]
    for most in (16, 32) if dtype.itemsize == 2 else ():
        triton_compress_few(new, cache, (phi[0], phi[1]), most)
    triton_rotate(heads.q.requires_grad_(), angles, angles).sum().backward()


def reading_pages(kv: int, group: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    """Where a step's rows lie, and what reads the paged cache."""
    from shoal.kernels.nsa.paged import DecodeTables, make_cache
    from shoal.kernels.nsa.triton_paged import triton_paged_decode
    from shoal.kernels.nsa.triton_places import triton_row_places

    cache = make_cache(1, 1, kv, dims, PAPER, dtype, torch.device("cpu"))
    queries, numbers = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 32, dtype=torch.int64)
    q, gates = (torch.zeros(3, kv * group, size, dtype=dtype) for size in (dims[0], 3))
    for room in (1, 1024):
        far = queries.new_zeros(3, kv, room)
        tables = DecodeTables(queries, far, far[:, :, :1].expand(-1, -1, 9).contiguous(), queries, PAPER)
        triton_paged_decode(q, gates, cache, tables, PAPER, 0.1)
    for scratch in (None, 0):
        arrays = numbers[:, 0].clone(), numbers[:, 1].clone(), numbers, numbers
        triton_row_places(*arrays, torch.zeros(dims[0] // 2 + 1).double(), kv, PAPER, torch.float32, scratch)


def dispatch(world: int, experts: int, copies: int, tokens: int) -> None:
    """What plans and sorts rows that travel. copies: of each expert, on ranks that follow one another."""
    from shoal.kernels.moe.fan import expand
    from shoal.kernels.moe.plan import Ways, address, gates_at_home, gates_of_rows, pack, plan, sort

    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    slots, choices = experts * copies, 6
    own = ints(experts) if copies > 1 else None
    ways = Ways(ints(slots), own, ints(slots), ints(slots), ints(world - 1), ints(world), 0)
    x, gates, chosen = (
        torch.zeros(tokens, 256, dtype=torch.bfloat16),
        torch.zeros(tokens, choices),
        ints(tokens, choices),
    )
    words = ints(tokens, 128 + 2 * choices)[:, 128:]
    planned = plan(chosen, gates, ways, True)
    plan(chosen, gates, ways, True, tokens)
    plan(chosen, gates, replace(ways, in_order=True), True, tokens, ints(slots))
    address(x, gates, chosen, torch.zeros(tokens, dtype=torch.int64), ways, True, x, words)
    fan = pack(planned, x, gates, ways, True, x, words)
    _, sorted_rows, _ = sort(chosen, gates, words, 0, slots // world, tokens, True)
    expand([x, x], sorted_rows, True)
    gates_of_rows(gates.flatten(), sorted_rows.rows, True)
    gates_at_home(gates, words[:, choices:], fan.rows, chosen, ways, True)


def sums(experts: int, hidden: int, dtype: torch.dtype) -> None:
    """Of each token's results: of a layer in one piece, of rows for other ranks, and with those that came home."""
    from shoal.kernels.moe import fan, triton_rows

    tokens, choices = 64, 6
    rows, home = (torch.zeros(tokens, count, dtype=torch.int32) for count in (choices, 3))
    results, gates = torch.zeros(tokens * choices, hidden, dtype=dtype), torch.zeros(tokens, choices)
    base, logits, centroids = (
        results.new_zeros(shape) for shape in ((tokens, hidden), (tokens, experts), (experts, hidden))
    )
    triton_rows.combine(results, rows, gates, base)
    triton_rows.combine(results, rows, None, base, logits, centroids)
    fan.combine(results, rows, True, gates)
    fan.combine(results, rows, True, gates, base, None, base, (results, home))
    fan.combine(results, rows, True, None, base, (logits, centroids), base, (results, home))


def exchange(kv: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    """Rows of keys and values into letters, and sums of what came."""
    from shoal.kernels.pieces import Pieces, columns, letters
    from shoal.kernels.triton_pieces import put_together

    own = [torch.zeros(64, kv, dim, dtype=dtype) for dim in dims]
    came = letters(own, 64)
    for out in (columns(came, own), own):
        put_together(Pieces(64, [(slice(0, 64), slice(0, 64), False)] * 2), own, columns(came, own), out)


def few(tokens: int, hidden: int, inner: int, dtype: torch.dtype, **how: Any) -> None:
    """A decode step of few rows: projections, sums that are normed, routing, experts."""
    from shoal.kernels.few import add_norm, few_parts, few_products
    from shoal.kernels.moe.few import few_choices, few_experts
    from shoal.kernels.moe.router import Router

    x, weight = torch.zeros(tokens, hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype)
    few_products(x, [x.new_zeros(n, hidden) for n in (512, 96, 96, 64)], True)
    parts = few_parts(x, x.new_zeros(hidden, hidden), True)
    live = torch.ones(tokens, dtype=torch.int64)
    chosen = few_choices(x, parts, weight, 1e-6, live, Router(x.new_zeros(64, hidden), 6, **how), True)
    shapes = [(64, hidden, 2 * inner), (64, inner, hidden), (2, hidden, 2 * inner), (2, inner, hidden)]
    gate_up, down, *shared = (x.new_zeros(shape) for shape in shapes)
    results = few_experts(x, chosen.experts, gate_up, down, (shared[0], shared[1]), True)
    add_norm(x, results, weight, 1e-6, True, chosen.gates)


def main() -> None:
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True  # what is cached has no log
    JITFunction.run = compile_for_hopper  # type: ignore[method-assign]
    hopper.on_hopper = lambda x: True
    hopper.multiprocessors = lambda device: 132  # type: ignore[assignment]
    launches.current_device = lambda: 0
    torch.cuda.device = lambda device: nullcontext()  # type: ignore
    if sys.argv[1:] == ["more"]:
        attention(1, 4, (128, 64), torch.float16)
        reading_pages(3, 5, (24, 40), torch.float32)
        dispatch(32, 256, 2, 512)
        sums(1000, 72, torch.float32)
        exchange(3, (24, 40), torch.float32)
        few(7, 200, 72, torch.float16, normalize=True, bias=torch.zeros(64), groups=8, most=3, score="sigmoid")
        return
    attention(2, 16, (128, 128), torch.bfloat16)
    attention(2, 16, (192, 128), torch.bfloat16)
    experts()
    routing(64)
    writing_pages(4, 16, (192, 128), torch.bfloat16)
    writing_pages(3, 5, (24, 40), torch.float32)  # takes kernels of its own
    reading_pages(4, 16, (192, 128), torch.bfloat16)
    dispatch(2, 64, 1, 16384)
    sums(64, 2048, torch.bfloat16)
    exchange(4, (192, 128), torch.bfloat16)
    few(1, 2048, 1408, torch.bfloat16)


if __name__ == "__main__":
    main()
