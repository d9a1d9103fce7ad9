"""FSDP2: each of several processes holds a part of every weight, its gradient and its moments.

The parts are float32 and are the masters. A layer's weights are put together, in the dtype of
computing, while it computes, and their gradients are added up in float32, each process keeping its
part. All processes take part in every pass, so they make equally many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard(model: PreTrainedModel, dtype: torch.dtype, device: torch.device, reshard: bool) -> None:
    """Divide the float32 weights of `model` among all processes, in place.

    Args:
        model: a causal language model of transformers, the same in every process.
        dtype: to compute in.
        device: of the parts.
        reshard: whether a layer's whole weights are given up after its forward pass, and put
            together again for the backward pass.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    precision = MixedPrecisionPolicy(dtype, torch.float32)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    tied = head.weight is embedding.weight
    layers = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    for module in (*layers, decoder):
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=precision,
            reshard_after_forward=reshard and module is not decoder,
        )
        module.set_gradient_divide_factor(1.0)  # denominators are the whole batch's: a sum
        module.set_force_sum_reduction_for_comms(True)
    # The head is no module that computes: models.forward puts its weights together.
    weight = head.weight.detach().to(device)
    head.weight = (
        embedding.weight
        if tied
        else torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None))
    )


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process has a part, put together; any other as it is. Every process
    calls this."""
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = tensor.full_tensor()
    return full.detach()


def collected(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors, those of which each process has a part put together on the CPU, one after
    another. Every process calls this; where it does not `keep` them, it gets none."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            found[name] = full if full is tensor else full.cpu()
    return found


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, whole and the same in every process, placed and divided as `like` is."""
    value = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
