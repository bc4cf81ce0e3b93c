"""NSA on one GPU: forward and backward pass beside PyTorch's dense attention, and the parts of both; decode; groups.

Part ``passes`` has the contexts, ``wide`` the paper's own heads, ``decode`` is ``nsa_decode.py``, ``groups`` is
``nsa_groups.py``. Everything from q, k_cmp, v_cmp, k, v and gates to the output is in a figure of a pass, and back to
their gradients. What makes k_cmp and v_cmp of keys and values, φ or the mean of a block, stands in rows of its own, and
is in the figures that say so. Dense attention gets as many KV heads as query heads: its kernels take about as long with
fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shoal.jobs.bench.registry import Settings, wants_gpu
from shoal.jobs.bench.result import Document, Row, time_row
from shoal.jobs.bench.turns import Call, medians
from shoal.kernels.nsa import BlockSizes, Layout, compress, compress_mean, make_layout, nsa_attention

if TYPE_CHECKING:
    from shoal.kernels.nsa.attention import Backend
    from shoal.kernels.nsa.triton_backward import BackwardTuning
    from shoal.kernels.nsa.triton_forward import ForwardTuning

SIZES = BlockSizes(cmp_block=32, cmp_stride=16, slc_block=64, slc_count=16, slc_initial=1, slc_local=2, window=512)
HEADS, KV_HEADS = 64, 4
CONTEXTS = (8192, 16384, 32768, 65536)
# (context, phase) -> the least ratio that is asked for, over FlashAttention-2 and over cuDNN
TARGETS = {
    (8192, "forward"): (2.1, 1.1),
    (16384, "forward"): (3.8, 2.0),
    (32768, "forward"): (6.3, 3.4),
    (65536, "forward"): (9.0, 4.8),
    (8192, "backward"): (2.0, 1.1),
    (16384, "backward"): (3.6, 2.0),
    (32768, "backward"): (6.5, 4.0),
    (65536, "backward"): (10.0, 6.0),
}
WIDE_TARGETS = {"forward": 4.5, "backward": 6.0}
DENSE = {"sdpa_flash": "FLASH_ATTENTION", "sdpa_cudnn": "CUDNN_ATTENTION"}  # baselines, and their names in SDPBackend
WHOLE = "NSA, whole"
COMPRESSIONS = ("block means", "φ")
WITH_PHI = f"{WHOLE}, with {COMPRESSIONS[1]}"


@dataclass(frozen=True)
class Problem:
    """One batch: random tensors of ``nsa_attention``, the gradient of its output, and what dense attention takes."""

    context: int
    dims: tuple[int, int]
    layout: Layout
    inputs: tuple[Tensor, ...]
    d_out: Tensor

    @classmethod
    def draw(cls, context: int, dims: tuple[int, int], heads: int = HEADS, device: str = "cuda") -> Problem:
        layout = make_layout((0, context), SIZES, device)
        rows = {"q": context, "cmp": layout.cmp_starts.numel(), "slc": context, "win": context}

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16)

        keys = [normal(rows[branch], KV_HEADS, dim) for branch in ("cmp", "slc", "win") for dim in dims]
        inputs = (normal(context, heads, dims[0]), *keys, normal(context, heads, 3).sigmoid())
        return cls(context, dims, layout, inputs, normal(context, heads, dims[1]))

    @property
    def heads(self) -> int:
        return self.inputs[0].shape[1]

    @property
    def scale(self) -> float:
        return float(self.dims[0] ** -0.5)

    def compressing(
        self, how: str, dim: int, backend: Backend = "auto"
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """What compresses keys or values of ``dim`` (one of ``COMPRESSIONS``), and what it takes, drawn: them first."""

        def leaf(*shape: int, size: float = 1.0) -> Tensor:
            x = torch.randn(*shape, device=self.d_out.device, dtype=self.d_out.dtype)
            return (size * x).requires_grad_()

        x, width = leaf(self.context, KV_HEADS, dim), SIZES.cmp_block * dim
        if how == "block means":
            return partial(compress_mean, layout=self.layout, backend=backend), (x,)
        w1 = leaf(KV_HEADS, width, 2 * dim, size=width**-0.5)
        w2 = leaf(KV_HEADS, 2 * dim, dim, size=(2 * dim) ** -0.5)
        return partial(compress, layout=self.layout, backend=backend), (x, leaf(KV_HEADS, SIZES.cmp_block, dim), w1, w2)

    @property
    def facts(self) -> dict[str, Any]:
        d_qk, d_v = self.dims
        heads = {"heads": self.heads, "kv_heads": KV_HEADS, "group": self.heads // KV_HEADS}
        return {"context": self.context, **heads, "d_qk": d_qk, "d_v": d_v, "batch": 1}


def run(settings: Settings) -> Iterator[Row]:
    """Rows of the parts that are asked for, as they are measured. Raises InvalidInput without a GPU."""
    from shoal.jobs.bench import nsa_decode, nsa_groups

    wants_gpu("nsa")
    torch.manual_seed(0)
    measured = {"passes": _passes, "wide": _wide, "decode": nsa_decode.run, "groups": nsa_groups.run}
    for part in settings.parts or measured:
        yield from measured[part](settings)


def _passes(settings: Settings) -> Iterator[Row]:
    """Every context, phase and baseline, and the parts of both phases."""
    for context in CONTEXTS:
        settings.say(f"context {context}")
        problem = Problem.draw(context, (128, 128))
        yield from _whole(problem, TARGETS)
        yield from forward_parts(problem) + backward_parts(problem) + _compressions(problem)
        del problem
        torch.cuda.empty_cache()


def _wide(settings: Settings) -> list[Row]:
    settings.say(f"context {CONTEXTS[-1]}, d_qk 192, d_v 128")
    rows = _whole(Problem.draw(CONTEXTS[-1], (192, 128)), {(CONTEXTS[-1], p): (t, t) for p, t in WIDE_TARGETS.items()})
    torch.cuda.empty_cache()
    return rows


def median_ms(f: Callable[[], object], rep: int = 100) -> float:
    """Median time of a call, with the L2 cache emptied before each."""
    from triton.testing import do_bench

    return float(do_bench(f, warmup=20, rep=rep, return_mode="median"))


def peak_bytes(f: Callable[[], object]) -> int:
    """The most memory that a call, compiled before, has allocated at a time beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def dense_calls(problem: Problem, baselines: Iterable[str] = DENSE) -> dict[tuple[str, str], Call]:
    """Passes of dense causal attention by (baseline, phase); where a kernel refuses the shapes it is left out."""
    shapes = [(1, problem.heads, problem.context, dim) for dim in (problem.dims[0], *problem.dims)]
    q, k, v = (torch.randn(*s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes)
    found: dict[tuple[str, str], Call] = {}
    for name in baselines:
        try:
            found[name, "forward"], found[name, "backward"] = _dense(q, k, v, name)
        except RuntimeError:
            continue
    return found


def _dense(q: Tensor, k: Tensor, v: Tensor, baseline: str) -> tuple[Call, Call]:
    """Forward pass of [1, heads, tokens, dim], and back from an output. Raises RuntimeError for shapes it refuses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def forward() -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, DENSE[baseline])):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    out = forward()
    d_out = torch.randn_like(out)

    def back() -> object:
        return torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)

    return torch.no_grad()(forward), back


@dataclass(frozen=True)
class Passes:
    """The two passes of one problem, ready to be called: forward, and back from an output."""

    forward: Callable[[], Tensor]
    back: Callable[[Tensor], object]

    @classmethod
    def of(cls, problem: Problem) -> Passes:
        leaves = tuple(x.requires_grad_() for x in problem.inputs)
        return cls._to(problem, leaves, lambda: leaves)

    @classmethod
    def compressing(cls, problem: Problem, how: str) -> Passes:
        """Those that begin with keys and values that are not compressed yet, and end with their gradients."""
        q, _, _, *others = (x.requires_grad_() for x in problem.inputs)
        both = [problem.compressing(how, dim) for dim in problem.dims]
        leaves = (q, *both[0][1], *both[1][1], *others)
        return cls._to(problem, leaves, lambda: (q, *(f(*taken) for f, taken in both), *others))

    @classmethod
    def _to(cls, problem: Problem, leaves: tuple[Tensor, ...], inputs: Callable[[], tuple[Tensor, ...]]) -> Passes:
        def forward() -> Tensor:
            backend = "triton" if problem.d_out.is_cuda else "torch"
            return nsa_attention(*inputs(), problem.layout, problem.scale, backend)  # type: ignore[call-arg, arg-type]

        def back(out: Tensor) -> object:
            return torch.autograd.grad(out, leaves, problem.d_out, retain_graph=True)

        return cls(forward, back)

    def peak_bytes(self) -> int:
        """Of both, compiled now."""
        self.back(self.forward())
        return peak_bytes(lambda: self.back(self.forward()))

    def calls(self, name: str = WHOLE) -> dict[tuple[str, str], Call]:
        """Each phase by (name, phase)."""
        out = self.forward()
        return {(name, "forward"): self.forward, (name, "backward"): lambda: self.back(out)}

    def exact(self) -> Call:
        """The deterministic backward pass."""
        with _deterministic():
            out = self.forward()

        def back() -> None:
            with _deterministic():
                self.back(out)

        return back


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _whole(problem: Problem, targets: dict[tuple[int, str], tuple[float, float]]) -> list[Row]:
    """Both phases beside each baseline, also with what compresses; and what the same bits in every run cost."""
    passes, exact = Passes.of(problem), (f"{WHOLE}, deterministic", "backward")
    compressing = {f"{WHOLE}, with {how}": Passes.compressing(problem, how) for how in COMPRESSIONS}
    most = {name: each.peak_bytes() for name, each in {WHOLE: passes, **compressing}.items()}
    more = {key: call for name, each in compressing.items() for key, call in each.calls(name).items()}
    ms = medians({**passes.calls(), **dense_calls(problem), exact: passes.exact(), **more})
    rows = []
    for what in most:
        for phase in ("forward", "backward"):
            for index, name in enumerate(DENSE):
                if (name, phase) in ms:
                    facts = {"phase": phase, **problem.facts, "peak_bytes": most[what]}
                    target = targets[problem.context, phase][index]
                    rows.append(time_row(what, ms[what, phase], name, ms[name, phase], target, **facts))
    what, phase = exact
    return [*rows, time_row(what, ms[exact], WHOLE, ms[WHOLE, phase], phase=phase, **problem.facts)]


@torch.no_grad()
def forward_parts(problem: Problem, tuning: ForwardTuning | None = None) -> list[Row]:
    """A row for each part of a forward pass."""
    from shoal.kernels.nsa.triton_choose import choose_blocks
    from shoal.kernels.nsa.triton_forward import ForwardTuning, attend_span
    from shoal.kernels.nsa.triton_gather import selected_by_block
    from shoal.kernels.nsa.triton_span import span_attention
    from shoal.kernels.nsa.triton_tables import make_tables

    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = problem.inputs
    tables, tuning, scale = make_tables(problem.layout), tuning or ForwardTuning(), problem.scale
    cmp, lse = attend_span(q, k_cmp, v_cmp, tables.cmp, scale, tuning.cmp)
    win, _ = attend_span(q, k_win, v_win, tables.window, scale, tuning.near)
    blocks, mixed = choose_blocks(q, k_cmp, lse, tables, scale, tuning.choose), torch.empty_like(cmp)

    def forced() -> tuple[Tensor, Tensor]:
        return span_attention(q, k_slc, v_slc, tables.local, scale, also=tables.initial, tuning=tuning.near)

    others = (q, k_slc, v_slc, blocks[..., SIZES.slc_initial + SIZES.slc_local :], tables, scale)
    beside = forced()
    parts = {
        "compressed": lambda: attend_span(q, k_cmp, v_cmp, tables.cmp, scale, tuning.cmp),
        "importance and choice": lambda: choose_blocks(q, k_cmp, lse, tables, scale, tuning.choose),
        "selected, forced": forced,
        "selected, others, and gates": lambda: selected_by_block(
            *others, own=False, beside=beside, mix=(cmp, win, gates, mixed)
        ),
        "window": lambda: attend_span(q, k_win, v_win, tables.window, scale, tuning.near),
    }
    return [time_row(name, median_ms(f), phase="forward", **problem.facts) for name, f in parts.items()]


@torch.no_grad()
def backward_parts(problem: Problem, tuning: BackwardTuning | None = None) -> list[Row]:
    """A row for each part of a backward pass."""
    from shoal.kernels.nsa.triton_backward import BackwardTuning, branch_backward, rounded, row_sums
    from shoal.kernels.nsa.triton_forward import nsa_forward
    from shoal.kernels.nsa.triton_gather_grad import selected_backward
    from shoal.kernels.nsa.triton_span_grad import Grads
    from shoal.kernels.nsa.triton_tables import make_tables

    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = problem.inputs
    tables, tuning = make_tables(problem.layout), tuning or BackwardTuning()
    scale, d_out = problem.scale, problem.d_out
    f = nsa_forward(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, problem.layout, scale)
    bases, dots, _ = row_sums(d_out, gates, f)
    d_q = torch.zeros(q.shape, device="cuda")
    cmp, slc, win = (
        Grads(d_q, torch.zeros(k.shape, device="cuda"), torch.zeros(v.shape, device="cuda"))
        for k, v in ((k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win))
    )
    parts = {
        "row sums": lambda: row_sums(d_out, gates, f),
        "compressed": lambda: branch_backward(
            *(q, k_cmp, v_cmp, d_out, bases[0], dots[0], tables.cmp, tables.cmp_seen, scale, cmp),
            deterministic=False,
            tuning=tuning.cmp,
        ),
        "selected": lambda: selected_backward(
            *(q, k_slc, v_slc, d_out, bases[1], dots[1], f.blocks, tables, scale, slc),
            alone=True,
            tuning=tuning.selected,
        ),
        "window": lambda: branch_backward(
            *(q, k_win, v_win, d_out, bases[2], dots[2], tables.window, tables.window_seen, scale, win),
            deterministic=False,
            tuning=tuning.window,
        ),
        "gradients of queries, rounded": lambda: rounded(d_q, scale, q.dtype),
    }
    return [time_row(name, median_ms(part), phase="backward", **problem.facts) for name, part in parts.items()]


def _compressions(problem: Problem) -> list[Row]:
    """φ, and block means, of keys or values, once; a layer has two."""
    rows = []
    for how in COMPRESSIONS:
        compressed, taken = problem.compressing(how, problem.dims[0])
        out = compressed(*taken)
        d_out = torch.randn_like(out)
        calls: dict[str, Call] = {
            "forward": partial(compressed, *taken),
            "backward": partial(torch.autograd.grad, out, taken, d_out, retain_graph=True),
        }
        what = f"compression, {how} (not in the whole)"
        rows += [time_row(what, median_ms(f), phase=phase, **problem.facts) for phase, f in calls.items()]
    return rows


def draw(result: Document, path: Path) -> bool:
    """Writes a PNG of ratios against the context; False where no part has any to draw. Raises OSError."""
    from shoal.jobs.bench.nsa_plot import draw as draw_ratios

    return draw_ratios(result, path)
