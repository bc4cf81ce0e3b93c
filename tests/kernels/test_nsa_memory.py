"""How much memory NSA's forward and backward pass take at most, at the sizes of `shoal bench nsa` and with documents of
a million tokens, without a GPU.

What launches the kernels runs as it is, over tensors without memory (torch's fake ones) that pass for those of a
Hopper; kernels are not launched. Which tensors live at a time is all that a peak depends on: those that the bench had
measured on an H100, at 8k to 64k, came out to 0.01 MB.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import triton_on_cpu
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

triton_on_cpu.prepare()

from triton.runtime.interpreter import InterpretedFunction  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from shoal.kernels import launches  # noqa: E402
from shoal.kernels.nsa import BlockSizes, make_layout, nsa_attention  # noqa: E402
from shoal.kernels.nsa.attention import Tensors  # noqa: E402
from shoal.kernels.nsa.triton_gather_grad import GatherGradTuning, selected_backward  # noqa: E402
from shoal.kernels.nsa.triton_inverse import TABLE  # noqa: E402
from shoal.kernels.nsa.triton_span_grad import Grads  # noqa: E402
from shoal.kernels.nsa.triton_tables import make_tables  # noqa: E402

TOKENS, HEADS, KV_HEADS = 65536, 64, 4
SIZES = BlockSizes(cmp_block=32, cmp_stride=16, slc_block=64, slc_count=16, slc_initial=1, slc_local=2, window=512)


class Ledger(TorchDispatchMode):
    """Bytes of the storages that operators make, from then on until nobody holds them; in pieces of 512, as PyTorch
    allocates."""

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.live = {x.untyped_storage()._cdata: 0 for x in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, FakeTensor):
                self._enter(x.untyped_storage())
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.live:
            self.live[key] = -(-storage.nbytes() // 512) * 512
            self.bytes += self.live[key]
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.bytes -= self.live.pop(key)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors pass for those of a Hopper, and kernels are not launched."""
    monkeypatch.setattr(FakeTensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda x: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(launches, "current_device", lambda: 0)
    for kind in (JITFunction, InterpretedFunction):
        monkeypatch.setattr(kind, "run", lambda *args, **kwargs: None)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("dims", "what", "most"),
    [
        ((128, 128), "forward", 5.1e9),
        ((128, 128), "forward and backward", 5.1e9),
        ((128, 128), "forward and backward, the graph retained", 8e9),
        ((192, 128), "forward and backward", 6.4e9),
    ],
)
def test_peak_at_64k(dims: tuple[int, int], what: str, most: float, deterministic: bool) -> None:
    """Beyond the inputs and the gradient of the output, 64 query and 4 KV heads, 16 bits. A graph that is retained
    keeps the branches' outputs, 3.2 GB, in the backward pass too."""
    ledger, out = counted(TOKENS, (KV_HEADS, HEADS // KV_HEADS), dims, what, deterministic)
    kept = 4 * out.untyped_storage().nbytes()
    assert kept < ledger.peak < most, f"{ledger.peak:,} bytes"


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("heads", "forward", "both"),
    [
        ((4, 16), 71.5e9, 74e9),
        ((16, 1), 19.5e9, 50e9),
        pytest.param((64, 1), 75e9, 198e9, marks=pytest.mark.slow),
    ],
    ids=["4 x 16", "16 x 1", "64 x 1"],
)
def test_peak_of_a_million_tokens(heads: tuple[int, int], forward: float, both: float, deterministic: bool) -> None:
    """Outputs of the branches and gradients in float32, whatever the number of blocks. heads: of keys, and a group."""
    for what, most in (("forward", forward), ("forward and backward", both)):
        ledger, _ = counted(1 << 20, heads, (128, 128), what, deterministic)
        assert ledger.peak < most, f"{what}: {ledger.peak:,} bytes"


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kv", [4, 16, 64])
@pytest.mark.parametrize("tokens", [1 << 17, 1 << 20])
def test_selections_turned_around_take_no_more_of_longer_documents(tokens: int, kv: int, deterministic: bool) -> None:
    """In the backward pass of 64 heads, beside parts of a chunk's gradients: a table, and as much to sort it."""
    tables = make_tables(make_layout((0, tokens), SIZES, "cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k = torch.empty(tokens, 64, 128, dtype=torch.bfloat16), torch.empty(tokens, kv, 128, dtype=torch.bfloat16)
        rows, blocks = torch.empty(tokens, 64), torch.empty(tokens, kv, 16, dtype=torch.int32)
        grads = Grads.of(torch.empty(q.shape), k, k)
        with Ledger(q, k, rows, blocks, grads.d_q, grads.d_k, grads.d_v) as ledger:
            operands = (q, k, k, q, rows, rows, blocks, tables, 0.1, grads)
            selected_backward(*operands, alone=True, deterministic=deterministic)
    parts = 2 * GatherGradTuning().chunk * 16 * 64 * 128
    assert parts < ledger.peak < parts + 2.2 * TABLE, f"{ledger.peak:,} bytes"


def counted(
    tokens: int, heads: tuple[int, int], dims: tuple[int, int], what: str, deterministic: bool
) -> tuple[Ledger, Tensor]:
    """A ledger of the forward pass, or of both, over a document; and the output. heads: of keys, and a group."""
    layout = make_layout((0, tokens), SIZES, "cpu", tile=256)
    make_tables(layout)  # made once for a batch
    torch.use_deterministic_algorithms(deterministic)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            inputs = drawn(tokens, layout.cmp_starts.numel(), heads, dims, "backward" in what)
            d_out = torch.empty(tokens, heads[0] * heads[1], dims[1], dtype=torch.bfloat16)
            with Ledger(*inputs, d_out) as ledger:
                out = nsa_attention(*inputs, layout, 0.1, "triton")
                if "backward" in what:
                    torch.autograd.grad(out, inputs, d_out, retain_graph="retained" in what)
    finally:
        torch.use_deterministic_algorithms(False)
    return ledger, out


def drawn(tokens: int, cmp_blocks: int, heads: tuple[int, int], dims: tuple[int, int], leaves: bool) -> Tensors:
    """The tensors of ``nsa_attention``."""
    kv, group = heads
    shapes = [(tokens, kv * group, dims[0])]
    shapes += [(rows, kv, dim) for rows in (cmp_blocks, tokens, tokens) for dim in dims]
    shapes += [(tokens, kv * group, 3)]
    return cast(Tensors, tuple(torch.empty(s, dtype=torch.bfloat16, requires_grad=leaves) for s in shapes))
