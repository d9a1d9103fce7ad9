"""Arguments of a stage: inputs given as named paths, inputs that may be absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from entrograd.pipeline import runner
from entrograd.pipeline.runner import Run, run_stage
from helpers.stages import PARAMS, only


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with parameters and two models; the tests' process is not tied to its
    parent as a stage is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "end_with_parent", lambda _: None)
    (tmp_path / "params.yaml").write_text(PARAMS)
    for name in ("base", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    return tmp_path


class Recorded:
    """A stage's function that keeps what it was given."""

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def __call__(self, run: Run) -> str:
        self.runs.append(run)
        run.paths.out.write_text("done")
        return "done"

    def start(self, *argv: str) -> int:
        return run_stage(
            "evaluate",
            self,
            doc="d",
            params=only("evaluate"),
            inputs={"model": {"base": "base"}, "curve": "curve.csv"},
            optional=("curve",),
            outputs={"out": "out.txt"},
            argv=list(argv),
        )


def test_help_names_the_sections_it_reads(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Recorded().start("--help")
    assert "sections read: evaluate" in " ".join(capsys.readouterr().out.split())


class TestNamedPaths:
    def test_the_default(self) -> None:
        work = Recorded()
        assert work.start() == 0
        assert work.runs[0].paths.model == {"base": Path("base")}

    def test_given_ones_replace_it_and_keep_their_order(self) -> None:
        work = Recorded()
        assert work.start("--model", "z=mine", "--model", "a=base") == 0
        assert list(work.runs[0].paths.model.items()) == [("z", Path("mine")), ("a", Path("base"))]

    def test_names_and_contents_key_the_resume_state(self, folder: Path) -> None:
        work = Recorded()
        work.start("--model", "a=base")
        work.start("--model", "b=base")
        (folder / "base" / "weights").write_text("other")
        work.start("--model", "b=base")
        assert len({run.resume for run in work.runs}) == 3

    @pytest.mark.parametrize(
        ("argument", "message"),
        [
            ("base", "--model base: expected NAME=PATH"),
            ("=base", "expected NAME=PATH"),
            ("a/b=base", "expected NAME=PATH"),
            ("a=", "expected NAME=PATH"),
            ("a=absent", "absent: no such file or folder (--model a=absent)"),
        ],
    )
    def test_a_wrong_one_is_explained(
        self, argument: str, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        work = Recorded()
        assert work.start("--model", argument) == 2
        assert message in capsys.readouterr().err
        assert not work.runs

    def test_a_name_may_appear_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert Recorded().start("--model", "a=base", "--model", "a=mine") == 2
        assert "a is named twice" in capsys.readouterr().err


class TestOptionalInputs:
    def curve(self, *argv: str) -> Any:
        work = Recorded()
        assert work.start(*argv) == 0
        return work.runs[0].paths.curve

    def test_an_absent_default_is_none(self) -> None:
        assert self.curve() is None

    def test_a_default_that_is_there_is_taken_unless_emptied(self, folder: Path) -> None:
        (folder / "curve.csv").write_text("step\n")
        assert self.curve() == Path("curve.csv")
        assert self.curve("--curve", "") is None

    def test_a_named_one_must_exist(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert Recorded().start("--curve", "mine.csv") == 2
        assert "mine.csv: no such file or folder (--curve)" in capsys.readouterr().err
