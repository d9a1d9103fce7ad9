"""params.yaml: what is wrong is named by key, with what is allowed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from entrograd.cli.main import main
from entrograd.errors import InputError
from entrograd.methods.params import MethodParams
from entrograd.pipeline.rules import read
from entrograd.pipeline.sections import Params

ROOT = Path(__file__).parent.parent


@pytest.fixture
def content() -> dict[str, Any]:
    known: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
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
    content["train_online"]["device"] = "tpu"
    allowed = "train_online.device: allowed: auto, cpu, cuda, or cuda:N for the GPU of that number"
    assert message(tmp_path, content) == f"{allowed} (got 'tpu')"


@pytest.mark.parametrize("text", ["1e-5", "1E-05", "+1.e-5", "1.0e-5", "0.00001"])
def test_numbers_as_dvc_reads_and_writes_them(tmp_path: Path, text: str) -> None:
    whole = (ROOT / "params.yaml").read_text(encoding="utf-8")
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
