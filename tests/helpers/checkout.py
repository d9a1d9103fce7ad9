"""The pipeline in a clone of this checkout, on the tiny model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from helpers.paths import ROOT, SHIPPED

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
    dates = [f"GIT_{who}_DATE=2026-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")]
    run(folder, "env", *dates, "git", "commit", "-qm", "start")  # equal trees are equal commits
    return folder
