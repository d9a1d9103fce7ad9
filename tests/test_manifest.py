"""Run manifests: which code, machine and settings made an output, and whether it is still it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from entrograd import environment
from entrograd.models.load import resolve_device, resolve_dtype
from entrograd.pipeline import runner
from entrograd.pipeline.fingerprint import Fingerprint
from entrograd.pipeline.manifest import made_by, manifest, read_manifest, write_manifests
from entrograd.pipeline.rules import read
from entrograd.report.provenance import origins
from entrograd.storage.files import read_json, write_json
from entrograd.storage.hashing import sha256
from helpers.paths import SHIPPED
from helpers.stages import only

IDENTITY: Fingerprint = {
    "stage": "evaluate",
    "params": {"evaluate": {"seed": 0}},
    "inputs": {"in": "0" * 64},
    "contents": ["0" * 64],
    "roles": {},
    "code": {},
}


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    done = subprocess.run(
        ["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with two files of code and an output."""
    folder = tmp_path / "project"
    (folder / "stages").mkdir(parents=True)
    for name in ("evaluate", "other"):
        (folder / f"stages/{name}.py").write_text("pass\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "start")
    (folder / "out.json").write_text("{}")
    return folder


def written(project: Path, *files: str) -> dict[str, object]:
    code = [project / file for file in files or ("stages/evaluate.py",)]
    write_manifests([project / "out.json"], IDENTITY, {"evaluate": {"device": "auto"}}, code)
    content = read_json(project / "out.json.run.json")
    assert isinstance(content, dict)
    return content


class TestCommit:
    """It is that of the stage's code, whatever else the folder holds."""

    def test_edits_to_the_stages_code_are_named(self, project: Path) -> None:
        head = git(project, "rev-parse", "HEAD")
        assert written(project)["git"] == {"commit": head, "edited": []}
        (project / "stages/other.py").write_text("1\n")  # another stage's
        (project / "notes").write_text("mine")
        assert written(project)["git"] == {"commit": head, "edited": []}
        (project / "stages/evaluate.py").write_text("1\n")
        assert written(project)["git"] == {"commit": head, "edited": ["stages/evaluate.py"]}

    def test_later_commits_of_other_files_leave_it(self, project: Path) -> None:
        """The same code has the same manifest, so dvc.lock can be committed after a run."""
        head = git(project, "rev-parse", "HEAD")
        (project / "dvc.lock").write_text("stages")
        git(project, "add", "dvc.lock")
        git(project, "commit", "-qm", "a run")
        assert written(project)["git"] == {"commit": head, "edited": []}

    def test_a_new_file_is_an_edit(self, project: Path) -> None:
        (project / "stages/a b.py").write_text("pass\n")
        made = written(project, "stages/evaluate.py", "stages/a b.py")
        assert made["git"]["edited"] == ["stages/a b.py"]  # type: ignore[index]

    def test_code_outside_a_repository_has_none(
        self, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a.py").write_text("pass\n")
        assert written(project, "../a.py")["git"] is None
        # Installed into an environment within a repository, which does not know it.
        (project / ".gitignore").write_text("venv\n")
        (project / "venv").mkdir()
        (project / "venv/a.py").write_text("pass\n")
        assert written(project, "venv/a.py")["git"] is None
        monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
        assert written(project)["git"] is None


def test_a_manifest_of_other_bytes_is_none(project: Path) -> None:
    output = project / "out.json"
    assert read_manifest(output) is None
    assert made_by(output) is None
    written(project)
    made = read_manifest(output)
    assert made is not None
    assert made["output_sha256"] == sha256(output)
    assert made["execution"] == {"evaluate": {"device": "auto"}}
    output.write_text("{} ")
    assert read_manifest(output) is None
    assert made_by(output) == "evaluate"  # a stage may still replace what it made


def test_the_environment_names_what_auto_became(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_resolved", {})
    assert environment.environment()["resolved"] == {}
    chosen = resolve_dtype("auto", resolve_device("cpu"))
    resolve_dtype("auto", resolve_device("cpu"))
    resolve_dtype("float32", resolve_device("cpu"))  # as the parameters say
    resolve_dtype("bfloat16", resolve_device("cpu"))
    here = environment.environment()
    dtype = "bfloat16" if chosen == torch.bfloat16 else "float32"
    assert here["resolved"] == {
        "device": ["cpu"],
        "dtype": [dtype],
        "threads": [str(torch.get_num_threads())],
    }
    fast = {"amx_bf16", "avx512_bf16"} & set(here["instructions"])
    assert (dtype == "bfloat16") == bool(fast)
    assert here["processor"]
    assert here["versions"]["torch"].startswith("2.")
    assert here["versions"]["python"] == sys.version.split()[0]


class TestReport:
    """The page names each run once, and a file whose run is not known."""

    def test_equal_runs_share_a_row(self, project: Path) -> None:
        head = git(project, "rev-parse", "HEAD")[:12]
        (project / "samples.json").write_text("[]")
        outputs = [project / "out.json", project / "samples.json"]
        write_manifests(outputs, IDENTITY, {}, [project / "stages/evaluate.py"])
        (row,) = origins(outputs)
        assert (row.stages, row.commit) == ("evaluate", head)
        assert "torch 2." in row.versions
        made = read_json(manifest(outputs[1]))
        assert isinstance(made, dict)
        made["stage"] = "score"
        write_json(manifest(outputs[1]), made)
        assert [row.stages for row in origins(outputs)] == ["evaluate, score"]

    def test_edits_and_unknown_runs_are_said(self, project: Path) -> None:
        (project / "stages/evaluate.py").write_text("1\n")
        written(project)
        (row,) = origins([project / "out.json"])
        assert row.commit.endswith(", with edits to stages/evaluate.py")
        (project / "out.json").write_text("{} ")
        (row,) = origins([project / "out.json"])
        assert row.commit == "not known: no run manifest of these bytes beside it"
        assert row.stages == "out.json"


def test_addresses_and_folders_are_left_out(tmp_path: Path) -> None:
    """They are the machine's own, and may name what nobody else should read."""
    params = yaml.safe_load(SHIPPED.read_text())
    params["execution"]["rollout"]["vllm"] = {"url": "http://127.0.0.1:8000"}
    executor = {"kind": "ray", "address": "ray://127.0.0.1:10001", "workers": 3}
    params["execution"]["annotate"]["executor"] = executor
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    sections = read(tmp_path / "params.yaml", only("rollout", "annotate", "prepare"))
    assert sections.rollout.vllm.url  # type: ignore[attr-defined]
    settings = runner._execution(sections)
    assert "prepare" not in settings
    assert not any("127.0.0.1" in str(values) for values in settings.values())
    rollout, annotate = settings["rollout"], settings["annotate"]
    assert isinstance(rollout, dict)
    assert isinstance(annotate, dict)
    assert rollout["token_budget"] == 32768
    assert annotate["grader.workers"] == 2
    assert annotate["executor"] == {"kind": "ray", "workers": 3, "cpus": 1, "gpus": 0.0}
