"""params.yaml: what is wrong is named by key, with what is allowed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from entrograd.annotate.params import AnnotateStage
from entrograd.cli.main import main
from entrograd.errors import InputError
from entrograd.methods.params import MethodParams
from entrograd.params import execution, models_in
from entrograd.pipeline.keys import RENAMED
from entrograd.pipeline.rules import read
from entrograd.pipeline.sections import Params
from entrograd.rollout.params import RolloutStage
from helpers.paths import SHIPPED


@pytest.fixture
def content() -> dict[str, Any]:
    known: dict[str, Any] = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    return copy.deepcopy(known)


def message(tmp_path: Path, content: dict[str, Any]) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read(file, Params)
    text = str(caught.value)
    assert text.startswith(f"{file}: ")  # the file that was read, whatever its name
    return text.removeprefix(f"{file}: ")


def test_an_unknown_key_is_named_with_those_allowed(tmp_path: Path, content: Any) -> None:
    content["train_online"]["optimizer"]["rate"] = 1.0
    found = message(tmp_path, content)
    assert found.startswith("train_online.optimizer.rate: unknown key; allowed here: betas, eps,")
    assert found.endswith("(got 1.0)")


def test_a_source_of_no_kind_names_the_kinds(tmp_path: Path, content: Any) -> None:
    content["prepare"]["sources"] = [{"path": "a.jsonl"}]
    kinds = "file, hub, reasoning_gym"
    found = message(tmp_path, content)
    assert found.startswith("prepare.sources.0: no kind; allowed: ")
    assert sorted(found.partition("allowed: ")[2].split(", ")) == kinds.split(", ")


def test_a_key_of_a_source_is_named_as_it_is_written(tmp_path: Path, content: Any) -> None:
    content["prepare"]["sources"] = [{"kind": "file"}]
    assert message(tmp_path, content) == "prepare.sources.0.path: is missing"
    content["prepare"]["sources"] = [{"kind": "file", "path": "a.jsonl", "paht": 1}]
    found = message(tmp_path, content)
    assert found.startswith("prepare.sources.0.paht: unknown key; allowed here: ")
    assert "task" not in found  # of another kind


def test_keys_that_do_not_fit_together_are_named_alone(tmp_path: Path, content: Any) -> None:
    content["rollout"]["sampling"]["top_p"] = 0.9
    found = message(tmp_path, content)
    assert found.startswith("rollout.sampling.top_p: completions come from a filtered distribution")
    assert "got" not in found


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_no_parameter_is_infinite(tmp_path: Path, content: Any, value: float) -> None:
    content["rollout"]["sampling"]["temperature"] = value
    assert "rollout.sampling.temperature: " in message(tmp_path, content)


def test_devices(tmp_path: Path, content: Any) -> None:
    content["execution"]["train_online"] = {"device": "tpu"}
    assert message(tmp_path, content) == (
        "execution.train_online.device: allowed: auto, cpu, cuda, or cuda:N for the GPU of that "
        "number (got 'tpu')"
    )


@pytest.mark.parametrize("text", ["1e-5", "1E-05", "+1.e-5", "1.0e-5", "0.00001"])
def test_numbers_as_dvc_reads_and_writes_them(tmp_path: Path, text: str) -> None:
    whole = SHIPPED.read_text(encoding="utf-8")
    file = tmp_path / "params.yaml"
    file.write_text(whole.replace("lr: 1.0e-5", f"lr: {text}"), encoding="utf-8")
    assert read(file, Params).train_online.optimizer.lr == 1e-5


@pytest.mark.parametrize(
    ("section", "title"),
    [
        ({"name": "gtpo"}, "gtpo"),
        ({"name": "gtpo", "weighting": "seed_grpo"}, "gtpo (weighting: seed_grpo)"),
        (
            {"name": "grpo", "reward": "encore", "loss": "dapo"},
            "grpo (reward: encore, loss: dapo)",
        ),
    ],
)
def test_a_recipe_is_called_by_all_its_choices(section: dict[str, str], title: str) -> None:
    assert MethodParams.model_validate(section).title == title


@pytest.mark.parametrize("stage", ["train_offline", "train_online"])
def test_a_column_no_curve_has_is_found_by_check(
    tmp_path: Path, content: Any, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content[stage]["checkpoint"] = {"keep_best": "reward_maen"}
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["check", str(file)]) == 2
    error = capsys.readouterr().err
    assert f"{stage}.checkpoint.keep_best: no learning curve has 'reward_maen'; take " in error
    assert "reward_mean" in error
    content[stage]["checkpoint"] = {"keep_best": "-loss"}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["check", str(file)]) == 0
    assert "valid; method gtpo (weighting: seed_grpo) needs" in capsys.readouterr().out


def test_a_folder_is_no_parameters(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read: Is a directory"):
        read(tmp_path, Params)


class TestExecution:
    """What changes no result stands in a section of its own, and only there."""

    def test_it_is_read_with_the_section_it_is_about(self, tmp_path: Path, content: Any) -> None:
        content["execution"] = {
            "annotate": {"grader": {"workers": 7}, "executor": {"kind": "processes"}},
            "train_online": {"checkpoint": {"keep_last": 5}, "token_budget": 99},
        }
        file = tmp_path / "params.yaml"
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        chosen = read(file, Params)
        assert chosen.annotate.grader.workers == 7
        assert chosen.annotate.executor.kind == "processes"
        assert chosen.annotate.grader.timeout_seconds == 5.0
        assert chosen.train_online.checkpoint.keep_last == 5
        assert execution(chosen.train_online)["token_budget"] == 99
        content["execution"] = None
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        plain = read(file, Params)
        assert plain != chosen
        assert plain.model_dump() == chosen.model_dump()  # what DVC and unfinished work depend on

    @pytest.mark.parametrize(
        "key",
        [
            *("rollout.shard_prompts", "annotate.grader.workers", "evaluate.grader.workers"),
            *("train_online.checkpoint.keep_last", "rollout.vllm.url", "rollout.executor.kind"),
        ],
    )
    def test_in_the_section_itself_it_is_an_error(
        self, tmp_path: Path, content: Any, key: str
    ) -> None:
        *blocks, name = key.split(".")
        block = content
        for part in blocks:
            block = block.setdefault(part, {})
        block[name] = 3
        found = message(tmp_path, content)
        stands = key.removesuffix(".kind")
        assert found == f"{stands}: changes no result; write it as execution.{stands}"

    def test_what_changes_results_is_an_error_in_it(self, tmp_path: Path, content: Any) -> None:
        content["execution"]["rollout"]["seed"] = 3
        found = message(tmp_path, content)
        assert found.startswith("execution.rollout.seed: unknown key; allowed here: vllm.url, ")
        assert found.endswith("(what changes results belongs into section rollout)")

    @pytest.mark.parametrize(
        ("block", "said"),
        [
            (3, "execution: expected sections (base_model, prepare, "),
            ({"rolout": {}}, "execution.rolout: no section; allowed here: base_model, "),
            ({"rollout": 3}, "execution.rollout: expected keys and values (got 3)"),
        ],
    )
    def test_what_is_no_section(self, tmp_path: Path, content: Any, block: Any, said: str) -> None:
        content["execution"] = block
        assert message(tmp_path, content).startswith(said)


OLD = {
    "train_online.steps": "train_online.rounds",
    "train_online.prompts_per_step": "train_online.prompts_per_round",
    "train_online.overlap": "train_online.prefetch",
    "train_offline.groups_per_step": "train_offline.prompts_per_update",
    "train_offline.checkpoint.every_steps": "train_offline.checkpoint.every_updates",
    "train_online.checkpoint.max_share": "execution.train_online.checkpoint.max_fraction",
    "train_online.optimizer.warmup_steps": "train_online.optimizer.warmup_updates",
    "prepare.overlap.share": "prepare.decontaminate",  # the outer one is named first
    "prepare.decontaminate.share": "prepare.decontaminate.fraction",
    "method.gtpo.correction": "method.gtpo.importance_sampling",
    "method.high_entropy_tokens.share": "method.high_entropy_tokens.fraction",
    "rollout.vllm.max_gap": "rollout.vllm.max_mismatch",
    "evaluate.bootstrap": "score.bootstrap",
    "evaluate.confidence": "score.confidence",
}


@pytest.mark.parametrize("key", OLD)
def test_an_old_key_names_the_new_one(tmp_path: Path, content: Any, key: str) -> None:
    *blocks, name = key.split(".")
    block = content
    for part in blocks:
        block = block.setdefault(part, {})
    block[name] = 1
    stands = key if key != "prepare.overlap.share" else "prepare.overlap"
    assert message(tmp_path, content) == f"{stands}: is called {OLD[key]} now"


def test_every_new_name_is_one() -> None:
    """A name in the table that no model has would send the user astray."""
    for new in RENAMED.values():
        path = new.removeprefix("execution.").replace("*", "train_online", 1).split(".")
        model: Any = Params
        if path[0] == "method":  # its blocks are the methods'
            continue
        for part in path:
            field = model.model_fields[part]
            inner = models_in(field.annotation)
            model = inner[0] if inner else None
        assert bool(field.exclude) == new.startswith("execution.")


def test_a_stage_needs_only_the_sections_it_reads(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("rollout: {seed: 3}\nexecution: {rollout: {token_budget: 9}}\n")
    assert read(file, RolloutStage).rollout.token_budget == 9
    with pytest.raises(InputError, match="annotate: is missing"):
        read(file, AnnotateStage)
