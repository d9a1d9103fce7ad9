"""Several processes: two, connected by gloo on the CPU, train as one does."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from entrograd.errors import InputError
from entrograd.storage.hashing import sha256
from entrograd.storage.tables import read_table
from entrograd.train.params import Lora, TrainOfflineParams
from entrograd.train.policy import Policy
from entrograd.train.processes import Processes, connect, own_rows
from helpers.chaos import STAGES, command
from helpers.paths import ROOT


def run(words: list[str], place: Path) -> str:
    done = subprocess.run(
        words,
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What helpers/two_processes.py wrote."""
    folder = tmp_path_factory.mktemp("runs")
    run([sys.executable, "-m", "helpers.two_processes", str(folder)], ROOT / "tests")
    return folder


def curve(place: Path) -> list[dict[str, float]]:
    with (place / "curve").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def assert_same_training(one: Path, two: Path) -> None:
    alone, both = curve(one), curve(two)
    assert len(alone) == len(both) > 1
    for a, b in zip(alone, both, strict=True):
        assert a.keys() == b.keys()
        assert b["loss"] == pytest.approx(a["loss"], rel=0, abs=1e-5)
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert any(row["loss"] != 0 for row in alone)
    weights = load_file(one / "out/model.safetensors")
    for name, other in load_file(two / "out/model.safetensors").items():
        assert (weights[name] - other).abs().max() < 1e-4, name


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one(runs: Path, stage: str, sharded: bool) -> None:
    """Both with the whole model, or by FSDP2 each with a part of it."""
    one, two = runs / f"{stage}-1", runs / f"{stage}-2"
    if sharded:
        one, two = runs / f"{stage}-plain-1", runs / f"{stage}-plain-sharded"
    assert_same_training(one, two)
    log = (two / "log.txt").read_text()
    assert "process 1 of 2" in log
    assert "process 2 of 2" in log
    assert ("each with a part of the weights" in log) == sharded
    unit = "rounds" if stage == "train_online" else "updates"
    assert log.count(f" {unit} of ") == 1  # one process speaks
    assert not list((two / "work").iterdir())
    if stage == "train_online":
        tables = [read_table(place / "rounds", "annotated") for place in (one, two)]
        for column in ("prompt_id", "sample_index", "completion_ids", "reward"):
            assert tables[0].column(column).to_pylist() == tables[1].column(column).to_pylist()


def test_two_processes_train_adapters_as_one(runs: Path) -> None:
    assert_same_training(runs / "adapters-1", runs / "adapters-2")
    trained = load_file(runs / "adapters-2/out/model.safetensors")
    begun = load_file(runs / "inputs/model/model.safetensors")
    assert trained.keys() == begun.keys()
    changed = {name for name in begun if not trained[name].equal(begun[name])}
    assert len(changed) == 2 * 7


def test_a_head_of_its_own_is_divided_in_uneven_parts(runs: Path) -> None:
    """17 tokens, two processes: 9 and 8 rows of an output head that is not the embedding. The
    layers are computed again in the backward pass."""
    assert_same_training(runs / "untied-1", runs / "untied-sharded")


@pytest.mark.parametrize("kind", ["train_online", "train_online-plain"])
@pytest.mark.parametrize("order", ["1-2", "2-1"])
def test_a_checkpoint_loads_in_another_number_of_processes(
    runs: Path, order: str, kind: str
) -> None:
    """`train_online-plain`: the two are FSDP2's."""
    place = runs / f"{kind}-{order}"
    assert "continuing after update 3" in (place / "log.txt").read_text()
    assert_same_training(runs / f"{kind}-1", place)


def test_two_processes_share_out_what_the_reference_computes(runs: Path) -> None:
    assert_same_training(runs / "penalty-1", runs / "penalty-2")
    assert all(row["kl_ref"] > 0 for row in curve(runs / "penalty-2"))


@pytest.mark.parametrize("sharded", [False, True])
def test_accelerate_launch_starts_a_stage(runs: Path, tmp_path: Path, sharded: bool) -> None:
    """The command lines for GPUs; where there are none their processes take the CPU."""
    kind = ["--use_fsdp", "--fsdp_version", "2"] if sharded else ["--multi_gpu"]
    inputs, same = runs / "inputs", "train_offline-2"
    if sharded:
        inputs, same = runs / "plain", "train_offline-plain-sharded"
    launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", *kind]
    launcher += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    said = run([*launcher, *command("train_offline", inputs, tmp_path)], tmp_path)
    assert "process 2 of 2" in said
    assert ("each with a part of the weights" in said) == sharded
    assert_same_training(runs / same, tmp_path)
    assert sha256(tmp_path / "out") == sha256(runs / same / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "add --fsdp_version 2"),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_OFFLOAD_PARAMS": "true",
            },
            "--fsdp_offload_params: not supported",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "--use_deepspeed: DeepSpeed's engine owns"),
    ],
)
def test_what_is_not_supported_is_said_before_anything_starts(
    settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**settings, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        connect("cpu")


def test_adapters_are_not_divided(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes()
    monkeypatch.setattr(processes, "sharded", True)
    with pytest.raises(InputError, match=r"lora: adapters are not divided .* without --use_fsdp"):
        Policy.load(tiny_model, TrainOfflineParams(lora=Lora()), 1, processes)


def test_rows_are_divided_by_groups_and_tokens() -> None:
    """Tokens: group 0 has 2 + 3 + 3 = 8, group 1 1 + 4 = 5, group 2 1 + 2 = 3."""
    prompts = [[1, 1], [1, 1], [2], [3]]
    completions = [[5] * 3, [5] * 3, [6] * 4, [7] * 2]
    groups = [0, 0, 1, 2]
    parts = [own_rows(prompts, completions, groups, rank, 2) for rank in range(2)]
    assert parts == [[True, True, False, False], [False, False, True, True]]
    assert own_rows(prompts, completions, groups, 0, 1) == [True] * 4
    assert own_rows(prompts, completions, groups, 3, 4) == [False] * 4
