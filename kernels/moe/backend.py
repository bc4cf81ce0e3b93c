"""Who computes the experts: PyTorch, Triton (and Gluon on Hopper), or MegaBlocks where it is installed."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from shoal.kernels.moe.gemms import Gemms

BACKENDS = ("auto", "torch", "triton", "megablocks")


def experts_backend(name: str, device: torch.device, dtype: torch.dtype) -> type[Gemms]:
    """The class of products that ``name`` means on this device; auto: triton for bf16 on a GPU, torch otherwise.

    Raises ValueError with a remedy where the backend cannot be had.
    """
    bf16 = device.type == "cuda" and dtype == torch.bfloat16
    able = bf16 and torch.version.hip is None and find_spec("triton") is not None
    if name == "torch" or (name == "auto" and not able):
        return Gemms
    if name == "megablocks":
        kind = _megablocks()
        if not bf16:
            raise ValueError(
                f"moe.backend='megablocks' needs bfloat16 on a GPU: on {device.type} in {dtype} set it to 'auto'"
            )
        return kind
    if not able:
        raise ValueError(
            f"moe.backend='triton' needs bfloat16 on a GPU, and Triton: on {device.type} in {dtype} set it to 'auto'"
        )
    if torch.cuda.get_device_capability(device) == (9, 0):
        from shoal.kernels.moe.gluon_gemms import GluonGemms

        return GluonGemms
    from shoal.kernels.moe.triton_gemms import TritonGemms

    return TritonGemms


def counts_stay(kind: type[Gemms], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether these products read no number of rows on the host, so that a CUDA graph can hold them.

    MegaBlocks wants them there, and so does PyTorch's grouped product, but for bfloat16 on Hopper.
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return hopper and dtype == torch.bfloat16 and not kind.host_counts


def _megablocks() -> type[Gemms]:
    if not (find_spec("megablocks") and find_spec("grouped_gemm")):
        raise ValueError(
            "moe.backend='megablocks', and it is not installed: run `make megablocks` on a machine with CUDA's "
            "compiler, or set moe.backend to 'auto'"
        )
    try:
        from shoal.kernels.moe.megablocks_gemms import MegaBlocksGemms
    except (ImportError, OSError) as error:  # built for another torch or CUDA
        raise ValueError(
            f"moe.backend='megablocks', and its grouped_gemm cannot be loaded ({error}): run `make megablocks` again, "
            f"with this torch, or set moe.backend to 'auto'"
        ) from None
    return MegaBlocksGemms
