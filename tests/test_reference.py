"""The reference model: its logprobs reach penalties and implicit rewards, or are asked for."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from entrograd.errors import InputError
from entrograd.methods.params import MethodParams
from entrograd.methods.presets import PRESETS
from entrograd.methods.registry import recipe
from entrograd.models.load import load_model
from entrograd.storage.tables import write_table
from entrograd.train.forward_backward import StepSettings
from entrograd.train.offline import train_offline
from entrograd.train.online import train_online
from entrograd.train.reference import load_reference
from helpers.tables import annotated_rows, groups
from helpers.tiny_model import write_tiny_model
from helpers.training import pipeline_params

SETTINGS = StepSettings(temperature=0.7, max_length=4, token_budget=1000)
KL = {"name": "grpo", "grpo": {"kl_coefficient": 0.3}}


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("other") / "model", seed=5)


def by_hand(model: Any, row: dict[str, Any], temperature: float) -> list[float]:
    ids = torch.tensor([[*row["prompt_ids"], *row["completion_ids"]]])
    with torch.no_grad():
        table = (model(ids).logits[0].double() / temperature).log_softmax(-1)
    start = len(row["prompt_ids"]) - 1
    return [float(table[start + k, token]) for k, token in enumerate(row["completion_ids"])]


class TestReference:
    def test_logprobs_are_those_of_its_plain_forward(
        self, tiny_model: Path, other_model: Path
    ) -> None:
        policy = load_model(tiny_model, "float32", "cpu")
        chosen = recipe(MethodParams.model_validate(KL))
        reference = load_reference(chosen, str(other_model), policy, "float32", SETTINGS)
        assert reference is not None
        rows = annotated_rows()
        built = groups(rows)
        reference.add_logprobs(built)
        plain = load_model(other_model, "float32", "cpu")
        completions = [completion for group in built for completion in group.completions]
        for row, completion in zip(rows, completions, strict=True):
            found = completion.tokens["ref_logprobs"]
            assert found.tolist() == pytest.approx(by_hand(plain, row, 0.7), abs=1e-5)
        kept = completions[0].tokens["ref_logprobs"]
        reference.add_logprobs(built)
        assert completions[0].tokens["ref_logprobs"] is kept

    def test_not_loaded_where_no_method_reads_it(self, tiny_model: Path) -> None:
        policy, chosen = load_model(tiny_model, "float32", "cpu"), recipe(MethodParams(name="grpo"))
        assert load_reference(chosen, "no such folder", policy, "float32", SETTINGS) is None

    def test_another_vocabulary_is_refused(self, tiny_model: Path, tmp_path: Path) -> None:
        policy, chosen = (
            load_model(tiny_model, "float32", "cpu"),
            recipe(MethodParams.model_validate(KL)),
        )
        smaller = load_model(tiny_model, "float32", "cpu")
        smaller.resize_token_embeddings(50)
        smaller.save_pretrained(tmp_path / "small")
        with pytest.raises(InputError, match="knows 50 tokens, the model in training"):
            load_reference(chosen, str(tmp_path / "small"), policy, "float32", SETTINGS)

    def test_the_sampling_policy_as_its_own_reference_is_said(
        self, tiny_model: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        policy = load_model(tiny_model, "float32", "cpu")
        chosen = recipe(MethodParams(name="asr"))
        rows = annotated_rows()
        for row in rows:
            row["old_logprobs"] = by_hand(policy, row, 0.7)
        reference = load_reference(chosen, str(tiny_model), policy, "float32", SETTINGS)
        assert reference is not None
        with caplog.at_level(logging.WARNING, "entrograd"):
            reference.add_logprobs(groups(rows))
        assert "the reference is the policy that sampled" in caplog.text


class TestOffline:
    def train(self, tmp_path: Path, model: Path, reference: Path | None, method: Any) -> Any:
        write_table(tmp_path / "t.parquet", annotated_rows(), "annotated")
        params = pipeline_params(
            method=method,
            train_offline={
                "epochs": 1,
                "prompts_per_update": 2,
                "reference": str(reference) if reference else None,
            },
        )
        train_offline(
            params.train_offline,
            params.method,
            model,
            tmp_path / "t.parquet",
            tmp_path / "out",
            tmp_path / "curve.csv",
            tmp_path / f"work-{method}",
        )
        with (tmp_path / "curve.csv").open() as file:
            return next(csv.DictReader(file))

    def test_the_penalty_by_hand(self, tiny_model: Path, other_model: Path, tmp_path: Path) -> None:
        plain = self.train(tmp_path, tiny_model, None, {"name": "grpo"})
        penalised = self.train(tmp_path, tiny_model, other_model, KL)
        # k3: e^d - d - 1 with d = log pi_ref - log pi, a completion's mean, then over completions
        policy, reference = (load_model(m, "float32", "cpu") for m in (tiny_model, other_model))
        means = []
        for row in annotated_rows():
            now, ref = (torch.tensor(by_hand(m, row, 1.0)) for m in (policy, reference))
            means.append(float(((ref - now).exp() - (ref - now) - 1).mean()))
        expected = 0.3 * sum(means) / len(means)
        assert expected > 0.01
        found = float(penalised["loss"]) - float(plain["loss"])
        assert found == pytest.approx(expected, rel=1e-4)
        assert float(penalised["kl_ref"]) > 0

    def test_asr_keeps_what_the_reference_makes_it_keep(
        self, tiny_model: Path, other_model: Path, tmp_path: Path
    ) -> None:
        block = {"segmentation": "token", "keep_denominator": True}
        row = self.train(tmp_path, tiny_model, other_model, {"name": "asr", "asr": block})
        reference = load_model(other_model, "float32", "cpu")
        kept = total = 0
        for number, item in enumerate(annotated_rows()[:3]):  # the group with a signal
            sign = -1 if number == 1 else 1
            for old, ref in zip(item["old_logprobs"], by_hand(reference, item, 1.0), strict=True):
                kept += sign * (old - ref) > 0
                total += 1
        assert 0 < kept < total
        assert float(row["kept_tokens"]) == pytest.approx(kept / total)

    def test_asked_for_before_a_model_is_loaded(self, tmp_path: Path) -> None:
        for method in (KL, {"name": "asr"}):
            with pytest.raises(InputError, match=r"train_offline\.reference: method .*models/base"):
                self.train(tmp_path, tmp_path / "no model", None, method)


class TestOnline:
    def run(self, tmp_path: Path, model: Path, reference: Path | None, method: Any) -> Any:
        prompts = [
            {
                "prompt_id": f"id{i}",
                "source": "s",
                "split": "train",
                "problem": f"{i}",
                "answers": ["7"],
                "prompt_text": f"{i} = ",
            }
            for i in range(2)
        ]
        write_table(tmp_path / "prompts.parquet", prompts, "prompts")
        params = pipeline_params(
            rollout={"group_size": 4, "sampling": {"max_new_tokens": 2}},
            train_online={
                "rounds": 2,
                "prompts_per_round": 2,
                "reference": str(reference) if reference else None,
            },
            method=method,
        )
        (tmp_path / "work").mkdir()
        out = [tmp_path / name for name in ("model", "rounds", "curve.csv", "work")]
        train_online(params, model, tmp_path / "prompts.parquet", *out)
        with (tmp_path / "curve.csv").open() as file:
            return list(csv.DictReader(file))

    def test_rounds_are_held_against_it(
        self, tiny_model: Path, other_model: Path, tmp_path: Path
    ) -> None:
        rows = self.run(tmp_path, tiny_model, other_model, KL)
        assert all(float(row["kl_ref"]) > 0 for row in rows)
        # wrong answers only: the penalty alone moves the policy
        assert all(float(row["grad_norm"]) > 0 for row in rows)

    def test_asked_for_before_a_model_is_loaded(self, tmp_path: Path) -> None:
        for name, section in (("asr", {}), ("grpo", {"grpo": KL["grpo"]})):
            with pytest.raises(InputError, match=r"train_online\.reference: method"):
                self.run(tmp_path / name, tmp_path / "none", None, {"name": name, **section})
        method = {"name": "asr", "asr": {"source": "reward_model"}}
        with pytest.raises(InputError, match=r"token_scores, which only a table of your own"):
            self.run(tmp_path / "scores", tmp_path / "none", None, method)


def test_the_reference_is_an_input_of_its_stage() -> None:
    params = pipeline_params(train_offline={"reference": "models/base"}, method={"name": "grpo"})
    assert params.train_offline.files() == ["models/base"]
    assert params.train_online.files() == []


def test_a_choice_needs_what_it_reads_and_no_more() -> None:
    for choices, needs in (
        ({"name": "asr"}, {"old_logprobs", "ref_logprobs"}),
        ({"name": "asr", "advantage": "grpo"}, set()),
        ({"name": "grpo", "loss": "grpo_s"}, set()),
        ({"name": "seed_grpo", "weighting": "none"}, set()),
        ({"name": "grpo", "reward": "empo"}, {"cluster_id"}),
    ):
        assert recipe(MethodParams.model_validate(choices)).required_columns == needs
    for preset in PRESETS:
        chosen = recipe(MethodParams(name=preset))
        parts = (part.required_columns for part in chosen.components)
        assert chosen.required_columns == set().union(*parts)
