"""How much memory NSA's forward and backward pass take at most, at the sizes of `shoal bench nsa`, without a GPU.

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

from shoal.kernels.nsa import BlockSizes, make_layout, nsa_attention  # noqa: E402
from shoal.kernels.nsa.attention import Tensors  # noqa: E402
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
    layout = make_layout((0, TOKENS), SIZES, "cpu", tile=256)
    make_tables(layout)  # made once for a batch
    torch.use_deterministic_algorithms(deterministic)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            inputs = drawn(layout.cmp_starts.numel(), dims, "backward" in what)
            d_out = torch.empty(TOKENS, HEADS, dims[1], dtype=torch.bfloat16)
            with Ledger(*inputs, d_out) as ledger:
                out = nsa_attention(*inputs, layout, 0.1, "triton")
                if "backward" in what:
                    torch.autograd.grad(out, inputs, d_out, retain_graph="retained" in what)
    finally:
        torch.use_deterministic_algorithms(False)
    kept = 4 * out.untyped_storage().nbytes()
    assert kept < ledger.peak < most, f"{ledger.peak:,} bytes"


def drawn(cmp_blocks: int, dims: tuple[int, int], leaves: bool) -> Tensors:
    """The tensors of ``nsa_attention``."""
    shapes = [(TOKENS, HEADS, dims[0])]
    shapes += [(rows, KV_HEADS, dim) for rows in (cmp_blocks, TOKENS, TOKENS) for dim in dims]
    shapes += [(TOKENS, HEADS, 3)]
    return cast(Tensors, tuple(torch.empty(s, dtype=torch.bfloat16, requires_grad=leaves) for s in shapes))
