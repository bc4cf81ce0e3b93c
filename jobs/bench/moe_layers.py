"""What ``shoal bench moe`` compares: layers of one size, and the chain of products that bounds them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.kernels.moe import grouped_ffn, route
from shoal.kernels.moe.backend import experts_backend
from shoal.kernels.moe.gemms import Gemms

HIDDEN, INNER, EXPERTS, TOP_K, SHARED = 2048, 1408, 64, 6, 2
"""One layer of DeepSeekMoE-16B."""


@dataclass(frozen=True)
class Problem:
    """Inputs of one layer, and the gradient of its output. module: what a layer of others keeps between calls."""

    x: Tensor
    centroids: Tensor
    gate_up: Tensor
    down: Tensor
    shared_up: Tensor
    shared_down: Tensor
    grad: Tensor
    memo: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return self.x, self.centroids, self.gate_up, self.down, self.shared_up, self.shared_down


Outcome = tuple[Tensor, tuple[Tensor, ...]]
"""A layer's output, and what gradients are taken of."""

Layer = Callable[[Problem], Outcome]


def problem(tokens: int, skew: float = 0.0, device: str = "cuda") -> Problem:
    """Random bf16 inputs. skew: the share of tokens that choose expert 0 for certain; the others never do."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(std).bfloat16()

    x, centroids = draw(tokens, HIDDEN), draw(EXPERTS, HIDDEN, std=HIDDEN**-0.5)
    if skew:
        x[:, 0] = torch.where(torch.rand(tokens, generator=generator, device=device) < skew, 30.0, -30.0)
        centroids[:, 0] = 0
        centroids[0, 0] = 1
    weights = [
        draw(EXPERTS, HIDDEN, 2 * INNER, std=HIDDEN**-0.5), draw(EXPERTS, INNER, HIDDEN, std=INNER**-0.5),
        draw(SHARED, HIDDEN, 2 * INNER, std=HIDDEN**-0.5), draw(SHARED, INNER, HIDDEN, std=INNER**-0.5),
    ]  # fmt: skip
    inputs = [t.requires_grad_() for t in (x, centroids, *weights)]
    return Problem(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5], draw(tokens, HIDDEN))


def flops(tokens: int, phase: str) -> float:
    """Of the experts' products: 2 a multiplication; the backward pass has two for each of the forward pass."""
    forward = 2.0 * tokens * (TOP_K + SHARED) * HIDDEN * INNER * 3
    return forward if phase == "forward" else 3 * forward


def chain(tokens: int, phase: str) -> Callable[[], None]:
    """Separate cuBLAS products with the layer's FLOPs, one weight each, outputs allocated beforehand."""
    empty = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    products: list[tuple[Tensor, Tensor, Tensor]] = []
    routed = tokens * TOP_K
    for rows, a, b in [
        (routed, HIDDEN, 2 * INNER),
        (routed, INNER, HIDDEN),
        (tokens, HIDDEN, 2 * SHARED * INNER),
        (tokens, SHARED * INNER, HIDDEN),
    ]:
        left, weight, out = empty(rows, a), empty(a, b), empty(rows, b)
        products.append((left, weight, out))
        if phase != "forward":
            products += [(out, weight.T, torch.empty_like(left)), (left.T, out, torch.empty_like(weight))]

    def call() -> None:
        for left, right, out in products:
            torch.mm(left, right, out=out)

    return call


def triton_layer(p: Problem) -> Outcome:
    """Ours, with ``moe.backend = "triton"``."""
    from shoal.kernels.moe.layer import moe_layer

    kind = experts_backend("triton", p.x.device, p.x.dtype)
    shared = (p.shared_up, p.shared_down)
    return moe_layer(p.x, p.centroids, p.gate_up, p.down, shared, TOP_K, kind=kind).out, p.inputs


def torch_layer(p: Problem) -> Outcome:
    """Shoal's torch backend: what a model computes on one rank with ``moe.backend = "torch"``."""
    return _by_products(p, Gemms)


def grouped_gemm_layer(p: Problem) -> Outcome:
    """The same with ``moe.backend = "megablocks"``: MegaBlocks' products alone."""
    return _by_products(p, experts_backend("megablocks", p.x.device, p.x.dtype))


def _by_products(p: Problem, kind: type[Gemms]) -> Outcome:
    routing = route(p.x, p.centroids, TOP_K)
    order = torch.argsort(routing.experts.flatten(), stable=True)
    counts = torch.bincount(routing.experts.flatten(), minlength=EXPERTS)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    results = grouped_ffn(p.x[order // TOP_K], counts, p.gate_up, p.down, kind)[inverse].view(len(p.x), TOP_K, HIDDEN)
    out = torch.bmm(routing.gates.to(results.dtype)[:, None], results)[:, 0]
    for gate_up, down in zip(p.shared_up, p.shared_down, strict=True):
        gate, up = (p.x @ gate_up).chunk(2, dim=-1)
        out = out + (F.silu(gate) * up) @ down
    return out, p.inputs


def _plain(
    x: Tensor, centroids: Tensor, gate_up: Tensor, down: Tensor, shared_up: Tensor, shared_down: Tensor
) -> Tensor:
    """A layer as one writes it in plain PyTorch: autograd, grouped_mm, the shared experts as one network."""
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
    gates, experts = torch.softmax((x @ centroids.T).float(), dim=-1).topk(TOP_K, dim=-1)
    order = torch.argsort(experts.flatten(), stable=True)
    inverse = torch.argsort(order)
    ends = F.one_hot(experts, EXPERTS).sum((0, 1)).cumsum(0).to(torch.int32)
    gate, up = grouped_mm(x[order // TOP_K], gate_up, offs=ends).chunk(2, dim=-1)
    results = grouped_mm(F.silu(gate) * up, down, offs=ends)[inverse].view(len(x), TOP_K, HIDDEN)
    gate, up = (x @ shared_up).chunk(2, dim=-1)
    return (results * gates[..., None].to(x.dtype)).sum(1) + (F.silu(gate) * up) @ shared_down


def compiled_layer(p: Problem) -> Outcome:
    """:func:`_plain` under torch.compile."""
    if "compiled" not in p.memo:
        p.memo["compiled"] = torch.compile(_plain, dynamic=False), (*p.inputs[:4], *_wide(p))
    function, inputs = p.memo["compiled"]
    return function(*inputs), inputs


def _wide(p: Problem) -> tuple[Tensor, Tensor]:
    """The shared experts' weights as those of one network."""
    up = p.shared_up.detach().view(SHARED, HIDDEN, 2, INNER).permute(1, 2, 0, 3).reshape(HIDDEN, -1)
    return up.contiguous().requires_grad_(), p.shared_down.detach().flatten(0, 1).clone().requires_grad_()


def megablocks_layer(p: Problem) -> Outcome:
    """MegaBlocks' dropless layer, grouped, with the shared experts beside it in plain PyTorch (weights of its own)."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    if "megablocks" not in p.memo:
        arguments = Arguments(
            hidden_size=HIDDEN, ffn_hidden_size=INNER, moe_num_experts=EXPERTS, moe_top_k=TOP_K, mlp_type="glu",
            mlp_impl="grouped", activation_fn=F.silu, bias=False, return_bias=False, bf16=True, device="cuda",
        )  # fmt: skip
        p.memo["megablocks"] = dMoE(arguments).cuda().bfloat16(), _wide(p)
    layer, (shared_up, shared_down) = p.memo["megablocks"]
    gate, up = (p.x @ shared_up).chunk(2, dim=-1)
    out = layer(p.x[:, None])
    out = (out[0] if isinstance(out, tuple) else out)[:, 0] + (F.silu(gate) * up) @ shared_down
    return out, (p.x, shared_up, shared_down, *layer.parameters())


OURS = ("triton", "torch", "triton, skewed")
LAYERS: dict[str, Layer] = {
    "triton": triton_layer,
    "torch": torch_layer,
    "torch.compile": compiled_layer,
    "megablocks": megablocks_layer,
    "megablocks, its products in Shoal": grouped_gemm_layer,
}


def both(layer: Layer, p: Problem) -> tuple[Tensor, ...]:
    """Forward and backward: all gradients."""
    out, inputs = layer(p)
    return torch.autograd.grad(out, inputs, p.grad)


def kept(layer: Layer, p: Problem) -> float:
    """MiB allocated after the forward pass minus before, without the output, the inputs and the weights."""
    both(layer, p)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = layer(p)[0]
    torch.cuda.synchronize()
    return (torch.cuda.memory_allocated() - before - out.nbytes) / 2**20


def first_call(cache: str) -> float:
    """Seconds from the first call, forward and backward at 16,384 tokens, to its result, with caches there."""
    os.environ["TRITON_CACHE_DIR"] = cache
    p = problem(16384)
    torch.mm(p.x, p.x.T[:, :64])
    torch.cuda.synchronize()
    start = time.perf_counter()
    both(triton_layer, p)
    torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    print(first_call(sys.argv[1]))
