"""Cross entropy that computes its gradient with the loss, against PyTorch's."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from shoal.workers.data.batch import IGNORE
from shoal.workers.model.loss import cross_entropy_sum


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 9),
    hidden=st.integers(1, 5),
    vocab=st.integers(1, 7),
    chunk=st.integers(1, 10),
    wanted=st.sampled_from([(True, True), (True, False), (False, True), (False, False)]),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients(
    tokens: int, hidden: int, vocab: int, chunk: int, wanted: tuple[bool, bool], ignored: float, seed: int
) -> None:
    """Also of one input alone, of no tokens, and where there is nothing to predict."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, dtype=torch.float64, generator=generator).requires_grad_(wanted[0])
    weight = torch.randn(vocab, hidden, dtype=torch.float64, generator=generator).requires_grad_(wanted[1])
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORE
    mine = cross_entropy_sum(x, weight, targets, chunk)
    theirs = F.cross_entropy(F.linear(x, weight), targets, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    inputs = [leaf for leaf in (x, weight) if leaf.requires_grad]
    assert mine.requires_grad == bool(inputs)
    if inputs:
        grads = zip(torch.autograd.grad(0.3 * mine, inputs), torch.autograd.grad(0.3 * theirs, inputs), strict=True)
        for a, b in grads:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_logits_are_computed(mode: type[torch.no_grad]) -> None:
    """Although weights are such as gradients could be wanted of: validation is like that."""
    x, weight = torch.randn(10, 8), torch.randn(6, 8, requires_grad=True)
    with mode(), FlopCounterMode(display=False) as counter:
        cross_entropy_sum(x, weight, torch.arange(10) % 6, 4)
    assert counter.get_total_flops() == 2 * 10 * 8 * 6


class Wide(TorchDispatchMode):
    """Counts bytes of the tensors with ``vocab`` columns that exist at a time."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.most = vocab, 0
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] == self.vocab:
            self.made.append(weakref.ref(out))
        alive = {x.data_ptr(): x.nbytes for ref in self.made if (x := ref()) is not None}
        self.most = max(self.most, sum(alive.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [True, False])
def test_memory_is_what_the_estimate_says(dtype: torch.dtype, wanted: bool) -> None:
    """Two float32 copies of a part's logits, however many parts there are."""
    vocab, chunk = 50, 8
    x, weight = torch.randn(5 * chunk, 4, dtype=dtype), torch.randn(vocab, 4, dtype=dtype, requires_grad=wanted)
    with Wide(vocab) as wide:
        cross_entropy_sum(x, weight, torch.arange(len(x)), chunk)
    assert 4 * chunk * vocab < wide.most <= 8 * chunk * vocab
