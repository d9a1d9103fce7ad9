"""Which runs made what the page shows: commit, device, dtype, processor, versions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from entrograd.pipeline.manifest import RunManifest, read_manifest

COMMIT = 12  # hex digits that are shown


@dataclass(frozen=True)
class Origin:
    """The run of a stage, or of several alike in all but the stage, in words."""

    stages: str
    commit: str
    computed: str
    processor: str
    versions: str


def origins(inputs: Iterable[Path]) -> list[Origin]:
    """A row per run that made these files, in their order; files whose run manifest is absent, or
    of other bytes, share a row that says so."""
    runs: dict[tuple[str, ...], list[str]] = {}
    for path in inputs:
        made = read_manifest(path)
        stage = made["stage"] if made else path.name
        stages = runs.setdefault(_facts(made), [])
        if stage not in stages:
            stages.append(stage)
    return [Origin(", ".join(stages), *facts) for facts, stages in runs.items()]


def _facts(made: RunManifest | None) -> tuple[str, ...]:
    if made is None:
        return ("not known: no run manifest of these bytes beside it", "", "", "")
    git, here = made["git"], made["environment"]
    commit = git["commit"][:COMMIT] if git else "not in a repository"
    if git and git["edited"]:
        commit += f", with edits to {', '.join(git['edited'])}"
    resolved = here["resolved"]
    threads = [f"{number} threads" for number in resolved.get("threads", [])]
    computed = ", ".join([*resolved.get("device", []), *resolved.get("dtype", []), *threads])
    processor = " ".join([here["processor"], *here["instructions"]])
    versions = ", ".join(
        f"{name} {number}" for name, number in here["versions"].items() if number != "absent"
    )
    return (commit, computed or "no model loaded", processor, versions)
