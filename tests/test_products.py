"""Products of inference: the model's outputs, as few products as inputs, nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from entrograd.models.cpu import products
from helpers.model_families import SHAPE, family


@pytest.fixture(params=["llama", "qwen", "gemma"])
def model(request: pytest.FixtureRequest) -> Any:
    model = family(request.param, "sdpa")
    for name, weight in model.named_parameters():
        if name.endswith("bias"):  # Qwen has them on q, k and v
            torch.nn.init.normal_(weight)
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def test_the_models_outputs_and_nothing_left_behind(model: Any) -> None:
    ids = torch.arange(24).view(3, 8)
    with torch.no_grad():
        plain = logits(model, ids)
    with products.inference(model) as head:
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(head(states), plain, rtol=1e-5, atol=1e-5)
    assert not any("forward" in vars(module) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(logits(model, ids), plain)


def test_layers_of_one_input_are_one_product(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply, rows = products._packed_linear, []

    def counted(packed: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
        result = multiply(packed, bias, inputs)
        rows.append(result.shape[-1])
        return result

    monkeypatch.setattr(products, "_packed_linear", counted)
    with products.inference(model):
        model.get_decoder()(input_ids=torch.arange(8)[None], use_cache=False)
    attention = model.get_decoder().layers[0].self_attn
    width = sum(getattr(attention, f"{name}_proj").out_features for name in "qkv")
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    assert rows == [width, hidden, 2 * inner, hidden] * SHAPE["num_hidden_layers"]


def test_new_weights_are_taken_on_entering(model: Any) -> None:
    ids = torch.arange(8)[None]
    with products.inference(model):
        before = logits(model, ids).clone()
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            layer.self_attn.k_proj.weight.mul_(2)
            layer.mlp.up_proj.weight.mul_(2)
        plain = logits(model, ids)
    with products.inference(model):
        after = logits(model, ids)
    torch.testing.assert_close(after, plain, rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


def test_another_input_between_them_is_computed_anew() -> None:
    """A model that gives its projections different inputs gets the product of each."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 4) for _ in range(3)]
    inputs = [torch.randn(2, 8) for _ in range(3)]
    with torch.inference_mode():
        outputs = products._Outputs(layers)
        for order in ([0, 1, 2], [2, 0, 1], [1, 1, 2]):
            for place in order:
                found = outputs.take(place, inputs[place])
                torch.testing.assert_close(found, layers[place](inputs[place]))
