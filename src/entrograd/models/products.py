"""Matrix products of inference on a CPU, by oneDNN on weights packed once.

Torch multiplies float32 matrices with MKL, which leaves much of a processor not made by Intel
unused, and lays bfloat16 weights out anew in every product. oneDNN on packed weights is, at 16 rows
of SmolLM2-135M on an AMD Zen 5, 2.4 times as fast in float32 and 1.4 times in bfloat16, in the same
precision (sums in float32). It knows no gradients, hence inference alone; the packed weights are
a second copy while it lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear
from torch.nn.functional import linear

Product = Callable[[Tensor], Tensor]

ROWS = 16  # the number of rows that weights are packed for; others cost little more


def product(weight: Tensor, bias: Tensor | None = None) -> Product:
    """inputs [..., K] -> inputs @ weight.T + bias, for weight [N, K] as it is now; no gradient
    flows."""
    if not uses_onednn(weight):
        return partial(linear, weight=weight, bias=bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
    return partial(_packed_linear, packed, bias)


def uses_onednn(weight: Tensor) -> bool:
    """Whether products with this weight are oneDNN's: on a CPU, in a precision it has there."""
    return (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (
            weight.dtype == torch.float32
            or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )


def _packed_linear(packed: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
    return result


@contextmanager
def inference(model: Any) -> Iterator[Product]:
    """Inference mode in which the model's linear layers are `product`s of their weights. Yields
    that of the output head: states [N, D] -> logits [N, V]."""
    head = model.get_output_embeddings()
    layers = [
        module
        for module in model.modules()
        if type(module) is Linear and module is not head and "forward" not in vars(module)
    ]
    try:
        with torch.inference_mode():
            for layer in layers:
                vars(layer)["forward"] = product(layer.weight, layer.bias)
            yield product(head.weight)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
