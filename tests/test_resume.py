"""Unfinished work: where a stage keeps it, when it goes on there, and what it says when not."""

from __future__ import annotations

import logging
import os
import runpy
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from entrograd.errors import InputError, Unfinished
from entrograd.methods.params import MethodParams
from entrograd.pipeline import fingerprint, runner
from entrograd.pipeline.runner import Run, run_stage
from entrograd.storage.hashing import sha256
from helpers.chaos import command, outputs, prepare
from helpers.paths import ROOT
from helpers.stages import PARAMS, only
from helpers.training import Killed, stop_at


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with parameters and a model; the tests' process is not tied to its parent
    as a stage is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "end_with_parent", lambda _: None)
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "weights").write_text("base")
    return tmp_path


class Work:
    """A stage that counts its runs in its resume folder and gives up before `needed` of them."""

    def __init__(self, needed: int = 2, name: str = "train_offline") -> None:
        self.needed, self.name, self.found = needed, name, list[int]()
        self.folder = Path()

    def __call__(self, run: Run) -> str:
        file = run.resume / "count"
        count = int(file.read_text()) if file.exists() else 0
        self.found.append(count)
        self.folder = run.resume
        file.write_text(str(count + 1))
        if count + 1 < self.needed:
            raise InputError("not yet")
        run.paths.out.write_text("done")
        return "done"

    def start(self, *argv: str) -> int:
        return run_stage(
            self.name,
            self,
            doc="d",
            params=only(self.name),
            inputs={"model": "base", "heads": "heads.json"},
            optional=("heads",),
            outputs={"out": "out.txt"},
            argv=["--timings", "", *argv],
        )


def change(section: str, **values: Any) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    params.setdefault(section, {}).update(values)
    Path("params.yaml").write_text(yaml.safe_dump(params))


def test_work_is_kept_until_the_stage_succeeds() -> None:
    work = Work(needed=3)
    assert [work.start(), work.start(), work.start()] == [2, 2, 0]
    assert work.found == [0, 1, 2]
    assert not work.folder.exists()
    assert Path("out.txt").read_text() == "done"


def test_resume_goes_on_in_the_folder_it_names() -> None:
    work = Work()
    assert work.start() == 2
    moved = work.folder.rename("elsewhere")
    assert work.start("--resume", str(moved)) == 0
    assert work.found == [0, 1]
    assert work.folder == Path("elsewhere")
    assert not moved.exists()


def change_a_parameter(_: pytest.MonkeyPatch) -> list[str]:
    change("train_offline", seed=7, optimizer={"lr": 0.5})
    return []


def change_an_input(_: pytest.MonkeyPatch) -> list[str]:
    Path("base/weights").write_text("others")
    return []


def give_another_input(_: pytest.MonkeyPatch) -> list[str]:
    Path("heads.json").write_text("{}")
    return []


def change_the_code(patch: pytest.MonkeyPatch) -> list[str]:
    hashes = fingerprint.hashes_of
    patch.setattr(fingerprint, "hashes_of", lambda files: hashes(files) | {"entrograd/a.py": "0"})
    return []


CHANGES: dict[str, tuple[Callable[[pytest.MonkeyPatch], list[str]], list[str]]] = {
    "parameters": (
        change_a_parameter,
        ["train_offline.optimizer.lr 1e-06 -> 0.5", "train_offline.seed 0 -> 7"],
    ),
    "input": (change_an_input, ["the content of base"]),
    "another input": (give_another_input, ["the content of heads.json"]),
    "code": (change_the_code, ["the code of entrograd/a.py"]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_is_named_and_the_work_not_continued(
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With --resume the stage refuses; without, it says why it starts anew."""
    work = Work()
    work.start()
    old = work.folder
    changed, expected = CHANGES[what]
    arguments = changed(monkeypatch)
    capsys.readouterr()
    assert work.start("--resume", str(old), *arguments) == 2
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert refusal == (
        f"train_offline: error: --resume {old}: cannot be continued, changed since: "
        f"{'; '.join(expected)}; undo the change, or leave --resume out to start anew"
    )
    assert work.found == [0]
    with caplog.at_level(logging.WARNING, "entrograd"):
        assert work.start(*arguments) == 2
    assert work.found == [0, 0]
    assert work.folder != old
    assert f"{old} holds unfinished work that is not continued" in caplog.text
    assert f"changed since: {'; '.join(expected)}." in caplog.text
    assert (old / "count").read_text() == "1"


def test_a_run_that_fails_before_it_did_anything_leaves_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nor a word about it in later ones; neither does one that was killed then."""

    class Early(Work):
        def __call__(self, run: Run) -> str:
            self.folder = run.resume
            assert run.resume.is_dir()
            raise InputError("no such file")

    for seed in range(3):
        change("train_offline", seed=seed)
        work = Early()
        assert work.start() == 2
        assert list(Path(".entrograd/resume").iterdir()) == []
    work.folder.mkdir()
    (work.folder / "fingerprint.json").write_text("{}")
    (work.folder / ".shard-00000.parquet.12345678.tmp").touch()
    change("train_offline", seed=7)
    with caplog.at_level(logging.INFO, "entrograd"):
        assert Work(needed=1).start() == 0
    assert "unfinished work" not in caplog.text


def test_what_changed_is_told_briefly() -> None:
    """Long values are cut, and only the first parameters named."""

    def identity(params: Mapping[str, object], code: dict[str, str]) -> fingerprint.Fingerprint:
        return fingerprint.fingerprint("s", params, {}, {}, code)

    code = {"a.py": "0"}
    old = {"name": "grpo", "sources": [{"path": "a" * 500, "keep": 1}, {"path": "b"}]}
    new = {"name": "gtpo", "sources": [{"path": "a" * 499, "keep": 1}]}
    cut = "a" * 57 + "..."
    assert fingerprint.differences(identity(old, code), identity(new, code)) == [
        "name grpo -> gtpo",
        f"sources.0.path {cut} -> {cut}",
        "sources.1.path b -> absent",
    ]
    many = identity({f"p{i}": 1 for i in range(10)}, code)
    others = identity({f"p{i}": 2 for i in range(10)}, {f"{i}.py": "0" for i in range(5)})
    assert fingerprint.differences(many, others) == [
        *(f"p{i} 1 -> 2" for i in range(8)),
        "and 2 more parameters",
        "the code of 0.py, 1.py, 2.py, 3.py and 2 more",
    ]


def test_another_stages_work_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    other = Work(name="evaluate")
    other.start()
    assert Work().start("--resume", str(other.folder)) == 2
    assert "changed since: stage evaluate; " in capsys.readouterr().err


def test_an_input_that_is_left_out_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("heads.json").write_text("{}")
    work = Work()
    work.start()
    assert work.start("--resume", str(work.folder), "--heads", "") == 2
    assert "cannot be continued, changed since: the content of the inputs; " in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("kind", ["absent", "empty"])
def test_a_folder_without_work_is_named(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "empty":
        Path("none").mkdir()
    assert Work().start("--resume", "none") == 2
    said = capsys.readouterr().err
    assert "none/fingerprint.json" in said
    assert "Traceback" not in said


def test_what_changes_no_result_may_change() -> None:
    """Section execution, where an input lies, where the output goes."""
    work = Work()
    work.start()
    checkpoint = {"keep_last": 5, "max_fraction": 0.5}
    change("execution", train_offline={"checkpoint": checkpoint, "token_budget": 8})
    Path("base").rename("moved")
    assert work.start("--resume", str(work.folder), "--model", "moved", "--out", "b.txt") == 0
    assert work.found == [0, 1]
    work = Work()
    work.start("--model", "moved")
    change("execution", train_offline={"checkpoint": {"keep_last": 1}, "device": "cpu"})
    assert work.start("--model", "moved") == 0
    assert work.found == [0, 1]


@pytest.mark.parametrize("name", ["train_offline", "train_online"])
def test_a_training_stage_goes_on_and_says_where(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The stage's own script, killed before its fourth update and started with --resume."""

    def start(place: Path, *more: str) -> int:
        words = [*command(name, folder, place), *more]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "stages" / f"{name}.py"), run_name="__main__")
        return int(end.value.code or 0)

    prepare(folder)
    for place in ("whole", "killed"):
        Path(place).mkdir()
    assert start(folder / "whole") == 0
    assert "continuing after update" not in caplog.text
    with monkeypatch.context() as patch:
        stop_at(patch, name.removeprefix("train_"), 3)
        with pytest.raises(Killed):
            start(folder / "killed")
    unfinished = next((folder / "killed/work").iterdir())
    with caplog.at_level(logging.INFO, "entrograd"):
        assert start(folder / "killed", "--resume", str(unfinished)) == 0
    checkpoint = unfinished / "checkpoints" / "update-00000003"
    assert f"continuing after update 3 ({checkpoint})" in caplog.text
    assert not unfinished.exists()
    whole = outputs(name, folder / "whole")
    for argument, path in outputs(name, folder / "killed").items():
        assert sha256(path) == sha256(whole[argument]), argument


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_without_memory_a_run_says_what_to_lower_and_goes_on(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    class Large(Work):
        def __call__(self, run: Run) -> str:
            said = super().__call__(run)
            if run.params.train_offline.token_budget > 100:
                raise error
            return said

    work = Large(needed=1)
    assert work.start() == 2
    said = capsys.readouterr().err
    assert "train_offline: error: out of memory; lower execution.train_offline.token_bud" in said
    change("execution", train_offline={"token_budget": 100})
    assert work.start() == 0
    assert work.found == [0, 1]


class TestEditsWhileAStageWorks:
    """DVC reads parameters, inputs and code after a stage, and records them as what it ran with."""

    class Slow(Work):
        """A stage in whose work something is edited, once."""

        def __init__(self, edit: Callable[[], Any]) -> None:
            super().__init__(needed=1)
            self.edit: Callable[[], Any] | None = edit

        def __call__(self, run: Run) -> str:
            said = super().__call__(run)
            if self.edit:
                self.edit()
            self.edit = None
            return said

    @pytest.mark.parametrize(
        ("edit", "what"),
        [
            (lambda: change("train_offline", seed=7), "train_offline.seed 0 -> 7"),
            (lambda: Path("base/weights").write_text("others"), "the content of base"),
            (lambda: Path("base/weights").unlink(), "the content of base"),
            (lambda: Path("params.yaml").write_text("{"), "params.yaml: not YAML"),
        ],
    )
    def test_end_it_without_output_and_its_work_is_kept(
        self, edit: Callable[[], Any], what: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        params, weights = Path("params.yaml").read_text(), Path("base/weights").read_text()
        work = self.Slow(edit)
        assert work.start() == 2
        said = capsys.readouterr().err
        assert f"error: changed while this stage was at work: {what}" in said
        assert not Path("out.txt").exists()
        assert not Path("out.txt.run.json").exists()
        Path("params.yaml").write_text(params)
        Path("base/weights").write_text(weights)
        assert work.start() == 0
        assert work.found == [0, 1]  # it goes on where it was
        assert Path("out.txt").exists()

    def test_to_its_code_end_it_too(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.Slow(lambda: change_the_code(monkeypatch)).start() == 2
        said = capsys.readouterr().err
        assert "changed while this stage was at work: the code of entrograd/a.py" in said
        assert not Path("out.txt").exists()

    def test_end_a_run_of_some_shards_too(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Its part of the work is kept for parameters that are not those of now."""

        class Part(self.Slow):  # type: ignore[name-defined]
            def __call__(self, run: Run) -> str:
                super().__call__(run)
                Path("out.txt").unlink()
                raise Unfinished("2 of 4 shards are there")

        assert Part(lambda: change("train_offline", seed=7)).start() == 2
        assert "train_offline.seed 0 -> 7; its outputs" in capsys.readouterr().err

    def test_of_what_it_does_not_read_are_nothing_to_it(self) -> None:
        def edit() -> None:
            change("report", title="other")
            change("execution", train_offline={"token_budget": 8})
            Path("other").write_text("new")

        assert self.Slow(edit).start() == 0


def test_a_copy_of_the_project_runs_its_own_code(folder: Path) -> None:
    """As DVC's temporary experiments: whatever is installed, or first in PYTHONPATH; and so do the
    processes that it starts."""
    for part in ("src", "stages"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    prepared = folder / "src/entrograd/data/prepare.py"
    prepared.write_text(
        "import subprocess, sys\n"
        "def prepare(section, out, rejects, summary):\n"
        "    words = [sys.executable, '-c', 'import entrograd; print(entrograd.__file__)']\n"
        "    file = subprocess.run(words, capture_output=True, text=True, check=True).stdout\n"
        "    for path in (out, rejects, summary): path.write_text(file)\n"
        "    return 'by the copy'\n"
    )
    Path("none.jsonl").touch()
    done = subprocess.run(
        [sys.executable, "stages/prepare.py", "--out", "a", "--rejects", "b", "--summary", "c"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("prepare: by the copy"), done.stderr
    assert Path("a").read_text().strip() == str(folder / "src/entrograd/__init__.py")


def test_a_script_that_runs_other_code_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "src/entrograd").mkdir(parents=True)
    (folder / "stages").mkdir()
    module = types.ModuleType("other")
    module.__file__ = str(folder / "stages/other.py")
    monkeypatch.setitem(sys.modules, "other", module)
    work = Work()
    monkeypatch.setattr(Work, "__module__", "other")
    assert work.start() == 2
    assert "put that folder first on sys.path" in capsys.readouterr().err
    assert not work.found


def test_unfinished_work_is_keyed_by_the_code_of_its_stage() -> None:
    """Not by other stages' code, nor by the report's page."""

    def code_of(stage: str, components: Iterable[str] = ()) -> set[str]:
        files = fingerprint.files_of(ROOT / f"stages/{stage}.py", components)
        return set(fingerprint.hashes_of(files))

    online = code_of("train_online")
    assert {"stages/train_online.py", "entrograd/train/step.py"} <= online
    assert not [file for file in online if "/report/plots" in file or "/evaluate/ev" in file]
    chosen = MethodParams(name="gtpo", weighting="seed_grpo").modules
    with_method = code_of("train_online", chosen)
    assert {file for file in with_method if "methods/advantage/" in file} == {
        "entrograd/methods/advantage/gtpo.py"
    }
    assert "entrograd/methods/weighting/seed_grpo.py" in with_method
    assert "entrograd/methods/loss/gspo.py" not in with_method
    report = code_of("report", chosen)
    assert not [file for file in report if "methods/advantage/" in file]
    assert "entrograd/report/page.html.jinja" in report
    assert "entrograd/train/step.py" not in report
