"""The real pipeline: every stage through DVC, on the tiny model, in a clone of this checkout."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from entrograd.pipeline.manifest import manifest, read_manifest
from helpers.checkout import DIGITS, environment, fresh_clone, run

OUTPUTS = [
    "models/base",
    "models/offline",
    "models/online",
    "data/prompts.parquet",
    "data/rejects.parquet",
    "data/rollouts",
    "data/annotated",
    "data/groups.parquet",
    "data/method.json",
    "data/online",
    "data/samples",
    "results/prepare.json",
    "results/annotate.json",
    "results/reward_heads.json",
    "results/train_offline.csv",
    "results/train_online.csv",
    "results/summary.json",
    "results/benchmarks.json",
    "report",
]


def stages(folder: Path) -> set[str]:
    """The stages of the pipeline."""
    return set(yaml.safe_load((folder / "dvc.yaml").read_text())["stages"])


def ran(folder: Path, said: str) -> set[str]:
    """The stages that DVC ran."""
    return {name for name in stages(folder) if f"Running stage '{name}'" in said}


def hashes(folder: Path) -> dict[str, str]:
    """What dvc.lock says of every output."""
    lock = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for stage in lock.values() for out in stage.get("outs", [])}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A clone in which the pipeline has run once."""
    folder = fresh_clone(tmp_path_factory.mktemp("clone"), tiny_model)
    said = run(folder, "dvc", "repro")
    assert "Running stage 'report'" in said
    assert f"{DIGITS} is not in dvc.yaml: add it to the deps of prepare" in said
    return folder


def test_every_output_is_there_with_a_manifest_beside_it(clone: Path) -> None:
    assert set(hashes(clone)) == {*OUTPUTS, *(f"{output}.run.json" for output in OUTPUTS)}
    commit = run(clone, "git", "rev-parse", "HEAD").strip()
    for output in OUTPUTS:
        assert (clone / output).is_dir() == (not Path(output).suffix)  # `run_stage` relies on it
        made = read_manifest(clone / output)
        assert made is not None
        assert made["environment"]["versions"]["torch"]
        assert made["environment"]["processor"]
        assert made["git"] == {"commit": commit, "edited": []}
        assert set(made) >= {"stage", "params", "inputs", "execution"}
    trained = read_manifest(clone / "models/online")
    assert trained is not None
    assert trained["environment"]["resolved"]["device"] == ["cpu"]
    assert trained["environment"]["resolved"]["dtype"] in (["bfloat16"], ["float32"])
    settings = trained["execution"]["rollout"]
    assert isinstance(settings, dict)
    assert settings["shard_prompts"] == 4
    timings = json.loads((clone / "results/timings.json").read_text())
    assert set(timings) == stages(clone)


def test_summary_has_what_it_promises(clone: Path) -> None:
    summary = json.loads((clone / "results/summary.json").read_text())
    for name in ("base", "offline", "online"):
        assert summary[name]["n"] == 24
        assert 0 <= summary[name]["ci_low"] <= summary[name]["accuracy"] <= summary[name]["ci_high"]
    difference = summary["online_minus_base"]
    assert difference["ci_low"] <= difference["diff"] <= difference["ci_high"]
    assert difference["diff"] == pytest.approx(
        summary["online"]["accuracy"] - summary["base"]["accuracy"]
    )
    shown = run(clone, sys.executable, "-m", "entrograd.cli.main", "summary")
    assert "report/index.html" in shown


def test_the_page_stands_alone(clone: Path) -> None:
    page = (clone / "report/index.html").read_text()
    assert "<svg" in page
    assert "<script" not in page
    assert str(clone) not in page


def test_a_second_run_does_nothing(clone: Path) -> None:
    assert "Running stage" not in run(clone, "dvc", "repro")


def test_a_change_runs_only_what_it_touches(clone: Path) -> None:
    """An experiment with another method: trained and evaluated again, nothing before."""
    said = run(clone, "dvc", "exp", "run", "-S", "method.name=grpo", "-n", "other")
    trained = {"method", "train_offline", "train_online", "evaluate", "score", "report"}
    assert ran(clone, said) == trained
    run(clone, "git", "checkout", "-q", "--", "params.yaml")
    run(clone, "dvc", "repro")  # from the run-cache: back to the first results
    diff = run(clone, "dvc", "metrics", "diff")
    assert "Error" not in diff


def test_a_manifest_is_that_of_its_output_after_a_checkout(clone: Path) -> None:
    """DVC keeps both; a stage then takes the pipeline's own output for what it is."""
    for name in OUTPUTS:
        path = clone / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        manifest(path).unlink()
    run(clone, "dvc", "checkout")
    assert [name for name in OUTPUTS if read_manifest(clone / name) is None] == []
    run(clone, sys.executable, "stages/method.py")
    run(clone, "dvc", "exp", "run", "-S", "score.confidence=0.9", "-n", "wide", "--temp")
    run(clone, "dvc", "exp", "apply", "wide")
    scored = read_manifest(clone / "results/summary.json")
    assert scored is not None
    assert scored["params"] == {"score": {"bootstrap": 200, "confidence": 0.9, "seed": 0}}
    run(clone, "git", "checkout", "-q", "--", "params.yaml")
    run(clone, "dvc", "repro")
    assert [name for name in OUTPUTS if read_manifest(clone / name) is None] == []


def test_another_confidence_samples_nothing_anew(clone: Path) -> None:
    before = json.loads((clone / "results/summary.json").read_text())["base"]
    said = run(clone, "dvc", "exp", "run", "-S", "score.confidence=0.5", "-n", "narrow")
    assert ran(clone, said) == {"score", "report"}
    after = json.loads((clone / "results/summary.json").read_text())["base"]
    assert after["accuracy"] == before["accuracy"]
    assert before["ci_low"] <= after["ci_low"] <= after["ci_high"] < before["ci_high"]
    run(clone, "git", "checkout", "-q", "--", "params.yaml")
    run(clone, "dvc", "repro")


def test_two_full_runs_give_equal_hashes(clone: Path) -> None:
    before = hashes(clone)
    said = run(clone, "dvc", "repro", "--force")
    assert ran(clone, said) == stages(clone)
    assert said.count("Running stage") == len(stages(clone))
    assert hashes(clone) == before


def test_the_flow_gives_the_same_hashes(clone: Path, tmp_path: Path, tiny_model: Path) -> None:
    other = fresh_clone(tmp_path / "flow", tiny_model)
    run(other, sys.executable, "-m", "flows.pipeline")
    assert hashes(other) == hashes(clone)


def test_a_killed_rollout_continues_at_the_first_missing_shard(
    clone: Path, tmp_path: Path, tiny_model: Path
) -> None:
    other = fresh_clone(tmp_path / "killed", tiny_model)
    run(other, "dvc", "repro", "base_model", "prepare")
    process = subprocess.Popen(
        ["dvc", "repro", "rollout"],
        cwd=other,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    work = other / ".entrograd" / "resume"
    first = None
    while first is None and process.poll() is None:
        first = next(work.glob("rollout-*/*/shard-*.parquet"), None)
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert first is not None
    assert not (other / "data" / "rollouts").exists()
    kept = first.stat().st_mtime_ns
    said = run(other, "dvc", "repro", "annotate")
    assert "shards kept" in said
    assert (other / "data" / "rollouts" / first.name).stat().st_mtime_ns == kept
    whole = hashes(clone)
    assert hashes(other) == {name: whole[name] for name in hashes(other)}
    assert "data/annotated" in hashes(other)
