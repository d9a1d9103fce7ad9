"""LoRA (arXiv 2106.09685) through PEFT: small matrices beside frozen weights are what is trained.

A layer computes W x + s B (A x) with s = alpha / rank. What samples and what is saved is a plain
model with W + s B A in its place, added up in float32, so nothing outside training knows adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Linear, Parameter

from entrograd.errors import InputError, extra
from entrograd.train.params import Lora

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from torch.nn import Module
    from transformers import PreTrainedModel

NAME = "default"  # PEFT's own for a model's only adapter


def add_adapters(model: PreTrainedModel, params: Lora, seed: int) -> None:
    """Freeze the weights of `model` and put adapters beside its linear layers, in place.

    A is drawn with `seed`, B is zero: the model computes what it did. InputError names a target
    the model does not have.
    """
    with extra("lora"):
        from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        lora_dropout=0.0,
        target_modules=_targets(model, params.target_modules),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    model.eval()


def plain_model(adapted: PreTrainedModel) -> PreTrainedModel:
    """A model without adapters that shares every tensor of `adapted` but the weights beside which
    those are; `merge` fills them in."""
    shared = {id(tensor): tensor for tensor in (*adapted.parameters(), *adapted.buffers())}
    plain = copy.deepcopy(adapted, shared)
    for name, layer in _adapters(plain):
        linear = layer.base_layer
        assert isinstance(linear, Linear)
        linear.weight = Parameter(linear.weight.detach().clone(), False)
        plain.set_submodule(name, linear)
    del plain.peft_config
    return plain


def merge(plain: Module, adapted: Module, adapters: Mapping[str, Tensor], base: Module) -> None:
    """Give `plain` the weights W + s B A, added up in float32 and rounded to its dtype.

    Args:
        plain: a model without adapters, whose other weights are right already.
        adapted: the model in training: it knows which layers have adapters, and their scale.
        adapters: the matrices by parameter name, float32.
        base: a model with the weights W; `adapted`, or `plain` itself.
    """
    with torch.no_grad():
        for name, layer in _adapters(adapted):
            a, b = (adapters[f"{name}.lora_{part}.{NAME}.weight"] for part in "AB")
            change = layer.scaling[NAME] * (b.float() @ a.float())
            frozen, weight = (m.get_parameter(f"{name}.weight") for m in (base, plain))
            weight.copy_(frozen.float() + change.to(frozen.device))


def _adapters(model: Module) -> Iterator[tuple[str, LoraLayer]]:
    """(name, layer) of every layer that has an adapter."""
    from peft.tuners.lora import LoraLayer

    yield from [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]


def _targets(model: PreTrainedModel, wanted: list[str] | None) -> list[str]:
    """The full names of the linear layers to adapt: all but the output head, or those whose name
    is, or ends in, one of `wanted`."""
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, Linear) and m is not head]
    if wanted is None:
        return linear
    chosen: dict[str, None] = {}
    for target in wanted:
        found = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not found:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise InputError(
                f"lora.target_modules: {target}: the model has no linear layer of that name that "
                f"can be adapted; it has {known}"
            )
        chosen |= dict.fromkeys(found)
    return list(chosen)
