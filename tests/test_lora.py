"""LoRA: adapters alone are trained; what samples and is saved is the same model without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from entrograd.errors import InputError
from entrograd.models.forward import completion_logprobs
from entrograd.models.load import load_model, load_tokenizer, policy_version
from entrograd.pipeline.sections import Params
from entrograd.train import forward_backward, step
from entrograd.train.lora import add_adapters
from entrograd.train.optimizer import Optimizer
from entrograd.train.params import Lora, TrainOfflineParams
from entrograd.train.params import Optimizer as OptimizerParams
from entrograd.train.policy import Policy
from golden.make import SETTINGS, batch, choose, float64_model
from helpers.training import RUNS, Killed, params, stop_at

LORA = Lora(rank=4, alpha=6)


def adapted(
    path: Path, dtype: str = "float32", optimizer: OptimizerParams | None = None, lora: Lora = LORA
) -> Policy:
    """A policy with adapters, for three updates."""
    params = TrainOfflineParams.model_validate(
        {"dtype": dtype, "device": "cpu", "lora": lora, "seed": 1, "optimizer": optimizer or {}}
    )
    return Policy.load(path, params, 3)


def trained(path: Path, dtype: str = "float32", lora: Lora = LORA, lr: float = 0.01) -> Policy:
    """A policy with adapters after three updates of GRPO."""
    policy = adapted(path, dtype, OptimizerParams(lr=lr), lora)
    for seed in range(3):
        measured = step.train_step(policy, choose("grpo"), batch(seed), SETTINGS)
        assert measured["grad_norm"] > 0
    return policy


def logprobs(model: Any) -> torch.Tensor:
    examples = batch(9)
    with torch.no_grad():
        return completion_logprobs(model, examples.prompt_ids, examples.completion_ids, 0.8)[0]


def by_layer(model: Any) -> dict[str, Any]:
    """The layers with adapters, by the name they have without."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}


def test_the_merged_model_is_the_adapted_one(tiny_model: Path, tmp_path: Path) -> None:
    policy = trained(tiny_model)
    adapted, before = logprobs(policy.model), logprobs(load_model(tiny_model, "float32", "cpu"))
    assert (adapted - before).abs().max() > 0.01
    sampler = policy.sampler()
    assert (logprobs(sampler) - adapted).abs().max() < 1e-5
    version = policy_version(sampler)
    policy.save(load_tokenizer(tiny_model), tmp_path / "out", None)
    saved = load_model(tmp_path / "out", "float32", "cpu")
    assert (logprobs(saved) - adapted).abs().max() < 1e-5
    assert policy_version(saved) == version
    assert load_file(tmp_path / "out/model.safetensors").keys() == (
        load_file(tiny_model / "model.safetensors").keys()
    )
    for layer in by_layer(policy.model).values():  # PEFT's own merge
        layer.merge()
    for name, layer in by_layer(policy.model).items():
        weight = saved.get_submodule(name).weight
        assert (layer.base_layer.weight - weight).abs().max() < 1e-6, name


def test_adapters_alone_are_trained(tiny_model: Path) -> None:
    policy = trained(tiny_model)
    original = dict(load_model(tiny_model, "float32", "cpu").named_parameters())
    for name, weight in policy.model.named_parameters():
        if "lora_" in name:
            assert weight.requires_grad
            continue
        assert not weight.requires_grad
        assert weight.grad is None
        assert torch.equal(weight, original[name.replace(".base_layer", "")]), name
    layers = by_layer(policy.model)
    assert len(layers) == 2 * 7  # q, k, v, o, gate, up, down of two layers
    expected = {f"{name}.lora_{part}.default.weight" for name in layers for part in "AB"}
    assert set(policy.optimizer.masters) == expected
    assert {id(p) for p in policy.optimizer.adamw.state} == {
        id(m) for m in policy.optimizer.masters.values()
    }


def test_the_sampler_shares_what_has_no_adapter(tiny_model: Path) -> None:
    policy = trained(tiny_model, lora=LORA.model_copy(update={"target_modules": ["q_proj"]}))
    mine = {p.data_ptr() for p in policy.model.parameters()}
    other = {n for n, p in policy.sampler().named_parameters() if p.data_ptr() not in mine}
    assert other == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert policy.sampler() is policy.sampler()


def test_the_sampler_is_written_as_any_model_is(tiny_model: Path, tmp_path: Path) -> None:
    """As vLLM's new weights are: a plain folder, whose version is the sampler's."""
    sampler = trained(tiny_model).sampler()
    sampler.save_pretrained(tmp_path / "weights")
    written = load_model(tmp_path / "weights", "float32", "cpu")
    assert policy_version(written) == policy_version(sampler)
    assert not list((tmp_path / "weights").glob("adapter*"))


def test_gradients_are_those_of_the_weights_they_change(tiny_model: Path) -> None:
    """With W + s B A: dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, dL/dW of the plain model."""
    policy = trained(tiny_model)
    examples = batch(4)

    def gradients(model: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        values, _ = completion_logprobs(model, examples.prompt_ids, examples.completion_ids, 1.0)
        values.sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain = policy.sampler().requires_grad_()
    dense = gradients(plain)
    policy.model.requires_grad_(False)
    for name, weight in policy.model.named_parameters():
        weight.requires_grad_("lora_" in name)
    found = gradients(policy.model)
    scale = 6.0 / 4
    for name in by_layer(policy.model):
        a, b = (policy.optimizer.masters[f"{name}.lora_{part}.default.weight"] for part in "AB")
        whole = dense[f"{name}.weight"]
        for part, want in (("A", scale * b.T @ whole), ("B", scale * whole @ a.T)):
            gradient = found[f"{name}.lora_{part}.default.weight"]
            assert (gradient - want).abs().max() < 1e-4 * want.abs().max(), (name, part)


def test_bfloat16_adapters_have_float32_masters(tiny_model: Path, tmp_path: Path) -> None:
    """Saved: the float32 weights of the file plus the masters' product, to float32's precision,
    though the model in training rounds both to bfloat16."""
    policy = trained(tiny_model, "bfloat16", lr=1e-4)
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    assert {m.dtype for m in policy.optimizer.masters.values()} == {torch.float32}
    masters = {n: m.detach().clone() for n, m in policy.optimizer.masters.items()}
    sampler = dict(policy.sampler().named_parameters())
    policy.save(load_tokenizer(tiny_model), tmp_path / "out", None)
    original = load_file(tiny_model / "model.safetensors")
    saved = load_file(tmp_path / "out/model.safetensors")
    changed = 0
    for name, weight in original.items():
        assert saved[name].dtype == torch.float32
        layer = name.removesuffix(".weight")
        want = weight
        if f"{layer}.lora_B.default.weight" in masters:
            a, b = (masters[f"{layer}.lora_{part}.default.weight"] for part in "AB")
            want = weight + 1.5 * b @ a
            changed += 1
            assert (saved[name] - weight).abs().max() > 0
        assert (saved[name] - want).abs().max() < 1e-6, name
        assert sampler[name].dtype == torch.bfloat16
        assert (sampler[name].float() - want).abs().max() < 2**-7 * want.abs().max(), name
    assert changed == 2 * 7


def test_any_division_of_the_batch_is_the_same_update(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 x 12, 3 x 4 and 12 x 1 rows a pass, with and without sharing the prompt, in float64."""
    results = []
    for shared in (True, False):
        for size in (12, 4, 1):
            parts = list(torch.arange(12).split(size))
            monkeypatch.setattr(forward_backward, "micro_batches", lambda *_, parts=parts: parts)
            subject = float64_model(tiny_model)
            add_adapters(subject, LORA, seed=1)
            for name, weight in subject.named_parameters():
                if "lora_B" in name:  # zero: A would have no gradient
                    torch.nn.init.normal_(weight, std=0.1, generator=torch.manual_seed(3))
            optimizer = Optimizer(subject, {}, OptimizerParams(lr=1e-3), 1)
            settings = replace(SETTINGS, share_prompts=shared)
            measured = step.train_step(
                Policy(subject, optimizer), choose("gtpo"), batch(5), settings
            )
            results.append((measured, optimizer.masters))
    first, weights = results[0]
    assert first["grad_norm"] > 0
    for measured, others in results[1:]:
        for key in ("loss", "grad_norm"):
            assert measured[key] == pytest.approx(first[key], rel=1e-10, abs=1e-10)
        for name, weight in weights.items():
            assert weight.dtype == torch.float64
            assert (others[name] - weight).abs().max() < 1e-10, name


def test_layers_computed_again_give_the_same_gradient(tiny_model: Path) -> None:
    options = OptimizerParams(gradient_checkpointing=True)
    policy = adapted(tiny_model, optimizer=options)
    measured = step.train_step(policy, choose("grpo"), batch(0), SETTINGS)
    plain = adapted(tiny_model)
    other = step.train_step(plain, choose("grpo"), batch(0), SETTINGS)
    assert measured["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert measured["grad_norm"] > 0


def with_lora(dtype: str, **checkpoint: Any) -> Params:
    """`params` of the resume tests, with adapters in both stages."""
    whole = params(**checkpoint)
    changed = {"lora": LORA, "dtype": dtype}
    return whole.model_copy(
        update={
            "train_offline": whole.train_offline.model_copy(update=changed),
            "train_online": whole.train_online.model_copy(update=changed),
        }
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", RUNS)
def test_stopped_at_every_update_it_gives_the_same_bits(
    kind: str, dtype: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = with_lora(dtype, keep_best="-loss")
    (tmp_path / "whole").mkdir()
    whole = RUNS[kind](chosen, tiny_model, tmp_path / "whole")
    (tmp_path / "stopped").mkdir()
    for _ in range(7):
        with monkeypatch.context() as patch:
            stop_at(patch, kind, 1)
            with pytest.raises(Killed):
                RUNS[kind](chosen, tiny_model, tmp_path / "stopped")
    checkpoint = load_file(
        max((tmp_path / "stopped/resume/checkpoints").glob("update-*")) / "weights.safetensors"
    )
    assert checkpoint
    assert all("lora_" in name for name in checkpoint)
    assert RUNS[kind](chosen, tiny_model, tmp_path / "stopped") == whole
    names = load_file(tiny_model / "model.safetensors").keys()
    for place in ("out", "out/best"):
        assert load_file(tmp_path / "whole" / place / "model.safetensors").keys() == names


def test_rounds_are_drawn_from_the_merged_weights(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version every row names is that of the plain model that would be saved then."""
    from entrograd.storage.tables import read_table
    from entrograd.train import online

    versions = []
    real = online.train_step

    def after(policy: Any, *rest: Any) -> dict[str, float]:
        measured = real(policy, *rest)
        model, optimizer = policy.model, policy.optimizer
        if optimizer.done % 2 == 0:  # two updates a round
            plain = load_model(tiny_model, "float32", "cpu")
            with torch.no_grad():
                for name in by_layer(model):
                    a, b = (optimizer.masters[f"{name}.lora_{k}.default.weight"] for k in "AB")
                    plain.get_submodule(name).weight += 1.5 * (b @ a)
            versions.append(policy_version(plain))
        return measured

    monkeypatch.setattr(online, "train_step", after)
    RUNS["online"](with_lora("float32"), tiny_model, tmp_path)
    drawn = read_table(tmp_path / "rounds", "annotated").column("policy_version").to_pylist()
    first = policy_version(load_model(tiny_model, "float32", "cpu"))
    assert list(dict.fromkeys(drawn)) == list(dict.fromkeys([first, *versions[:3]]))
    assert len(set(drawn)) > 1
    assert policy_version(load_model(tmp_path / "out", "float32", "cpu")) == versions[3]


class TestTargets:
    def test_are_named_by_the_end_of_their_names(self, tiny_model: Path) -> None:
        model = load_model(tiny_model, "float32", "cpu")
        add_adapters(model, Lora(target_modules=["self_attn.q_proj", "1.mlp.up_proj"]), 0)
        assert sorted(by_layer(model)) == [
            "model.layers.0.self_attn.q_proj",
            "model.layers.1.mlp.up_proj",
            "model.layers.1.self_attn.q_proj",
        ]

    @pytest.mark.parametrize("name", ["qq_proj", "proj", "lm_head", "embed_tokens"])
    def test_an_unknown_one_is_named(self, tiny_model: Path, name: str) -> None:
        model = load_model(tiny_model, "float32", "cpu")
        with pytest.raises(InputError) as refused:
            add_adapters(model, Lora(target_modules=["q_proj", name]), 0)
        assert f"lora.target_modules: {name}: the model has no linear layer" in str(refused.value)
        assert "it has down_proj, gate_proj, k_proj, o_proj, q_proj" in str(refused.value)
        assert not by_layer(model)

    def test_equal_seeds_draw_equal_adapters(self, tiny_model: Path) -> None:
        drawn: list[str] = []
        for seed in (1, 1, 2):
            torch.rand(len(drawn) + 1)  # wherever torch's own generator stands
            model = load_model(tiny_model, "float32", "cpu")
            state = torch.get_rng_state()
            add_adapters(model, LORA, seed)
            assert torch.equal(torch.get_rng_state(), state)
            drawn.append(policy_version(model))
        assert drawn[0] == drawn[1] != drawn[2]
