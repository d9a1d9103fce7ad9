"""One forward for old_logprobs, entropies and the first update."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from entrograd.data.groups import PromptGroup
from entrograd.methods.params import MethodParams
from entrograd.methods.presets import PRESETS
from entrograd.methods.registry import recipe
from entrograd.models import forward
from entrograd.models.load import load_model
from entrograd.train import forward_backward as passes_module
from entrograd.train import scoring as module
from entrograd.train.batch import examples
from entrograd.train.forward_backward import StepSettings
from entrograd.train.optimizer import Optimizer
from entrograd.train.params import Optimizer as OptimizerParams
from entrograd.train.policy import Policy
from entrograd.train.scoring import Scoring
from entrograd.train.step import train_step
from helpers.tables import annotated_rows, groups


@pytest.fixture(autouse=True)
def _float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's RMSNorm rounds to float32 whatever the model's dtype; here it does not."""

    def normalised(self: Any, states: torch.Tensor) -> torch.Tensor:
        variance = states.square().mean(-1, keepdim=True)
        weight: torch.Tensor = self.weight
        return weight * states * torch.rsqrt(variance + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", normalised)


def rows() -> list[dict[str, Any]]:
    """Three groups of three with every column a method may read; the second has no signal."""
    first, second = annotated_rows()[:3], annotated_rows()[3:]
    third = [{**row, "prompt_id": "p2", "prompt_ids": [5, 6, 20, 21]} for row in first]
    return [
        {
            **row,
            "segment_ids": [0] * len(row["completion_ids"]),
            "reward_heads": [
                {"name": "a", "value": row["reward"]},
                {"name": "b", "value": 0.25 * row["sample_index"]},
            ],
        }
        for row in [*first, *second, *third]
    ]


def float64_policy(path: Path) -> tuple[Any, Optimizer]:
    model = load_model(path, "float32", "cpu").to(torch.float64)
    return model, Optimizer(model, {}, OptimizerParams(lr=1e-3), updates=5)


def annotate(drawn: list[PromptGroup], score: Scoring) -> None:
    completions = [completion for group in drawn for completion in group.completions]
    for completion, (logprobs, entropies) in zip(completions, score(drawn), strict=True):
        completion.tokens |= {"old_logprobs": logprobs, "entropies": entropies}


def one_round(path: Path, method: str, budget: int, keep: bool) -> tuple[dict[str, float], Any]:
    model, optimizer = float64_policy(path)
    settings = StepSettings(0.9, 4, budget)
    score = Scoring(model, settings, 1000)
    drawn = groups(rows())
    annotate(drawn, score)
    kept = score.take()
    built = examples(drawn, torch.device("cpu"))
    if method == "asr":  # a reference policy pulls on the group without signal too
        reference = replace(built.batch, ref_logprobs=built.batch.old_logprobs - 0.1)
        built = replace(built, batch=reference)
    gradients: list[torch.Tensor] = []
    optimizer.adamw.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.clone() for p in model.parameters())
    )
    measured = train_step(
        Policy(model, optimizer),
        recipe(MethodParams(name=method)).fitted({"a": 0.7, "b": 1.1}),
        built,
        settings,
        kept if keep else None,
    )
    return measured, gradients


@pytest.mark.parametrize("budget", [12, 1000])
@pytest.mark.parametrize("method", sorted(PRESETS))
def test_the_kept_forward_gives_the_step_of_separate_passes(
    tiny_model: Path, method: str, budget: int
) -> None:
    (one, gradients), (other, others) = (
        one_round(tiny_model, method, budget, keep) for keep in (True, False)
    )
    assert one == pytest.approx(other, abs=1e-10, rel=1e-10)
    assert one["grad_norm"] > 0
    assert gradients
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_an_on_policy_round_has_one_forward(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def counted(model: Any, prompts: Any, completions: Any, *options: Any) -> Any:
        seen.append(len(completions))
        return forward.completion_logprobs(model, prompts, completions, *options)

    monkeypatch.setattr(module, "completion_logprobs", counted)
    monkeypatch.setattr(passes_module, "completion_logprobs", counted)
    measured, _ = one_round(tiny_model, "grpo", 1000, keep=True)
    assert seen == [6]  # the group without signal is scored without a graph
    assert abs(measured["kl"]) < 1e-7  # old_logprobs are stored in float32


def test_scores_are_those_of_score_in_the_rows_order(tiny_model: Path) -> None:
    model, _ = float64_policy(tiny_model)
    drawn = rows()
    want = forward.score(
        model, [r["prompt_ids"] for r in drawn], [r["completion_ids"] for r in drawn], 0.9, 1000
    )
    for budget in (1, 12, 1000):
        got = Scoring(model, StepSettings(0.9, 4, budget), 30)(groups(drawn))
        for (a, b), (c, d) in zip(got, want, strict=True):
            assert a.tolist() == pytest.approx(c, abs=1e-12)
            assert b.tolist() == pytest.approx(d, abs=1e-12)


def test_what_is_kept_is_kept_for_one_update(tiny_model: Path) -> None:
    model, _ = float64_policy(tiny_model)
    score = Scoring(model, StepSettings(1.0, 4, 1000), 1000)
    score(groups(rows()))
    kept = score.take()
    assert kept is not None
    assert kept.rows.tolist() == [0, 1, 2, 6, 7, 8]
    assert kept.logprobs.requires_grad
    assert score.take() is None
    score(groups([{**row, "reward": 1.0} for row in rows()]))
    assert score.take() is None


def test_a_wrong_guess_of_the_signal_costs_no_gradient(tiny_model: Path) -> None:
    """A kept group that turns out without advantages leaves; one not kept has its own forward."""
    model, optimizer = float64_policy(tiny_model)
    drawn = groups(rows())
    score = Scoring(model, StepSettings(1.0, 4, 1000), 1000)
    annotate(drawn, score)
    kept = score.take()
    for group in drawn:  # now only the group that was not kept has a signal
        for completion in group.completions:
            signal = group.prompt_id == "p1" and completion.sample_index == 0
            completion.reward = float(signal)
    settings = StepSettings(1.0, 4, 1000)
    batch = examples(drawn, torch.device("cpu"))
    method = recipe(MethodParams(name="grpo"))
    got = train_step(Policy(model, optimizer), method, batch, settings, kept)
    plain, second = float64_policy(tiny_model)
    want = train_step(Policy(plain, second), method, batch, settings)
    assert got == pytest.approx(want, abs=1e-10)
    assert got["grad_norm"] > 0
