"""Dense weights in shards, by PyTorch's FSDP2: an attention rank holds a part of each tensor and of its gradient.

The weights of a block are gathered when it is computed, and once more backwards, and let go of after each; gradients
are summed over the ranks as soon as the block has them, each part at the rank whose it is. Those outside blocks
(embedding, last norm, head) stay whole from the forward pass until the backward one ends. Experts are not touched.

Where a model computes in 16 bits, the shards are its float32 masters: they are rounded before they are gathered, and
gradients are summed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from shoal.workers.mesh import Mesh
from shoal.workers.model import Transformer
from shoal.workers.model.feedforward import named_views


def shard_dense(model: Transformer, mesh: Mesh) -> None:
    """Cuts all weights but those of experts into a part for each attention rank, each block's and the others'.

    Parameters are DTensors afterwards. A rank without attention has none of them, and one alone keeps them whole.
    """
    group = mesh.attention
    if group is None or group.handle is None:
        return
    experts = {p for name, p in model.named_parameters() if ".moe.experts." in name}
    stacked = {id(p) for _, p, part in named_views(model) if part is not None}
    ranks, wide = group.size, torch.promote_types(model.dtype, torch.float32)
    device = next(model.parameters()).device.type
    device_mesh = DeviceMesh.from_group(group.handle, device, mesh_dim_names=("attention",))
    policy = MixedPrecisionPolicy(model.dtype, wide, cast_forward_inputs=False)

    def cut(weights: nn.Parameter) -> Shard:
        return Shard(shard_dim(weights.shape, ranks, id(weights) in stacked))

    for part in (*model.layers, model):
        for weights in part.parameters():
            if weights not in experts and not isinstance(weights, DTensor):
                weights.data = weights.data.to(wide)
        sharded = fully_shard(part, mesh=device_mesh, mp_policy=policy, shard_placement_fn=cut, ignored_params=experts)
        # losses are sums over the tokens of all ranks: gradients are added up, not averaged
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def shard_dim(shape: Sequence[int], ranks: int, stacked: bool) -> int:
    """The first dimension that ranks share evenly, as FSDP2 asks of all but dimension 0; that one if there is none.

    stacked: experts, one after another, of which each is cut, since each has a name of its own.
    """
    even = [dim for dim in range(int(stacked), len(shape)) if shape[dim] % ranks == 0]
    assert even or not stacked, "parallel.shard_dense has model.hidden divide over the ranks"
    return even[0] if even else 0


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is on this rank: a view of its part where it is sharded, else all of it."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def as_part(tensor: Tensor, parameter: nn.Parameter, member: int | None = None) -> Tensor:
    """``tensor``, which lies as this rank's part of a parameter does, as that part of a whole; itself if that is not
    sharded. member: which of stacked experts it is of; None: of all."""
    if not isinstance(parameter, DTensor):
        return tensor
    (placement,) = parameter.placements
    assert isinstance(placement, Shard)
    first = 0 if member is None else 1
    shape = parameter.shape[first:]
    strides = torch.empty(shape, device="meta").stride()
    at = [Shard(placement.dim - first)]
    return DTensor.from_local(tensor, parameter.device_mesh, at, run_check=False, shape=shape, stride=strides)
