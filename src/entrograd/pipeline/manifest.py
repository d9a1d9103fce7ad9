"""The run manifest, `OUTPUT.run.json`: what made an output, from what, with which code, where.

It lies beside the output, not in it: commit and machine differ between runs whose outputs are
equal. DVC keeps it with the output, so it is there, and of that output, after a checkout too.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict, cast

from entrograd.environment import Environment, environment
from entrograd.errors import InputError
from entrograd.pipeline.fingerprint import Fingerprint
from entrograd.storage.files import read_json, write_json
from entrograd.storage.hashing import sha256


class Code(TypedDict):
    """The last commit that changed a stage's code, and which of its files were edited since."""

    commit: str
    edited: list[str]


class RunManifest(TypedDict):
    """The content of a run manifest. `execution`: settings that change no result. `git`: None
    where the code is not in a repository."""

    stage: str
    output_sha256: str
    inputs: dict[str, str]
    params: dict[str, object]
    execution: dict[str, object]
    git: Code | None
    environment: Environment


def manifest(output: Path) -> Path:
    """Where the run manifest of an output lies."""
    return output.with_name(f"{output.name}.run.json")


def write_manifests(
    outputs: Iterable[Path],
    identity: Fingerprint,
    execution: Mapping[str, object],
    files: Iterable[Path],
) -> None:
    """Write the manifest of each output of a run. `files`: the stage's code."""
    git, here = _git(sorted(files)), environment()
    for output in outputs:
        content: RunManifest = {
            "stage": identity["stage"],
            "output_sha256": sha256(output),
            "inputs": identity["inputs"],
            "params": identity["params"],
            "execution": json.loads(json.dumps(execution, default=str)),
            "git": git,
            "environment": here,
        }
        write_json(manifest(output), content)


def read_manifest(output: Path) -> RunManifest | None:
    """The manifest of an output; None where there is none, or it is not of these bytes."""
    try:
        content = read_json(manifest(output))
    except InputError:
        return None
    if not isinstance(content, dict) or content.get("output_sha256") != sha256(output):
        return None
    return cast("RunManifest", content)


def made_by(output: Path) -> str | None:
    """The stage that made an output, or was about to when it was ended."""
    try:
        content = read_json(manifest(output))
    except InputError:
        return None
    return content.get("stage") if isinstance(content, dict) else None


def _git(files: list[Path]) -> Code | None:
    """The last commit that changed one of these files, and those edited since; None where git is
    absent or knows none of them. Later commits, such as that of dvc.lock, do not matter: the same
    code has the same manifest."""
    git = ("git", "-C", str(files[0].parent))
    paths = [str(file) for file in files]
    commit = _output(*git, "log", "-1", "--format=%H", "--", *paths)
    status = _output(*git, "status", "--porcelain", "-z", "--untracked-files=all", "--", *paths)
    if not commit or status is None:
        return None
    edited = sorted(line[3:] for line in status.split("\0") if line)
    return {"commit": commit.strip(), "edited": edited}


def _output(*command: str) -> str | None:
    """What a command prints; None where it fails or is absent."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
