"""Outputs: what a stage may replace and where they may lie, what a killed one leaves beside them,
and the words for what cannot be written."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from entrograd.errors import InputError, Unfinished
from entrograd.models import load
from entrograd.pipeline import runner
from entrograd.pipeline.runner import Run, run_stage
from entrograd.storage.files import (
    atomic,
    atomic_folder,
    read_json,
    remove_folder,
    sweep,
    write_text,
)
from entrograd.storage.hashing import sha256
from helpers.stages import PARAMS, only


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with parameters, a source that they name and a folder `in`."""
    place = tmp_path / "here"
    (place / "in").mkdir(parents=True)
    (place / "in" / "rows").write_text("rows")
    (place / "mine.jsonl").write_text("source")
    (place / "params.yaml").write_text(PARAMS.replace("none.jsonl", "mine.jsonl"))
    monkeypatch.chdir(place)
    monkeypatch.setattr(runner, "end_with_parent", lambda _: None)
    return place


class Stage:
    """A stage that writes a folder and a file, and then raises `error`, if it is given one."""

    def __init__(self, name: str = "report", error: BaseException | None = None) -> None:
        self.name, self.error, self.runs = name, error, 0

    def __call__(self, run: Run) -> str:
        self.runs += 1
        with atomic_folder(run.paths.out) as folder:
            (folder / "page").write_text("page")
        write_text(run.paths.curve, f"{self.runs}")
        if self.error:
            raise self.error
        return "done"

    def start(self, *argv: str) -> int:
        return run_stage(
            self.name,
            self,
            doc="d",
            params=only("prepare", self.name),
            inputs={"rows": "in"},
            outputs={"out": "new/out", "curve": "new/curve.csv"},
            argv=["--timings", "", *argv],
        )


def content(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): file.read_text()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


class TestWhatIsThere:
    """It is replaced where this stage made it; else nothing is read, written or run."""

    def refused(self, capsys: pytest.CaptureFixture[str], *argv: str, name: str = "report") -> str:
        work, before = Stage(name), content(Path())
        assert work.start(*argv) == 2
        assert not work.runs
        assert content(Path()) == before
        return capsys.readouterr().err.splitlines()[-1]

    def test_a_users_folder(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("x_user").mkdir()
        Path("x_user/notes").write_text("mine")
        assert self.refused(capsys, "--out", "x_user") == (
            "report: error: x_user: is there already, and x_user.run.json does not say that stage "
            "report made it; give another --out, or remove it"
        )

    def test_a_users_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("mine.csv").write_text("mine")
        assert "mine.csv: is there already" in self.refused(capsys, "--curve", "mine.csv")

    def test_another_stages_output(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert Stage("evaluate").start() == 0
        capsys.readouterr()
        assert "does not say that stage report made it" in self.refused(capsys)

    @pytest.mark.parametrize("text", ["{", "[]", "{}"])
    def test_a_manifest_that_says_nothing(
        self, text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("mine.csv").write_text("mine")
        Path("mine.csv.run.json").write_text(text)
        assert "mine.csv: is there already" in self.refused(capsys, "--curve", "mine.csv")

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (("--out", "other.csv"), "other.csv: is a file, and --out is a folder; give another"),
            (("--curve", "empty"), "empty: is a folder, and --curve is a file; give another"),
            (("--curve", "pipe"), "pipe: is a device, and --curve is a file; give another"),
        ],
    )
    def test_something_of_another_kind(
        self, argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("other.csv").touch()
        Path("empty").mkdir()
        os.mkfifo("pipe")
        assert message in self.refused(capsys, *argv)

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (("--out", "in"), "in: is in, an input of this run; give another --out"),
            (("--out", "in/new"), "in/new: lies in in, an input of this run"),
            (("--curve", "in/new"), "in/new: lies in in, an input of this run"),
            (("--out", "deep", "--rows", "deep/in"), "deep: contains deep/in, an input of this"),
            (("--out", "link"), "link: is in, an input of this run"),
            (("--out", "mine.jsonl"), "mine.jsonl: is mine.jsonl, an input of this run"),
            (("--curve", "mine.jsonl"), "mine.jsonl: is mine.jsonl, an input of this run"),
            (("--curve", "params.yaml"), "params.yaml: is params.yaml, an input of this run"),
            (("--out", "a", "--curve", "a"), "a: is a, the output --curve; give another --out"),
            (("--out", "a", "--curve", "a/b"), "a: contains a/b, the output --curve"),
            (("--curve", "a", "--out", "a/b"), "a/b: lies in a, the output --curve"),
            (("--out", ".entrograd"), ".entrograd: contains .entrograd/resume, the folder of unf"),
            (("--out", ".entrograd/resume/a"), "lies in .entrograd/resume, the folder of unf"),
            (("--out", "w", "--work", "w"), "w: is w, the folder of unfinished work (--work)"),
        ],
    )
    def test_the_place_of_something_of_this_run(
        self, argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("deep/in").mkdir(parents=True)
        Path("link").symlink_to("in")
        assert message in self.refused(capsys, *argv)

    @pytest.mark.parametrize("out", [".", "..", "", "in/.."])
    def test_the_current_folder(self, out: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert "holds the current folder; give another --out" in self.refused(capsys, "--out", out)

    def test_its_own_outputs_and_empty_ones_are_replaced(self) -> None:
        Path("new/out").mkdir(parents=True)
        Path("new/curve.csv").touch()
        work = Stage()
        assert [work.start(), work.start()] == [0, 0]
        assert Path("new/curve.csv").read_text() == "2"
        assert read_json("new/out.run.json")["output_sha256"] == sha256("new/out")


def test_a_run_that_ends_between_an_output_and_its_manifest_can_be_made_again() -> None:
    """It may have been killed, or have had no room for a later output."""
    work = Stage(error=InputError("no room"))
    assert work.start() == 2
    assert read_json("new/out.run.json") == {"stage": "report"}
    work.error = None
    assert work.start() == 0
    assert set(read_json("new/out.run.json")) > {"stage", "params"}


@pytest.mark.parametrize(
    ("error", "code"), [(InputError("no such model"), 2), (Unfinished("two shards left"), 0)]
)
def test_a_run_without_output_claims_none(error: Exception, code: int) -> None:
    class Early(Stage):
        def __call__(self, _: Run) -> str:
            assert read_json("new/out.run.json") == {"stage": "report"}
            raise error

    assert Early().start() == code
    assert content(Path("new")) == {}


# --- what a killed process leaves ------------------------------------------------------------


def killed_while_writing(path: Path, kind: Callable[[Path], Any]) -> Path:
    """The temporary file or folder of a process that SIGKILL ended as it wrote `path`."""
    before = set(path.parent.iterdir())
    child = os.fork()
    if child == 0:
        with kind(path):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = set(path.parent.iterdir()) - before
    return left


def test_what_a_killed_run_left_is_swept_when_the_stage_starts(folder: Path) -> None:
    Path("new").mkdir()
    left = [
        killed_while_writing(folder / "new" / name, kind)
        for name, kind in (
            ("out", atomic_folder),
            ("curve.csv", atomic),
            ("out.run.json", atomic),
        )
    ]
    others = killed_while_writing(folder / "new" / "out.csv", atomic)
    Path("new/.out.settings").write_text("a user's")
    assert all(path.exists() for path in left)
    assert Stage().start() == 0
    assert not any(path.exists() for path in left)
    assert others.exists()
    assert Path("new/.out.settings").exists()


def test_what_a_living_process_writes_is_left_alone(folder: Path) -> None:
    path = folder / "out"
    for kind in (atomic, atomic_folder):
        with kind(path) as temporary:
            sweep(path)
            assert temporary.exists()
        assert path.exists()
        remove_folder(path) if path.is_dir() else path.unlink()


# --- what cannot be written ------------------------------------------------------------------


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """It ends a write as a full disk does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_model_for_which_there_is_no_room_is_named(tiny_model: Path, folder: Path) -> None:
    model, tokenizer = (
        load.load_model(tiny_model, "float32", "cpu"),
        load.load_tokenizer(tiny_model),
    )
    with (
        file_size_limit(10_000),
        pytest.raises(InputError, match=r"/out: cannot be written: File too large; make room"),
    ):
        load.save(model, tokenizer, folder / "out")
    assert not [path for path in folder.iterdir() if "out" in path.name]


@pytest.mark.parametrize("kind", [atomic, atomic_folder])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
def test_what_the_system_refuses_is_a_sentence(
    kind: Callable[[Path], Any], number: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, "x")

    def write() -> None:
        with kind(folder / "out") as temporary:
            (temporary / "page" if temporary.is_dir() else temporary).write_text("page")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InputError) as refused:
        write()
    assert str(refused.value) == f"{folder / 'out'}: cannot be written: {os.strerror(number)}"
    assert not [path for path in folder.iterdir() if "out" in path.name]


def test_a_file_that_code_looks_for_in_vain_keeps_its_traceback(folder: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic(folder / "out"):
        Path("absent").read_text()


@pytest.mark.parametrize(
    "argv", [("--timings", "mine.jsonl/t"), ("--work", "mine.jsonl"), ("--out", "mine.jsonl/out")]
)
def test_a_place_that_cannot_be_is_named_before_anything_runs(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    work = Stage()
    assert work.start(*argv) == 2
    assert not work.runs
    assert "cannot be written: mine.jsonl is not a writable folder" in capsys.readouterr().err


@pytest.mark.parametrize("reads_named", [True, False])
def test_files_that_parameters_name_are_inputs_of_who_reads_them(reads_named: bool) -> None:
    def work(run: Run) -> str:
        write_text(run.paths.out, "page")
        return "done"

    done = run_stage(
        "report",
        work,
        doc="d",
        params=only("prepare"),
        inputs={"rows": "in"},
        outputs={"out": "out.html"},
        reads_named=reads_named,
        argv=["--timings", ""],
    )
    assert done == 0
    known = read_json("out.html.run.json")["inputs"]
    assert sorted(known) == (["in", "mine.jsonl"] if reads_named else ["in"])
