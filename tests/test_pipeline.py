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
from typing import Any

import pytest
import yaml

from helpers.paths import ROOT, SHIPPED

OUTPUTS = [
    "models/base",
    "models/offline",
    "models/online",
    "data/prompts.parquet",
    "data/rejects.parquet",
    "data/rollouts",
    "data/annotated",
    "data/groups.parquet",
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


DIGITS = "digits.jsonl"


def small_params(model: Path) -> dict[str, Any]:
    """The project's own params.yaml, cut down to seconds. A random model hits no sum: problems of
    a file that any digit answers give it something to learn from."""
    params: dict[str, Any] = yaml.safe_load(SHIPPED.read_text())
    params["base_model"] = {"reference": f"path:{model}"}
    params["prepare"]["sources"][0].update(size=20, keep=None)
    params["prepare"]["sources"].insert(0, {"kind": "file", "path": DIGITS})
    params["prepare"]["heldout_fraction"] = 0.3
    params["rollout"].update(prompts=16, group_size=4)
    params["execution"]["rollout"]["shard_prompts"] = 4
    params["rollout"]["sampling"].update(max_new_tokens=2)
    params["train_offline"].update(epochs=1, prompts_per_update=8, optimizer={"lr": 0.003})
    params["train_online"].update(rounds=2, prompts_per_round=4, optimizer={"lr": 0.003})
    params["evaluate"].update(heldout_problems=24)
    params["score"].update(bootstrap=200)
    params["report"].update(samples=3)
    return params


def environment() -> dict[str, str]:
    scripts = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DVC_NO_ANALYTICS": "1",
        "GIT_AUTHOR_NAME": "t",
        "GIT_AUTHOR_EMAIL": "t@example.org",
        "GIT_COMMITTER_NAME": "t",
        "GIT_COMMITTER_EMAIL": "t@example.org",
    }


def run(folder: Path, *command: str, code: int = 0) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == code, f"{' '.join(command)}: exit {done.returncode}\n{said[-4000:]}"
    return said


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


def fresh_clone(folder: Path, model: Path) -> Path:
    """The files git knows of this checkout as they are now, in a repository of their own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "dvc.lock").unlink(missing_ok=True)
    rows = [{"problem": f"{i} or {i + 1}", "answer": list("0123456789")} for i in range(80)]
    (folder / DIGITS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "params.yaml").write_text(yaml.safe_dump(small_params(model), sort_keys=False))
    run(folder, "git", "init", "-q")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "start")
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A clone in which the pipeline has run once."""
    folder = fresh_clone(tmp_path_factory.mktemp("clone"), tiny_model)
    said = run(folder, "dvc", "repro")
    assert "Running stage 'report'" in said
    assert f"{DIGITS} is not in dvc.yaml: add it to the deps of prepare" in said
    return folder


def test_every_output_is_there_with_a_manifest_beside_it(clone: Path) -> None:
    assert set(hashes(clone)) == set(OUTPUTS)
    for output in OUTPUTS:
        assert (clone / output).exists()
        manifest = json.loads((clone / f"{output}.run.json").read_text())
        assert manifest["versions"]["torch"]
        assert manifest["git"]
        assert set(manifest) >= {"stage", "params", "inputs", "output_sha256"}
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
    assert ran(clone, said) == {"train_offline", "train_online", "evaluate", "score", "report"}
    run(clone, "git", "checkout", "-q", "--", "params.yaml")
    run(clone, "dvc", "repro")  # from the run-cache: back to the first results
    diff = run(clone, "dvc", "metrics", "diff")
    assert "Error" not in diff


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
