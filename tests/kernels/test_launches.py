"""Launches that do not ask Triton what arguments would be compiled for: whether it is asked where it must be."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, replace
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton_on_cpu
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

triton_on_cpu.prepare()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import BaseBackend  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from shoal.kernels import launches  # noqa: E402
from shoal.kernels.hopper import descriptor  # noqa: E402


def _scale(x, y, count, factor, N: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(y + i, tl.load(x + i, mask=i < count) * factor * N, mask=i < count)


class Compiled:
    """In the place of what Triton compiles: remembers how it is launched."""

    def __init__(self, told: list[Any]) -> None:
        self.told = told

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.told.append((grid, arguments))


class Launchable(Compiled):
    """With the launcher of an NVIDIA GPU."""

    function, packed_metadata = 77, (4, 1, 0)

    def __init__(self, run: Any, told: list[Any]) -> None:
        super().__init__(told)
        self.run = run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """What Triton was asked to compile, and what was launched without asking it."""
    compiled: list[Any] = []
    launched: list[Any] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Compiled:
        compiled.append(named)
        return Compiled(launched)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(launches, "current_device", lambda: 0)
    monkeypatch.setattr(launches, "_compiled", {})
    return compiled, launched


def test_triton_is_asked_once_for_each_thing_it_compiles_for(asked: tuple[list[Any], list[Any]]) -> None:
    compiled, launched = asked
    kernel: Any = JITFunction(_scale, do_not_specialize=["count", "factor"])
    words = torch.zeros(64)
    variants: list[tuple[Any, Any, int, dict[str, int]]] = [
        (words, words, 5, {"N": 2, "TILE": 16}),
        (words[1:], words, 5, {"N": 2, "TILE": 16}),  # not on 16 bytes
        (words, words.double(), 5, {"N": 2, "TILE": 16}),
        (words, words, 2**31, {"N": 2, "TILE": 16}),  # int64
        (words, words, 5, {"TILE": 16, "N": 3}),
        (words, words, 5, {"N": 16, "TILE": 2}),
        (words, words, 5, {"N": 2, "TILE": 16, "num_warps": 8}),
    ]
    for x, y, count, named in variants:
        launches.launch(kernel, (3,), x, y, count, 7, **named)
    assert compiled == [named for *_, named in variants]
    assert not launched
    for x, y, count, named in variants:
        launches.launch(kernel, (4, 2), x[4:], y[4:], count + 16, 8, **named)
    assert len(compiled) == len(variants)
    for (grid, arguments), (x, y, count, named) in zip(launched, variants, strict=True):
        assert grid == (4, 2, 1)
        assert arguments == (x[4:].data_ptr(), y[4:].data_ptr(), count + 16, 8, named["N"], named["TILE"])


def test_numbers_that_triton_may_specialize_on_are_told_apart(asked: tuple[list[Any], list[Any]]) -> None:
    """1, multiples of 16, and those that want 64 bits; numbers with a point are never specialized."""
    compiled, launched = asked
    kernel: Any = JITFunction(_scale)
    x = torch.zeros(8)
    for count, again in ((5, -7), (16, 48), (1, 1), (2**31, 2**33), (2**31 + 1, 2**40 + 3)):
        launches.launch(kernel, (1,), x, x, count, 0.5, N=2, TILE=8)
        before = len(compiled)
        launches.launch(kernel, (1,), x, x, again, 3.0, N=2, TILE=8)
        assert len(compiled) == before
        assert launched[-1] == ((1, 1, 1), (x.data_ptr(), x.data_ptr(), again, 3.0, 2, 8))
    assert len(compiled) == 5


NUMBERS = [(False, True), (0, 1, 2, 15, 16, 48, -1, -16), (2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, 2**62)]
MEMORY = torch.zeros(64, dtype=torch.uint8)
ARGUMENTS: list[Any] = [
    *(number for some in NUMBERS for number in some),
    *(0.0, 1.0, 16.0, float("inf")),
    *(MEMORY[at:][:32].view(dtype) for at in (0, 8, 16) for dtype in (torch.bfloat16, torch.float16, torch.int64)),
    torch.nn.Parameter(torch.zeros(4)),
    torch.zeros(0),
    *(descriptor(torch.zeros(64, 64, dtype=dtype), 32, 64) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
]


@pytest.mark.parametrize("unspecialized", [{}, {"do_not_specialize": ["x"]}, {"do_not_specialize_on_alignment": ["x"]}])
def test_no_two_arguments_that_triton_tells_apart_are_taken_for_each_other(
    unspecialized: dict[str, Any], asked: tuple[list[Any], list[Any]]
) -> None:
    """All pairs, against what Triton makes of an argument when it looks for what it has compiled."""
    specialize = pytest.importorskip("triton._C.libtriton").native_specialize_impl
    _, launched = asked
    kernel: Any = JITFunction(_scale, **unspecialized)
    x = kernel.params[0]
    told_apart = not x.do_not_specialize, not x.do_not_specialize_on_alignment
    kinds = [specialize(BaseBackend, argument, False, *told_apart) for argument in ARGUMENTS]
    alike = 0
    for (first, kind), (second, other) in permutations(zip(ARGUMENTS, kinds, strict=True), 2):
        launches._compiled.clear()
        launched.clear()
        for argument in (first, second):
            launches.launch(kernel, (1,), argument, MEMORY, 5, 7, N=2, TILE=8)
        assert not launched or kind == other, f"{second} was taken for {first}"
        alike += len(launched)
    assert alike > len(ARGUMENTS)


def test_tensors_of_the_cpu_are_given_to_triton_which_refuses_them(
    asked: tuple[list[Any], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their addresses among those of a GPU's would end the process."""
    compiled, launched = asked
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda _: 0, raising=False)
    kernel: Any = JITFunction(_scale)
    with FakeTensorMode():
        there = torch.empty(8, device="cuda")
    for _ in range(2):
        launches.launch(kernel, (1,), there, there, 5, 7, N=2, TILE=8)
    assert (len(compiled), len(launched)) == (1, 1)
    launches.launch(kernel, (1,), there, torch.zeros(8), 5, 7, N=2, TILE=8)
    assert (len(compiled), len(launched)) == (2, 1)


def test_constants_that_are_not_named_are_what_the_kernel_says(asked: tuple[list[Any], list[Any]]) -> None:
    def scale(x, count, N: tl.constexpr, TILE: tl.constexpr = 32):  # type: ignore[no-untyped-def]
        tl.store(x, count * N * TILE)

    _, launched = asked
    kernel: Any = JITFunction(scale)
    x = torch.zeros(8)
    for _ in range(2):
        launches.launch(kernel, (1,), x, 5, N=2)
    assert launched == [((1, 1, 1), (x.data_ptr(), 5, 2, 32))]


def test_a_kernel_that_was_launched_stays(asked: tuple[list[Any], list[Any]]) -> None:
    """Another one could get its id, and be taken for it."""
    kernel: Any = JITFunction(_scale)
    there = weakref.ref(kernel)
    launches.launch(kernel, (1,), torch.zeros(8), torch.zeros(8), 5, 7, N=2, TILE=8)
    del kernel
    gc.collect()
    assert there() is not None


def test_descriptors_of_another_kind_are_compiled_for(asked: tuple[list[Any], list[Any]]) -> None:
    """dtype, block and layout are what a kernel is compiled for; where a tensor lies, and its sizes, are not."""
    compiled, launched = asked
    kernel: Any = JITFunction(_scale)
    x, y = (torch.zeros(64, 64, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    kinds = [descriptor(x, 64, 64), descriptor(x, 32, 64), descriptor(y, 32, 64), descriptor(y, 32, 64, rows=True)]
    for made in kinds:
        launches.launch(kernel, (1,), made, x, 5, 7, N=2, TILE=8)
    assert len(compiled) == 4
    other = descriptor(x[8:], 32, 64)
    launches.launch(kernel, (1,), other, x, 5, 7, N=2, TILE=8)
    assert len(compiled) == 4
    assert launched[-1][1][0] is other


def test_constants_are_named_and_others_are_not(asked: tuple[list[Any], list[Any]]) -> None:
    kernel: Any = JITFunction(_scale, do_not_specialize=["count", "factor"])
    x = torch.zeros(8)
    with pytest.raises(TypeError, match="N=2 is a constant"):
        launches.launch(kernel, (1,), x, x, 5, 7, 2, TILE=8)
    with pytest.raises(TypeError, match=r"\['factor'\] are no constants"):
        launches.launch(kernel, (1,), x, x, 5, factor=7, N=2, TILE=8)


@dataclass
class Described:
    """What of a tensor descriptor matters to a launch."""

    base: torch.Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str = "zero"


def test_descriptors_are_given_to_cuda_once_for_each_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """And launches get the arguments that Triton's own way gives them."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    asked: list[tuple[Any, ...]] = []

    def made(descriptor: Described, meta: dict[str, Any]) -> list[Any]:
        what = descriptor.base.data_ptr(), descriptor.padding, meta["block_size"]
        asked.append(what)
        return [(what, meta["swizzle"]), *descriptor.shape, *descriptor.strides]

    monkeypatch.setattr(driver, "make_tensordesc_arg", made)
    monkeypatch.setattr(launches, "_maps", {})
    got: list[tuple[Any, ...]] = []
    block = {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": [64, 64], "fp4_padded": False}
    metas = [block, block | {"block_size": [128, 64]}]
    signature = {0: "tensordesc<bf16[64, 64]>", 1: "*i32", 2: "tensordesc<bf16[128, 64]>", 3: "constexpr"}
    triton_way = driver.wrap_handle_tensordesc(lambda *given: got.append(given), signature, metas)
    ours = launches._with_kept_maps(triton_way)
    assert ours is not triton_way
    x = torch.zeros(64, 64)
    one, other = Described(x, (64, 64), (64, 1)), Described(x[1:], (63, 64), (64, 1))
    flat = Described(x, (4096,), (1,))
    before = tuple(range(13))
    for first, second in ((one, other), (other, one), (one, one), (flat, other), (one, replace(other, padding="nan"))):
        arguments = (*before, first, 5, second, 7)
        triton_way(*arguments)
        asked.clear()
        ours(*arguments)
        fresh = len(asked)
        ours(*arguments)
        assert len(asked) == fresh, "what was asked once is known"
        assert got[-3] == got[-2] == got[-1]
    assert launches._with_kept_maps(got.append) == got.append  # of a kernel without descriptors


@pytest.mark.parametrize("changes", [{}, {"global_scratch_size": 1}, {"profile_scratch_size": 1}])
def test_launches_say_what_those_of_triton_say(changes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """But for hooks of a profiler; kernels that need memory of Triton's allocators are launched by it."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    if not triton.__version__.startswith("3.6."):
        pytest.skip("Triton is asked to launch")
    told: list[Any] = []
    run = driver.CudaLauncher.__new__(driver.CudaLauncher)
    sizes = {"global_scratch_size": 0, "profile_scratch_size": 0} | changes
    aligned = {"global_scratch_align": 1, "profile_scratch_align": 1}
    options = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": True}
    run.__dict__.update(sizes, **aligned, **options, launch=lambda *given: told.append(given))
    compiled = Launchable(run, [])
    monkeypatch.setattr(launches, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: 99)))
    start = launches.starter(compiled)
    start(0, (4, 2, 1), 1234, 5, 16)
    if changes:
        assert compiled.told == [((4, 2, 1), (1234, 5, 16))]
        assert not told
    else:
        run(4, 2, 1, 99, compiled.function, compiled.packed_metadata, None, None, None, 1234, 5, 16)
        assert told[0] == told[1]
        assert len(told[0]) == launches._BEFORE + 3


def test_what_is_launched_computes() -> None:
    """Twice, of which the second launch does not ask Triton on a GPU."""
    kernel = triton.jit(do_not_specialize=["count", "factor"])(_scale)
    for factor in (2, 3):
        x = torch.arange(40, dtype=torch.float32, device=triton_on_cpu.DEVICE)
        y = torch.full_like(x, -1)
        launches.launch(kernel, (launches.tiles(37, 16),), x, y, 37, factor, N=2, TILE=16)
        assert torch.equal(y, torch.where(x < 37, x * factor * 2, -1))


@given(count=st.integers(0, 1 << 40), size=st.integers(1, 1 << 20))
def test_arithmetic_is_that_of_triton(count: int, size: int) -> None:
    assert launches.tiles(count, size) == triton.cdiv(count, size)
    assert launches.power_of_2(size) == triton.next_power_of_2(size)
