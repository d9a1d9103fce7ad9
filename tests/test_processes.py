"""Several processes: two, connected by gloo on the CPU, train as one does."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chaos import prepare
from conftest import ROOT
from safetensors.torch import load_file

from entrograd import io
from entrograd.train.processes import own_rows

SCRIPTS = Path(sys.executable).parent
LAUNCH = [str(SCRIPTS / "accelerate"), "launch", "--cpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
DATA = {
    "train_offline": ("--annotated", "annotated.parquet"),
    "train_online": ("--prompts", "prompts.parquet"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, prompts, annotated rollouts and parameters of some seconds' training."""
    folder = tmp_path_factory.mktemp("inputs")
    prepare(folder)
    return folder


def command(stage: str, inputs: Path, place: Path, launch: list[str]) -> list[str]:
    flag, name = DATA[stage]
    said = [*launch, str(ROOT / "stages" / f"{stage}.py"), flag, str(inputs / name)]
    said += ["--params", str(inputs / "params.yaml"), "--model", str(inputs / "model")]
    said += ["--work", str(place / "work"), "--timings", "", "--out", str(place / "out")]
    said += ["--curve", str(place / "curve.csv"), "--reward-heads", ""]
    return [*said, "--rounds", str(place / "rounds")] if stage == "train_online" else said


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}


def run(stage: str, inputs: Path, place: Path, launch: list[str]) -> str:
    place.mkdir(exist_ok=True)
    done = subprocess.run(
        command(stage, inputs, place, launch),
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def curve(place: Path) -> list[dict[str, float]]:
    with (place / "curve.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def assert_same_training(one: Path, two: Path) -> None:
    alone, both = curve(one), curve(two)
    assert len(alone) == len(both) > 1
    for a, b in zip(alone, both, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert any(row["loss"] != 0 for row in alone)
    weights = load_file(one / "out/model.safetensors")
    for name, other in load_file(two / "out/model.safetensors").items():
        assert (weights[name] - other).abs().max() < 1e-4, name


@pytest.mark.parametrize("stage", DATA)
def test_two_processes_train_as_one(stage: str, inputs: Path, tmp_path: Path) -> None:
    run(stage, inputs, tmp_path / "one", [sys.executable])
    said = run(stage, inputs, tmp_path / "two", LAUNCH)
    assert said.count(f"{stage}: ") >= 1
    assert_same_training(tmp_path / "one", tmp_path / "two")
    if stage == "train_online":
        tables = [io.read_table(tmp_path / n / "rounds", "annotated") for n in ("one", "two")]
        for column in ("prompt_id", "sample_index", "completion_ids", "reward"):
            assert tables[0].column(column).to_pylist() == tables[1].column(column).to_pylist()
    assert not list((tmp_path / "two/work").iterdir())


@pytest.mark.parametrize("first", ["one", "two"])
def test_a_checkpoint_loads_in_another_number_of_processes(
    first: str, inputs: Path, tmp_path: Path
) -> None:
    """Killed after some updates in one world size, finished in the other."""
    launches = {"one": [sys.executable], "two": LAUNCH}
    place = tmp_path / "killed"
    place.mkdir()
    running = subprocess.Popen(
        command("train_online", inputs, place, launches[first]),
        cwd=place,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while running.poll() is None and not list(
        place.glob("work/*/checkpoints/step-*3/manifest.json")
    ):
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (place / "out").exists()
    other = {"one": "two", "two": "one"}[first]
    said = run("train_online", inputs, place, launches[other])
    assert "continuing after update" in said
    run("train_online", inputs, tmp_path / "whole", [sys.executable])
    assert_same_training(tmp_path / "whole", place)


def test_rows_are_divided_by_groups_and_tokens() -> None:
    """Tokens: group 0 has 2 + 3 + 3 = 8, group 1 1 + 4 = 5, group 2 1 + 2 = 3."""
    prompts = [[1, 1], [1, 1], [2], [3]]
    completions = [[5] * 3, [5] * 3, [6] * 4, [7] * 2]
    groups = [0, 0, 1, 2]
    parts = [own_rows(prompts, completions, groups, rank, 2) for rank in range(2)]
    assert parts == [[True, True, False, False], [False, False, True, True]]
    assert own_rows(prompts, completions, groups, 0, 1) == [True] * 4
    assert own_rows(prompts, completions, groups, 3, 4) == [False] * 4
