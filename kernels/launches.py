"""Launches of Triton kernels that take little of the host's time, which is what bounds few tokens."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, KernelParam


class Descriptor(TensorDescriptor):  # type: ignore[misc]  # Triton is not typed
    """For copies of blocks of a tensor by TMA. kind: a number for what a kernel is compiled for, of dtype, block and
    layout."""

    kind: int


_compiled: dict[tuple[Any, ...], tuple[Callable[..., None], tuple[Any, ...], Any]] = {}
"""Of a kernel and all that it is compiled for: what launches it, its constants in their order, and the kernel, whose id
no other one must get."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int | float | Descriptor, **named: Any) -> None:
    """``kernel[grid](*arguments, **named)`` on the current device, named being its constants and Triton's options.

    Triton asks of every argument what it would be compiled for, and takes three times as long for that as for the
    launch, with tensor descriptors 20 times: of what was compiled once it is enough to know tensors' dtypes and whether
    they begin on 16 bytes, of numbers (64 bits with a sign) what Triton may specialize on, of descriptors their kind.
    Given tensors, it would ask CUDA where each of them lies; those of the CPU are still given to it, which refuses
    them. Raises TypeError where a constant is no keyword, or a keyword no constant.
    """
    if not isinstance(kernel, JITFunction):  # of Triton's interpreter
        kernel[grid](*arguments, **named)
        return
    device = current_device()
    values: list[Any] = []
    kinds: list[Any] = [id(kernel), device, len(named), *named, *named.values()]  # pairs would take longer to hash
    for argument in arguments:
        if isinstance(argument, Tensor):
            address = argument.data_ptr()
            values.append(address)
            kinds += argument.dtype, address & 15 == 0, argument.is_cuda
            continue
        values.append(argument)
        if isinstance(argument, Descriptor):
            kinds.append(argument.kind)
        elif isinstance(argument, float):
            kinds.append(float)
        else:  # False is no 0, and no multiple of 16
            kinds += type(argument), argument == 1, argument & 15 == 0, -(2**31) <= argument < 2**31
    key = tuple(kinds)
    found = _compiled.get(key)
    if found is None:
        params = _constants(kernel, arguments)
        compiled = kernel[grid](*arguments, **named)
        if compiled is not None:
            _compiled[key] = starter(compiled), tuple(named.get(each.name, each.default) for each in params), kernel
        return
    start, constants, _ = found
    start(device, (*grid, 1, 1)[:3], *values, *constants)


def starter(compiled: Any) -> Callable[..., None]:
    """What launches a compiled kernel, given the current device, a grid of three numbers, and all arguments.

    Triton 3.6 goes through three functions of Python at each launch, to ask for hooks of its own profiler and for
    memory, which this leaves out; of another version, or a kernel that needs such memory, it is asked to launch.
    """
    run: Any = getattr(compiled, "run", None)
    plain = triton.__version__.startswith("3.6.") and type(run).__name__ == "CudaLauncher"
    if not plain or run.global_scratch_size or run.profile_scratch_size:
        return lambda _, grid, *arguments: compiled[grid](*arguments)
    go, function = _with_kept_maps(run.launch), compiled.function
    options = run.launch_cooperative_grid, run.launch_pdl, None, None, compiled.packed_metadata, None, None, None
    stream = driver.active.get_current_stream

    def start(device: int, grid: tuple[int, int, int], *arguments: Any) -> None:
        go(*grid, stream(device), function, *options, *arguments)

    return start


_BEFORE = 13
"""Arguments of Triton 3.6's launches before those of the kernel."""

_maps: dict[tuple[Any, ...], list[Any]] = {}
"""Of each tensor descriptor that was used what CUDA copies by, with shape and strides: they say where a tensor lies and
how, no more, and allocators give the same places again and again."""

MOST_MAPS = 4096


def _with_kept_maps(go: Callable[..., None]) -> Callable[..., None]:
    """Triton 3.6's launch of a kernel, which asks CUDA anew for all of its tensor descriptors; or ``go`` itself, where
    it has none."""
    outside = inspect.getclosurevars(go).nonlocals if inspect.isfunction(go) else {}
    if not outside.keys() >= {"launcher", "tensordesc_indices", "tensordesc_meta"}:
        return go
    metas = outside["tensordesc_meta"]
    if None in metas:
        return go
    from triton.backends.nvidia.driver import make_tensordesc_arg

    launcher, places = outside["launcher"], (_BEFORE + place for place in sorted(outside["tensordesc_indices"]))
    kinds = (sys.intern(str(sorted(meta.items()))) for meta in metas)
    wanted = [*zip(places, metas, kinds, strict=True)][::-1]

    def launch(*arguments: Any) -> None:
        given = list(arguments)
        for place, meta, kind in wanted:  # from the last one on, since each becomes several
            made = given[place]
            key = made.base.data_ptr(), kind, made.padding, *made.shape, *made.strides
            found = _maps.get(key)
            if found is None:
                if len(_maps) >= MOST_MAPS:
                    _maps.clear()
                found = _maps[key] = make_tensordesc_arg(made, meta)
            given[place : place + 1] = found
        launcher(*given)

    return launch


def current_device() -> int:
    """The index of the GPU that Triton launches on."""
    index: int = driver.active.get_current_device()
    return index


def current_place() -> tuple[int, int]:
    """The GPU that Triton launches on, and its current stream."""
    device = current_device()
    return device, driver.active.get_current_stream(device)


def _constants(kernel: JITFunction[Any], arguments: tuple[Any, ...]) -> list[KernelParam]:
    """The constants, which stand behind the arguments."""
    params, constants = kernel.params[: len(arguments)], kernel.params[len(arguments) :]
    for param, argument in zip(params, arguments, strict=True):
        if param.is_constexpr:
            raise TypeError(f"{kernel.__name__}: {param.name}={argument} is a constant: name it where it is launched")
    if plain := [param.name for param in constants if not param.is_constexpr]:
        raise TypeError(f"{kernel.__name__}: {plain} are no constants: pass them by their place, before all constants")
    return constants


def tiles(count: int, size: int) -> int:
    """How many tiles of a size so much makes. Triton's ``cdiv`` takes twenty times as long on the host."""
    return -(-count // size)


def power_of_2(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()
